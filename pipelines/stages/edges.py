"""What all ways to find neighbours share: the parts they search, equal rows, and the tables of edges they leave.

    digests/<part>      a digest of every row, shuffled to hash partitions
    equal/<partition>   the rows that have equals (``curation.equal``), shuffled to their parts
    alike/<part>        those of a part

A copy, equal to a row before it, takes part in no search. It has one edge, to the lowest row it is equal to, and that
row has one to the lowest of its copies: what is near one of them is near them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, FileInfo, pool_of, read_table, write_table
from curation.embeddings import EmbeddingsPart, embedding_parts, read_embeddings
from curation.equal import DIGEST, EQUAL, ROWS_PER_PARTITION, digest_partition, digest_records, find_equal
from curation.execute import CPU, Device, Executor
from curation.neighbors import NeighborsConfig
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.stage import make_aside
from pipelines.stages.connect import range_at, raw_name
from pipelines.stages.embed import executor_gpus

EDGE = np.dtype([("row", "<i4"), ("near_row", "<i8"), ("similarity", "<f4"), ("equal", "?")])


class Part(NamedTuple):
    """A part of embeddings."""

    number: int
    start: int  # position in the pool of the first row of the pool's part
    vectors: EmbeddingsPart


class KnownEdges(NamedTuple):
    """The edges that an earlier search found among the rows of the first parts."""

    near: Artifact
    n_parts: int

    def of(self, part: Part, config: NeighborsConfig, equal: np.ndarray) -> np.ndarray:
        """EDGE (n,): the known edges that start in a part, none in a later one; without those in ``equal``, its EQUAL,
        which are found anew."""
        if part.number >= self.n_parts:
            return np.zeros(0, EDGE)
        table = read_table(self.near.part(part.number))
        edges = edge_records(*(table[name].to_numpy() for name in EDGE.names or ()))
        at = np.searchsorted(equal["row_id"], edges["row"] + np.int64(part.start))
        to = np.r_[equal["other"], -1][at]
        alike = (np.r_[equal["row_id"], -1][at] == edges["row"] + np.int64(part.start)) & (to == edges["near_row"])
        found: np.ndarray = edges[~alike & (edges["similarity"] >= np.float32(config.min_similarity))]
        return found


def device_of(executor: Executor) -> Device:
    """GPUs where the resources of the run have them."""
    gpus = executor_gpus(executor)
    return Device("cuda", gpus) if gpus else CPU


class EqualRows(NamedTuple):
    """Where the equal rows of all parts are."""

    folder: Location
    n_partitions: int

    def of(self, part: Part) -> np.ndarray:
        """EQUAL (n,): the rows of a part that have equals in the pool, ascending."""
        return np.frombuffer((self.folder / "alike" / raw_name(part.number)).read(), EQUAL)


@dataclass(frozen=True)
class Distinct:
    """A part without the copies."""

    part: Part
    equal: EqualRows

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """``rows`` int32 (n,) within the pool's part and ``x`` float32 (n, d) unit rows."""
        rows, x = self.part.vectors.read()
        equal = self.equal.of(self.part)
        if not equal["copy"].any():
            return rows, x
        stays = ~np.isin(rows, equal["row_id"][equal["copy"]] - self.part.start)
        return rows[stays], x[stays]


def parts_of(embeddings: Artifact) -> list[Part]:
    """The parts of an embeddings artifact."""
    starts = pool_of(embeddings).starts.tolist()
    return [Part(i, starts[i], part) for i, part in enumerate(embedding_parts(embeddings))]


def most_neighbors(config: NeighborsConfig, parts: Sequence[Part]) -> int:
    """How many neighbours a row is given: no more than there are rows, whatever is asked for."""
    return min(config.n_neighbors, max(1, sum(part.vectors.n_rows for part in parts) - 1))


def part_names(parts: Sequence[Part]) -> list[str]:
    """The names of the scratch files of parts."""
    return [raw_name(part.number) for part in parts]


def starts_of(parts: Sequence[Part]) -> np.ndarray:
    """int64 (n,): where the parts start."""
    return np.array([part.start for part in parts], np.int64)


def find_equal_rows(parts: Sequence[Part], folder: Location, executor: Executor) -> EqualRows:
    """Leave the equal rows of every part in scratch files."""
    equal = EqualRows(folder, max(1, -(-sum(part.vectors.n_rows for part in parts) // ROWS_PER_PARTITION)))
    names, partitions = part_names(parts), range(equal.n_partitions)
    make_aside(partial(send_digests, equal=equal), parts, names, folder / "digests", executor)
    work, shared = partial(compare_partition, equal=equal), {"starts": starts_of(parts)}
    make_aside(work, partitions, [raw_name(p) for p in partitions], folder / "equal", executor, shared)
    make_aside(partial(gather_equal, equal=equal), parts, names, folder / "alike", executor)
    return equal


def send_digests(part: Part, equal: EqualRows) -> None:
    """The digests of a part's rows, to the hash partitions."""
    rows, x = read_embeddings(part.vectors.location)
    records = digest_records(x, rows + np.int64(part.start))
    name = raw_name(part.number)
    write_shuffle(
        equal.folder / "digests" / name, records, digest_partition(records, equal.n_partitions), equal.n_partitions
    )


def compare_partition(partition: int, equal: EqualRows, starts: np.ndarray) -> None:
    """The equal rows of a hash partition, to their parts."""
    names = [raw_name(number) for number in range(len(starts))]
    records = np.concatenate([read_shuffle(equal.folder / "digests" / name, DIGEST, partition) for name in names])
    found = find_equal(records)
    write_shuffle(equal.folder / "equal" / raw_name(partition), found, range_at(starts, found["row_id"]), len(starts))


def gather_equal(part: Part, equal: EqualRows) -> None:
    """The equal rows of a part, from all hash partitions."""
    names = [raw_name(p) for p in range(equal.n_partitions)]
    found = np.concatenate([read_shuffle(equal.folder / "equal" / name, EQUAL, part.number) for name in names])
    (equal.folder / "alike" / raw_name(part.number)).write(found[np.argsort(found["row_id"], kind="stable")].tobytes())


def count_distinct(part: Part, equal: EqualRows) -> int:
    """How many rows of a part are no copies."""
    return part.vectors.n_rows - int(equal.of(part)["copy"].sum())


def equal_edges(part: Part, equal: np.ndarray) -> np.ndarray:
    """EDGE (n,): the edges between equal rows, which have similarity 1, that start in a part. equal: its EQUAL."""
    return edge_records(equal["row_id"] - part.start, equal["other"], np.ones(len(equal), np.float32), equal["copy"])


def edge_records(
    row: np.ndarray, near_row: np.ndarray, similarity: np.ndarray, equal: np.ndarray | bool = False
) -> np.ndarray:
    """EDGE (n,) of columns (n,)."""
    edges = np.empty(len(row), EDGE)
    edges["row"], edges["near_row"], edges["similarity"], edges["equal"] = row, near_row, similarity, equal
    return edges


def strongest(edges: np.ndarray, k: int) -> np.ndarray:
    """The k strongest EDGE of each row, ties to the lowest near row, by row, the strongest first."""
    edges = edges[np.lexsort((edges["near_row"], -edges["similarity"], edges["row"]))]
    rank = np.arange(len(edges)) - np.searchsorted(edges["row"], edges["row"])
    best: np.ndarray = edges[rank < k]
    return best


def write_edges(location: Location, n_rows: int, edges: np.ndarray, k: int) -> FileInfo:
    """One part: EDGE (n,) in any order, by row, the strongest first. Counts as full the lists with k edges or more."""
    edges = strongest(edges, len(edges))
    table = pa.table({name: pa.array(np.ascontiguousarray(edges[name])) for name in EDGE.names or ()})
    counts = {"rows": n_rows, "kept": n_rows, "dropped": 0, "bad": 0}
    n_of_rows = np.unique(edges["row"][~edges["equal"]], return_counts=True)[1]
    counts |= {"edges": len(edges), "equal": int(edges["equal"].sum()), "full_lists": int((n_of_rows >= k).sum())}
    return write_table(location, table, counts)
