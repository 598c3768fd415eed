"""``retrieve`` on small made-up vectors against the rule in plain numpy, and through recipes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from tiny import digit

from curation import retrieve as kernel
from curation.artifact import Artifact, finish, part_name, read_table, write_table
from curation.embeddings import EmbeddingsPart, write_embeddings
from curation.retrieve import RetrieveConfig, order_keys, plan_seed_pool, share_pairs
from curation.selection import read_selection, write_selection
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.stage import Output
from pipelines.stages import retrieve
from pipelines.stages.retrieval import clusters, quotas, search
from pipelines.stages.table import STAGES

WIDTH = 6
BACKBONE = {"name": "made up"}


def made(root: Path, step: str, stage: str, files: list[Any], facts: dict[str, Any], **inputs: Artifact) -> Artifact:
    """A finished artifact, as the engine would leave it."""
    entries = {name: {"path": f"{a.location.parent.name}/x", "digest": a.digest} for name, a in inputs.items()}
    counts = {"rows": 0, "kept": sum(file.counts.get("kept", 0) for file in files)}
    head = {"stage": stage, "inputs": entries, "counts": counts, "facts": facts, "config": {}, "locations": {}}
    return finish(Location(str(root / step / "x")), files, head)


class Vectors(NamedTuple):
    """An embeddings artifact and what is in it."""

    artifact: Artifact
    ids: np.ndarray  # positions of the embedded rows in their pool
    x: np.ndarray  # as the kernels see them


def make_vectors(
    root: Path, name: str, sizes: list[int], rng: np.random.Generator, backbone: Any = BACKBONE
) -> Vectors:
    """A pool with parts of these sizes, one row in eight rejected. The vectors stand in few directions: many ties."""
    pools, files, ids, xs = [], [], [], []
    at, start = Location(str(root / name / "x")), 0
    for i, n in enumerate(sizes):
        pool_part = Location(str(root / f"{name}-pool" / "x")) / part_name(i)
        pools.append(write_table(pool_part, pa.table({"row_id": np.arange(start, start + n)})))
        bad = np.flatnonzero(rng.random(n) < 0.125)
        rows = np.setdiff1d(np.arange(n), bad)
        x = rng.integers(-2, 3, (len(rows), WIDTH)) + 0.01
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f2")
        files.append(write_table(at / part_name(i, "rejected"), pa.table({"row": pa.array(bad, pa.int32())})))
        files.append(write_embeddings(at / part_name(i), rows, x, {"kept": len(rows)}))
        ids.append(rows + start)
        xs.append(EmbeddingsPart(at / part_name(i), len(rows), 0).read()[1])
        start += n
    pool = made(root, f"{name}-pool", "pool", pools, {"of": name})
    artifact = made(root, name, "embed", files, {"width": WIDTH, "backbone": backbone}, pool=pool)
    return Vectors(artifact, np.concatenate(ids), np.concatenate(xs))


class Tree(NamedTuple):
    """A hierarchy of three levels over the vectors of a pool."""

    artifact: Artifact
    centroids: list[np.ndarray]
    labels: list[np.ndarray]  # of the covered rows, at each level


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared, float32 (n, k)."""
    return ((x[:, None].astype("f8") - y[None].astype("f8")) ** 2).sum(-1).astype("f4")


def make_tree(root: Path, web: Vectors, rng: np.random.Generator) -> Tree:
    leaves, middle, top = (rng.normal(size=(k, WIDTH)).astype("f4") / 2 for k in (9, 4, 2))
    up, upper = distances(leaves, middle).argmin(1).astype("i4"), distances(middle, top).argmin(1).astype("i4")
    d = distances(web.x, leaves)
    at, files, first = Location(str(root / "tree" / "x")), [], 0
    for i in range(len(web.artifact.parts)):
        rows = read_table(web.artifact.part(i), ["row"])["row"]
        mine = d[first : first + len(rows)]
        label, gap = mine.argmin(1).astype("i4"), mine.min(1) if len(mine) else np.zeros(0, "f4")
        files.append(write_table(at / part_name(i), pa.table({"row": rows, "label": label, "sq_distance": gap})))
        first += len(rows)
    for t, x in enumerate((leaves, middle, top)):
        for i, half in enumerate((x[: len(x) // 2], x[len(x) // 2 :])):
            files.append(write_embeddings(at / part_name(i, f"centroids-{t}"), np.arange(len(half)), half))
    for t, labels in ((1, up), (2, upper)):
        files.append(write_table(at / part_name(0, f"labels-{t}"), pa.table({"label": labels})))
    facts = {"n_clusters": [9, 4, 2], "backbone": BACKBONE}
    tree = made(root, "tree", "cluster", files, facts, embeddings=web.artifact)
    return Tree(tree, [leaves, middle, top], [d.argmin(1), up[d.argmin(1)], upper[up[d.argmin(1)]]])


def make_selection(root: Path, web: Vectors, rng: np.random.Generator) -> Artifact:
    """Three rows in four, rejected ones too."""
    pool, at, files = web.artifact.input("pool"), Location(str(root / "some" / "x")), []
    for i, part in enumerate(pool.parts):
        kept = rng.random(part.rows) < 0.75
        files.append(write_selection(at / part_name(i), np.arange(part.rows), kept))
    return made(root, "some", "select", files, {}, pool=pool)


def chosen_ids(selection: Artifact, pool: Artifact) -> np.ndarray:
    parts = [read_selection(selection.part(i)).rows + pool.starts[i] for i in range(len(pool.parts))]
    return np.concatenate(parts)


Claims = dict[tuple[int, int], tuple[float, int, int, int, float]]  # (row id, pool) -> gap, near, hits, group, value


def near_claims(k: int, web: Vectors, allowed: np.ndarray, seeds: list[Vectors]) -> Claims:
    """What every seed image asks for."""
    claims: Claims = {}
    for j, pool in enumerate(seeds):
        similarity = (pool.x.astype("f8") @ web.x[allowed].astype("f8").T).astype("f4")
        for q, near in enumerate(pool.ids.tolist()):
            for i in np.lexsort((web.ids[allowed], -similarity[q]))[:k].tolist():
                row, gap = int(web.ids[allowed][i]), -float(similarity[q, i])
                old = claims.get((row, j), (np.inf, 0, 0, 0, 0.0))
                best = min(old[:2], (gap, near))
                claims[row, j] = (*best, old[2] + 1, j, best[0])
    return claims


def cluster_claims(
    config: RetrieveConfig, web: Vectors, allowed: np.ndarray, tree: Tree, seeds: list[Vectors]
) -> tuple[Claims, list[int]]:
    """The allowed rows of qualifying clusters, and how many clusters qualify for each seed pool."""
    level = config.level or 0
    centroids, labels = tree.centroids[level], tree.labels[level]
    own = distances(web.x, centroids)[np.arange(len(web.x)), labels]
    claims: Claims = {}
    n_clusters = []
    for j, pool in enumerate(seeds):
        d = distances(pool.x, centroids)
        lies = d.argmin(1)
        qualifying = [c for c in range(len(centroids)) if (lies == c).sum() > config.most_hits_without]
        n_clusters.append(len(qualifying))
        for c in qualifying:
            gap, near = min((float(d[i, c]), int(pool.ids[i])) for i in np.flatnonzero(lies == c))
            for i in np.flatnonzero((labels == c) & allowed).tolist():
                claims[int(web.ids[i]), j] = (gap, near, int((lies == c).sum()), c, float(own[i]))
    return claims, n_clusters


def cut_claims(claims: Claims, config: RetrieveConfig, n_pools: int) -> Claims:
    """Those within the quotas, and the order in which each pool wants them."""
    keys = {}
    for (row, j), (_, _, _, _, value) in claims.items():
        luck = int(order_keys(np.array([row]), np.zeros(1, "f4"), "random", config.seed)[0])
        keys[row, j] = value if config.pick == "closest" else luck
    kept: Claims = {}
    pairs = sorted({(j, claim[3]) for (_, j), claim in claims.items()})
    sizes = [sum(claim[3] == g and p == j for (_, p), claim in claims.items()) for j, g in pairs]
    pool, group = np.array(pairs).reshape(-1, 2).T
    quotas = share_pairs(pool, group, np.array(sizes, np.int64), n_pools, config).quota
    for (j, g), quota in zip(pairs, quotas.tolist(), strict=True):
        mine = sorted((keys[row, p], row) for (row, p), claim in claims.items() if p == j and claim[3] == g)
        kept |= {(row, j): claims[row, j] for _, row in mine[:quota]}
    return kept


def owners(claims: Claims, config: RetrieveConfig, n_pools: int) -> dict[int, int]:
    """Which rows stay, and whose they are."""
    rows = sorted({row for row, _ in claims})
    if config.target is None or config.target >= len(rows):
        return {row: min((claims[row, j][0], j) for j in range(n_pools) if (row, j) in claims)[1] for row in rows}
    value = {at: claim[4] for at, claim in claims.items()}
    if config.pick == "random":
        luck = order_keys(np.array(rows), np.zeros(len(rows), "f4"), "random", config.seed).tolist()
        value = {(row, j): luck[rows.index(row)] for row, j in claims}
    lists = [sorted((value[row, p], row) for row, p in claims if p == j) for j in range(n_pools)]
    owner: dict[int, int] = {}
    while len(owner) < config.target:
        left = {j: [row for _, row in lists[j] if row not in owner] for j in range(n_pools)}
        turn = min((sum((row, j) in claims for row in owner), j) for j in range(n_pools) if left[j])[1]
        owner[left[turn][0]] = turn
    return owner


def expected_rows(
    config: RetrieveConfig, claims: Claims, looked: list[int], n_pools: int
) -> dict[int, tuple[bool, int | None, int, int | None, int, float | None]]:
    """row id -> kept, near_row, hits, seed, seed_pools, gap."""
    owner = owners(claims, config, n_pools)
    best = owners(claims, RetrieveConfig(mode=config.mode, seeds=config.seeds), n_pools)
    answer: dict[int, Any] = {}
    for row in looked:
        mine = [j for j in range(n_pools) if (row, j) in claims]
        hits, bits = sum(claims[row, j][2] for j in mine), sum(1 << j for j in mine)
        if not mine:
            answer[row] = (False, None, 0, None, 0, None)
            continue
        seed = owner.get(row, best[row])
        answer[row] = (row in owner, claims[row, seed][1], hits, seed, bits, claims[row, seed][0])
    return answer


CASES = [
    {"mode": "sample", "n_neighbors": 3},
    {"mode": "sample"},
    {"mode": "sample", "n_neighbors": 5, "max_rows": 11},
    {"mode": "sample", "n_neighbors": 5, "max_rows": 14, "pick": "closest", "target": 20},
    {"mode": "sample", "n_neighbors": 2, "target": 9},
    {"mode": "cluster", "min_hits": 0},
    {"mode": "cluster", "min_hits": 1, "per_cluster": 4},
    {"mode": "cluster", "min_hits": 1, "per_cluster": 4, "max_rows": 7, "pick": "closest"},
    {"mode": "cluster", "min_hits": 0, "max_rows": 20, "level": 1, "pick": "closest"},
    {"mode": "cluster", "min_hits": 2, "per_cluster": 9, "level": 1, "target": 13},
    {"mode": "cluster", "min_hits": 0, "per_cluster": 6, "target": 1000},
    {"mode": "cluster", "min_hits": 3, "per_cluster": 5, "level": 2},
]


class World(NamedTuple):
    web: Vectors
    tree: Tree
    selection: Artifact
    seeds: list[Vectors]

    def inputs(self, config: RetrieveConfig, selected: bool) -> dict[str, Artifact]:
        seeds = {f"seeds.{name}": pool.artifact for name, pool in zip(config.seeds, self.seeds, strict=True)}
        source = {"embeddings": self.web.artifact} if config.mode == "sample" else {"hierarchy": self.tree.artifact}
        return {**seeds, **source, **({"selection": self.selection} if selected else {})}


def make_world(root: Path, seed: int) -> World:
    rng = np.random.default_rng(seed)
    web = make_vectors(root, "web", [17, 0, 30, 5, 24, 1], rng)
    seeds = [make_vectors(root, f"seed{j}", sizes, rng) for j, sizes in enumerate(([6, 0, 5], [9], [2, 2]))]
    return World(web, make_tree(root, web, rng), make_selection(root, web, rng), seeds)


def run_stage(world: World, config: RetrieveConfig, selected: bool, at: Path | str, executor: Any = None) -> Output:
    executor = executor or LocalExecutor(Resources())
    out = Output(Location(str(at)), executor)
    out.facts["counts"] = retrieve.run(config, world.inputs(config, selected), out, executor)
    return out


@pytest.fixture(scope="module", params=range(3))
def world(request, tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), request.param)


def read_rows(out: Output, pool: Artifact) -> dict[int, dict[str, Any]]:
    tables = [read_table(out.location / part_name(i)).to_pylist() for i in range(len(pool.parts))]
    return {int(pool.starts[i]) + row["row"]: row for i, rows in enumerate(tables) for row in rows}


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_result_is_the_one_of_the_rule(world, tmp_path, monkeypatch, case, selected):
    monkeypatch.setattr(quotas, "BUCKET_ROWS", 5)
    monkeypatch.setattr(search, "SEARCH_GROUPS", 3)
    config = RetrieveConfig(seeds=("a", "b", "c"), seed=4, **case)
    out = run_stage(world, config, selected, tmp_path)
    web, pool = world.web, world.web.artifact.input("pool")
    chosen = chosen_ids(world.selection, pool) if selected else np.arange(int(pool.starts[-1]))
    allowed = np.isin(web.ids, chosen)
    if config.mode == "sample":
        claims, n_clusters = near_claims(config.k, web, allowed, world.seeds), [0, 0, 0]
    else:
        claims, n_clusters = cluster_claims(config, web, allowed, world.tree, world.seeds)
    uncut, claims = claims, cut_claims(claims, config, 3)
    expected = expected_rows(config, claims, web.ids[allowed].tolist(), 3)
    found = read_rows(out, pool)
    assert list(found) == sorted(expected)
    for row, (kept, near_row, hits, seed, bits, gap) in expected.items():
        mine = found[row]
        assert (mine["kept"], mine["near_row"], mine["hits"], mine["seed"], mine["seed_pools"]) == (
            kept, near_row, hits, seed, bits,
        ), row  # fmt: skip
        if config.mode == "sample":
            assert mine["similarity"] == (None if gap is None else -gap)
    check_clusters(world, config, found)
    check_facts(world, config, out, uncut, claims, n_clusters, {row for row, e in expected.items() if e[0]})
    counts = out.facts["counts"]
    bad = 0 if not selected else len(chosen) - int(allowed.sum())
    assert counts["bad"] == bad and counts["rows"] == len(expected) + bad == counts["kept"] + counts["dropped"] + bad


def check_clusters(world: World, config: RetrieveConfig, found: dict[int, dict[str, Any]]) -> None:
    """Every row says its cluster and how far from the centroid it is."""
    if config.mode == "sample":
        return
    level = config.level or 0
    at = np.searchsorted(world.web.ids, sorted(found))
    labels = world.tree.labels[level][at]
    gap = distances(world.web.x[at], world.tree.centroids[level])[np.arange(len(at)), labels]
    rows = [found[row] for row in sorted(found)]
    assert [row["cluster"] for row in rows] == labels.tolist()
    np.testing.assert_array_equal([row["sq_distance"] for row in rows], gap)


def check_facts(
    world: World, config: RetrieveConfig, out: Output, uncut: Claims, claims: Claims, n_clusters: list[int],
    kept: set[int],
) -> None:  # fmt: skip
    """The facts are those of the planner, and what became of it."""
    facts = out.facts["seed_pools"]
    assert list(facts) == list(config.seeds)
    for j, (fact, seeds) in enumerate(zip(facts.values(), world.seeds, strict=True)):
        plan = plan_seed_pool(
            config.mode, len(seeds.ids), n_neighbors=config.k, n_clusters=n_clusters[j], max_rows=config.max_rows,
            per_cluster=config.per_cluster, n_in_clusters=sum(pool == j for _, pool in uncut),
        )  # fmt: skip
        mine = {row for row, pool in claims if pool == j}
        assert fact == {**plan._asdict(), "retrieved": len(mine), "kept": len(mine & kept)}
        assert fact["retrieved"] <= fact["capped"] <= fact["nominal"]
    assert out.facts["counts"]["nominal"] == sum(fact["nominal"] for fact in facts.values())
    assert out.facts["counts"]["retrieved"] == len({row for row, _ in claims})
    json.dumps(out.facts)


def test_the_image_based_filter_of_datacomp(world, tmp_path):
    """Every image whose nearest centroid is that of at least one seed image, and no other."""
    config = RetrieveConfig(mode="cluster", seeds=("a", "b", "c"), min_hits=0)
    found = read_rows(run_stage(world, config, False, tmp_path), world.web.artifact.input("pool"))
    hit = {int(c) for pool in world.seeds for c in distances(pool.x, world.tree.centroids[0]).argmin(1)}
    near = distances(world.web.x, world.tree.centroids[0]).argmin(1)
    assert [found[row]["kept"] for row in world.web.ids.tolist()] == [int(c) in hit for c in near]


@pytest.mark.parametrize("case", [CASES[3], CASES[7], CASES[9]], ids=["sample", "cluster", "level"])
def test_how_work_is_cut_changes_no_byte(world, tmp_path, monkeypatch, case):
    config = RetrieveConfig(seeds=("a", "b", "c"), **case)
    run_stage(world, config, True, tmp_path / "one")
    monkeypatch.setattr(quotas, "BUCKET_ROWS", 1)
    monkeypatch.setattr(search, "SEARCH_GROUPS", 2)
    run_stage(world, config, True, tmp_path / "two")
    for i in range(len(world.web.artifact.parts)):
        assert (tmp_path / "one" / part_name(i)).read_bytes() == (tmp_path / "two" / part_name(i)).read_bytes()


@pytest.mark.parametrize("case", [CASES[3], CASES[9]], ids=["sample", "cluster"])
def test_s3_holds_the_same_bytes(world, tmp_path, on_s3, case):
    config = RetrieveConfig(seeds=("a", "b", "c"), **case)
    here, there = (run_stage(world, config, True, at) for at in (tmp_path, on_s3.uri))
    again = run_stage(world, config, True, on_s3.uri)
    assert there.files == here.files == again.files and there.facts == here.facts == again.facts


@pytest.mark.parametrize("case", [CASES[3], CASES[9]], ids=["sample", "cluster"])
def test_scratch_that_is_whole_is_not_made_again(world, tmp_path, case):
    """Every file is taken away in turn, with all that were made after it."""
    config = RetrieveConfig(seeds=("a", "b", "c"), **case)
    whole = run_stage(world, config, True, tmp_path)
    files = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    order = sorted(files, key=lambda path: path.stat().st_mtime_ns)
    rng = np.random.default_rng(0)
    for n in rng.choice(len(order), 6, replace=False).tolist():
        for path in order[n:]:
            path.unlink()
        before = {path: path.stat().st_mtime_ns for path in order[:n]}
        again = run_stage(world, config, True, tmp_path)
        assert {path: path.read_bytes() for path in files} == files
        assert {path: path.stat().st_mtime_ns for path in order[:n]} == before
        assert again.facts == whole.facts


def test_more_seed_pools_change_nothing_for_the_others(world, tmp_path):
    """Luck is an image's own."""
    case = {"mode": "cluster", "min_hits": 0, "per_cluster": 3}
    both = run_stage(world, RetrieveConfig(seeds=("a", "b", "c"), **case), False, tmp_path / "both")
    alone = run_stage(
        world._replace(seeds=world.seeds[:1]), RetrieveConfig(seeds=("a",), **case), False, tmp_path / "alone"
    )
    pool = world.web.artifact.input("pool")
    pairs = zip(read_rows(both, pool).values(), read_rows(alone, pool).values(), strict=True)
    assert all((a["seed_pools"] & 1) == b["seed_pools"] for a, b in pairs)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"mode": "sample", "n_neighbors": 78}, r"n_neighbors must be at most the rows to retrieve from: got 78 for"),
        ({"mode": "cluster", "level": 3}, r"level must be below the number of levels, 3: got 3"),
        ({"mode": "cluster", "min_hits": 40}, r"more than 40 images of one seed pool \(min_hits\): got at most \d+$"),
    ],
)
def test_what_cannot_be_retrieved_is_told(world, tmp_path, case, words):
    with pytest.raises(UserError, match=words) as caught:
        run_stage(world, RetrieveConfig(seeds=("a", "b", "c"), **case), False, tmp_path)
    assert caught.value.hint
    if "at most" in words and case["mode"] == "cluster":
        most = max(np.bincount(distances(pool.x, world.tree.centroids[0]).argmin(1)).max() for pool in world.seeds)
        assert caught.value.message.endswith(f" {most}")


@pytest.mark.parametrize("mode", ["sample", "cluster"])
def test_seeds_that_are_no_seeds_are_named(world, tmp_path, mode):
    rng = np.random.default_rng(0)
    config = RetrieveConfig(mode=mode, seeds=("a", "birds"))
    empty = world._replace(seeds=[world.seeds[0], make_vectors(tmp_path, "empty", [0], rng)])
    with pytest.raises(UserError, match="must have images that were embedded: birds has none"):
        run_stage(empty, config, False, tmp_path / "out")
    other = make_vectors(tmp_path, "other", [9], rng, {"name": "another"})
    with pytest.raises(UserError, match="one backbone: got another for birds and made up for the pool"):
        run_stage(world._replace(seeds=[world.seeds[0], other]), config, False, tmp_path / "out")


STEPS: dict[str, dict[str, Any]] = {
    "web": {"stage": "pool", "source": "web"},
    "birds": {"stage": "pool", "source": "birds"},
    "web_vec": {"stage": "embed", "pool": "web", "backbone": "pixels"},
    "birds_vec": {"stage": "embed", "pool": "birds", "backbone": "pixels"},
    "tree": {"stage": "cluster", "embeddings": "web_vec", "n_clusters": [4]},
}


@pytest.mark.parametrize(
    ("step", "words", "hint"),
    [
        ({"mode": "sample"}, r"near must name its embeddings in mode 'sample': got none", "stage embed"),
        ({"mode": "cluster"}, r"near must name its hierarchy in mode 'cluster': got none", "stage cluster"),
        ({"mode": "cluster", "hierarchy": "web_vec"}, r"near.hierarchy must name a step of stage cluster", ""),
        ({"mode": "sample", "embeddings": "web_vec", "min_hits": 3}, r"near.min_hits must be left out in mode "
         "'sample': got 3", "mode 'cluster'"),
        ({"mode": "sample", "embeddings": "web_vec", "hierarchy": "tree"}, r"near.hierarchy must be left out .* 'tree'",
         "mode 'cluster'"),
        ({"mode": "cluster", "hierarchy": "tree", "n_neighbors": 2}, r"near.n_neighbors must be left out in mode "
         "'cluster': got 2", "mode 'sample'"),
        ({"mode": "cluster", "hierarchy": "tree", "embeddings": "web_vec"}, r"near.embeddings must be left out", ""),
        ({"mode": "sample", "embeddings": "web_vec", "target": 0}, r"retrieve.target must be at least 1: got 0", ""),
        ({"mode": "nearest", "embeddings": "web_vec"}, r"retrieve.mode must be 'sample' or 'cluster'", ""),
    ],
)  # fmt: skip
def test_keys_of_another_mode_are_refused_before_anything_runs(step, words, hint):
    tree = {"steps": {**STEPS, "near": {"stage": "retrieve", "seeds": ["birds_vec"], **step}}}
    with pytest.raises(UserError, match=words) as caught:
        parse_recipe(tree, STAGES)
    assert hint in caught.value.hint


def save_digits(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True)
    for i in numbers:
        digit(i).save(folder / f"{i:04d}.png")


def check_union(twice: Artifact) -> None:
    """Each bird stands in both members of the union, itself and its copy in the web; as seeds all find themselves."""
    pool = twice.input("embeddings").input("pool")
    rows = [row for i in range(len(pool.parts)) for row in read_table(twice.part(i)).to_pylist()]
    assert [row["seed_pools"] for row in rows] == [2] * 20 + [3] * 10 + [2] * 30 + [3] * 10
    birds = [row for row in rows if row["seed"] == 0]
    assert [row["near_row"] for row in birds] == [*range(10), *range(10)] and all(row["kept"] for row in rows)


def test_a_recipe_retrieves_near_its_seeds(tmp_path):
    """The seeds are pictures of the pool: each finds itself. What is retrieved can be drawn from and stored."""
    save_digits(tmp_path / "web", range(60))
    save_digits(tmp_path / "birds", range(20, 30))
    steps = {name: dict(step) for name, step in STEPS.items()}
    steps["web"] |= {"source": str(tmp_path / "web"), "part_rows": 16}
    steps["birds"] |= {"source": str(tmp_path / "birds")}
    steps["near"] = {"stage": "retrieve", "mode": "sample", "embeddings": "web_vec", "seeds": ["birds_vec"],
                     "n_neighbors": 1}  # fmt: skip
    steps["inside"] = {"stage": "retrieve", "mode": "cluster", "hierarchy": "tree", "selection": "near",
                       "seeds": ["birds_vec"], "min_hits": 0}  # fmt: skip
    steps["shards"] = {"stage": "shards", "pool": "web", "selection": "inside"}
    steps["both"] = {"stage": "union", "members": ["web", "birds"]}
    steps["both_vec"] = {"stage": "union", "members": ["web_vec", "birds_vec"], "pool": "both"}
    steps["all"] = {"stage": "select", "pool": "both", "where": "true"}
    steps["twice"] = {"stage": "retrieve", "mode": "sample", "embeddings": "both_vec", "selection": "all",
                      "seeds": ["birds_vec", "both_vec"], "n_neighbors": 2}  # fmt: skip
    recipe = parse_recipe({"steps": steps}, STAGES)
    results = run_recipe(recipe, Location(str(tmp_path / "root")), LocalExecutor(recipe.resources))
    found = {result.name: Artifact(result.location) for result in results if result.location}
    rows = [row for i in range(4) for row in read_table(found["near"].part(i)).to_pylist()]
    assert [i for i, row in enumerate(rows) if row["kept"]] == list(range(20, 30))
    assert [row["near_row"] for row in rows if row["kept"]] == list(range(10))
    assert all(row["similarity"] == pytest.approx(1, abs=1e-6) for row in rows if row["kept"])
    assert found["inside"].counts["kept"] == found["shards"].counts["kept"] == 10
    assert found["near"].facts["seed_pools"] == {
        "birds_vec": {"mode": "sample", "n_seeds": 10, "clusters": None, "nominal": 10, "capped": 10, "retrieved": 10,
                      "kept": 10}
    }  # fmt: skip
    check_union(found["twice"])
    steps["other"] = {"stage": "select", "pool": "birds", "where": "true"}
    steps["near"] |= {"selection": "other"}
    steps["inside"].pop("selection")
    for last, key in (("near", "embeddings"), ("inside", "hierarchy")):
        steps["inside"]["selection"] = "other"
        tree = {"steps": {name: steps[name] for name in (*STEPS, "other", last)}}
        recipe = parse_recipe(tree, STAGES)
        with pytest.raises(UserError, match=rf"{last}.selection must select from the pool of {last}.{key}"):
            list(run_recipe(recipe, Location(str(tmp_path / "root")), LocalExecutor(recipe.resources)))


@pytest.mark.parametrize("case", [CASES[3], CASES[9]], ids=["sample", "cluster"])
def test_what_sees_every_claim_is_never_on_the_driver(world, tmp_path, ray_executor, monkeypatch, case):
    """What gathers rows or pairs is made useless in this process; workers have their own."""
    config = RetrieveConfig(seeds=("a", "b", "c"), **case)
    here = run_stage(world, config, True, tmp_path / "here")
    for name in ("draft", "find_cuts", "share_pairs", "judge", "cluster_claims"):
        users = [module for module in (retrieve, search, clusters, quotas) if hasattr(module, name)]
        assert users
        for module in (*users, kernel):
            monkeypatch.setattr(module, name, None)
    there = run_stage(world, config, True, tmp_path / "there", ray_executor)
    assert [file.sha256 for file in there.files] == [file.sha256 for file in here.files]
