"""What every rule of ``dedup`` reads: the edges of parts, and the order in which their images are rather kept."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from curation.artifact import Artifact, read_table
from curation.dedup import UNSCORED, distance_scores, float_scores
from curation.embeddings import covered_rows
from curation.shuffle import read_shuffle
from curation.store import Location
from pipelines.stage import SCRATCH
from pipelines.stages.connect import RowRange, Span, raw_name

GROUP_EDGES = 1 << 22  # edges that a task reads, unless one part has more: 100 bytes each while they become a forest
BLOCK_RECORDS = 1 << 21  # shuffled records that a task holds at a time, unless one file has more for it

# What becomes of a row: of one that goes, whom it is dropped for, and how similar it is to that one.
DECIDED = np.dtype([("representative", "<i8"), ("similarity", "<f4")])


class Job(NamedTuple):
    """What tasks read, and where they write."""

    near: Artifact
    embeddings: Artifact
    out: Location

    def aside(self, folder: str) -> Location:
        """A folder of scratch files."""
        return self.out / SCRATCH / folder


class Edges(NamedTuple):
    """Edges that start in one part, by row, the strongest first."""

    row: np.ndarray  # int64 (m,), in the pool
    near_row: np.ndarray  # int64 (m,), in the pool
    similarity: np.ndarray  # float32 (m,)
    equal: np.ndarray  # bool (m,): near_row is the lowest of the rows that are equal to this one


def edges_of_part(span: Span, job: Job) -> Edges:
    """The edges that start in a part."""
    index, start, _ = span
    table = read_table(job.near.part(index))
    row, near_row, similarity = (table[name].to_numpy() for name in ("row", "near_row", "similarity"))
    equal = table["equal"].to_numpy() if "equal" in table.column_names else np.zeros(len(row), bool)
    return Edges(row + np.int64(start), near_row, similarity, equal)


def edge_groups(spans: Sequence[Span], n_edges: Sequence[int]) -> list[list[Span]]:
    """Consecutive parts with at most GROUP_EDGES edges together, or one part: many parts have few edges each."""
    groups: list[list[Span]] = []
    size = 0
    for span, n in zip(spans, n_edges, strict=True):
        if not groups or size + n > GROUP_EDGES:
            groups.append([])
            size = 0
        groups[-1].append(span)
        size += n
    return groups


def read_blocks(files: Sequence[Location], dtype: np.dtype, destination: int) -> Iterator[np.ndarray]:
    """What shuffle files hold for one destination, at least BLOCK_RECORDS at a time, as long as there is any."""
    waiting, n_waiting = list[np.ndarray](), 0
    for location in files:
        waiting.append(read_shuffle(location, dtype, destination))
        n_waiting += len(waiting[-1])
        if n_waiting >= BLOCK_RECORDS:
            yield np.concatenate(waiting)
            waiting, n_waiting = [], 0
    if n_waiting:
        yield np.concatenate(waiting)


def decided_rows(span: Span, folder: Location) -> np.ndarray:
    """DECIDED (n,): what becomes of every row of a part. A row that stays is its own representative."""
    return np.frombuffer((folder / raw_name(span[0])).read(), DECIDED)


class Origin(NamedTuple):
    """A pool, maybe of a union."""

    first_part: int
    first_source: int  # how many sources the pools before it have
    numbered: bool  # whether names in it start with the number of their source


def origins_of(pool: Artifact) -> list[Origin]:
    """Of what pools a union is made, in order; a pool is its own."""
    found: list[Origin] = []
    first_part = first_source = 0
    for leaf in leaves(pool):
        n_sources = len(leaf.outside("source"))
        found.append(Origin(first_part, first_source, n_sources > 1))
        first_part += len(leaf.parts)
        first_source += n_sources
    return found


def leaves(pool: Artifact) -> Iterator[Artifact]:
    """The pools of a union, and of unions in it."""
    if not pool.members:
        yield pool
    for member in pool.members:
        yield from leaves(member)


class Scores(NamedTuple):
    """Where the rank of a row is to be read."""

    keep: str
    pool: Artifact
    embeddings: Artifact
    tree: Artifact | None = None  # for farthest and closest
    scored: Artifact | None = None  # for score
    origins: tuple[Origin, ...] = ()  # for source_priority


def scores_of_range(rows: RowRange, row_ids: np.ndarray, scores: Scores) -> np.ndarray:
    """int64 (n,): the scores of some rows of a range, ascending."""
    at = np.searchsorted(row_ids, [rows.start, *(start + n for _, start, n in rows.spans)])
    found = [score_rows(span, scores, row_ids[i:j]) for span, i, j in zip(rows.spans, at, at[1:], strict=False)]
    return np.concatenate(found)


def score_rows(span: Span, scores: Scores, row_ids: np.ndarray) -> np.ndarray:
    """int64 (n,), the higher the rather kept, of some row ids of a part."""
    index, start, _ = span
    rows = row_ids - start
    if scores.keep == "first" or not len(rows):
        return np.zeros(len(rows), np.int64)
    if scores.tree is not None:
        distance = read_table(scores.tree.part(index), ["sq_distance"])["sq_distance"].to_numpy()
        found = distance_scores(distance, scores.keep == "farthest")
        return scores_among(rows, covered_rows(scores.embeddings.part(index)), found)
    if scores.scored is not None:
        column = str(scores.scored.facts["column"])
        table = read_table(scores.scored.part(index), ["row", column])
        return scores_among(rows, table["row"].to_numpy(), float_scores(table[column].to_numpy()))
    if scores.keep == "source_priority":
        return source_scores(index, scores, rows)
    of_pool: np.ndarray = pool_scores(index, scores)[rows]
    return of_pool


def scores_among(rows: np.ndarray, covered: np.ndarray, found: np.ndarray) -> np.ndarray:
    """int64 (n,): the scores of rows of which some have one, UNSCORED for the others. covered: ascending."""
    at = np.minimum(np.searchsorted(covered, rows), max(len(covered) - 1, 0))
    out = np.full(len(rows), UNSCORED)
    if len(covered):
        there = covered[at] == rows
        out[there] = found[at[there]]
    return out


def source_scores(index: int, scores: Scores, rows: np.ndarray) -> np.ndarray:
    """int64 (n,): minus the number of the source of some rows of a part, counted over all pools of a union."""
    origin = scores.origins[bisect_right([origin.first_part for origin in scores.origins], index) - 1]
    numbers = np.zeros(len(rows), np.int64)
    if origin.numbered:
        names = read_table(scores.pool.part(index), ["source"])["source"].take(rows)
        found = pc.struct_field(pc.extract_regex(names, r"\A(?P<number>\d+)/"), "number")
        numbers = found.cast("int64").to_numpy()
    return -(origin.first_source + numbers)


def pool_scores(index: int, scores: Scores) -> np.ndarray:
    """int64 (n,): of every row of a part what the pool knows: pixels, or bytes."""
    if scores.keep == "largest_file":
        n_bytes: np.ndarray = read_table(scores.pool.part(index), ["n_bytes"])["n_bytes"].to_numpy()
        return n_bytes
    size = read_table(scores.pool.part(index), ["width", "height"])
    pixels: np.ndarray = size["width"].to_numpy().astype(np.int64) * size["height"].to_numpy()
    return pixels
