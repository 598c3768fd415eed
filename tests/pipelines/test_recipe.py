"""Recipes are read strictly: every mistake is one sentence with a hint."""

import pytest

from curation.store import Location
from pipelines.errors import UserError
from pipelines.recipe import STEP, apply_override, parse_recipe, parse_yaml, read_recipe
from pipelines.stages.table import STAGES


def tree(**steps):
    return {"seed": 3, "steps": steps}


POOL = {"stage": "pool", "source": "photos"}


def refused(recipe, *words):
    with pytest.raises(UserError) as caught:
        parse_recipe(recipe, STAGES)
    text = f"{caught.value.message} | {caught.value.hint}"
    for word in words:
        assert word in text, text
    assert "\n" not in caught.value.message


def test_a_recipe_becomes_typed_steps():
    recipe = parse_recipe(
        tree(
            web=POOL,
            vec={"stage": "embed", "pool": "web", "backbone": "pixels"},
            near={"stage": "neighbors", "embeddings": "vec", "min_similarity": 0.9},
            tree={"stage": "cluster", "embeddings": "vec", "n_clusters": [10, 3]},
        ),
        STAGES,
    )
    assert [step.name for step in recipe.steps] == ["web", "vec", "near", "tree"]
    assert recipe.steps[0].config.source == "photos"
    assert recipe.steps[2].inputs == {"embeddings": "vec"}
    assert recipe.steps[3].config.n_clusters == (10, 3)
    assert recipe.steps[3].config.seed == 3  # the recipe's, where the step gives none


def test_a_backbone_is_a_step_where_one_has_that_name():
    steps = {
        "web": POOL,
        "shards": {"stage": "shards", "pool": "web"},
        "mine": {"stage": "train", "shards": "shards"},
        "vec": {"stage": "embed", "pool": "web", "backbone": "mine"},
        "hub": {"stage": "embed", "pool": "web", "backbone": "facebook/dinov2-small"},
    }
    found = {step.name: step for step in parse_recipe(tree(**steps), STAGES).steps}
    assert (found["vec"].inputs["backbone"], found["vec"].config.backbone) == ("mine", STEP)
    assert "backbone" not in found["hub"].inputs
    assert found["hub"].config.backbone == "facebook/dinov2-small"


def test_a_report_reads_every_step_above_it():
    recipe = parse_recipe(tree(web=POOL, page={"stage": "report"}, exam=POOL), STAGES)
    assert recipe.steps[1].inputs == {"web": "web"}


def test_mistakes_are_one_sentence_with_a_hint():
    embed = {"stage": "embed", "pool": "web", "backbone": "pixels"}
    refused({"seeds": 1, "steps": {}}, "no key 'seeds'", "did you mean seed?")
    refused({"seed": -1, "steps": {"web": POOL}}, "seed must be an integer of at least 0: got -1")
    refused({"steps": {}}, "must have steps")
    refused(tree(web={**POOL, "min_sides": 3}), "web has no key 'min_sides'", "did you mean min_side?")
    refused(tree(web={**POOL, "min_side": "big"}), "web.min_side must be a valid integer: got 'big'")
    refused(tree(web={**POOL, "min_side": 2.5}), "web.min_side must be a valid integer: got 2.5")
    for bad, words in (("x", "levels.n_resamples must be a valid integer: got 'x'"),
                       ([1, "x"], "levels.n_resamples.1 must be a valid integer: got 'x'")):  # fmt: skip
        levels = {"stage": "cluster", "embeddings": "vec", "n_clusters": [9, 3], "n_resamples": bad}
        refused(tree(web=POOL, vec=embed, levels=levels), words)
    refused(tree(web={**POOL, "min_side": 0}), "pool.min_side must be at least 1: got 0")
    refused(tree(web={"stage": "pool"}), "web must have source: got none")
    refused(tree(web={"stage": "pol"}), "known stage: got 'pol'", "did you mean pool?")
    refused(tree(web=3), "web must be a mapping")
    refused(tree(web={"stage": ["pool"]}), "known stage: got ['pool']")
    refused(tree(web=POOL, vec={**embed, "backbone": "pixel"}),
            "vec.backbone must be pixels, phash, openlvd-tiny, an earlier train", "did you mean pixels?")  # fmt: skip
    refused(tree(vec=embed, web=POOL), "vec.pool must name an earlier step: got 'web'")
    refused(tree(web=POOL, vec={"stage": "embed", "backbone": "pixels"}), "vec must name its pool: got none")
    refused(
        tree(web=POOL, near={"stage": "neighbors", "embeddings": "web", "min_similarity": 0.9}),
        "near.embeddings must name a step of stage embed: got 'web', a pool step",
    )
    refused({**tree(web=POOL), "resources": {"worker": 2}}, "resources has no key 'worker'", "did you mean workers?")
    refused({**tree(web=POOL), "resources": {"workers": -2}}, "resources.workers must not be negative: got -2")
    refused(tree(**{"../x": POOL}), "letters, digits, - and _")


def test_a_key_may_stand_once():
    with pytest.raises(UserError, match="'web' twice"):
        parse_yaml("steps:\n  web: {stage: pool}\n  web: {stage: pool}\n", "r.yaml")


def test_yaml_that_is_none_or_no_mapping():
    with pytest.raises(UserError, match=r"r\.yaml must be YAML"):
        parse_yaml("steps: [", "r.yaml")
    with pytest.raises(UserError, match="must be a mapping"):
        parse_yaml("- a\n- b\n", "r.yaml")


def test_yaml_runs_nothing():
    with pytest.raises(UserError, match="must be YAML"):
        parse_yaml("seed: !!python/object/apply:os.getcwd []\n", "r.yaml")


def test_overrides_change_steps_resources_and_the_seed():
    parsed = tree(web=dict(POOL))
    apply_override(parsed, "web.min_side=7")
    apply_override(parsed, "resources.workers=1")
    apply_override(parsed, "seed=9")
    before = parsed["steps"]["web"]
    apply_override(parsed, "web.columns.blue=2")
    apply_override(parsed, "web.columns.red=1")
    assert parsed["steps"]["web"].pop("columns") == {"blue": 2, "red": 1}
    assert "columns" not in before  # which other steps may share
    recipe = parse_recipe(parsed, STAGES)
    assert (recipe.steps[0].config.min_side, recipe.resources.workers, recipe.seed) == (7, 1, 9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("web.min_side=[1", "needs a YAML value"),
        ("web", "step.key=value"),
        ("web..c=1", "step.key=value"),
        ("a.b.c=1", "'a', which is not in the recipe"),
        ("wep.min_side=3", "'wep', which is not in the recipe"),
    ],
)
def test_an_override_that_hits_nothing_is_refused(override, words):
    with pytest.raises(UserError, match=words):
        apply_override(tree(web=dict(POOL)), override)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no recipe"):
        read_recipe(Location(str(tmp_path / "no.yaml")), [], STAGES)


def test_overrides_of_what_is_empty():
    parsed = {"resources": None, "steps": {"web": None}}
    apply_override(parsed, "resources.workers=1")
    assert parsed["resources"] == {"workers": 1}
    with pytest.raises(UserError, match="web must be a mapping: got None"):
        apply_override(parsed, "web.source=x")


def test_a_key_is_a_word():
    with pytest.raises(UserError, match="a key must be a word"):
        parse_yaml("steps:\n  ? [a, b]\n  : 3\n", "r.yaml")


VECTORS = {"stage": "embed", "backbone": "pixels"}
FITTING = {
    "web": POOL,
    "exam": POOL,
    "both": {"stage": "union", "members": ["web", "exam"]},
    "vec": {**VECTORS, "pool": "web"},
    "exam_vec": {**VECTORS, "pool": "exam"},
    "both_vec": {"stage": "union", "members": ["vec", "exam_vec"], "pool": "both"},
    "tree": {"stage": "cluster", "embeddings": "vec", "n_clusters": [10, 3]},
    "near": {"stage": "neighbors", "embeddings": "vec", "min_similarity": 0.9},
    "unique": {"stage": "dedup", "neighbors": "near", "keep": "farthest", "hierarchy": "tree"},
    "clean": {"stage": "decontaminate", "embeddings": "vec", "reference": "exam_vec", "neighbors": "near",
              "mode": "component", "min_similarity": 0.9},
    "found": {"stage": "retrieve", "mode": "cluster", "hierarchy": "tree", "seeds": ["exam_vec"], "level": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "change", "words"),
    [
        ("both_vec", {"pool": None}, "both_vec, a union of embeddings, must name its pool: got none"),
        ("both", {"members": ["web"], "pool": "exam"}, "both.pool is for a union of embeddings: got it with pools"),
        ("unique", {"hierarchy": None}, "unique.keep farthest needs a hierarchy: got none"),
        ("unique", {"keep": "closest", "hierarchy": None}, "unique.keep closest needs a hierarchy: got none"),
        ("unique", {"keep": "first"}, "unique.hierarchy is for keep farthest or closest: got it with first"),
        ("found", {"level": 2}, "found.level must be below the number of levels, 2: got 2"),
        ("clean", {"mode": "direct"}, "clean.neighbors is read in mode 'component' alone: got it in mode 'direct'"),
        (
            "clean",
            {"reference": ["exam_vec", "vec"]},
            "clean.reference must be other images than those looked at: got vec",
        ),
        (
            "clean",
            {"reference": ["exam_vec", "exam_vec"]},
            "clean.reference must name a step once: got 'exam_vec' twice",
        ),
        ("clean", {"reference": []}, "clean.reference must be a list of earlier steps: got []"),
        ("clean", {"reference": None}, "clean.reference must be a list of earlier steps: got None"),
        ("clean", {"reference": "exam"}, "clean.reference must name a step of stage embed: got 'exam', a pool step"),
        ("clean", {"min_similarity": 0.8}, "clean.min_similarity must be at least that of its neighbors, 0.9: got 0.8"),
    ],
)
def test_what_the_steps_above_rule_out_is_told_when_the_recipe_is_read(step, change, words):
    parse_recipe(tree(**FITTING), STAGES)
    refused(tree(**{**FITTING, step: {**FITTING[step], **change}}), words)


def test_one_reference_may_stand_without_a_list():
    one = parse_recipe(tree(**FITTING), STAGES)
    assert one == parse_recipe(tree(**{**FITTING, "clean": {**FITTING["clean"], "reference": ["exam_vec"]}}), STAGES)
    [clean] = [step for step in one.steps if step.name == "clean"]
    assert clean.config.reference == ("exam_vec",) and clean.inputs["reference.exam_vec"] == "exam_vec"
