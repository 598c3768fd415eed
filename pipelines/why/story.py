"""``openlvd why``: the story of one image, from the artifacts that the steps of a run have left."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from curation.artifact import Artifact
from curation.store import Location
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.roots import check_versions, finished_steps, noted_stages
from pipelines.stage import SELECTIONS
from pipelines.why.find import Found, Image, find_images
from pipelines.why.run import Run, seats
from pipelines.why.steps import NOTHING_TO_SAY, TELL

# Inputs along which rows go from step to step; others (a reference, a backbone, a hierarchy that stands beside
# embeddings) are only looked at.
FLOW = ("pool", "selection", "embeddings", "neighbors", "hierarchy", "members", "components")
CHOOSING = (*SELECTIONS, "shards")  # stages that say which images go on
LOST = ("dropped", "rejected", "refused")  # outcomes after which an image does not go on
SERVED = ("reference", "seed", "bank", "query")  # outcomes of an image that others are compared with
SAID = (*LOST, *SERVED, "kept")  # outcomes that stand before their reason

Story = dict[str, Any]


class Verdict(NamedTuple):
    """What became of an image."""

    sentence: str
    closing: list[str]  # of each set that it is not in, who dropped it
    dropped_by: list[str]  # steps


def tell_why(root: Location, asked: str) -> Story:
    """The story of every image of a run that ``asked`` means: a key, the beginning of one, or a path.

    Returns ``found``, a list of images with ``pool row_id key source member steps verdict``, each step with ``step
    stage outcome text details`` and what the stage knows, and ``not_done``, the steps that have not run. All of it is
    JSON-able. Raises UserError when there is no such image, or root, or when another version has made it.
    """
    executor = LocalExecutor()
    done = finished_steps(root)
    check_versions(done)
    not_done = {name: stage for name, stage in noted_stages(root).items() if name not in done}
    pools = {name: step for name, step in done.items() if step.stage == "pool"}
    if not pools:
        raise UserError(f"a pool of {root} must be finished: got none", "run the recipe first")
    run = Run(done, executor)
    found = find_images(pools, asked, executor)
    undecided = any(stage in CHOOSING for stage in not_done.values())
    return {"found": [story_of(run, one, undecided) for one in found], "not_done": list(not_done)}


def story_of(run: Run, found: Found, undecided: bool) -> Story:
    """What happened to one image; to the one that its bytes went on as, if it is an exact duplicate."""
    asked, image = found.image, found.kept or found.image
    told = list(tell_steps(run, image))
    verdict = judge(run, image, told, undecided)
    sentence = verdict.sentence
    if found.kept is not None:
        told = [*tell_steps(run, asked), *told]
        sentence = f"Its bytes went on as {image.name}. {sentence}"
    return {
        "pool": asked.step,
        "row_id": image.values.get("row_id"),
        "key": asked.key,
        "source": asked.values["source"],
        "member": asked.values["member"],
        "note": found.note,
        "verdict": sentence,
        "closing": verdict.closing,
        "dropped_by": verdict.dropped_by,
        "steps": told,
    }


def tell_steps(run: Run, image: Image) -> Iterator[Story]:
    """What each step says of the image, in the order of the recipe."""
    for name, step in run.steps.items():
        if step.stage in NOTHING_TO_SAY:
            continue
        for told in TELL[step.stage](run, step, image):
            head = {"step": name, "stage": step.stage, "outcome": told.outcome, "text": told.text}
            yield {**head, **told.facts, "details": told.details}


def judge(run: Run, image: Image, told: Sequence[Story], undecided: bool) -> Verdict:
    """What became of the image in every set of shards that could hold it; before there is one, in the last choice.

    ``undecided``: steps that choose have not run.
    """
    if image.part is None:
        refused = lost("the curated set", told)
        return refused._replace(sentence=capital(refused.sentence))
    ends = [name for name, step in run.steps.items() if chooses(run, step, image)]
    goals = [name for name in ends if run.steps[name].stage == "shards"]
    if ends and (undecided or not goals):
        goals = list(dict.fromkeys([*goals, ends[-1]]))
    if not goals:
        return Verdict(onlooker(image, told), [], [])
    verdicts = [judge_one(run, goal, label(run, goal, len(goals) == 1), told) for goal in goals]
    sentence = "; ".join(verdict.sentence for verdict in verdicts)
    closing = [line for verdict in verdicts for line in verdict.closing]
    dropped_by = list(dict.fromkeys(step for verdict in verdicts for step in verdict.dropped_by))
    return Verdict(capital(sentence), closing, dropped_by)


def capital(sentence: str) -> str:
    """A sentence as it begins."""
    return sentence[0].upper() + sentence[1:]


def label(run: Run, goal: str, alone: bool) -> str:
    """What a set of shards or a selection is called in a sentence."""
    if run.steps[goal].stage != "shards":
        return f"what `{goal}` has chosen so far"
    return f"the curated set `{goal}`" if alone else f"`{goal}`"


def judge_one(run: Run, goal: str, name: str, told: Sequence[Story]) -> Verdict:
    """Whether the image is in one set; if not, the steps that dropped it among those that its rows went through."""
    there = [step for step in told if step["step"] == goal and step["outcome"] in ("kept", "in", "twin")]
    if there:
        return Verdict(f"in {name} ({there[0]['text']})", [], [])
    line = set(ancestors(run.steps[goal]))
    losses = [step for step in told if step["outcome"] in LOST and run.steps[step["step"]].location.uri in line]
    if losses:
        return lost(name, losses)
    return Verdict(f"not in {name}: nothing that it was made from holds this image", [], [])


def lost(name: str, losses: Sequence[Story]) -> Verdict:
    """The verdict on an image that some steps dropped, with the reason of each."""
    by = [f"{step['outcome']} by `{step['step']}` ({step['stage']})" for step in losses]
    reasons = "; and ".join(f"{who}: {step['text']}" for who, step in zip(by, losses, strict=True))
    return Verdict(
        f"not in {name}: {reasons}", [f"Not in {name}: {' and '.join(by)}"], [step["step"] for step in losses]
    )


def chooses(run: Run, step: Artifact, image: Image) -> bool:
    """Whether a step says of the image's pool which images go on."""
    return step.stage in CHOOSING and bool(seats(image, run.pool(step)))


def onlooker(image: Image, told: Sequence[Story]) -> str:
    """The sentence for an image of a pool from which no step selects."""
    served = [f"{step['outcome']} of `{step['step']}` ({step['text']})" for step in told if step["outcome"] in SERVED]
    return f"No step selects from `{image.step}`" + (f"; the image is a {', a '.join(served)}" if served else "")


def ancestors(step: Artifact) -> Iterator[str]:
    """The artifact and all that its rows went through, by location."""
    yield step.location.uri
    for name in step.manifest["inputs"]:
        if name.partition(".")[0] in FLOW and not (name == "hierarchy" and step.has_input("embeddings")):
            yield from ancestors(step.input(name))


def print_story(story: Mapping[str, Any], console: Console) -> None:
    """The story for people. Names are shown as they are, and fold where a line ends."""
    for i, found in enumerate(story["found"]):
        if i:
            say(console, "")
        print_image(found, console)
    if story["not_done"]:
        say(console, f"\nNot done yet: {', '.join(story['not_done'])}")


def print_image(found: Mapping[str, Any], console: Console) -> None:
    """The verdict on one image, what each step says, and once more who dropped it."""
    name = found["source"] if found["member"] is None else f"{found['source']}/{found['member']}"
    say(console, f"{name} in the pool {found['pool']}, key {found['key'] or 'unknown'}")
    say(console, found["verdict"], style="bold")
    if found["note"]:
        say(console, f"Note: {found['note']}")
    say(console, "")
    for step in found["steps"]:
        outcome = f"{step['outcome']}: " if step["outcome"] in SAID else ""
        say(console, f"{step['step']} ({step['stage']}): {outcome}{step['text']}", indent=2)
        for detail in step["details"]:
            say(console, detail, indent=6)
    if found["closing"]:
        say(console, "\n" + "\n".join(found["closing"]))


def say(console: Console, line: str, indent: int = 0, style: str = "") -> None:
    """One line, folded at a terminal and whole in a file, with what could move the cursor written out."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in line)
    if console.is_terminal:
        console.print(Padding(Text(shown, style=style, overflow="fold"), (0, 0, 0, indent), expand=False))
    else:
        console.print(Text(" " * indent + shown, style=style), soft_wrap=True)
