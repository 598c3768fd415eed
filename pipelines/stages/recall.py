"""How much of what an exact search finds a k-NN join finds, measured on sampled rows.

The true edges of the sampled rows come from every row of the pool, part by part. Before the join it is known at how
many cells of both its rows each of them is found, so ``nprobe`` can be chosen, and a join that would miss too much does
not start; after it, the edges that were written are counted.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import part_name, read_table, write_table
from curation.cells import allowed_misses, nearest_cells, needed_nprobe, recall_at
from curation.embeddings import BLOCK_ROWS
from curation.execute import Executor, Ref
from curation.neighbors import Neighbors, NeighborsConfig, merge_block, merge_candidates
from curation.seed_sample import sample_counts
from curation.signatures import Limits, signatures, within_limits
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stages.connect import range_at
from pipelines.stages.edges import Distinct, EqualRows, Part, device_of, most_neighbors, starts_of

MIN_EDGES = 100  # of the sampled rows: with fewer nothing is known of how similar near rows are
N_PLANTED = 4096  # planted edges
LOST = -1  # an edge that its signatures rule out: no nprobe finds it
QUERIES, PLANTED = 3, 4  # purposes of a generator


class Queries(NamedTuple):
    """The sampled rows."""

    ids: np.ndarray  # int64 (n,), ascending
    x: np.ndarray  # float32 (n, d)


class Reach(NamedTuple):
    """The true edges of the sampled rows, and when a join finds them."""

    query: np.ndarray  # int64 (m,), row id
    near_row: np.ndarray  # int64 (m,); -1 of a planted edge
    similarity: np.ndarray  # float32 (m,)
    needed: np.ndarray  # int32 (m,): the join finds it from this nprobe on; 0: not up to the highest looked at; LOST

    def true(self) -> "Reach":
        """Without the planted edges."""
        return Reach(*(column[self.near_row >= 0] for column in self))


class Quantizer(NamedTuple):
    """What decides whether the join compares two rows."""

    centroids: np.ndarray  # float32 (nlist, d)
    limits: Limits
    seed: int


def find_reach(
    config: NeighborsConfig,
    parts: Sequence[Part],
    sizes: Sequence[int],
    equal: EqualRows,
    quantizer: Ref[Quantizer],
    most: int,
    executor: Executor,
) -> Reach:
    """The true edges of ``recall_queries`` rows, and when a join with up to ``most`` cells a row finds them.

    sizes: the rows of each part that are no copies. Where the true edges are too few to be sure of a recall, edges are
    planted beside them.
    """
    counts = sample_counts(sizes, config.recall_queries, np.random.default_rng([config.seed, QUERIES]))
    draw = partial(draw_queries, equal=equal, seed=config.seed)
    queries = executor.reduce(draw, list(zip(parts, counts, strict=True)), join_queries)
    device = device_of(executor)
    search = partial(true_neighbours, equal=equal, k=most_neighbors(config, parts), device=device.name)
    truth = executor.reduce(search, parts, merge_truth, shared={"queries": queries}, gpus=device.gpus)
    work = partial(reach_of_part, starts=starts_of(parts), config=config, most=most)
    shared = {"queries": queries, "truth": truth, "quantizer": quantizer}
    reach = executor.reduce(work, parts, join_reach, shared=shared).get()
    if allowed_misses(len(reach.needed), config.min_recall) >= 0:
        return reach
    few = len(reach.needed) < MIN_EDGES
    similarity = np.array([config.min_similarity, 1], np.float32) if few else reach.similarity
    work = partial(plant, similarity=np.sort(similarity), seed=config.seed, most=most)
    [planted] = executor.map(work, [N_PLANTED], {"queries": queries, "quantizer": quantizer})
    return join_reach(reach, planted)


def draw_queries(item: tuple[Part, int], equal: EqualRows, seed: int) -> Queries:
    """Some rows of a part that are no copies, uniform without replacement."""
    part, n = item
    rows, x = Distinct(part, equal).read()
    rng = np.random.default_rng([seed, QUERIES, part.number])
    at = np.sort(rng.choice(len(rows), n, replace=False, shuffle=False))
    return Queries(rows[at] + np.int64(part.start), x[at])


def join_queries(a: Queries, b: Queries) -> Queries:
    """Those of earlier parts, then those of later ones."""
    return Queries(np.concatenate([a.ids, b.ids]), np.concatenate([a.x, b.x]))


def true_neighbours(part: Part, queries: Queries, equal: EqualRows, k: int, device: str) -> Neighbors:
    """The k rows of one part most similar to each query, exactly."""
    rows, x = Distinct(part, equal).read()
    none = Neighbors.none_yet(len(queries.ids), k)
    return merge_block(queries.x, x, rows + np.int64(part.start), none, queries.ids, device) if len(rows) else none


def merge_truth(a: Neighbors, b: Neighbors) -> Neighbors:
    """The nearest in the parts of both."""
    return merge_candidates(a, b.row_ids, b.similarity, np.full(len(b.row_ids), -1, np.int64))


def reach_of_part(
    part: Part,
    queries: Queries,
    truth: Neighbors,
    quantizer: Quantizer,
    starts: np.ndarray,
    config: NeighborsConfig,
    most: int,
) -> Reach:
    """The true edges of queries to rows of one part."""
    near = (truth.similarity >= np.float32(config.min_similarity)) & (truth.row_ids >= 0)
    near[near] = range_at(starts, truth.row_ids[near]) == part.number
    query = np.nonzero(near)[0]
    near_row = truth.row_ids[near]
    if not len(query):
        return Reach(near_row, near_row, np.zeros(0, np.float32), np.zeros(0, np.int32))
    rows, x = part.vectors.read()
    y = x[np.searchsorted(rows, near_row - part.start)]
    needed = found_from(queries.x[query], y, quantizer, most)
    return Reach(queries.ids[query], near_row, truth.similarity[near], needed)


def join_reach(a: Reach, b: Reach) -> Reach:
    """The edges of both."""
    return Reach(*(np.concatenate(columns) for columns in zip(a, b, strict=True)))


def found_from(x: np.ndarray, y: np.ndarray, quantizer: Quantizer, most: int) -> np.ndarray:
    """int32 (n,): the nprobe from which on each pair of rows float32 (n, d) is found; 0: not up to ``most``; LOST."""
    from curation import loops_bits

    found = np.zeros(len(x), np.int32)
    for start in range(0, len(x), BLOCK_ROWS):
        at = slice(start, start + BLOCK_ROWS)
        a, b = (nearest_cells(some[at], quantizer.centroids, most) for some in (x, y))
        needed = loops_bits.first_shared(a, b, len(quantizer.centroids))
        bits_a, bits_b = (signatures(some[at], quantizer.seed) for some in (x, y))
        found[at] = np.where(within_limits(quantizer.limits, bits_a, bits_b), needed, LOST)
    return found


def plant(n: int, queries: Queries, quantizer: Quantizer, similarity: np.ndarray, seed: int, most: int) -> Reach:
    """Edges of the queries to rows that are not there: as similar as the given ones, ascending (m,), and beside that as
    another query is. So they lie where rows of the pool lie."""
    rng = np.random.default_rng([seed, PLANTED])
    query = np.arange(n) % len(queries.ids)
    other = (query + rng.integers(1, max(2, len(queries.ids)), n)) % len(queries.ids)
    x = queries.x[query].astype(np.float64)
    aside = queries.x[other] - x * np.einsum("nd,nd->n", x, queries.x[other])[:, None]
    aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    drawn = np.quantile(similarity, rng.random(n)).clip(-1, 1)[:, None]
    y = (drawn * x + np.sqrt(1 - drawn**2) * aside).astype(np.float32)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    needed = found_from(queries.x[query], y, quantizer, most)
    return Reach(queries.ids[query], np.full(n, -1, np.int64), drawn[:, 0].astype(np.float32), needed)


def write_reach(location: Location, reach: Reach) -> None:
    """Keep it for the end, and for a run that goes on."""
    write_table(location, pa.table(reach._asdict()))


def read_reach(location: Location) -> Reach:
    """What ``write_reach`` wrote."""
    table = read_table(location)
    return Reach(*(table[name].to_numpy() for name in Reach._fields))


def choose_nprobe(config: NeighborsConfig, reach: Reach, most: int) -> int:
    """How many cells a row lies in: as the config says, or as few as make ``min_recall`` sure (``sure_nprobe``).

    Where the true edges are too few for that, as few as find that share of them and of the planted ones, and half of
    the rest. Raises UserError when that many cells would find too few of the true edges.
    """
    true = reach.true().needed
    least = nprobe_for(true, tolerated_misses(len(true), config.min_recall))
    if config.nprobe != "auto":
        chosen = int(config.nprobe)
    elif allowed_misses(len(true), config.min_recall) >= 0:
        chosen = sure_nprobe(reach.true(), config.min_recall) or most
    else:
        both = (true, reach.needed[reach.near_row < 0])
        careful = 1 - (1 - config.min_recall) / 2
        chosen = max(nprobe_for(some, floor_misses(len(some), careful)) or most for some in both)
    recall = recall_at(true, chosen)
    if recall is not None and misses_too_many(len(true) * (1 - recall), len(true), config.min_recall):
        hint = "set method: exact, or ask for less" if least is None else f"set nprobe to {least}, or to auto"
        raise UserError(too_few(recall, len(true), config, chosen), hint)
    return chosen


def nprobe_for(needed: np.ndarray, n_misses: int) -> int | None:
    """The lowest nprobe that misses so many, what signatures rule out among them: more of those change nothing."""
    findable = needed[needed != LOST]
    return needed_nprobe(findable, max(0, n_misses - (len(needed) - len(findable))))


def sure_nprobe(true: Reach, min_recall: float) -> int | None:
    """The nprobe that makes a recall of all edges sure, and for the quarter of them that is nearest to the threshold
    one with at most twice the misses: it is these that cells lose, and nobody looks for them again. One miss is always
    allowed among those that signatures let pass, or a single odd pair would decide."""
    weakest = true.needed[np.argsort(true.similarity, kind="stable")[: len(true.needed) // 4]]
    both = ((true.needed, min_recall), (weakest, max(0.0, 1 - 2 * (1 - min_recall))))
    least = [
        nprobe_for(some, max(1 + int((some == LOST).sum()), allowed_misses(len(some), share))) for some, share in both
    ]
    found = [nprobe for nprobe in least if nprobe is not None]
    return max(found) if len(found) == 2 else None


def floor_misses(n: int, share: float) -> int:
    """How many of n may be missing where a share of them must be there."""
    return int((1 - share) * n + 1e-9)


def tolerated_misses(n: int, share: float) -> int:
    """The same, but one in any case, unless all must be there: of few edges one says nothing of the share."""
    return max(int(share < 1), floor_misses(n, share))


def misses_too_many(n_misses: float, n: int, share: float) -> bool:
    """Whether more are missing than may be."""
    return n_misses > tolerated_misses(n, share) + 1e-9


def too_few(recall: float, n_edges: int, config: NeighborsConfig, nprobe: int) -> str:
    """The sentence for a join that misses too much."""
    return (
        f"neighbors.min_recall must be reached, {config.min_recall:g}: got {recall:.4g} of {n_edges} true edges of "
        f"{config.recall_queries} sampled rows, with nprobe {nprobe}"
    )


def count_found(part: Part, reach: Reach, starts: np.ndarray, out: Location) -> np.ndarray:
    """int64 (2,): of the true edges of the sampled rows of one part, how many are there; and if any edge of a row
    whose list is full may stand for one that is not among its strongest."""
    mine = range_at(starts, reach.query) == part.number
    if not mine.any():
        return np.zeros(2, np.int64)
    table = read_table(out / part_name(part.number))
    table = table.filter(pa.compute.invert(table["equal"]))
    pairs = np.stack([table["row"].to_numpy() + np.int64(part.start), table["near_row"].to_numpy()], axis=1)
    wanted = np.stack([reach.query[mine], reach.near_row[mine]], axis=1)
    there = set(map(tuple, pairs[np.isin(pairs[:, 0], wanted[:, 0])].tolist()))
    same = sum(tuple(pair) in there for pair in wanted.tolist())
    queries, n_wanted = np.unique(wanted[:, 0], return_counts=True)
    ids = np.sort(pairs[:, 0])
    n_there = np.searchsorted(ids, queries, side="right") - np.searchsorted(ids, queries)
    return np.array([same, np.minimum(n_wanted, n_there).sum()])


def measure_recall(
    config: NeighborsConfig, parts: Sequence[Part], reach: Reach, nprobe: int, out: Location, executor: Executor
) -> dict[str, float | int | None]:
    """The recall of the edges that were written, as facts; None where the sampled rows have no true edge.

    ``recall`` counts, for a row with more near rows than its list has room for, any of them;
    ``recall_strongest`` counts the very edges of the exact search. Raises UserError below ``min_recall``, unless a
    single edge is missing.
    """
    true = reach.true()
    n_edges = len(true.needed)
    work = partial(count_found, starts=starts_of(parts), out=out)
    strongest, any_near = sum(executor.map(work, parts, {"reach": true}), np.zeros(2, np.int64)).tolist()
    facts: dict[str, float | int | None] = {"recall": None, "recall_strongest": None, "recall_edges": n_edges}
    if n_edges:
        facts |= {"recall": any_near / n_edges, "recall_strongest": strongest / n_edges}
        if misses_too_many(n_edges - any_near, n_edges, config.min_recall):
            raise UserError(too_few(any_near / n_edges, n_edges, config, nprobe), "raise nprobe, or set method: exact")
    return facts
