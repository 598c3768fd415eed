import faiss
import numpy as np
import pytest

from curation import neighbors as module
from curation.neighbors import Neighbors, NeighborsConfig, merge_block, nearest_neighbors


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")


def random_rows(seed, n, width=16):
    return unit(np.random.default_rng(seed).normal(size=(n, width)))


def tied_rows(seed, n, width=16, distinct=12):
    """Many copies, and many rows that differ by less than float32 products can tell."""
    rng = np.random.default_rng(seed)
    x = random_rows(seed, distinct, width)[rng.integers(distinct, size=n)]
    return np.where(rng.random((n, 1)) < 0.5, x, unit(x + 1e-7 * rng.normal(size=x.shape)))


def brute_force(queries, base, k, query_ids=None):
    """Every similarity in float64, rounded once, then a full sort."""
    similarity = np.stack([(q.astype("f8") * base.astype("f8")).sum(1) for q in queries]).astype("f4")
    row_ids = np.tile(np.arange(len(base)), (len(queries), 1))
    if query_ids is not None:
        itself = row_ids == query_ids[:, None]
        similarity, row_ids = np.where(itself, -np.inf, similarity), np.where(itself, -1, row_ids)
    order = np.lexsort((row_ids, -similarity), axis=1)[:, :k]
    return np.take_along_axis(row_ids, order, 1), np.take_along_axis(similarity, order, 1)


@pytest.mark.parametrize("make", [random_rows, tied_rows])
@pytest.mark.parametrize("seed", range(12))
def test_neighbours_match_brute_force(make, seed):
    queries, base = make(seed, 70), make(seed, 600)
    k = int(np.random.default_rng(seed).integers(1, 60))
    row_ids, similarity = nearest_neighbors(queries, base, k)
    assert row_ids.dtype == np.int64 and similarity.dtype == np.float32
    expected = brute_force(queries, base, k)
    np.testing.assert_array_equal(similarity, expected[1])
    np.testing.assert_array_equal(row_ids, expected[0])


@pytest.mark.parametrize("make", [random_rows, tied_rows])
@pytest.mark.parametrize("width", [3, 100])
def test_a_row_is_never_its_own_neighbour(make, width):
    x = make(3, 300, width)
    ids = np.arange(100, 200)
    found = nearest_neighbors(x[100:200], x, 20, query_ids=ids)
    expected = brute_force(x[100:200], x, 20, ids)
    np.testing.assert_array_equal(found.row_ids, expected[0])
    np.testing.assert_array_equal(found.similarity, expected[1])
    assert not (found.row_ids == ids[:, None]).any()


@pytest.mark.parametrize("make", [random_rows, tied_rows])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_in_any_cut_and_order_give_the_same(make, seed):
    rng = np.random.default_rng(seed)
    x, queries, own = make(seed, 500), make(seed, 500)[50:90], np.arange(50, 90)
    whole = nearest_neighbors(queries, x, 30, own)
    cuts = np.sort(rng.integers(0, 501, size=int(rng.integers(1, 20))))
    ids = rng.permutation(500)  # blocks of a cell hold any rows
    best = Neighbors.none_yet(40, 30)
    for block in np.split(ids, cuts):
        before = best.row_ids.copy()
        merged = merge_block(queries, x[block], block, best, own)
        np.testing.assert_array_equal(best.row_ids, before)  # the running result is not written to
        best = merged
    np.testing.assert_array_equal(best.row_ids, whole.row_ids)
    np.testing.assert_array_equal(best.similarity, whole.similarity)


def test_query_blocks_do_not_matter(monkeypatch):
    x = tied_rows(1, 300)
    whole = nearest_neighbors(x, x, 25, np.arange(300))
    monkeypatch.setattr(module, "QUERY_ROWS", 7)
    monkeypatch.setattr(module, "RECHECK_SCORES", 1000)
    pieces = nearest_neighbors(x, x, 25, np.arange(300))
    np.testing.assert_array_equal(whole.row_ids, pieces.row_ids)


@pytest.mark.parametrize("width", [5, 64, 384])
def test_similarity_is_symmetric_and_the_same_for_equal_rows(width):
    x = tied_rows(0, 200, width)
    found = nearest_neighbors(x, x, 200)
    table = np.empty((200, 200), "f4")
    np.put_along_axis(table, found.row_ids, found.similarity, 1)
    np.testing.assert_array_equal(table, table.T)
    same = (x[:, None] == x[None]).all(-1)
    i, j = np.nonzero(same)
    np.testing.assert_array_equal(table[i], table[j])


def test_threads_do_not_matter():
    x = tied_rows(2, 3000, 32)
    before = faiss.omp_get_max_threads()
    try:
        results = []
        for n in (1, 2):
            faiss.omp_set_num_threads(n)
            results.append(nearest_neighbors(x, x, 10))
    finally:
        faiss.omp_set_num_threads(before)
    np.testing.assert_array_equal(results[0].row_ids, results[1].row_ids)
    np.testing.assert_array_equal(results[0].similarity, results[1].similarity)


def test_few_rows_are_padded():
    x = random_rows(0, 3)
    found = nearest_neighbors(x, x, 5, np.arange(3))
    assert (found.row_ids[:, :2] >= 0).all() and (found.row_ids[:, 2:] == -1).all()
    assert np.isfinite(found.similarity[:, :2]).all() and np.isneginf(found.similarity[:, 2:]).all()
    assert (nearest_neighbors(x, x[:0], 4).row_ids == -1).all()
    assert nearest_neighbors(x[:0], x, 4).row_ids.shape == (0, 4)


def test_float16_rows_are_used_in_float32():
    x = random_rows(0, 100).astype("f2")
    np.testing.assert_array_equal(
        nearest_neighbors(x, x, 5)[1], nearest_neighbors(x.astype("f4"), x.astype("f4"), 5)[1]
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: nearest_neighbors(2 * x, x, 3), "queries must have unit rows: 9 of 9 do not"),
        (lambda x: nearest_neighbors(x, 0 * x, 3), "base must have unit rows: 9 of 9 do not"),
        (lambda x: nearest_neighbors(x, np.eye(4), 3), r"one width.*got \(9, 16\), \(4, 4\), k = 3, 4 ids"),
        (lambda x: nearest_neighbors(x, x, 0), "k of at least 1.*k = 0"),
        (lambda x: merge_block(x, x, np.arange(3), Neighbors.none_yet(9, 2)), "an id for each base row.*3 ids"),
        (lambda x: NeighborsConfig(min_similarity=1.5), r"neighbors.min_similarity must be in \(0, 1\]: got 1.5"),
        (lambda x: NeighborsConfig(min_similarity=0), r"in \(0, 1\]: got 0"),
        (lambda x: NeighborsConfig(min_similarity=float("nan")), r"in \(0, 1\]: got nan"),
        (
            lambda x: NeighborsConfig(min_similarity=0.5, n_neighbors=0),
            "neighbors.n_neighbors must be at least 1: got 0",
        ),
    ],
)
def test_what_cannot_be_searched_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(random_rows(0, 9))


def test_a_threshold_has_no_default():
    with pytest.raises(TypeError, match="min_similarity"):
        NeighborsConfig()
