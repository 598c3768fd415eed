"""The command ``openlvd contains``: a line an image, then the sum."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow.compute as pc
from rich.console import Console

from curation.artifact import read_table
from curation.execute import Executor, Ref, on_worker
from curation.store import Location
from pipelines.commands import place_of
from pipelines.contains.search import (
    NAME_COLUMNS,
    Answer,
    Asked,
    Found,
    answers_of_part,
    embed_asked,
    search,
    totals_of,
)
from pipelines.contains.target import Target, find_target
from pipelines.errors import UserError
from pipelines.executor import Resources, quiet
from pipelines.launch import open_executor
from pipelines.progress import StepProgress
from pipelines.rows import place_in_parts
from pipelines.why.find import Image, name_of, rows_where
from pipelines.why.run import counted, place_text
from pipelines.why.story import judge_one, say, tell_steps

REJECTED = ("source", "member", "key", "reason", "detail", "duplicate_of")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, as the command line says it."""

    root: str
    images: str
    step: str | None = None  # that chose the set
    embeddings: str | None = None  # to compare by
    min_similarity: float | None = None
    whole_pool: bool = False
    backbone: str | None = None  # where its weights are now
    work: str | None = None
    executor: str = "serial"
    address: str | None = None
    as_json: bool = False


@dataclass
class Teller:
    """Prints answers, and counts them."""

    target: Target
    as_json: bool
    console: Console = field(default_factory=lambda: Console(highlight=False, emoji=False))
    counts: Counter[str] = field(default_factory=Counter)

    def tell(self, known: dict[str, Any], text: str) -> None:
        """One image."""
        self.counts[known["answer"]] += 1
        if self.as_json:
            print(json.dumps(known))
        else:
            line = text.replace("\n", "\\n")  # a name may have a line of its own
            say(self.console, f"{known['answer']:<8} {line}")


def contains(question: Question) -> bool:
    """Print which images have a near copy in the set of a run; whether any has. Raises UserError or TaskError."""
    target = find_target(Location(question.root), question.step, question.embeddings, question.min_similarity)
    images = place_of(question.images)
    with (
        open_executor(question.executor, question.address, Resources()) as engine,
        working_place(question.work, question.address) as work,
    ):
        with StepProgress(question.as_json) as progress:  # closed before anything is printed
            asked = embed_asked(target, images, question.backbone, work, engine, progress.start)
            engine.progress = progress.start(target.name, "search")
            found = search(target, asked, question.whole_pool, engine)
            totals = on_worker(engine, totals_of, {"found": found}).get()
        engine.progress = quiet
        teller = Teller(target, question.as_json)
        tell_answers(teller, asked, found, engine)
        tell_unread(teller, asked)
        tell_sum(teller, question, *totals)
        return bool(teller.counts["in"])


@contextmanager
def working_place(given: str | None, address: str | None) -> Iterator[Location]:
    """Where the vectors of the images go: a place that stays, or one that vanishes. Raises UserError."""
    if given is not None:
        yield place_of(given)
    elif address is not None:
        raise UserError(
            "--work must be given with --address: got none", "name a place that all machines of the cluster reach"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="openlvd-contains-") as folder:
            yield Location(folder)


def tell_answers(teller: Teller, asked: Asked, found: Ref[Found], executor: Executor) -> None:
    """A line for every image that was embedded, the answers of one part in memory at a time."""
    target = teller.target
    work = partial(answers_of_part, asked=asked, pool=target.pool, min_similarity=target.min_similarity)
    for answers in executor.map(work, range(len(asked.vectors.parts)), {"found": found}):
        for answer in answers:
            known = answer._asdict()
            text = f"{similarity_text(answer)}  {answer.image} (key {answer.key[:12]})"
            if answer.near is not None:
                text += f"  nearest {place_text(answer.near)}"
            if answer.answer == "dropped" and answer.near is not None:
                known |= why_not(target, answer.near["row_id"])
                text += f"; {known['verdict']}"
            teller.tell(known, text)


def similarity_text(answer: Answer) -> str:
    """A similarity in six places."""
    return "  none" if answer.similarity is None else f"{answer.similarity:.4f}"


def why_not(target: Target, position: int) -> dict[str, Any]:
    """Why a row of the pool is not in the set: ``dropped_by``, the steps, and the ``verdict``, as ``why`` says it."""
    part, row = place_in_parts(position, target.pool)
    owner, own_part = target.pool.member(part)
    condition = pc.field("row_id") == row + int(owner.starts[own_part])
    [values] = rows_where(target.pool.part(part), condition).to_pylist()
    image = Image(target.run.name(owner), owner, values, own_part, row)
    told = list(tell_steps(target.run, image))
    verdict = judge_one(target.run, target.name, f"`{target.name}`", told)
    return {"dropped_by": verdict.dropped_by, "verdict": verdict.sentence}


def tell_unread(teller: Teller, asked: Asked) -> None:
    """A line for every file that gave no vector, and for every exact copy of another."""
    files = [asked.pool.location / file.name for file in asked.pool.files if file.name.startswith("rejected-")]
    for location in files:
        for values in read_table(location, REJECTED).to_pylist():
            if values["reason"] == "exact_duplicate":
                first = values["duplicate_of"]
                known = {"image": name_of(values), "key": values["key"], "answer": "again", "same_as": first}
                teller.tell(known, f"{known['image']}  has the bytes of {first}")
            else:
                tell_lost(teller, name_of(values), values)
    for index in range(len(asked.vectors.parts)):
        lost = read_table(asked.vectors.part(index, "rejected"))
        names = read_table(asked.pool.part(index), NAME_COLUMNS).take(lost["row"]).to_pylist()
        for name, values in zip(names, lost.to_pylist(), strict=True):
            tell_lost(teller, name_of(name), {**values, "key": name["key"]})


def tell_lost(teller: Teller, image: str, values: Mapping[str, Any]) -> None:
    """One file that gave no vector."""
    why = ", ".join(filter(None, [values["reason"], values["detail"]]))
    teller.tell({"image": image, "key": values["key"], "answer": "unread", "detail": why}, f"{image}  {why}")


def tell_sum(teller: Teller, question: Question, rows: int, without: int) -> None:
    """How many of the distinct images that could be read have a near copy in the set, and what it was asked by."""
    target, counts = teller.target, teller.counts
    known: dict[str, Any] = {"images": counts["in"] + counts["dropped"] + counts["no"], "in": counts["in"]}
    known |= {"dropped": counts["dropped"]} if question.whole_pool else {}
    known |= {"again": counts["again"], "unread": counts["unread"], "set": target.name, "rows": rows}
    known |= {"rows_without_vector": without, "min_similarity": target.min_similarity}
    known["similarity_from"] = "--min-similarity" if question.min_similarity else target.descriptor.said_by
    known |= {"embeddings": target.descriptor.step, "backbone": target.descriptor.vectors.facts["backbone"]["name"]}
    if question.as_json:
        print(json.dumps(known))
    else:
        say(teller.console, "\n" + "\n".join(sum_lines(known)))


def sum_lines(known: Mapping[str, Any]) -> Iterator[str]:
    """The sum for people."""
    by = known["similarity_from"]
    by = by if by.startswith("-") else f"as in `{by}`"
    of = counted(known["images"], "image has", "images have")
    yield f"{known['in']:,} of {of} a near copy in the curated set `{known['set']}`"
    yield f"({known['rows']:,} images; similarity of at least {known['min_similarity']:g} by {known['backbone']}, {by})"
    if "dropped" in known:
        yield f"{known['dropped']:,} more have one in the pool alone"
    if known["again"]:
        yield f"{counted(known['again'], 'file')} had the bytes of another: not counted"
    if known["unread"]:
        yield f"{counted(known['unread'], 'file')} could not be read"
    if known["rows_without_vector"]:
        yield f"{counted(known['rows_without_vector'], 'image')} of the set could not be embedded: not searched"
