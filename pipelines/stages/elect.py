"""The row that stays of every component, over row ranges, in scratch files beside the labels of ``connect``:

claims/<range>           the best row of the range for each component whose smallest row is elsewhere or another,
                         shuffled to the range of that smallest row
best/<range>             the best row of each component whose smallest row is in the range, beside that row, as CLAIM
replies/<range>          the same, shuffled to the ranges that made claims, in the order of their claims
representatives/<range>  int64, one for every row of the range: the row that stays for it
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from curation.components import distinct
from curation.dedup import best_rows
from curation.execute import Executor
from curation.shuffle import read_shuffle, write_groups, write_shuffle
from curation.store import Location
from pipelines.stage import make_aside
from pipelines.stages.connect import RowRange, Span, range_at, raw_name, raw_names, read_pairs, starts_of

CLAIM = np.dtype([("root", "<i8"), ("score", "<i8"), ("row", "<i8")])
NO_SCORE = np.iinfo(np.int64).min
ROW = np.dtype("<i8")
Scores = Callable[[RowRange, np.ndarray], np.ndarray]  # of ascending rows of a range, int64: higher is better


def elect(folder: Location, ranges: Sequence[RowRange], scores: Scores, executor: Executor) -> None:
    """Leave the representatives of every range in ``folder``: the highest score, ties to the lowest row id."""
    choose(folder, ranges, scores, executor)
    spread = partial(spread_range, folder=folder, n_ranges=len(ranges))
    make_aside(spread, ranges, raw_names(ranges), folder / "representatives", executor)


def choose(folder: Location, ranges: Sequence[RowRange], scores: Scores, executor: Executor) -> None:
    """Leave the best row of each component with its smallest, and the claims that were made for it, in ``folder``."""
    names, starts = raw_names(ranges), {"starts": starts_of(ranges)}
    claim = partial(claim_range, folder=folder, scores=scores)
    make_aside(claim, ranges, names, folder / "claims", executor, starts)
    best = partial(choose_range, folder=folder, scores=scores, n_ranges=len(ranges))
    make_aside(best, ranges, names, folder / "replies", executor)


def claim_range(rows: RowRange, folder: Location, scores: Scores, starts: np.ndarray) -> None:
    """The best of the range's rows for each component, but for its smallest row: that one is known where it is."""
    row_id, root = read_pairs(folder / "labels" / raw_name(rows.number)).T
    best = best_rows(root, scores(rows, row_id), row_id)
    claims = np.empty(len(best.component), CLAIM)
    claims["root"], claims["score"], claims["row"] = best
    write_shuffle(folder / "claims" / raw_name(rows.number), claims, range_at(starts, best.component), len(starts))


def choose_range(rows: RowRange, folder: Location, scores: Scores, n_ranges: int) -> None:
    """The best row of each component whose smallest row is in the range, told to all that made a claim."""
    best = np.arange(rows.start, rows.stop)
    score = np.full(len(best), NO_SCORE)
    for number in range(n_ranges):  # of equal scores the lower row comes first and stays
        claims = claims_of(folder, number, rows)
        at = claims["root"] - rows.start  # each once
        better = claims["score"] > score[at]
        best[at[better]], score[at[better]] = claims["row"][better], claims["score"][better]
    roots = np.flatnonzero(score > NO_SCORE)
    own = scores(rows, roots + rows.start)
    first = roots[own >= score[roots]]
    best[first] = first + rows.start
    name = raw_name(rows.number)
    chosen = np.empty(len(roots), CLAIM)
    chosen["root"], chosen["score"], chosen["row"] = roots + rows.start, np.maximum(own, score[roots]), best[roots]
    (folder / "best" / name).write(chosen.tobytes())
    replies = (best[claims_of(folder, number, rows)["root"] - rows.start] for number in range(n_ranges))
    write_groups(folder / "replies" / name, replies, n_ranges)


def claims_of(folder: Location, number: int, rows: RowRange) -> np.ndarray:
    """CLAIM (m,): what one range claims of the components of another, ascending by root, each once."""
    return read_shuffle(folder / "claims" / raw_name(number), CLAIM, rows.number)


def best_of(folder: Location, number: int) -> np.ndarray:
    """CLAIM (m,): the best row of each component whose smallest row is in a range."""
    return np.frombuffer((folder / "best" / raw_name(number)).read(), CLAIM)


def spread_range(rows: RowRange, folder: Location, n_ranges: int) -> None:
    """What stays for every row of the range; a row without edges stays for itself."""
    name = raw_name(rows.number)
    stays = np.arange(rows.start, rows.stop)
    best = best_of(folder, rows.number)
    stays[best["root"] - rows.start] = best["row"]
    row_id, root = read_pairs(folder / "labels" / name).T
    replies = [read_shuffle(folder / "replies" / raw_name(number), ROW, rows.number) for number in range(n_ranges)]
    claimed = distinct(root)  # the claims of this range: ranges are in the order of their rows
    stays[row_id - rows.start] = np.concatenate(replies)[np.searchsorted(claimed, root)]
    (folder / "representatives" / name).write(stays.astype(ROW, copy=False).tobytes())


def representatives_of(span: Span, folder: Location, starts: np.ndarray) -> np.ndarray:
    """int64 (n,): the row that stays for every row of a part."""
    _, start, n_rows = span
    at = int(range_at(starts, np.array([start]))[0])
    location = folder / "representatives" / raw_name(at)
    return np.frombuffer(location.read(8 * (start - int(starts[at])), 8 * n_rows), ROW)
