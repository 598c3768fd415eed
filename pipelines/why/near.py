"""What ``neighbors``, ``dedup`` and ``decontaminate`` have to say about one image: which images are near it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation.artifact import Artifact
from pipelines.rows import place_in_parts, vectors_of_part
from pipelines.why.chain import MAX_REACHED, Hop, shortest_chain
from pipelines.why.find import Image
from pipelines.why.run import (
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
    row_of,
    seats,
)


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
    part, row = place_in_parts(position, pool)
    stays = next(row_of(step.part(part), row))["kept"]
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
        part, row = place_in_parts(position, pool)
        items.append((part, np.array([row])))
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
    if decision["near_row"] is None or similarity is None:
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
        part, row = place_in_parts(position, pool)
        decision = next(row_of(step.part(part), row))
    return [*chain, {**picture(run, reference, decision["near_row"]), "similarity": decision["similarity"]}]
