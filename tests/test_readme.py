"""What the README shows works: its recipe, its links, its commands."""

import re
from pathlib import Path

from pipelines.recipe import SHIPPED, parse_recipe, parse_yaml
from pipelines.stages.table import STAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_recipes_are_recipes_and_show_every_stage_but_three():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    recipe = parse_recipe(parse_yaml("".join(blocks), "README.md"), STAGES)  # the second goes on where the first ends
    assert {step.stage for step in recipe.steps} == set(STAGES) - {"evaluate", "score", "calibrate"}


def test_every_recipe_that_is_shipped_is_listed():
    assert set(re.findall(r"\]\(pipelines/recipes/(\w+)\.yaml\)", README)) == {
        path.stem for path in SHIPPED.glob("*.yaml")
    }


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^ +make (\w+)$", README, re.MULTILINE)) == {"demo", "test"} <= targets
