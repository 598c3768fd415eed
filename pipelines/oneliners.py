"""From a folder of images to a folder without copies, or to balanced shards, in one command each.

Both write a recipe, run it, and say in a few lines what came of it. What the run needs and leaves is below
``.openlvd`` in the place of the result: artifacts, ``report.html``, and ``recipe.yaml``, which ``openlvd run`` takes
as it is.
"""

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from curation.artifact import Artifact
from curation.listing import split_pattern
from curation.store import Location
from embedding.config import MODEL_FREE
from embedding.decode import MAX_PIXELS
from pipelines.commands import place_of, see_help
from pipelines.engine import plan_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.fingerprint import look_outside
from pipelines.kept import DROPPED, RECORDS, Folder, write_kept
from pipelines.launch import open_executor, run_shown
from pipelines.lock import lock_root
from pipelines.progress import StepProgress
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Recipe, parse_recipe, parse_yaml
from pipelines.stages.report import PAGE
from pipelines.stages.table import STAGES

COPY = {  # the similarity from which on two images are copies, by a descriptor
    "pixels": 0.99,  # finds the re-encoded, rescaled and brightened copies that the demo plants, and no more
    "phash": 1 - 31 / 128,  # up to 31 of 256 bits differ: what the makers of PDQ recommend to begin with
}
PART_ROWS = 2048  # images of a piece of work: a folder is some thousand images, and every core is to have some
MOST = 0.5  # share of bad images at which a folder is taken for something else
ROOT, RECIPE, REPORT = ".openlvd", "recipe.yaml", "report.html"
NO_CONCEPTS = (
    "note: the descriptor {} knows layout, not content: these clusters are of images that look alike from far away. "
    "A backbone by name, such as --backbone facebook/dinov2-small, makes clusters of concepts."
)
OPTIONS = {  # of the commands, and the step and key that each becomes in the recipe
    "--backbone": ("vectors", "backbone"),
    "--min-similarity": ("near", "min_similarity"),
    "--max-drop-fraction": ("unique", "max_drop_fraction"),
    "--n-clusters": ("concepts", "n_clusters"),
    "--target": ("balanced", "target"),
}
DECIDE = ("--backbone", "--min-similarity", "--n-clusters", "--target")  # which images a set of shards has
Tree = dict[str, Any]  # a recipe as plain values
Summary = dict[str, int | str]


def dedup_folder(
    photos: str,
    kept: str,
    min_similarity: float | None,
    backbone: str,
    max_drop_fraction: float,
    executor: str,
    as_json: bool,
) -> None:
    """Copy the images of ``photos`` to ``kept``, one of every group of copies. Raises UserError or TaskError."""
    source, out = place_of(photos), place_of(kept)
    if not out.is_local:
        raise UserError(
            f"KEPT must be a local folder: got {out}", "images on S3 are best kept in shards: balance-folder"
        )
    similarity = threshold(backbone, min_similarity)
    root = open_place("dedup-folder", source, out, "KEPT")
    tree = copies_recipe(source, backbone, similarity, max_drop_fraction)
    tree["steps"]["page"] = {"stage": "report"}
    read_tree("dedup-folder", tree)  # mistakes are told before the work
    with open_executor(executor, None, Resources()) as engine, StepProgress(as_json) as progress:
        steps = run_tree("dedup-folder", tree, root, engine, progress, until="unique")
        with lock_root(root / RECORDS, progress.say):
            engine.progress = progress.start("files", "copy")
            folder = Folder(steps["images"], steps["vectors"], steps["unique"], out.path, root)
            files = write_kept(folder, engine)
        progress.stop()
        steps = run_tree("dedup-folder", tree, root, engine, progress, told=steps)
    summary = found_counts(steps) | {
        f"files {name}": n for name, n in files.items() if n or name in ("copied", "there")
    }
    show(summary, {"images": str(out), "dropped": str(root / DROPPED)}, publish_page(steps, root), as_json)


def balance_folder(
    photos: str,
    shards: str,
    target: int,
    min_similarity: float | None,
    backbone: str,
    n_clusters: list[int] | None,
    max_drop_fraction: float,
    executor: str,
    as_json: bool,
) -> None:
    """Make shards of at most ``target`` images of ``photos``, balanced over clusters. Raises UserError or TaskError."""
    source, out = place_of(photos), place_of(shards)
    similarity = threshold(backbone, min_similarity)
    root = open_place("balance-folder", source, out, "--out")
    copies = copies_recipe(source, backbone, similarity, max_drop_fraction)
    before = finished_recipe(root, out)
    clusters = before.get("concepts", {}).get("n_clusters") if n_clusters is None else n_clusters
    tree = balanced_recipe(copies, target, [1] if clusters is None else clusters)
    recipe = read_tree("balance-folder", tree)  # mistakes are told before the work
    if before:
        check_same_set(before, tree, recipe, root, out)
    if backbone in MODEL_FREE:
        print(NO_CONCEPTS.format(backbone), file=sys.stderr)
    with open_executor(executor, None, Resources()) as engine, StepProgress(as_json) as progress:
        steps: dict[str, Artifact] = {}
        if clusters is None:
            steps = run_tree("balance-folder", copies, root, engine, progress)  # says how many images there are
            tree = balanced_recipe(copies, target, default_clusters(steps["unique"].counts["kept"]))
        steps = run_tree("balance-folder", tree, root, engine, progress, {"shards": out}, told=steps)
    made = steps["shards"].counts
    summary: Summary = found_counts(steps) | {
        "clusters": " > ".join(f"{n:,}" for n in reversed(steps["concepts"].facts["n_clusters"])),
        "drawn": made["kept"],
        "shards": made["shards"],
    }
    show(summary, {"shards": str(out)}, publish_page(steps, root), as_json)


def threshold(backbone: str, given: float | None) -> float:
    """The similarity from which on two images are copies. Raises UserError when only the user can know."""
    if given is None and backbone not in COPY:
        raise UserError(
            f"--min-similarity must be given with --backbone {backbone}: got none",
            "a threshold belongs to a descriptor: 0.6 is published for the copy detector SSCD; a semantic encoder at "
            "0.6 finds the same class, not the same image",
        )
    return COPY[backbone] if given is None else given


def default_clusters(n_images: int) -> list[int]:
    """A cluster for every 10 images and above them one for every 100, at least 2 and at most one an image."""
    fine, coarse = (min(max(n_images // size, 2), n_images) for size in (10, 100))
    return [fine, coarse] if coarse < fine else [fine]


def copies_recipe(source: Location, backbone: str, min_similarity: float, max_drop_fraction: float) -> Tree:
    """The steps from a folder to one image of every group of copies; nothing that decodes is refused for its size."""
    folder = Path(backbone).expanduser()
    spec = str(folder.resolve()) if backbone not in MODEL_FREE and folder.exists() else backbone
    limits = {"max_pixels": 2 * MAX_PIXELS, "max_bad_fraction": MOST}
    return {
        "seed": 0,
        "steps": {
            "images": {"stage": "pool", "source": source.uri, "min_side": 1, "max_aspect_ratio": 1e9, **limits,
                       "part_rows": PART_ROWS},
            "vectors": {"stage": "embed", "pool": "images", "backbone": spec, **limits},
            "near": {"stage": "neighbors", "embeddings": "vectors", "min_similarity": min_similarity},
            "unique": {"stage": "dedup", "neighbors": "near", "max_drop_fraction": max_drop_fraction},
        },
    }  # fmt: skip


def balanced_recipe(copies: Tree, target: int, n_clusters: list[int]) -> Tree:
    """The steps from a folder to balanced shards: those of ``copies``, and what follows them."""
    more = {
        "distinct": {**copies["steps"]["vectors"], "selection": "unique"},
        "concepts": {"stage": "cluster", "embeddings": "distinct", "n_clusters": n_clusters},
        "balanced": {"stage": "sample", "hierarchy": "concepts", "target": target},
        "shards": {"stage": "shards", "pool": "images", "selection": "balanced"},
        "page": {"stage": "report"},
    }
    return {**copies, "steps": copies["steps"] | more}


def read_tree(command: str, tree: Tree) -> Recipe:
    """A recipe given as plain values, checked. Raises UserError, with the option where that is a key of a step."""
    try:
        return parse_recipe(tree, STAGES)
    except UserError as e:
        message = e.message
        for option, (step, key) in OPTIONS.items():
            for owner in (step, tree["steps"].get(step, {}).get("stage")):
                message = message.replace(f"{owner}.{key}", option)
        raise UserError(message, e.hint if e.hint.startswith("did you mean") else see_help(command)) from e


def finished_recipe(root: Location, out: Location) -> Tree:
    """The steps that made the finished set of shards at a place, {} when none is there."""
    if not (root / RECIPE).exists() or not Artifact(out).is_complete():
        return {}
    steps: Tree = parse_yaml((root / RECIPE).read().decode(), RECIPE)["steps"]
    return steps


def check_same_set(before: Tree, tree: Tree, recipe: Recipe, root: Location, out: Location) -> None:
    """A finished set is made of the same images with the same settings, or nothing is written. Raises UserError."""
    for option in DECIDE:
        step, key = OPTIONS[option]
        now, then = tree["steps"][step][key], before.get(step, {}).get(key)
        if then is not None and then != now:
            raise UserError(
                f"--out must be empty or made with {option} {now}: got {out}, a finished set made with {option} {then}",
                "choose another --out",
            )
    [images] = plan_recipe(recipe, root, until="images")
    made_of = str(Artifact(out).manifest["inputs"]["pool"]["path"])
    if images.location is not None and images.location.name != made_of.rpartition("/")[2]:
        raise UserError(
            f"--out must be empty or made by this openlvd of the images that are in {images_from(tree)} now: "
            f"got {out}, a finished set of others",
            "choose another --out",
        )


def images_from(tree: Tree) -> str:
    """Where the images of a recipe come from."""
    return str(tree["steps"]["images"]["source"])


def open_place(command: str, source: Location, out: Location, name: str) -> Location:
    """The root of the run, when ``out`` is apart from the source and new, or of the same command. Raises UserError."""
    folder, pattern = split_pattern(source)
    if folder == source or pattern:
        a, b = f"{folder.uri.rstrip('/')}/", f"{out.uri.rstrip('/')}/"
        if a.startswith(b) or b.startswith(a):
            raise UserError(
                f"{name} and PHOTOS must not be in one another: got {out} and {folder}", f"choose another {name}"
            )
    if out.is_local and out.exists() and not out.is_folder():
        raise UserError(f"{name} must be a folder: got {out}, a file", f"choose another {name}")
    root = out / ROOT
    if (root / RECIPE).exists():
        text = (root / RECIPE).read().decode()
        made_by, before = text.splitlines()[0], images_from(parse_yaml(text, RECIPE))
        if made_by != first_line(command) or before != source.uri:
            raise UserError(
                f"{name} must be empty or made by openlvd {command} from {source}: got {out}, "
                f"{made_by.strip('# ')} from {before}",
                f"choose another {name}",
            )
    elif out.is_folder():
        others = [entry.name for entry in out.list() if not entry.name.startswith(".")]
        if others:
            raise UserError(
                f"{name} must be empty or made by openlvd {command}: got {out} with {len(others)} files, "
                f"first {others[0]}",
                f"choose another {name}",
            )
    return root


def first_line(command: str) -> str:
    """What a recipe begins with."""
    return f"# made by openlvd {command}"


def run_tree(
    command: str,
    tree: Tree,
    root: Location,
    engine: LocalExecutor | RayExecutor,
    progress: StepProgress,
    places: Mapping[str, Location] | None = None,
    told: Collection[str] = (),
    until: str | None = None,
) -> dict[str, Artifact]:
    """Run a recipe given as plain values; it is checked, then written to the root, then run."""
    recipe = read_tree(command, tree)
    text = yaml.safe_dump({"root": root.uri, **tree}, sort_keys=False, allow_unicode=True)
    hint = f"# openlvd run does the same; to change it, copy it: the next {command} writes it anew\n"
    if not (root / RECIPE).exists():
        look_outside(recipe.steps)  # nothing is written for a folder that is not there
    with lock_root(root, progress.say):
        (root / RECIPE).write(f"{first_line(command)}\n{hint}\n{text}".encode())
    results = run_shown(recipe, root, engine, progress, until, places, told)
    return {result.name: Artifact(result.location) for result in results if result.location is not None}


def found_counts(steps: Mapping[str, Artifact]) -> Summary:
    """What was found in the source, and what became of it: all but ``ignored files`` add up to ``images found``."""
    pool, vectors, unique = (steps[name].counts for name in ("images", "vectors", "unique"))
    exact = pool.get("exact_duplicate", 0)
    counts: Summary = {
        "images found": pool["rows"],
        "bad": pool["bad"] + vectors["bad"],
        "exact copies": exact,
        "near copies": unique["dropped"],
        "kept": unique["kept"],
    }
    other = pool["dropped"] - exact
    also = {"refused": other, "ignored files": pool["ignored_files"]}
    return counts | {name: n for name, n in also.items() if n}


def publish_page(steps: Mapping[str, Artifact], root: Location) -> Location:
    """Put the page of the run where one finds it."""
    page = root / REPORT
    page.write((steps["page"].location / PAGE).read())
    return page


def show(summary: Summary, places: Mapping[str, str], page: Location, as_json: bool) -> None:
    """Print the summary, and where everything is; the report's place is the last line."""
    if as_json:
        print(json.dumps({**{name.replace(" ", "_"): n for name, n in summary.items()}, **places, "report": str(page)}))
        return
    for name, n in summary.items():
        print(f"{name:<14} {n if isinstance(n, str) else format(n, ',')}")
    print()
    for name, place in {**places, "recipe": str(page.parent / RECIPE), "report": str(page)}.items():
        print(f"{name:<14} {place}")
