"""How similar the rows of a component are to the one that stays of it, and ``max_chain``, in scratch files:

    wanted/<part>    the representatives of a part's rows, shuffled to the parts that have their vectors
    vectors/<part>   these vectors, shuffled to the parts that want them
    looked/<part>    DECIDED of every row: its representative, and the similarity where it was looked at
    far/<part>       rows below ``max_chain`` with their vectors, shuffled to tasks by component
    splits/<task>    whom each of these is dropped for, shuffled to its part
    split/<part>     DECIDED of every row, with that

Without ``max_chain`` a sample of components is looked at, about SAMPLE_ROWS rows of them. With it all are, once; only
rows that are far from their representative go on. They are taken in the order of ``keep``, as many at a time as a task
holds: the first stays, what is at least ``max_chain`` similar to it is dropped for it, the next that is left stays, and
so on within a component.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from curation.components import distinct
from curation.dedup import first_near, split_groups
from curation.embeddings import EmbeddingsPart, embedding_parts, read_embeddings, stored_form, stored_norms
from curation.execute import Executor
from curation.shuffle import read_shuffle, write_groups, write_shuffle
from curation.store import Location
from pipelines.stage import make_aside
from pipelines.stages.connect import Span, range_at, raw_name
from pipelines.stages.elect import representatives_of
from pipelines.stages.rank import DECIDED, Job, Scores, decided_rows, score_rows

SAMPLE_ROWS = 1 << 20  # dropped rows that are looked at without max_chain
TASK_ROWS = 1 << 16  # far rows of a task, about, unless one component has more
ROWS_AT_ONCE = 1 << 15  # far rows whose vectors a task holds as float32

ROW = np.dtype("<i8")
SPLIT = np.dtype([("row", "<i8"), ("near_row", "<i8"), ("similarity", "<f4")])
KEY = np.dtype([("component", "<i8"), ("score", "<i8"), ("row", "<i8")])


class Part(NamedTuple):
    """A part of the pool, and its vectors."""

    span: Span
    vectors: EmbeddingsPart

    @property
    def number(self) -> int:
        """Of the part."""
        return self.span[0]


class Look(NamedTuple):
    """What tasks need to know."""

    job: Job
    folder: Location
    max_chain: float
    share: float  # of the components that are looked at
    form: tuple[np.dtype, int]  # dtype and width of the vectors

    @property
    def vector(self) -> np.dtype:
        """A vector on its way, as it is stored."""
        return np.dtype([("row", "<i8"), ("norm", "<f4"), ("x", self.form[0], (self.form[1],))])

    @property
    def far(self) -> np.dtype:
        """A row on its way that is far from its representative."""
        return np.dtype([*KEY.descr, ("norm", "<f4"), ("x", self.form[0], (self.form[1],))])


def look_at_components(
    job: Job, max_chain: float, scores: Scores, spans: Sequence[Span], starts: np.ndarray, executor: Executor
) -> tuple[Location, float]:
    """Leave what becomes of every row, from what ``elect`` left in ``components``.

    ``starts``: of the ranges. Returns where (see ``decided_rows``), and the share of components that were looked at.
    """
    shared = {"ranges": starts, "starts": np.array([start for _, start, _ in spans], np.int64)}
    parts = [Part(span, vectors) for span, vectors in zip(spans, embedding_parts(job.embeddings), strict=True)]
    names, folder = [raw_name(part.number) for part in parts], job.aside("likeness")
    n_dropped = sum(executor.map(partial(count_dropped, job=job), spans, {"ranges": starts}))
    share = 1.0 if max_chain else min(1.0, SAMPLE_ROWS / max(1, n_dropped))
    forms = list(executor.map(stored_form, [part.vectors.location for part in parts]))
    form = max(forms, key=lambda form: form[0].itemsize, default=(np.dtype("<f2"), 0))  # float32 if one part has that
    look = Look(job, folder, max_chain, share, form)
    make_aside(partial(ask_part, look=look), parts, names, folder / "wanted", executor, shared)
    make_aside(partial(send_part, look=look, n_parts=len(parts)), parts, names, folder / "vectors", executor)
    make_aside(partial(look_at_part, look=look), parts, names, folder / "looked", executor, shared)
    n_far = sum(executor.map(partial(count_far, look=look), parts)) if max_chain else 0
    if not n_far:
        return folder / "looked", share
    n_tasks = -(-n_far // TASK_ROWS)
    far, tasks = partial(send_far, look=look, scores=scores, n_tasks=n_tasks), range(n_tasks)
    make_aside(far, parts, names, folder / "far", executor)
    split = partial(split_components, look=look)
    make_aside(split, tasks, [raw_name(i) for i in tasks], folder / "splits", executor, {"starts": shared["starts"]})
    make_aside(partial(merge_part, look=look, n_tasks=n_tasks), parts, names, folder / "split", executor)
    return folder / "split", share


def count_dropped(span: Span, job: Job, ranges: np.ndarray) -> int:
    """How many rows of a part are not their own representatives."""
    _, start, n_rows = span
    stays = representatives_of(span, job.aside("components"), ranges)
    return int(np.count_nonzero(stays != np.arange(start, start + n_rows)))


def hashed(ids: np.ndarray) -> np.ndarray:
    """uint64 (n,): a fixed hash of ids int64 (n,), the last step of SplitMix64."""
    z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: np.ndarray = z ^ (z >> np.uint64(31))
    return found


def dropped_and_seen(part: Part, look: Look, ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The representatives of a part's rows int64 (n,), and those of them, as indices, that are to be looked at."""
    _, start, n_rows = part.span
    stays = representatives_of(part.span, look.job.aside("components"), ranges)
    dropped = np.flatnonzero(stays != np.arange(start, start + n_rows))
    if look.share < 1:
        dropped = dropped[hashed(stays[dropped]) < np.uint64(look.share * 2.0**64)]
    return stays, dropped


def ask_part(part: Part, look: Look, ranges: np.ndarray, starts: np.ndarray) -> None:
    """Ask for the vectors of the representatives of a part's rows."""
    stays, seen = dropped_and_seen(part, look, ranges)
    wanted = distinct(stays[seen])
    write_shuffle(look.folder / "wanted" / raw_name(part.number), wanted, range_at(starts, wanted), len(starts))


def send_part(part: Part, look: Look, n_parts: int) -> None:
    """The vectors of a part that others want."""
    asked = [read_shuffle(look.folder / "wanted" / raw_name(i), ROW, part.number) for i in range(n_parts)]
    vectors = reader_of(part, look.vector) if any(map(len, asked)) else None
    none = np.zeros(0, look.vector)
    groups = (none if vectors is None else vectors(row_ids) for row_ids in asked)
    write_groups(look.folder / "vectors" / raw_name(part.number), groups, n_parts)


def reader_of(part: Part, record: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """What gives records with ``row``, ``norm`` and ``x`` of some row ids of a part, which is read once."""
    rows, x = read_embeddings(part.vectors.location)
    norms = stored_norms(x)

    def vectors_of(row_ids: np.ndarray) -> np.ndarray:
        at = np.searchsorted(rows, row_ids - part.span[1])
        found = np.zeros(len(at), record)
        found["row"], found["norm"], found["x"] = row_ids, norms[at], x[at]
        return found

    return vectors_of


def unit(records: np.ndarray) -> np.ndarray:
    """float32 (n, d): the unit rows of records with ``norm`` and ``x``."""
    x: np.ndarray = records["x"].astype(np.float32) / records["norm"][:, None]
    return x


def look_at_part(part: Part, look: Look, ranges: np.ndarray, starts: np.ndarray) -> None:
    """The similarity of a part's rows to their representatives."""
    from curation import loops

    stays, seen = dropped_and_seen(part, look, ranges)
    decided = np.empty(len(stays), DECIDED)
    decided["representative"], decided["similarity"] = stays, np.nan
    if len(seen):
        rows, x = part.vectors.read()
        sender = range_at(starts, stays[seen])
        for number in np.unique(sender).tolist():
            vectors = read_shuffle(look.folder / "vectors" / raw_name(number), look.vector, part.number)
            some = seen[sender == number]
            theirs, mine = np.searchsorted(vectors["row"], stays[some]), np.searchsorted(rows, some)
            decided["similarity"][some] = loops.pair_dots(x, unit(vectors), mine, theirs)
    (look.folder / "looked" / raw_name(part.number)).write(decided.tobytes())


def far_rows(part: Part, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """DECIDED of a part's rows that are too far from their representatives, and their row ids."""
    decided = decided_rows(part.span, look.folder / "looked")
    far = np.flatnonzero(decided["similarity"] < np.float32(look.max_chain))
    return decided[far], far + part.span[1]


def count_far(part: Part, look: Look) -> int:
    """How many rows of a part are too far from their representatives."""
    return len(far_rows(part, look)[1])


def send_far(part: Part, look: Look, scores: Scores, n_tasks: int) -> None:
    """The rows of a part that are too far from their representatives, to the tasks of their components."""
    decided, row_ids = far_rows(part, look)
    records = np.zeros(len(row_ids), look.far)
    if len(row_ids):
        records = reader_of(part, look.far)(row_ids)
        records["component"], records["score"] = decided["representative"], score_rows(part.span, scores, row_ids)
    task = (hashed(decided["representative"]) % np.uint64(n_tasks)).astype(np.int64)
    write_shuffle(look.folder / "far" / raw_name(part.number), records, task, n_tasks)


def split_components(task: int, look: Look, starts: np.ndarray) -> None:
    """Whom each far row of some components is dropped for, or itself, to its part."""
    files = [look.folder / "far" / raw_name(i) for i in range(len(starts))]

    def arrived() -> Iterator[np.ndarray]:
        for location in files:
            yield read_shuffle(location, look.far, task)

    found = split_all(arrived, look.max_chain)
    write_shuffle(look.folder / "splits" / raw_name(task), found, range_at(starts, found["row"]), len(starts))


def split_all(arrived: Callable[[], Iterator[np.ndarray]], low: float) -> np.ndarray:
    """SPLIT (n,) of far rows: in a component, in their order, each is dropped for the first that stays and is near.

    ``arrived`` gives their records, with vectors, as often as it is asked. Holds 70 bytes a row, and the vectors of
    ROWS_AT_ONCE rows and of what ``arrived`` gives at a time: rows that come first are settled among themselves, then
    what is left of the last component among them is compared with those of it that stay.
    """
    keys = np.concatenate([some[list(KEY.names or ())].astype(KEY) for some in arrived()])
    keys = keys[np.lexsort((keys["row"], -keys["score"], keys["component"]))]
    rows, component = np.ascontiguousarray(keys["row"]), np.ascontiguousarray(keys["component"])
    by_row = np.argsort(rows)
    found, left = np.zeros(len(keys), SPLIT), np.arange(len(keys))
    found["row"] = rows

    def vectors(wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Which of ``wanted``, ascending places among the keys, and their vectors, some at a time."""
        for records in arrived():
            place = by_row[np.searchsorted(rows, records["row"], sorter=by_row)]
            at = np.minimum(np.searchsorted(wanted, place), len(wanted) - 1)
            here = wanted[at] == place
            yield at[here], unit(records[here])

    while len(left):
        some, left = left[:ROWS_AT_ONCE], left[ROWS_AT_ONCE:]
        at, x = (np.concatenate(both) for both in zip(*vectors(some), strict=True))
        x = x[np.argsort(at)]
        near, found["similarity"][some] = split_groups(x, component[some], low)
        found["near_row"][some] = rows[some[near]]
        stays = np.flatnonzero((near == np.arange(len(near))) & (component[some] == component[some[-1]]))
        n_last = int(np.searchsorted(component[left], component[some[-1]], side="right"))
        last, is_left = left[:n_last], np.ones(len(left), bool)
        for at, y in vectors(last) if n_last else ():
            near, similarity = first_near(y, x[stays], low)
            hit, is_near = at[near >= 0], near >= 0
            found["near_row"][last[hit]] = rows[some[stays[near[is_near]]]]
            found["similarity"][last[hit]], is_left[hit] = similarity[is_near], False
        left = left[is_left]
    return found


def merge_part(part: Part, look: Look, n_tasks: int) -> None:
    """What becomes of every row of a part."""
    decided = decided_rows(part.span, look.folder / "looked").copy()
    for task in range(n_tasks):
        found = read_shuffle(look.folder / "splits" / raw_name(task), SPLIT, part.number)
        at, stays = found["row"] - part.span[1], found["row"] == found["near_row"]
        decided["representative"][at] = found["near_row"]
        decided["similarity"][at] = np.where(stays, np.nan, found["similarity"])
    (look.folder / "split" / raw_name(part.number)).write(decided.tobytes())
