"""What the README shows works: its recipe, its links, its commands."""

import re
from pathlib import Path

from pipelines.recipe import parse_recipe, parse_yaml
from pipelines.stages.table import STAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_recipe_is_a_recipe_with_the_whole_chain():
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    recipe = parse_recipe(parse_yaml(block[1], "README.md"), STAGES)
    assert {step.stage for step in recipe.steps} == set(STAGES) - {"evaluate"}


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^ +make (\w+)$", README, re.MULTILINE)) == {"demo", "test"} <= targets
