import numpy as np
import pytest
from blobs import blobs, cut, with_weights

from curation import labelling as module
from curation.execute import CPU, Device, SerialExecutor
from curation.kmeans import HeldTrail, Lloyd, State, fit, members_of, refine, sums_of_parts, unit_rows
from curation.labelling import Member, assign_part
from curation.nearest import Bounds, nearest_centroid
from curation.rows import ArrayRows

GPU = Device("cpu:0", 0.25)  # what runs on a GPU, on this CPU


class WithGpus(SerialExecutor):
    """Sums do not go through what has GPUs; keeps the loads that do."""

    def __init__(self):
        self.loads = []

    def map_workers(self, make, items, gpus=0):
        assert gpus == GPU.gpus
        self.loads.append([[member.part.n_rows for member in load] for load in items])
        return super().map_workers(make, items, gpus)

    def reduce(self, fn, items, merge, shared=None, fan_in=16, gpus=0):
        assert not gpus
        return super().reduce(fn, items, merge, shared, fan_in)


def unlike(x, ours, theirs):
    """Of labelled rows those whose two centroids are not as near, up to a part in 100,000."""
    near, far = (((x.astype("f8") - centroids[labels]) ** 2).sum(1) for centroids, labels in (ours, theirs))
    return np.flatnonzero((ours[1] != theirs[1]) & ~np.isclose(near, far, rtol=1e-5, atol=0))


@pytest.mark.parametrize("shape", [{}, {"n_blobs": 400, "spread": 0.05}, {"width": 64, "spread": 2}])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_gpu_takes_the_steps_of_a_cpu(shape, metric, monkeypatch):
    x = blobs(1, **shape)
    x = unit_rows(x) if metric == "cosine" else x
    parts = with_weights(cut(x, [0, 700, 701, 2500]), np.random.default_rng(0).integers(0, 4, len(x)))
    start, how = State(x[:60].copy()), Lloyd(tol=1e-4, metric=metric, empty="split")
    expected = refine(parts, start, SerialExecutor(), how)
    near = [assign_part(part, expected.centroids) for part in parts]
    monkeypatch.setattr(module, "assign", None)  # what compares rows and centroids on a CPU
    executor = WithGpus()
    found = refine(parts, start, executor, how, HeldTrail(), GPU)
    assert found.n_done == expected.n_done > 5 and found.done == expected.done
    np.testing.assert_allclose(found.centroids, expected.centroids, atol=1e-5)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-6)
    assert executor.loads == [[[700, 1, 1799, 1500]]] * found.n_done  # all that keep a GPU busy at once
    for part, (labels, sq_distance) in zip(parts, near, strict=True):
        ours, distance = assign_part(part, found.centroids, GPU)
        rows = part.part.x
        assert not len(unlike(rows, (found.centroids, ours), (expected.centroids, labels)))
        assert (ours.dtype, distance.dtype) == (np.int32, np.float32)
        np.testing.assert_allclose(distance, sq_distance, rtol=1e-4, atol=1e-6)


def test_rows_meet_a_gpu_many_at_a_time(monkeypatch):
    """Blocks are joined across parts, and labels come back to theirs."""
    monkeypatch.setattr(module, "ROWS", 10_000)
    x, c = blobs(2, n=31_000), blobs(3)[:20]
    parts = cut(x, [0, 200, 9000, 9900, 26_000])
    trail, executor, heights = HeldTrail(), WithGpus(), []
    assign_rows = module.TorchTarget.assign
    monkeypatch.setattr(
        module.TorchTarget, "assign", lambda self, rows: heights.append(len(rows)) or assign_rows(self, rows)
    )
    step = module.step_to(c, GPU)
    members = members_of(parts, trail)
    shared = module.step_shared(step, executor, members)
    assert executor.loads == [[[200, 8800, 900, 16_100], [5000]]] and sum(heights) == len(x)
    assert all(5000 <= height <= 10_000 for height in heights) and len(heights) == 4
    for member in members[1:]:
        labels, sq_distance = module.assign_member(member, shared["step"].get())
        expected, least = nearest_centroid(member.part.x, c)
        np.testing.assert_array_equal(labels, expected)
        np.testing.assert_array_equal(sq_distance, least)
    module.step_shared(step, executor, members)
    assert len(heights) == 4  # they are all labelled
    trail.memory(3).tag = b""
    module.step_shared(step, executor, members)
    assert len(heights) == 7  # its load is labelled again, in the same blocks


def test_labels_that_are_known_are_not_made_again(monkeypatch):
    """A step that was broken off finds in memories what was done; so does one on a CPU."""
    x = blobs(3, n=9000)
    parts, start, trail = cut(x, [5000]), State(x[:50].copy()), HeldTrail()
    first = refine(parts, start, SerialExecutor(), Lloyd(n_iter=1), trail)
    expected = refine(parts, first, SerialExecutor(), Lloyd(n_iter=2), trail)
    assign_rows, n_rows = module.assign, []
    monkeypatch.setattr(module, "assign", lambda rows, *rest: n_rows.append(len(rows)) or assign_rows(rows, *rest))
    trail.parts[0] = module.Held()
    again = refine(parts, first, SerialExecutor(), Lloyd(n_iter=2), trail)
    assert sum(n_rows) == 5000
    for a, b in zip(again, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bounds_of_other_centroids_are_not_believed():
    x = blobs(3)
    parts, start, trail = [ArrayRows(x)], State(x[:50].copy()), HeldTrail()
    first = refine(parts, start, SerialExecutor(), Lloyd(n_iter=1), trail)
    trail.parts[0] = module.Held(b"others", Bounds(np.zeros(len(x), np.int32), np.full(len(x), 99, "f4")))
    found = refine(parts, first, SerialExecutor(), Lloyd(n_iter=2), trail)
    np.testing.assert_array_equal(found.centroids, refine(parts, start, SerialExecutor(), Lloyd(n_iter=2)).centroids)


def test_what_a_gpu_said_is_not_what_a_cpu_says():
    """Labels are under the tag of what made them, so that none depends on what memories hold."""
    x = blobs(4)
    trail, step = HeldTrail(), module.step_to(x[:50].copy(), GPU)
    members = members_of([ArrayRows(x)], trail)
    module.step_shared(step, WithGpus(), members)
    trail.memory(0).bounds.labels[:] = 7
    labels, _ = module.assign_member(members[0], module.step_to(step.centroids))
    np.testing.assert_array_equal(labels, nearest_centroid(x, step.centroids)[0])
    assert trail.memory(0).tag == module.tag_of(step.centroids) != step.tag


def test_a_run_may_go_on_without_its_gpu():
    """And then with it again."""
    x = blobs(5, n=3000)
    parts, start, trail, how = cut(x, [1000]), State(x[:40].copy()), HeldTrail(), Lloyd(n_iter=12, tol=0)
    expected, state = refine(parts, start, SerialExecutor(), how), start
    for n_iter, device in [(3, GPU), (6, CPU), (9, GPU), (12, CPU)]:
        state = refine(parts, state, SerialExecutor(), Lloyd(n_iter=n_iter, tol=0), trail, device)
    assert state.n_done == expected.n_done == 12
    np.testing.assert_array_equal(state.centroids, expected.centroids)


def test_labels_of_a_gpu_must_have_a_place():
    x = blobs(0)
    with pytest.raises(ValueError, match="must have a memory to lie in: got a part without one"):
        fit([ArrayRows(x)], 5, (0,), SerialExecutor(), device=GPU)
    step = module.step_to(x[:5], GPU)
    with pytest.raises(ValueError, match="labels made on cpu:0 must be in the memory of their part: they were lost"):
        sums_of_parts([Member(ArrayRows(x), HeldTrail().memory(0))], step)
    none = sums_of_parts([Member(ArrayRows(x[:0]))], step)
    assert none.sizes.sum() == 0
