"""Components over row ranges, with rounds of stars, against one union-find; and the election of the rows that stay."""

import json
from functools import partial

import numpy as np
import pytest

from curation.components import connected_components, part_forest
from curation.execute import SerialExecutor
from curation.store import Location
from pipelines.stages import connect
from pipelines.stages.connect import even_ranges, part_ranges, raw_name, read_pairs, starts_of, write_pairs
from pipelines.stages.elect import elect, representatives_of


def random_graph(rng, n_rows):
    return rng.integers(0, n_rows, (n_rows, 2))


def path(rng, n_rows):
    row = rng.permutation(n_rows)
    return rng.permutation(np.stack([row[:-1], row[1:]], axis=1))


def ordered_path(rng, n_rows):
    return np.stack([np.arange(n_rows - 1), np.arange(1, n_rows)], axis=1)


def cliques(rng, n_rows):
    """Pareto sizes; every row beside the next few of its clique."""
    clique = np.repeat(np.arange(n_rows), np.ceil(rng.pareto(1, n_rows)).astype(int))[:n_rows]
    row = rng.permutation(len(clique))
    edges = [np.stack([row[:-k], row[k:]], axis=1)[clique[:-k] == clique[k:]] for k in (1, 2, 3)]
    return np.concatenate(edges)


def star(rng, n_rows):
    return np.stack([np.full(n_rows, rng.integers(n_rows)), np.arange(n_rows)], axis=1)


def caterpillar(rng, n_rows):
    """A long chain with a leaf at each row of it, highest rows in the middle."""
    half = n_rows // 2
    chain = np.r_[np.arange(0, half, 2), np.arange(1, half, 2)[::-1]]
    leaves = np.stack([np.arange(half), np.arange(half, 2 * half)], axis=1)
    return np.concatenate([np.stack([chain[:-1], chain[1:]], axis=1), leaves])


GRAPHS = [random_graph, path, ordered_path, cliques, star, caterpillar]


@pytest.fixture
def place(tmp_path):
    return Location(str(tmp_path))


class Failing(SerialExecutor):
    """Ends the run after some tasks."""

    def __init__(self, n_tasks):
        self.left = n_tasks

    def map(self, fn, items, shared=None, gpus=0):
        for result in super().map(fn, items, shared, gpus):
            if self.left == 0:
                raise InterruptedError
            self.left -= 1
            yield result


@pytest.fixture
def small(monkeypatch):
    """Many ranges and many blocks, none of which holds enough to see a component whole."""

    def cut(range_rows, block_edges):
        monkeypatch.setattr(connect, "ONE_TASK_ROWS", 0)
        monkeypatch.setattr(connect, "RANGE_ROWS", range_rows)
        monkeypatch.setattr(connect, "BLOCK_EDGES", block_edges)

    return cut


def forests_of(place, edges, n_forests):
    files = [place / "forests" / raw_name(i) for i in range(n_forests)]
    for file, some in zip(files, np.array_split(edges, n_forests), strict=True):
        write_pairs(file, part_forest(some))
    return files


def labels_of(place, n_rows, ranges):
    labels = np.arange(n_rows)
    for rows in ranges:
        pairs = read_pairs(place / "labels" / raw_name(rows.number))
        assert ((pairs[:, 0] >= rows.start) & (pairs[:, 0] < rows.stop)).all() and (np.diff(pairs[:, 0]) > 0).all()
        labels[pairs[:, 0]] = pairs[:, 1]
    return labels


def spans_of(cuts, n_rows):
    """Parts that may be empty."""
    starts, ends = [0, *cuts.tolist()], [*cuts.tolist(), n_rows]
    return [(i, start, end - start) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]


def score_of_range(rows, row_ids, score):
    assert ((row_ids >= rows.start) & (row_ids < rows.stop)).all() and (np.diff(row_ids) > 0).all()
    return score[row_ids]


def n_rounds(place):
    """Rounds that the stars took: each is a large and a small one."""
    return json.loads((place / "stars.json").read())["number"] / 2


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("seed", range(4))
def test_ranges_give_the_labels_of_one_task(graph, seed, place, small):
    rng = np.random.default_rng(seed)
    n_rows = int(rng.integers(2, 400))
    edges = rng.permutation(graph(rng, n_rows))
    expected = connected_components(edges, n_rows)
    forests = forests_of(place, edges, int(rng.integers(1, 9)))
    one = even_ranges(n_rows)
    connect.connect(place / "one", forests, one, SerialExecutor())
    np.testing.assert_array_equal(labels_of(place / "one", n_rows, one), expected)
    small(int(rng.integers(1 + n_rows // 8, n_rows + 2)), int(rng.integers(4, 60)))
    connect.connect(place / "ranges", forests, even_ranges(n_rows), SerialExecutor())
    np.testing.assert_array_equal(labels_of(place / "ranges", n_rows, even_ranges(n_rows)), expected)
    n_counted = int(rng.integers(expected.max() + 1, n_rows + 1))
    of_some = np.flatnonzero(np.bincount(expected) > 1)
    sizes = np.bincount(expected[:n_counted])[of_some]
    for folder, ranges in ((place / "one", one), (place / "ranges", even_ranges(n_rows))):
        found = connect.count_components(folder, ranges, n_counted, SerialExecutor())
        assert found == (len(sizes), sizes.max(initial=0))


@pytest.mark.parametrize("graph", [path, ordered_path, caterpillar])
def test_long_chains_take_as_many_rounds_as_their_length_has_bits(graph, place, small):
    """Not as many as they are long."""
    n_rows = 100_000
    edges = graph(np.random.default_rng(0), n_rows)
    forests = forests_of(place, edges, 10)
    small(n_rows // 10, 4096)
    connect.connect(place, forests, even_ranges(n_rows), SerialExecutor())
    assert n_rounds(place) < np.log2(n_rows) + 2
    np.testing.assert_array_equal(labels_of(place, n_rows, even_ranges(n_rows)), connected_components(edges, n_rows))


def test_a_round_without_moves_is_not_the_last_when_a_block_has_joined_rows(place, small):
    """Row 2 beside 0 and 1 in one block joins 1 to 0, which row 3 does not see."""
    files = [place / "forests" / raw_name(i) for i in range(2)]
    write_pairs(files[0], np.array([[2, 0], [2, 1]]))
    write_pairs(files[1], np.array([[3, 1]]))
    small(4, 1)
    connect.connect(place, files, even_ranges(4), SerialExecutor())
    assert labels_of(place, 4, even_ranges(4)).tolist() == [0, 0, 0, 0]


def test_rounds_that_are_interrupted_go_on(place, small):
    n_rows = 300
    edges = path(np.random.default_rng(0), n_rows)
    forests = forests_of(place, edges, 3)
    small(100, 8)
    done = [-1]
    for n_tasks in (2, 5, 4, 1, 0, 7):
        with pytest.raises(InterruptedError):
            connect.connect(place, forests, even_ranges(n_rows), Failing(n_tasks))
        done.append(connect.last_step(place).number)
    assert done[-1] > done[2] > 0 and done == sorted(done)
    connect.connect(place, forests, even_ranges(n_rows), SerialExecutor())
    assert not labels_of(place, n_rows, even_ranges(n_rows)).any()
    assert len(list(place.path.glob("stars-*"))) == 1, "steps of no use any more are gone"


@pytest.mark.parametrize("graph", [random_graph, cliques, star])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_row_of_every_component_stays(graph, seed, place, small):
    rng = np.random.default_rng(seed)
    n_rows = int(rng.integers(2, 300))
    spans = spans_of(np.sort(rng.integers(0, n_rows + 1, 9)), n_rows)
    edges = graph(rng, n_rows)
    forests = forests_of(place, edges, 3)
    score = rng.integers(-3, int(rng.choice([-1, 100])), n_rows)  # many ties, or few
    component = connected_components(edges, n_rows)
    best = {c: row for s, row, c in sorted(zip(score, -np.arange(n_rows), component, strict=True))}
    small(int(rng.integers(1, n_rows)), 8)
    ranges = part_ranges(spans)
    assert [span for rows in ranges for span in rows.spans] == spans
    connect.connect(place, forests, ranges, SerialExecutor())
    elect(place, ranges, partial(score_of_range, score=score), SerialExecutor())
    for span in spans:
        stays = representatives_of(span, place, starts_of(ranges))
        assert stays.tolist() == [-best[component[row]] for row in range(span[1], span[1] + span[2])]


def test_ranges_are_at_most_so_many_and_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(connect, "RANGE_ROWS", 10)
    monkeypatch.setattr(connect, "MOST_RANGES", 7)
    for n_rows in (1, 9, 10, 11, 69, 70, 71, 1000):
        ranges = even_ranges(n_rows)
        assert len(ranges) <= 7 and [rows.number for rows in ranges] == list(range(len(ranges)))
        assert [rows.start for rows in ranges] == [0, *(rows.stop for rows in ranges[:-1])]
        assert ranges[-1].stop == n_rows
    spans = spans_of(np.arange(3, 30, 3), 60)
    assert [(rows.start, rows.stop) for rows in part_ranges(spans)] == [(0, 9), (9, 18), (18, 27), (27, 60)]
