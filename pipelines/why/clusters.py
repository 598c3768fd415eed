"""What ``cluster``, ``sample`` and ``retrieve`` have to say about one image: where it lies, what was drawn there."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation.artifact import Artifact, read_table
from curation.execute import on_worker
from curation.labelling import assign_part
from curation.retrieve import RetrieveConfig
from curation.store import Location
from pipelines.stages.retrieval.clusters import centroids_of_level
from pipelines.stages.retrieval.job import SeedPart, seed_parts
from pipelines.why.find import Image, rows_where
from pipelines.why.run import (
    Run,
    Seat,
    Told,
    count_rows,
    counted,
    decisions,
    matching_rows,
    picture,
    picture_text,
    row_of,
    seats,
)


def tell_cluster(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """The clusters around the image, from the finest to the coarsest, with their sizes."""
    n_clusters: list[int] = step.facts["n_clusters"]
    for _, decision in decisions(run, step, image):
        path = [int(decision["label"])]
        for level in range(1, len(n_clusters)):
            path.append(cluster_above(step, level, path[-1]))
        sizes = cluster_sizes(run, step, path)
        clusters = [
            {"level": level, "cluster": cluster, "of": n_clusters[level], "images": sizes[level]}
            for level, cluster in enumerate(path)
        ]
        words = [f"{c['cluster']} of {c['of']:,} ({counted(c['images'], 'image')})" for c in clusters]
        facts = {"clusters": clusters, "sq_distance": decision["sq_distance"]}
        yield Told("labelled", f"in cluster {', in '.join(words)}", facts, [])


def label_files(tree: Artifact, level: int) -> list[tuple[Location, int]]:
    """The files with the labels of a level's lower clusters, each with the first of these."""
    found, first = [], 0
    for file in tree.files:
        if file.name.startswith(f"labels-{level}-"):
            found.append((tree.location / file.name, first))
            first += file.rows
    return found


def cluster_above(tree: Artifact, level: int, cluster: int) -> int:
    """The cluster of a level that a cluster of the level below is in."""
    location, first = [entry for entry in label_files(tree, level) if entry[1] <= cluster][-1]
    return int(next(row_of(location, cluster - first))["label"])


def cluster_sizes(run: Run, tree: Artifact, path: Sequence[int]) -> list[int]:
    """Images of each cluster on a path, finest first."""
    finest = []
    for level, cluster in enumerate(path):
        wanted = np.array([cluster])
        for t in range(level, 0, -1):  # what is in it, down to the finest level
            found = run.executor.map(partial(clusters_in, wanted=wanted), label_files(tree, t))
            wanted = np.concatenate(list(found))
        finest.append(wanted)
    total = np.zeros(len(path), np.int64)
    for some in run.executor.map(partial(images_in, tree=tree), range(len(tree.parts)), shared={"finest": finest}):
        total += some
    return [int(n) for n in total]


def clusters_in(file: tuple[Location, int], wanted: np.ndarray) -> np.ndarray:
    """int64 (n,): the clusters of one file that are in a wanted cluster of the level above."""
    location, first = file
    inside: np.ndarray = first + np.flatnonzero(np.isin(read_table(location, ["label"])["label"].to_numpy(), wanted))
    return inside


def images_in(index: int, tree: Artifact, finest: Sequence[np.ndarray]) -> np.ndarray:
    """int64 (n,): images of one part in each set of level-0 clusters."""
    labels = read_table(tree.part(index), ["label"])["label"].to_numpy()
    return np.array([np.isin(labels, some).sum() for some in finest], np.int64)


def tell_sample(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """The quota of the cluster that the image is drawn from, and whether the image was drawn."""
    config = step.manifest["config"]
    pick = config["pick"]
    for seat, decision in decisions(run, step, image):
        cluster, quota, count = decision["cluster"], decision["quota"], decision["count"]
        n = sum(count_rows(run, step, "cluster", cluster).values())
        facts = {"cluster": cluster, "quota": quota, "cluster_images": n, "count": count, "pick": pick}
        how = "at random"
        if pick == "closest":
            facts["rank"] = rank_in_cluster(run, step.input("hierarchy"), seat, cluster)
            how = f"the closest to its centroid, of which this is number {facts['rank']:,}"
        gave = f"{drawn_from(config, cluster)} gave {quota:,} of {counted(n, 'image')}"
        if count:
            times = "" if count == 1 else f" {count} times"
            yield Told("kept", f"{gave}; this one was drawn{times} (picked {how}{capped(config)})", facts, [])
        else:
            yield Told("dropped", f"{gave}; this one was not among them (picked {how}{capped(config)})", facts, [])


def drawn_from(config: Mapping[str, Any], cluster: int) -> str:
    """What the quota is of. Settings that are left out have the stage's defaults."""
    if config.get("mode") == "uniform":
        return "the whole hierarchy"
    level = config.get("level")
    return f"its cluster {cluster}" + (f" of level {level}" if level else "")


def capped(config: Mapping[str, Any]) -> str:
    """The cap of a sample, if it has one."""
    caps = ((name, config.get(f"max_per_{name}")) for name in ("source", "label"))
    return "".join(f", at most {cap:,} of a {name}" for name, cap in caps if cap is not None)


def rank_in_cluster(run: Run, tree: Artifact, seat: Seat, cluster: int) -> int:
    """1 for the image closest to the centroid of its cluster, ties to the lower row."""
    mine = next(row_of(tree.part(seat.part), seat.row))["sq_distance"]
    closer = pc.field("sq_distance") < mine
    first = (pc.field("sq_distance") == mine) & (pc.field("row") < seat.row)
    own = pc.field("label") == cluster
    parts = range(len(tree.parts))
    ahead = [own & (closer if i > seat.part else closer | (pc.field("sq_distance") == mine) if i < seat.part
                    else closer | first) for i in parts]  # fmt: skip
    return 1 + sum(run.executor.map(partial(count_where, tree=tree), list(zip(parts, ahead, strict=True))))


def count_where(item: tuple[int, pc.Expression], tree: Artifact) -> int:
    """Rows of one part that meet a condition."""
    return int(rows_where(tree.part(item[0]), item[1], ["row"]).num_rows)


def tell_retrieve(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """Which seed image asked for the image, or why none did; or what the image asked for as a seed."""
    config = step.manifest["config"]
    for _, decision in decisions(run, step, image):
        if decision["near_row"] is None:
            facts = {"cluster": decision["cluster"]} if "cluster" in decision else {}
            yield Told("dropped", not_retrieved(run, step, config, decision), facts, [])
        else:
            yield tell_retrieved(run, step, config, decision)
    for index, name in enumerate(config["seeds"]):
        seeds = step.input(f"seeds.{name}")
        for seat in seats(image, run.pool(seeds)):
            if any(row_of(seeds.part(seat.part), seat.row)):
                condition = (pc.field("seed") == index) & (pc.field("near_row") == seat.position)
                n, first = matching_rows(run, step, condition)
                near = [picture(run, run.pool(step), position) for position in first]
                text = f"of {counted(n, 'retrieved image')} it is the nearest seed image"
                yield Told("seed", text, {"seeds": name, "n_retrieved": n, "near": near}, [*map(picture_text, near)])


def tell_retrieved(run: Run, step: Artifact, config: Mapping[str, Any], decision: Mapping[str, Any]) -> Told:
    """An image that seed pools retrieved, whether or not it found a place within the target."""
    seeds: list[str] = config["seeds"]
    nearest = picture(run, run.pool(step.input(f"seeds.{seeds[decision['seed']]}")), decision["near_row"])
    by = [name for bit, name in enumerate(seeds) if decision["seed_pools"] >> bit & 1]
    names = ("similarity", "cluster", "sq_distance", "hits")
    facts = {name: decision[name] for name in names if name in decision} | {"seed_pools": by, "nearest": nearest}
    how = f"near {nearest['name']} of {nearest['pool']}"
    how += f" (similarity {decision['similarity']:.6g})" if "similarity" in decision else ""
    if config["mode"] == "cluster":
        how = (
            f"in cluster {decision['cluster']}, where {counted(decision['hits'], 'seed image lies', 'seed images lie')}"
        )
    text = f"{how}, retrieved for {', '.join(by)}"
    if not decision["kept"]:
        text += f", but not among the {config['target']:,} images of the target"
    outcome = "kept" if decision["kept"] else "dropped"
    return Told(outcome, text, facts, [f"nearest seed image: {picture_text(nearest)}"])


def not_retrieved(run: Run, step: Artifact, config: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    """Why no seed pool has an image, in one line. Settings that are left out have the stage's defaults."""
    settings = RetrieveConfig(**{**config, "seeds": tuple(config["seeds"])})
    if settings.mode == "sample":
        cut = "" if settings.max_rows is None else f", or max_rows {settings.max_rows:,} cut it"
        return f"no seed image has it among its {settings.k} nearest{cut}"
    own = pc.field("cluster") == decision["cluster"]
    n, _ = matching_rows(run, step, own)
    n_retrieved, _ = matching_rows(run, step, own & pc.field("near_row").is_valid())
    if n_retrieved:
        gave = f"its cluster {decision['cluster']} gave {n_retrieved:,} of {counted(n, 'image')}"
        return f"{gave}; this one was not among them (picked {settings.pick})"
    if settings.max_rows is not None and max(seeds_in_cluster(run, step, settings, decision["cluster"])) > (
        settings.most_hits_without
    ):
        gave = f"its cluster {decision['cluster']} gave none of {counted(n, 'image')}: its quota was 0"
        return f"{gave}, because max_rows {settings.max_rows:,} is shared by all clusters that qualify"
    least = settings.most_hits_without + 1
    return f"fewer than {counted(least, 'image')} of any seed pool lie in its cluster {decision['cluster']}"


def seeds_in_cluster(run: Run, step: Artifact, config: RetrieveConfig, cluster: int) -> list[int]:
    """How many images of each seed pool lie in a cluster, found as ``retrieve`` finds it.

    A task holds the centroids of the level and one part of a seed pool.
    """
    pools = [step.input(f"seeds.{name}") for name in config.seeds]
    parts = seed_parts(pools)
    read = partial(centroids_of_level, tree=step.input("hierarchy"), level=config.cluster_level)
    shared = {"centroids": on_worker(run.executor, read, {})}
    found = [0] * len(pools)
    for seeds, n in zip(parts, run.executor.map(partial(seeds_in_part, cluster=cluster), parts, shared), strict=True):
        found[seeds.pool] += n
    return found


def seeds_in_part(seeds: SeedPart, cluster: int, centroids: np.ndarray) -> int:
    """Images of one part of a seed pool in a cluster."""
    labels, _ = assign_part(seeds.vectors, centroids)
    return int(np.count_nonzero(labels == cluster))
