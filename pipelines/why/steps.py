"""What the steps of a run have to say about one image: a function a stage, in a table.

Each yields what became of the image in one step, and nothing where the step did not look at it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow.compute as pc

from curation.artifact import Artifact
from curation.pool import MEASURES
from curation.shards import shard_name
from curation.tar_writer import EXTENSIONS
from pipelines.why.clusters import tell_cluster, tell_retrieve, tell_sample
from pipelines.why.find import Image, rows_where
from pipelines.why.near import tell_decontaminate, tell_dedup, tell_neighbors
from pipelines.why.run import (
    N_SHOWN,
    Run,
    Seat,
    Told,
    decisions,
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
    columns = ("row_id", "format", "width", "height", "n_bytes", "label", "caption", *MEASURES)
    facts = {key: v[key] for key in columns if key in v}
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
    """Whether the expression is true of the image, with the columns and scores that it names."""
    where = step.manifest["config"]["where"]
    for seat, decision in decisions(run, step, image):
        known = {**image.values, "row_id": seat.position, "bytes": image.values["n_bytes"], **scores_of(step, seat)}
        values = {name: value for name, value in known.items() if named_in(where, name)}
        shown = ", ".join(f"{name} is {shown_value(value)}" for name, value in values.items())
        outcome = "kept" if decision["kept"] else "dropped"
        text = f"{where} is {'true' if decision['kept'] else 'not true'}" + (f" ({shown})" if shown else "")
        yield Told(outcome, text, {"where": where, "values": values}, [])


def scores_of(step: Artifact, seat: Seat) -> dict[str, float | None]:
    """The scores that a select step knew of an image, None where one does not cover it."""
    found: dict[str, float | None] = {}
    for name in step.manifest["config"].get("scores", ()):
        score = step.input(f"scores.{name}")
        column = score.facts["column"]
        found[column] = next((row[column] for row in row_of(score.part(seat.part), seat.row)), None)
    return found


def shown_value(value: Any) -> str:
    """A value of a column in a line of text."""
    return "null" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def tell_score(run: Run, step: Artifact, image: Image) -> Iterator[Told]:
    """The number that the head gave the image."""
    column, backbone = step.facts["column"], step.facts["backbone"]["name"]
    for _, scored in decisions(run, step, image):
        text = f"{column} is {shown_value(scored[column])} (a head on {backbone})"
        yield Told("scored", text, {"column": column, "value": scored[column], "backbone": backbone}, [])


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


NOTHING_TO_SAY = frozenset({"index", "train", "calibrate", "report"})  # of one image
TELL: dict[str, Tell] = {
    "pool": tell_pool,
    "union": tell_union,
    "select": tell_select,
    "embed": tell_embed,
    "score": tell_score,
    "neighbors": tell_neighbors,
    "dedup": tell_dedup,
    "decontaminate": tell_decontaminate,
    "cluster": tell_cluster,
    "assign": tell_cluster,
    "sample": tell_sample,
    "retrieve": tell_retrieve,
    "mix": tell_mix,
    "shards": tell_shards,
    "evaluate": tell_evaluate,
}
