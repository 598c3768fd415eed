"""What the steps of a run have to say about one image: a function a stage, in a table.

Each yields what became of the image in one step, and nothing where the step did not look at it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation.artifact import Artifact, read_table
from curation.retrieve import RetrieveConfig
from curation.shards import EXTENSIONS
from curation.store import Location
from pipelines.report_sections import vectors_of_part
from pipelines.stages.shards import shard_name
from pipelines.why_chain import MAX_REACHED, Hop, shortest_chain
from pipelines.why_find import Image, rows_where
from pipelines.why_run import (
    N_SHOWN,
    Run,
    Seat,
    Told,
    count_rows,
    counted,
    decisions,
    matching_rows,
    number,
    picture,
    picture_text,
    place_of,
    place_text,
    row_of,
    seats,
)

Tell = Callable[[Run, Artifact, Image], Iterator[Told]]


def tell_pool(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """What the pool saw of the image, or why it refused it."""
    if image.pool.location.uri != step.location.uri:
        return
    v = image.values
    place = place_of(step, image.part or 0, v)
    if image.part is None:
        why = f"{v['reason']}, {v['detail']}" if v["detail"] else str(v["reason"])
        why = f"exact duplicate of {v['duplicate_of']}" if v["reason"] == "exact_duplicate" else why
        facts = {key: v[key] for key in ("reason", "detail", "duplicate_of")}
        yield Told("refused", f"{image.name}, {why}", {**facts, **place}, [place_text(place)])
        return
    label = "" if v["label"] is None else f", label {v['label']}"
    text = f"row {v['row_id']:,} of {int(step.starts[-1]):,}, {image.name}, {v['width']} x {v['height']} {v['format']}"
    facts = {key: v[key] for key in ("row_id", "format", "width", "height", "n_bytes", "label", "caption")}
    shown = ", ".join(image.copies[:N_SHOWN]) + (" and others" if len(image.copies) > N_SHOWN else "")
    copies = [f"refused as exact duplicates of it: {shown}"] if image.copies else []
    text += f", {v['n_bytes']:,} bytes{label}"
    yield Told("kept", text, {**facts, **place, "copies": list(image.copies)}, [place_text(place), *copies])


def tell_union(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """Where the image stands among all members, of which nothing is copied."""
    total = int(run.pool(step).starts[-1])
    for seat in seats(image, run.pool(step)):
        if step.kind == "pool" or any(row_of(step.part(seat.part), seat.row)):
            text = f"row {seat.position:,} of {total:,} of the union"
            yield Told("member", text, {"row_id": seat.position}, [])


def tell_select(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """Whether the expression is true of the image, with the columns that it names."""
    where = step.manifest["config"]["where"]
    values = {name: value for name, value in image.values.items() if named_in(where, name)}
    shown = ", ".join(f"{name} is {'null' if value is None else value}" for name, value in values.items())
    for _, decision in decisions(run, step, image):
        outcome = "kept" if decision["kept"] else "dropped"
        text = f"{where} is {'true' if decision['kept'] else 'not true'}" + (f" ({shown})" if shown else "")
        yield Told(outcome, text, {"where": where, "values": values}, [])


def named_in(expression: str, column: str) -> bool:
    """Whether an SQL expression names a column; case does not count there."""
    return re.search(rf"(?<!\w){re.escape(column)}(?!\w)", expression, re.IGNORECASE) is not None


def tell_embed(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """Whether the image became a vector."""
    backbone, width = step.facts["backbone"]["name"], step.facts["width"]
    for seat in seats(image, run.pool(step)):
        for _ in row_of(step.part(seat.part), seat.row):
            text = f"embedded by {backbone} ({width} numbers)"
            yield Told("embedded", text, {"backbone": backbone, "width": width}, [])
        for bad in row_of(step.part(seat.part, "rejected"), seat.row):
            facts = {"reason": bad["reason"], "detail": bad["detail"]}
            yield Told("rejected", f"{bad['reason']}, {bad['detail']}", facts, [])


def tell_neighbors(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """How many images are near, and the nearest of them."""
    pool, low = run.pool(step), step.manifest["config"]["min_similarity"]
    embeddings = step.input("embeddings")
    for seat in seats(image, pool):
        if not any(row_of(embeddings.part(seat.part), seat.row)):
            continue
        edges = list(row_of(step.part(seat.part), seat.row))
        near = [{**picture(run, pool, edge["near_row"]), "similarity": edge["similarity"]} for edge in edges[:N_SHOWN]]
        facts = {"edges": len(edges), "min_similarity": low, "near": near}
        if not edges:
            yield Told("alone", f"no image is near it (similarity of at least {low:g})", facts, [])
            continue
        text = f"{counted(len(edges), 'image is', 'images are')} near it (similarity of at least {low:g})"
        yield Told("near", text, facts, [f"{shown['similarity']:.6g}  {picture_text(shown)}" for shown in near])


def tell_dedup(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """Which image of a group of near copies stayed, and how this one is joined to it."""
    rule = step.manifest["config"].get("rule", "component")
    for seat, decision in decisions(run, step, image):
        if decision["near_row"] is None:
            yield Told("kept", "it has no near copy", {"rule": rule}, [])
        elif rule == "component":
            yield tell_component(run, step, seat, decision)
        else:
            yield tell_earlier(run, step, seat, decision)


def tell_earlier(run: Run, step: Artifact, seat: Seat, decision: Mapping[str, Any]) -> Told:
    """Rule ``semdedup``: the nearest image that comes before this one, or those that this one is the nearest of."""
    pool, keep = run.pool(step), step.manifest["config"]["keep"]
    if decision["kept"]:
        n, first = dropped_rows(run, step, "representative", seat.position)
        dropped = [picture(run, pool, position) for position in first]
        text = f"no image near it comes before it ({keep}); {counted(n, 'image was', 'images were')} dropped for it"
        facts = {"rule": "semdedup", "keep": keep, "n_dropped": n, "dropped": dropped}
        return Told("kept", text, facts, [f"dropped for it: {picture_text(shown)}" for shown in dropped])
    position = decision["representative"]
    part = int(np.searchsorted(pool.starts, position, side="right")) - 1
    stays = next(row_of(step.part(part), position - int(pool.starts[part])))["kept"]
    similarity = cosine(run, step.input("neighbors").input("embeddings"), (pool, seat.position), (pool, position))
    earlier = {**picture(run, pool, position), "similarity": similarity, "kept": stays}
    what = "stays" if stays else "was dropped too"
    text = f"near copy of {earlier['name']}, which comes before it ({keep}) and {what} (similarity {similarity:.6g})"
    facts = {"rule": "semdedup", "keep": keep, "representative": earlier}
    return Told("dropped", text, facts, [f"{what}: {picture_text(earlier)}"])


def tell_component(run: Run, step: Artifact, seat: Seat, decision: Mapping[str, Any]) -> Told:
    """Rule ``component``: the image that stays of all that near copies join."""
    stayed = decision["representative"]
    sizes = count_rows(run, step, "representative", stayed)
    n = sum(sizes.values())
    facts: dict[str, Any] = {"rule": "component", "component_images": n}
    if not decision["kept"]:
        return tell_copy(run, step, seat, decision, facts, [part for part, some in sizes.items() if some])
    _, first = dropped_rows(run, step, "representative", stayed)
    facts["dropped"] = [picture(run, run.pool(step), position) for position in first]
    text = f"the one that stays of {counted(n, 'image')} joined by near copies"
    return Told("kept", text, facts, [f"dropped for it: {picture_text(shown)}" for shown in facts["dropped"]])


def tell_copy(
    run: Run, step: Artifact, seat: Seat, decision: Mapping[str, Any], facts: dict[str, Any], parts: Sequence[int]
) -> Told:
    """An image that was dropped for its representative. ``parts`` are those that hold the component."""
    near = step.input("neighbors")
    pool, stayed = run.pool(step), decision["representative"]
    similarity = cosine(run, near.input("embeddings"), (pool, seat.position), (pool, stayed))
    representative = {**picture(run, pool, stayed), "similarity": similarity}
    strongest = {**picture(run, pool, decision["near_row"]), "similarity": decision["similarity"]}
    chain = shortest_chain(near, pool.starts, parts, seat.position, stayed, run.executor)
    facts |= {"representative": representative, "strongest": strongest, "keep": step.manifest["config"]["keep"]}
    facts["chain"] = None if chain is None else shown_chain(run, pool, chain)
    directly = chain is not None and len(chain) == 1
    how = "near copy of" if directly else "joined by a chain of near copies to"
    text = f"{how} {representative['name']}, which stays (similarity {similarity:.6g})"
    details = [
        f"stays ({facts['keep']}): {picture_text(representative)}",
        f"strongest: {decision['similarity']:.6g}  {picture_text(strongest)}",
        f"component: {counted(facts['component_images'], 'image')}",
    ]
    if chain is None:
        details.append(f"the chain is not told: it leads through more than {MAX_REACHED:,} images")
    elif not directly:
        details += [f"  {hop['similarity']:.6g}  {picture_text(hop)}" for hop in facts["chain"]]
    return Told("dropped", text, facts, details)


def shown_chain(run: Run, pool: Artifact, chain: Sequence[Hop]) -> list[dict[str, Any]]:
    """The images of a chain, each with its similarity to the one before."""
    return [{**picture(run, pool, hop.position), "similarity": hop.similarity} for hop in chain]


def cosine(run: Run, embeddings: Artifact, *places: tuple[Artifact, int]) -> float:
    """The similarity of two images of the pool behind embeddings, a float64 sum as in the report."""
    items = []
    for pool, position in places:
        part = int(np.searchsorted(pool.starts, position, side="right")) - 1
        items.append((part, np.array([position - int(pool.starts[part])])))
    a, b = run.executor.map(partial(vectors_of_part, embeddings=embeddings), items)
    return float(a[0] @ b[0])


def dropped_rows(
    run: Run, step: Artifact, column: str, value: int, *conditions: pc.Expression
) -> tuple[int, list[int]]:
    """How many rows were dropped with a value in a column, and the positions of the first N_SHOWN."""
    condition = (pc.field(column) == value) & ~pc.field("kept")
    for other in conditions:
        condition &= other
    return matching_rows(run, step, condition)


def tell_decontaminate(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """How near the image is to a reference pool; or what it was the reference for."""
    config = step.manifest["config"]
    reference, low = run.pool(step.input("reference")), config["min_similarity"]
    for _, decision in decisions(run, step, image):
        yield tell_leak(run, step, reference, decision)
    for seat in seats(image, reference):
        if not any(row_of(step.input("reference").part(seat.part), seat.row)):
            continue
        directly = [] if config.get("mode", "direct") == "direct" else [pc.field("hops") == 1]
        n, first = dropped_rows(run, step, "near_row", seat.position, *directly)
        dropped = [picture(run, run.pool(step), position) for position in first]
        text = f"{counted(n, 'image was', 'images were')} dropped because of it"
        facts = {"n_dropped": n, "dropped": dropped, "min_similarity": low}
        yield Told("reference", text, facts, [picture_text(shown) for shown in dropped])


def tell_leak(run: Run, step: Artifact, reference: Artifact, decision: Mapping[str, Any]) -> Told:
    """The nearest reference image, and the chain that leads to one in component mode."""
    low, similarity = step.manifest["config"]["min_similarity"], number(decision["similarity"])
    facts: dict[str, Any] = {"min_similarity": low, "similarity": similarity}
    if decision["near_row"] < 0 or similarity is None:
        return Told("kept", "there is no reference image", facts, [])
    nearest = picture(run, reference, decision["near_row"])
    facts["nearest"] = nearest
    nearest_text = f"nearest reference image: {similarity:.6g}  {picture_text(nearest)}"
    if decision["kept"]:
        text = f"the nearest image of {nearest['pool']} is at {similarity:.6g}, below {low:g}"
        return Told("kept", text, facts, [nearest_text])
    if decision.get("hops", 1) == 1:
        text = f"near {nearest['name']} of {nearest['pool']} (similarity {similarity:.6g}, at least {low:g})"
        return Told("dropped", text, facts, [nearest_text])
    facts |= {"hops": decision["hops"], "chain": chain_to_reference(run, step, reference, decision)}
    last = facts["chain"][-1]
    text = f"a chain of {decision['hops']} near pairs leads to {last['name']} of {last['pool']}"
    return Told("dropped", text, facts, [f"  {hop['similarity']:.6g}  {picture_text(hop)}" for hop in facts["chain"]])


def chain_to_reference(
    run: Run, step: Artifact, reference: Artifact, decision: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One image a hop, the last of the reference pool, each with its similarity to the one before."""
    pool = run.pool(step)
    chain = []
    while decision["hops"] > 1:
        position = decision["through"]
        chain.append({**picture(run, pool, position), "similarity": decision["through_similarity"]})
        part = int(np.searchsorted(pool.starts, position, side="right")) - 1
        decision = next(row_of(step.part(part), position - int(pool.starts[part])))
    return [*chain, {**picture(run, reference, decision["near_row"]), "similarity": decision["similarity"]}]


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
    """The quota of the image's cluster, and whether the image was drawn."""
    pick = step.manifest["config"]["pick"]
    for seat, decision in decisions(run, step, image):
        cluster, quota, count = decision["cluster"], decision["quota"], decision["count"]
        n = sum(count_rows(run, step, "cluster", cluster).values())
        facts = {"cluster": cluster, "quota": quota, "cluster_images": n, "count": count, "pick": pick}
        how = "at random"
        if pick == "closest":
            facts["rank"] = rank_in_cluster(run, step.input("hierarchy"), seat, cluster)
            how = f"the closest to its centroid, of which this is number {facts['rank']:,}"
        gave = f"its cluster {cluster} gave {quota:,} of {counted(n, 'image')}"
        if count:
            times = "" if count == 1 else f" {count} times"
            yield Told("kept", f"{gave}; this one was drawn{times} (picked {how})", facts, [])
        else:
            yield Told("dropped", f"{gave}; this one was not among them (picked {how})", facts, [])


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
    least = settings.most_hits_without + 1
    return f"fewer than {counted(least, 'image')} of any seed pool lie in its cluster {decision['cluster']}"


def tell_mix(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """How often the image is seen, and in an epoch of which component."""
    for _, decision in decisions(run, step, image):
        of = counts_of(decision)
        facts = {"count": decision["count"]} | ({"count_of": of} if of else {})
        yield Told("kept", f"seen {times_text(decision['count'], of)}", facts, [])


def counts_of(row: Mapping[str, Any]) -> dict[str, int]:
    """How often an epoch of each component has the image: the columns ``count:<component>`` that are not 0."""
    return {name.partition(":")[2]: n for name, n in row.items() if name.startswith("count:") and n}


def times_text(count: int, of: Mapping[str, int]) -> str:
    """``once an epoch``, or how often in an epoch of each component."""
    if of:
        return ", ".join(f"{'once' if n == 1 else f'{n} times'} an epoch of {name}" for name, n in of.items())
    return "once an epoch" if count == 1 else f"{count} times an epoch"


def tell_shards(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """In which tar the image is, and how often an epoch shows it."""
    own = [seat.position for seat in seats(image, run.pool(step))]
    shards = range(len(step.parts)) if own else range(0)
    for index, rows in enumerate(run.executor.map(partial(shard_rows, step=step, key=image.key), shards)):
        for row in rows:
            yield tell_shard(run, step, row["row_id"] in own, index, row)


def shard_rows(index: int, step: Artifact, key: str | None) -> list[dict[str, Any]]:
    """What the index of one shard says of a key: one row, or none."""
    found: list[dict[str, Any]] = rows_where(step.part(index), pc.field("key") == key).to_pylist()
    return found


def tell_shard(run: Run, step: Artifact, is_own: bool, index: int, row: Mapping[str, Any]) -> Told:
    """An image's place in a set of shards. A key stands there once: if not as its own, as an image of another pool."""
    member = f"{row['key']}.{EXTENSIONS.get(row['format'], row['format'])}"
    shard, count = shard_name(index), row["count"]
    facts = {"shard": shard, "path": str(step.location / shard), "offset": row["offset"], "length": row["length"],
             "member": member, "count": count}  # fmt: skip
    of = counts_of(row)
    facts |= {"count_of": of} if of else {}
    times = times_text(count, of)
    place = f"{facts['path']} (byte {row['offset']}: {member})"
    if is_own:
        return Told("in", f"in {shard}, {times}", facts, [place])
    twin = picture(run, run.pool(step), row["row_id"])
    text = f"its bytes are in {shard} as those of {twin['name']} of {twin['pool']}, {times}"
    return Told("twin", text, {**facts, "twin": twin}, [place, picture_text(twin)])


def tell_evaluate(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """What was predicted of a query, and what an image of the bank votes for."""
    for seat in seats(image, step.input("queries")):
        for answer in row_of(step.part(seat.part), seat.row):
            right = answer["label"] == answer["predicted"]
            text = f"label {answer['label']}, predicted {answer['predicted']} ({'right' if right else 'wrong'})"
            yield Told("query", text, {key: answer[key] for key in ("label", "predicted")} | {"right": right}, [])
    label = image.values.get("label")
    if seats(image, step.input("bank")) and label is not None:
        yield Told("bank", f"votes with its label {label}", {"label": label}, [])


NOTHING_TO_SAY = frozenset({"train", "report"})  # of one image

TELL: dict[str, Tell] = {
    "pool": tell_pool,
    "union": tell_union,
    "select": tell_select,
    "embed": tell_embed,
    "neighbors": tell_neighbors,
    "dedup": tell_dedup,
    "decontaminate": tell_decontaminate,
    "cluster": tell_cluster,
    "sample": tell_sample,
    "retrieve": tell_retrieve,
    "mix": tell_mix,
    "shards": tell_shards,
    "evaluate": tell_evaluate,
}
