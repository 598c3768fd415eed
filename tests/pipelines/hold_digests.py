"""Write the digests that ``test_contract.py`` holds the stages to: run it after a stage's version was raised."""

import json
import tempfile
from pathlib import Path

from tiny import STEP_OF_STAGE, make_images, recipe

from curation.artifact import Artifact
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor
from pipelines.numerics import numerics
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES

DIGESTS = Path(__file__).parent / "digests.json"
TAG = ("numpy", "torch", "pyarrow", "pillow", "blas", "simd")


def machine_tag() -> dict[str, str]:
    """What the bytes may depend on beside the code."""
    return {name: numerics()[name] for name in TAG}


def digests_of(steps: dict[str, Artifact]) -> dict[str, dict[str, object]]:
    """Version and digest of every stage."""
    return {
        stage: {"version": STAGES[stage].version, "digest": steps[step].digest}
        for stage, step in sorted(STEP_OF_STAGE.items())
    }


def main() -> None:
    """Run the tiny recipe and write what came out."""
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images")
        parsed = parse_recipe(recipe(Path(folder) / "images"), STAGES)
        root = Location(f"{folder}/root")
        steps = {r.name: Artifact(r.location) for r in run_recipe(parsed, root, LocalExecutor(parsed.resources))}
        held = {"numerics": machine_tag(), "stages": digests_of(steps)}
        DIGESTS.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
