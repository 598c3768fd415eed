"""Presets: files of settings that a training begins with."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedding.vit import ViT
from pipelines.errors import UserError
from pipelines.recipe import PRESETS, laid_over, parse_recipe, read_preset, structure, with_presets
from pipelines.stages.table import STAGES
from training.config import HeadConfig, TrainConfig
from training.heads import DinoHead
from training.schedules import sqrt_scaled_lr

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
SHAPES = [name for name in NAMES if name.startswith("vit-")]
OBJECTIVES = [name for name in NAMES if name not in SHAPES]


def config(*names, **own):
    return structure(TrainConfig, with_presets("train", {"preset": list(names), **own}), "train")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_objective_fits_every_shape(objective, shape):
    assert config(objective, shape).vit.width == read_preset("", shape)["vit"]["width"]


# Section 6.6 of what is known of these models: parameters of the backbone. Of DINOv3 the released training builds keep
# a bias of the keys that is always 0; the Hugging Face classes, and ours, have none.
@pytest.mark.parametrize(
    ("names", "own", "count"),
    [
        (["dino", "vit-s"], {}, 21_665_664 + 384),  # and our mask token
        (["dino", "vit-b"], {}, 85_798_656 + 768),
        (["dinov2", "vit-s"], {"patch_size": 14}, 21_629_184),
        (["dinov2", "vit-b"], {"patch_size": 14}, 85_725_696),
        (["dinov2", "vit-l"], {}, 303_351_808),
        (["dinov2-lvd", "vit-l"], {}, 303_655_168),
        (["dinov2-lvd", "vit-g"], {}, 1_134_771_200),
        (["dinov2-lvd", "vit-g"], {"image_size": 518}, 1_136_480_768),
        (["dinov2-lvd", "vit-g"], {"image_size": 518, "n_registers": 4}, 1_136_486_912),
        (["dinov3", "vit-s"], {"n_registers": 4}, 21_596_544),
        (["dinov3", "vit-s-plus"], {"n_registers": 4}, 28_692_864),
        (["dinov3", "vit-b"], {"n_registers": 4}, 85_660_416),
        (["dinov3", "vit-l"], {"n_registers": 4}, 303_129_600),
        (["dinov3", "vit-l"], {"key_bias": True}, 303_150_080),
        (["dinov3", "vit-l-plus"], {"n_registers": 4}, 403_891_200),
        (["dinov3", "vit-so400m"], {"key_bias": True}, 415_406_592),
        (["dinov3", "vit-h-plus"], {"n_registers": 4}, 840_592_640),
        (["dinov3-7b", "vit-7b"], {}, 6_716_035_072),
    ],
)
def test_backbones_have_the_published_numbers_of_parameters(names, own, count):
    with torch.device("meta"):
        vit = ViT(config(*names, vit=own, local_size=112).vit)  # a size of patches of 14 and of 16
    assert sum(p.numel() for p in vit.parameters()) == count


@pytest.mark.parametrize(
    ("names", "head", "ibot_head"),
    [
        (["dino", "vit-s"], 22_286_592, None),
        (["dinov2", "vit-l"], 23_662_848, None),
        (["dinov2-lvd", "vit-g"], 58_593_664, 41_554_176),
        (["dinov3", "vit-l"], 23_597_312, 23_597_312),
        (["dinov3-7b", "vit-7b"], 239_092_224, 72_884_608),
    ],
)
def test_heads_have_the_published_numbers_of_parameters(names, head, ibot_head):
    found = config(*names)

    def count(shape: HeadConfig) -> int:
        with torch.device("meta"):
            made = DinoHead(found.vit.width, shape.prototypes, hidden=shape.hidden, bottleneck=shape.bottleneck,
                            norm=shape.norm)  # fmt: skip
        return sum(p.numel() for p in made.parameters())

    assert count(found.head) == head
    assert ibot_head is None or count(found.ibot_head) == ibot_head


@pytest.mark.parametrize(
    ("name", "base", "factor"),
    [("dinov2", 4e-3, 1), ("dinov2-lvd", 2e-4, 1), ("dinov3", 1e-3, 4), ("dinov3-7b", 5e-5, 4)],
)
def test_rates_are_the_published_ones_at_their_batch(name, base, factor):
    found = config(name)
    assert found.lr == pytest.approx(sqrt_scaled_lr(base, found.batch, factor))
    assert found.lr_schedule().max() == pytest.approx(found.lr)


def test_a_constant_rate_stays_to_the_end():
    rates = replace(config("dinov3-7b"), n_steps=200, warmup_steps=100, teacher_temperature_steps=100).lr_schedule()
    assert (rates[100:] == 4e-4).all()


def test_the_later_wins_and_what_is_within_is_laid_over():
    below = {"a": {"x": 1, "y": 2}, "b": 3, "c": {"x": 1}}
    assert laid_over(below, {"a": {"y": 5}, "c": None}) == {"a": {"x": 1, "y": 5}, "b": 3, "c": None}
    assert below["a"] == {"x": 1, "y": 2}
    found = config("dinov3", "vit-s", vit={"patch_size": 8}, augment={"hflip": 0.0}, ibot_head=None)
    assert (found.vit.width, found.vit.patch_size, found.vit.position) == (384, 8, "rope")
    assert found.augment.hflip == 0 and found.ibot_head is None


def test_a_file_may_be_a_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("batch: 32\nvit: {width: 64, heads: 2}\n")
    assert config(str(tmp_path / "mine.yaml"), "vit-ti").batch == 32
    assert config("vit-ti", str(tmp_path / "mine.yaml")).vit.width == 64


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("dinov4", "train.preset must be a preset: got 'dinov4' | did you mean dinov"),
        (3, "train.preset must be a name or a list of names: got 3"),
        ("gone.yaml", "train.preset must be a file that exists: got gone.yaml"),
    ],
)
def test_a_preset_that_is_not_there_is_named(given, words):
    with pytest.raises(UserError) as caught:
        with_presets("train", {"preset": given})
    assert words in f"{caught.value.message} | {caught.value.hint}"


def test_a_wrong_key_of_a_preset_is_told_as_one_of_the_step(tmp_path):
    (tmp_path / "mine.yaml").write_text("bach: 32\n")
    steps = {
        "web": {"stage": "pool", "source": "photos"},
        "raw": {"stage": "shards", "pool": "web"},
        "first": {"stage": "train", "shards": "raw", "preset": str(tmp_path / "mine.yaml")},
    }
    with pytest.raises(UserError) as caught:
        parse_recipe({"steps": steps}, STAGES)
    assert "first has no key 'bach'" in caught.value.message and caught.value.hint == "did you mean batch?"


def test_the_trainer_knows_no_preset_by_name():
    """What a preset does is in its file alone: no text of the trainer but its comments and docstrings names one."""
    for path in (Path(__file__).parents[2] / "training").glob("*.py"):
        tree = ast.parse(path.read_text())
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in said]
        assert not {word for word in words if word in NAMES}, path
