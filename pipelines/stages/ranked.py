"""Rules ``greedy`` and ``semdedup`` of ``dedup``: what a row is near to that comes before it in the order of ``keep``.

Rows that are equal count as one, the best of them, which is known at the lowest of them: their home. Over row ranges:

    labels/<range>, best/<range>   equal rows, as components of their own: see ``elect``
    sent/<group>                   the edges of some parts, shuffled to the range of the other end
    edges/<range>-<n>              the same with a better and a worse end: shuffled to slices of the order of rank, or
                                   with semdedup as NEAR to the range of the home of the worse end
    edges/<range>                  the names of these files
    slices/<slice>                 greedy: the edges of a slice, in the order of rank
    dropping/<slice>               greedy: those whose better end stays, as NEAR, shuffled to the range of the home
    found/<range>                  NEAR of every home in the range that is near a better row
    answers/<range>                what that says to rows whose home is elsewhere: ANSWER, in the order of their claims

The one task that sees all edges with ``greedy`` takes them slice by slice, in order, and holds a bit a row and a slice:
so one look at each edge is enough, however long a chain is.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from curation.components import distinct
from curation.dedup import (
    RANKED,
    Dropped,
    End,
    drop_in_order,
    in_order,
    merge_dropped,
    nearest_dropped,
    no_row_dropped,
    order_bounds,
    rank_edges,
    slice_of,
)
from curation.execute import Executor, on_worker
from curation.shuffle import read_shuffle, write_groups, write_shuffle
from curation.store import Location
from pipelines.stage import make_aside
from pipelines.stages.connect import (
    RowRange,
    Span,
    range_at,
    raw_name,
    raw_names,
    read_pairs,
    starts_of,
    write_pairs,
)
from pipelines.stages.elect import best_of, choose, claims_of
from pipelines.stages.rank import (
    DECIDED,
    Edges,
    Job,
    Scores,
    edge_groups,
    edges_of_part,
    read_blocks,
    score_rows,
    scores_of_range,
)

SLICE_EDGES = 1 << 22  # edges of a slice, about: 36 bytes each, a few times while they are put in order
MOST_SLICES = 1 << 10  # or slices get more edges: each task reads a piece of the file of every other
SAMPLE_STEP = 1 << 12  # of so many edges in order one is sampled, to find where slices begin

# An edge on its way: the end it goes to, and the rank of the end it starts at.
SENT = np.dtype([("to", "<i8"), ("home", "<i8"), ("best", "<i8"), ("score", "<i8"), ("similarity", "<f4")])
NEAR = np.dtype([("home", "<i8"), ("near_row", "<i8"), ("similarity", "<f4")])
ANSWER = np.dtype([("best", "<i8"), ("near_row", "<i8"), ("similarity", "<f4")])  # near_row -1: near no better one


class Ranking(NamedTuple):
    """What tasks of these rules need to know."""

    rule: str
    job: Job
    scores: Scores
    n_rows: int
    n_ranges: int
    n_sent: int  # files of edges that were sent

    @property
    def folder(self) -> Location:
        """Where the scratch files are."""
        return self.job.aside("ranked")


def drop_by_rank(
    rule: str, job: Job, scores: Scores, spans: Sequence[Span], ranges: Sequence[RowRange], out: Location,
    executor: Executor,
) -> None:  # fmt: skip
    """Leave what becomes of every row in ``out``: see ``decided_rows``."""
    if not ranges:
        return
    n_edges = [part.rows for part in job.near.parts]
    groups = edge_groups(spans, n_edges)
    work = Ranking(rule, job, scores, ranges[-1].stop, len(ranges), len(groups))
    names, starts = raw_names(ranges), {"starts": starts_of(ranges)}
    make_aside(partial(label_range, work=work), ranges, names, work.folder / "labels", executor)
    choose(work.folder, ranges, partial(scores_of_range, scores=scores), executor)
    sent = [raw_name(i) for i in range(len(groups))]
    make_aside(partial(send_edges, work=work), list(enumerate(groups)), sent, work.folder / "sent", executor, starts)
    if rule == "greedy":
        files = drop_greedily(work, ranges, sum(n_edges), executor)
    else:
        make_aside(partial(rank_range, work=work), ranges, names, work.folder / "edges", executor, starts)
        files = ranked_files(work)
    answer = partial(answer_range, work=work)
    make_aside(answer, ranges, names, work.folder / "answers", executor, {"files": files})
    last = [raw_name(rows.spans[-1][0]) for rows in ranges]
    make_aside(partial(settle_range, work=work, out=out), ranges, last, out, executor)


def label_range(rows: RowRange, work: Ranking) -> None:
    """The rows of a range that are equal to a lower one, beside the lowest."""
    found = [np.empty((0, 2), np.int64)]
    for span in rows.spans:
        edges = edges_of_part(span, work.job)
        found.append(np.stack([edges.row[edges.equal], edges.near_row[edges.equal]], axis=1))
    write_pairs(work.folder / "labels" / raw_name(rows.number), np.concatenate(found))


def ends_of(spans: Sequence[Span], number: int, work: Ranking) -> End:
    """Every row of consecutive parts of one range as an end of edges; right for homes alone."""
    start, stop = spans[0][1], spans[-1][1] + spans[-1][2]
    home = np.arange(start, stop)
    score = np.concatenate([score_rows(span, work.scores, np.arange(span[1], span[1] + span[2])) for span in spans])
    chosen, best = best_of(work.folder, number), home.copy()
    chosen = chosen[(chosen["root"] >= start) & (chosen["root"] < stop)]
    score[chosen["root"] - start], best[chosen["root"] - start] = chosen["score"], chosen["row"]
    return End(score, best, home)


def send_edges(item: tuple[int, Sequence[Span]], work: Ranking, starts: np.ndarray) -> None:
    """The edges of some parts between rows that are not equal, to the ranges of their other ends."""
    number, spans = item
    sent = np.concatenate([sent_of_part(span, work, starts) for span in spans])
    to = range_at(starts, sent["to"])
    write_shuffle(work.folder / "sent" / raw_name(number), sent, to, len(starts))


def sent_of_part(span: Span, work: Ranking, starts: np.ndarray) -> np.ndarray:
    """SENT (m,): the edges of one part."""
    edges = Edges(*(column[~edges.equal] for edges in [edges_of_part(span, work.job)] for column in edges))
    sent = np.empty(len(edges.row), SENT)
    if not len(sent):
        return sent
    ends, at = ends_of([span], int(range_at(starts, edges.row[:1])[0]), work), edges.row - span[1]
    sent["to"], sent["home"], sent["similarity"] = edges.near_row, edges.row, edges.similarity
    sent["best"], sent["score"] = ends.best[at], ends.score[at]
    return sent


def ranked_edges(rows: RowRange, work: Ranking) -> Iterator[np.ndarray]:
    """RANKED (m,): the edges that were sent to a range, some at a time."""
    files = [work.folder / "sent" / raw_name(i) for i in range(work.n_sent)]
    copies = read_pairs(work.folder / "labels" / raw_name(rows.number))[:, 0]
    ends: End | None = None
    for block in read_blocks(files, SENT, rows.number):
        ends = ends or ends_of(rows.spans, rows.number, work)
        is_copy = np.zeros(len(ends.home), bool)  # only the lowest of equal rows has an edge to one of the others
        is_copy[copies - rows.start] = True
        sent = block[~is_copy[block["to"] - rows.start]]
        at = sent["to"] - rows.start
        here = End(ends.score[at], ends.best[at], ends.home[at])
        yield rank_edges(End(sent["score"], sent["best"], sent["home"]), here, sent["similarity"])


def rank_range(rows: RowRange, work: Ranking, starts: np.ndarray, bounds: np.ndarray | None = None) -> None:
    """The edges of a range: to slices, or without ``bounds`` as NEAR to the homes of their worse ends."""
    names = list[str]()
    for block, edges in enumerate(ranked_edges(rows, work)):
        names.append(f"{raw_name(rows.number)}-{raw_name(block)}")
        location = work.folder / "edges" / names[-1]
        if bounds is None:
            write_near(location, edges, starts)
        else:
            write_shuffle(location, edges, slice_of(edges, bounds), len(bounds) + 1)
    (work.folder / "edges" / raw_name(rows.number)).write(json.dumps(names).encode())


def write_near(location: Location, edges: np.ndarray, starts: np.ndarray) -> None:
    """The worse ends of edges beside the better ones, shuffled to the ranges of their homes."""
    near = np.empty(len(edges), NEAR)
    near["home"], near["near_row"], near["similarity"] = edges["home"], edges["better"], edges["similarity"]
    write_shuffle(location, near, range_at(starts, near["home"]), len(starts))


def ranked_files(work: Ranking) -> list[Location]:
    """The shuffle files that ``rank_range`` has left."""
    lists = [json.loads((work.folder / "edges" / raw_name(number)).read()) for number in range(work.n_ranges)]
    return [work.folder / "edges" / name for name in chain.from_iterable(lists)]


def drop_greedily(work: Ranking, ranges: Sequence[RowRange], n_edges: int, executor: Executor) -> list[Location]:
    """The files of the edges that drop a row."""
    bounds, starts = np.zeros(0, RANKED), starts_of(ranges)
    if n_edges > SLICE_EDGES:
        n_slices = min(MOST_SLICES, -(-n_edges // SLICE_EDGES))
        sample = executor.reduce(partial(sample_range, work=work), ranges, concatenate)
        bounds = on_worker(executor, partial(order_bounds, n_slices=n_slices), {"sample": sample}).get()
    shared = {"starts": starts, "bounds": bounds}
    make_aside(partial(rank_range, work=work), ranges, raw_names(ranges), work.folder / "edges", executor, shared)
    slices = range(len(bounds) + 1)
    names = [raw_name(number) for number in slices]
    make_aside(partial(sort_slice, work=work), slices, names, work.folder / "slices", executor,
               {"files": ranked_files(work)})  # fmt: skip
    out = work.folder / "dropping"
    make_aside(partial(drop_all, work=work), [len(slices)], names[-1:], out, executor, {"starts": starts})
    return [out / name for name in names]


def concatenate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One range's edges after the other's, for ``executor.reduce``."""
    return np.concatenate([a, b])


def sample_range(rows: RowRange, work: Ranking) -> np.ndarray:
    """RANKED (m,): one of SAMPLE_STEP edges that were sent to a range."""
    found = [in_order(edges)[SAMPLE_STEP // 2 :: SAMPLE_STEP] for edges in ranked_edges(rows, work)]
    return np.concatenate([np.zeros(0, RANKED), *found])


def sort_slice(number: int, work: Ranking, files: Sequence[Location]) -> None:
    """The edges of a slice in the order of rank."""
    edges = np.concatenate([np.zeros(0, RANKED), *(read_shuffle(location, RANKED, number) for location in files)])
    (work.folder / "slices" / raw_name(number)).write(in_order(edges).tobytes())


def drop_all(n_slices: int, work: Ranking, starts: np.ndarray) -> None:
    """One after the other, the edges of every slice that drop a row; the last file is the last to be there."""
    dropped = no_row_dropped(work.n_rows)
    for number in range(n_slices):
        edges = np.frombuffer((work.folder / "slices" / raw_name(number)).read(), RANKED)
        stays = drop_in_order(edges, dropped)
        write_near(work.folder / "dropping" / raw_name(number), edges[stays], starts)


def answer_range(rows: RowRange, work: Ranking, files: Sequence[Location]) -> None:
    """What the homes of a range are near to, told to the ranges that have rows equal to them."""
    found = nearest_dropped(*(np.zeros(0, NEAR)[name] for name in ("home", "near_row", "similarity")))
    for some in read_blocks(files, NEAR, rows.number):
        found = merge_dropped(found, Dropped(some["home"], some["near_row"], some["similarity"]))
    near, answers = np.empty(len(found.row_id), NEAR), answers_of_homes(rows, work, found)
    near["home"], near["near_row"], near["similarity"] = found
    (work.folder / "found" / raw_name(rows.number)).write(near.tobytes())
    told = (answers[claims_of(work.folder, i, rows)["root"] - rows.start] for i in range(work.n_ranges))
    write_groups(work.folder / "answers" / raw_name(rows.number), told, work.n_ranges)


def answers_of_homes(rows: RowRange, work: Ranking, found: Dropped) -> np.ndarray:
    """ANSWER (n,) of every row of a range, right for homes."""
    answers = np.zeros(rows.stop - rows.start, ANSWER)
    answers["best"], answers["near_row"] = np.arange(rows.start, rows.stop), -1
    chosen = best_of(work.folder, rows.number)
    answers["best"][chosen["root"] - rows.start] = chosen["row"]
    at = found.row_id - rows.start
    answers["near_row"][at], answers["similarity"][at] = found.near_row, found.similarity
    return answers


def settle_range(rows: RowRange, work: Ranking, out: Location) -> None:
    """What becomes of every row of a range, part by part."""
    near = np.frombuffer((work.folder / "found" / raw_name(rows.number)).read(), NEAR)
    answers = answers_of_homes(rows, work, Dropped(near["home"], near["near_row"], near["similarity"]))
    row_id, home = read_pairs(work.folder / "labels" / raw_name(rows.number)).T
    told = [read_shuffle(work.folder / "answers" / raw_name(i), ANSWER, rows.number) for i in range(work.n_ranges)]
    answers[row_id - rows.start] = np.concatenate(told)[np.searchsorted(distinct(home), home)]
    decided = decide(answers, np.arange(rows.start, rows.stop), work.rule)
    for index, start, n_rows in rows.spans:
        (out / raw_name(index)).write(decided[start - rows.start : start - rows.start + n_rows].tobytes())


def decide(answers: np.ndarray, row_ids: np.ndarray, rule: str) -> np.ndarray:
    """DECIDED (n,) from ANSWER (n,).

    Of equal rows that are near a better one with ``greedy`` all are dropped for that one, for it stays; with
    ``semdedup`` the best is, and the others for the best.
    """
    is_best, near = answers["best"] == row_ids, answers["near_row"] >= 0
    if rule == "semdedup":
        near &= is_best
    decided = np.empty(len(answers), DECIDED)
    decided["representative"] = np.where(near, answers["near_row"], answers["best"])
    decided["similarity"] = np.where(near, answers["similarity"], np.where(is_best, np.nan, 1))
    return decided
