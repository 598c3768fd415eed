"""What ``neighbors``, ``dedup`` and ``decontaminate`` have to say about one image: which images are near it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation.artifact import Artifact
from pipelines.rows import place_in_parts, vectors_of_part
from pipelines.stages.certificate import nearest_name
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
        if decision["kept"] and decision["near_row"] is None and not any_dropped_for(run, step, seat):
            yield Told("kept", "it has no near copy", {"rule": rule}, [])
            continue
        told = tell_component(run, step, seat, decision) if rule == "component" else None
        told = told or tell_ranked(run, step, seat, decision, rule)
        if decision.get("retracted"):
            told = told._replace(text=f"{told.text}; it was kept before later images came")
        yield told


def any_dropped_for(run: Run, step: Artifact, seat: Seat) -> bool:
    """Whether an image was dropped for one; that it may be without an edge of its own, by an edge of the other."""
    return dropped_rows(run, step, "representative", seat.position)[0] > 0


def tell_ranked(run: Run, step: Artifact, seat: Seat, decision: Mapping[str, Any], rule: str) -> Told:
    """Rules ``greedy`` and ``semdedup``: the image that this one was dropped for, or those dropped for it."""
    pool, keep = run.pool(step), step.manifest["config"]["keep"]
    if decision["kept"]:
        n, first = dropped_rows(run, step, "representative", seat.position)
        dropped = [picture(run, pool, position) for position in first]
        which = "no image that stays and is near it" if rule == "greedy" else "no image near it"
        text = f"{which} comes before it ({keep}); {counted(n, 'image was', 'images were')} dropped for it"
        facts = {"rule": rule, "keep": keep, "n_dropped": n, "dropped": dropped}
        return Told("kept", text, facts, [f"dropped for it: {picture_text(shown)}" for shown in dropped])
    position = decision["representative"]
    part, row = place_in_parts(position, pool)
    stays = next(row_of(step.part(part), row))["kept"]
    similarity = cosine(run, step.input("neighbors").input("embeddings"), (pool, seat.position), (pool, position))
    earlier = {**picture(run, pool, position), "similarity": similarity, "kept": stays}
    what = "stays" if stays else "was dropped too"
    text = f"near copy of {earlier['name']}, which comes before it ({keep}) and {what} (similarity {similarity:.6g})"
    facts = {"rule": rule, "keep": keep, "representative": earlier}
    return Told("dropped", text, facts, [f"{what}: {picture_text(earlier)}"])


def tell_component(run: Run, step: Artifact, seat: Seat, decision: Mapping[str, Any]) -> Told:
    """Rule ``component``: the image that stays of all that near copies join, or of those of them that are like it."""
    stayed, max_chain = decision["representative"], step.manifest["config"].get("max_chain", 0)
    sizes = count_rows(run, step, "representative", stayed)
    n = sum(sizes.values())
    facts: dict[str, Any] = {"rule": "component", "component_images": n}
    if max_chain:
        facts["max_chain"] = max_chain
    if not decision["kept"]:  # a chain may lead through what max_chain has cut off, wherever that is
        parts = range(len(step.parts)) if max_chain else [part for part, some in sizes.items() if some]
        return tell_copy(run, step, seat, decision, facts, parts)
    _, first = dropped_rows(run, step, "representative", stayed)
    facts["dropped"] = [picture(run, run.pool(step), position) for position in first]
    text = f"the one that stays of {counted(n, 'image')} joined by near copies"
    if max_chain and n > 1:
        text += f" and at least {max_chain:g} similar to it"
    elif max_chain:
        text = f"no image that near copies join to it and that stays before it is at least {max_chain:g} similar to it"
    return Told("kept", text, facts, [f"dropped for it: {picture_text(shown)}" for shown in facts["dropped"]])


def tell_copy(
    run: Run, step: Artifact, seat: Seat, decision: Mapping[str, Any], facts: dict[str, Any], parts: Sequence[int]
) -> Told:
    """An image that was dropped for its representative. ``parts`` are those that hold the component."""
    near = step.input("neighbors")
    pool, stayed = run.pool(step), decision["representative"]
    similarity = cosine(run, near.input("embeddings"), (pool, seat.position), (pool, stayed))
    representative = {**picture(run, pool, stayed), "similarity": similarity}
    chain = shortest_chain(near, pool.starts, parts, seat.position, stayed, run.executor)
    facts |= {"representative": representative, "keep": step.manifest["config"]["keep"]}
    facts["chain"] = None if chain is None else shown_chain(run, pool, chain)
    directly = chain is not None and len(chain) == 1
    how = "near copy of" if directly else "joined by a chain of near copies to"
    text = f"{how} {representative['name']}, which stays (similarity {similarity:.6g})"
    details = [f"stays ({facts['keep']}): {picture_text(representative)}"]
    if decision["near_row"] is not None:  # null when it is in the lists of others alone
        facts["strongest"] = {**picture(run, pool, decision["near_row"]), "similarity": decision["similarity"]}
        details.append(f"strongest: {decision['similarity']:.6g}  {picture_text(facts['strongest'])}")
    details.append(f"component: {counted(facts['component_images'], 'image')}")
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
    """How near the image is to the references; or what it was the reference for, and what of the pool is nearest."""
    names: list[str] = step.facts["references"]
    pools = [run.pool(step.input(f"reference.{name}")) for name in names]
    for _, decision in decisions(run, step, image):
        yield tell_leak(run, step, pools, decision)
    for index, name in enumerate(names):
        for seat in seats(image, pools[index]):
            for nearest in row_of(step.location / nearest_name(name, seat.part), seat.row):
                yield tell_reference(run, step, index, seat, nearest)


def tell_reference(run: Run, step: Artifact, index: int, seat: Seat, nearest: Mapping[str, Any]) -> Told:
    """What was dropped because of an image of one reference, and which row of the pool is nearest to it."""
    low = step.manifest["config"]["min_similarity"]
    own = [pc.field("reference") == index]
    own += [] if step.manifest["config"]["mode"] == "direct" else [pc.field("hops") == 1]
    n, first = dropped_rows(run, step, "near_row", seat.position, *own)
    dropped = [picture(run, run.pool(step), position) for position in first]
    facts: dict[str, Any] = {"reference": step.facts["references"][index], "n_dropped": n, "dropped": dropped}
    facts |= {"min_similarity": low, "similarity": nearest["similarity"]}
    details = [picture_text(shown) for shown in dropped]
    if nearest["near_row"] is not None:
        facts["nearest"] = picture(run, run.pool(step), nearest["near_row"])
        details.append(f"nearest image of the pool: {nearest['similarity']:.6g}  {picture_text(facts['nearest'])}")
    return Told("reference", f"{counted(n, 'image was', 'images were')} dropped because of it", facts, details)


def tell_leak(run: Run, step: Artifact, references: Sequence[Artifact], decision: Mapping[str, Any]) -> Told:
    """The nearest image of all references, and the chain that leads to one in component mode."""
    low, similarity = step.manifest["config"]["min_similarity"], decision["similarity"]
    facts: dict[str, Any] = {"min_similarity": low, "similarity": similarity}
    facts["reference"] = step.facts["references"][decision["reference"]]
    nearest = picture(run, references[decision["reference"]], decision["near_row"])
    facts["nearest"] = nearest
    nearest_text = f"nearest reference image: {similarity:.6g}  {picture_text(nearest)}"
    if decision["kept"]:
        text = f"the nearest image of {nearest['pool']} is at {similarity:.6g}, below {low:g}"
        return Told("kept", text, facts, [nearest_text])
    if decision.get("hops", 1) == 1:
        text = f"near {nearest['name']} of {nearest['pool']} (similarity {similarity:.6g}, at least {low:g})"
        return Told("dropped", text, facts, [nearest_text])
    facts |= {"hops": decision["hops"], "chain": chain_to_reference(run, step, references, decision)}
    last = facts["chain"][-1]
    text = f"a chain of {decision['hops']} near pairs leads to {last['name']} of {last['pool']}"
    return Told("dropped", text, facts, [f"  {hop['similarity']:.6g}  {picture_text(hop)}" for hop in facts["chain"]])


def chain_to_reference(
    run: Run, step: Artifact, references: Sequence[Artifact], decision: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One image a hop, the last of a reference pool, each with its similarity to the one before."""
    pool = run.pool(step)
    chain = []
    while decision["hops"] > 1:
        position = decision["through"]
        chain.append({**picture(run, pool, position), "similarity": decision["through_similarity"]})
        part, row = place_in_parts(position, pool)
        decision = next(row_of(step.part(part), row))
    last = picture(run, references[decision["reference"]], decision["near_row"])
    return [*chain, {**last, "similarity": decision["similarity"]}]
