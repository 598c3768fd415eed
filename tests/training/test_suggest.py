import math
from dataclasses import fields, replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from training.config import TrainConfig
from training.monitor import doubts
from training.suggest import CPU_FLOPS, CPU_SECONDS, MAX_GPU_STEPS, _step_flops, suggest

N_IMAGES = [1, 2, 15, 16, 100, 999, 10**4, 50_000, 10**6, 14_197_122, 10**8, 10**10]
SIDES = [8, 9, 11, 16, 28, 32, 47, 48, 63, 64, 65, 96, 224, 500, 4000]


def config_of(n_images, side, gpu, given=None):
    """As pipelines makes it: what is given wins."""
    found = {name: one.value for name, one in suggest(n_images, side, gpu, given).items()}
    return TypeAdapter(TrainConfig).validate_python({**(given or {}), **found})


@pytest.mark.parametrize("gpu", [False, True])
def test_every_pool_gets_a_config(gpu):
    for n in N_IMAGES:
        for side in SIDES:
            config = config_of(n, side, gpu)
            assert config.image_size % config.vit.patch_size == config.local_size % config.vit.patch_size == 0
            assert config.local_size < config.image_size
            assert abs(config.image_size - side) <= config.vit.patch_size / 2 or side >= 64
            assert min(n, 16) / 2 < config.head.prototypes <= 131072 and math.log2(config.head.prototypes) % 1 == 0
            assert config.ibot_head.prototypes <= config.head.prototypes
            assert replace(config.ibot_head, prototypes=config.head.prototypes) == config.head
            assert 0.99 <= config.momentum < 1
            assert len(config.lr_schedule()) == config.n_steps > 0
            assert len(config.temperature_schedule()) == config.n_steps


@pytest.mark.parametrize("gpu", [False, True])
def test_more_images_never_make_it_smaller(gpu):
    for side in SIDES:
        found = [config_of(n, side, gpu) for n in N_IMAGES]
        for values in (
            [config.head.prototypes for config in found],
            [config.momentum for config in found],
            [config.teacher_temperature for config in found],
        ):
            assert values == sorted(values)
        if gpu:  # on a CPU more prototypes take time from the steps
            assert [config.n_steps for config in found] == sorted(config.n_steps for config in found)
    sizes = [config_of(10**5, side, gpu).image_size for side in range(8, 300)]
    assert all(np.diff(sizes) >= 0)


def test_prototypes_are_a_16th_of_the_images():
    for n, k in [(10, 8), (60, 16), (1000, 64), (16_384, 1024), (33_000, 2048), (10**6, 65536), (10**10, 131072)]:
        assert config_of(n, 224, True).head.prototypes == k


@pytest.mark.parametrize("gpu", [False, True])
def test_no_doubt_is_cast_on_what_is_suggested(gpu):
    """But that a run is short, where it cannot be longer, which the suggestion says too."""
    for given in ({}, {"batch": 8}, {"batch": 32, "vit": {"patch_size": 4}}):
        for n in N_IMAGES[1:]:
            for side in (8, 28, 60, 224):
                found = suggest(n, side, gpu, given)
                values = {name: one.value for name, one in found.items()}
                config = TypeAdapter(TrainConfig).validate_python({**given, **values})
                said = doubts(config, n)
                assert not [text for text in said if "prototypes" in text], (n, side, said)
                short = config.n_steps * config.batch < n
                assert len(said) == short
                assert not short or "hour" in found["n_steps"].reason or "the length of" in found["n_steps"].reason


def test_beside_a_preset_only_what_depends_on_the_data_is_suggested():
    of_data = {"batch", "image_size", "local_size", "head", "ibot_head", "precision", "n_steps", "warmup_steps", "lr",
               "momentum"}  # fmt: skip
    for gpu in (False, True):
        for preset in ({"vit": {"depth": 3}}, {"batch": 16}, {}):
            found = suggest(10**6, 30, gpu, {"n_steps": 300}, preset)
            assert found.keys() == of_data - preset.keys() - {"n_steps"} - ({"precision"} if not gpu else set())
            assert found["head"].value.keys() == {"prototypes"}  # width and depth of heads are what a preset means
            assert (found["image_size"].value, found["local_size"].value) == (32, 16)  # of patches of 16
    whole = {"head": {"norm": "none"}, "image_size": 96}
    assert not {"head", "ibot_head", "image_size", "vit", "augment"} & suggest(100, 30, False, {}, whole).keys()


def test_a_shorter_run_shortens_the_first_steps_of_a_preset():
    preset = {"n_steps": 1000, "warmup_steps": 100, "freeze_last_layer_steps": 3, "teacher_temperature_start": 0.04,
              "teacher_temperature_steps": 500, "cooldown_fraction": 0.2}  # fmt: skip
    found = suggest(100, 30, False, {"n_steps": 100}, preset)
    assert [found[f"{name}_steps"].value for name in ("warmup", "freeze_last_layer", "teacher_temperature")] == [
        10,
        1,
        50,
    ]
    assert found["warmup_steps"].reason == "100 of 1,000 in the preset, so as many of 100"
    assert suggest(100, 30, False, {"n_steps": 100, "warmup_steps": 100}, preset).keys() == found.keys() - {
        "warmup_steps"
    }
    for n_steps in (1, 2, 3, 999):  # the config takes all of them
        values = {name: one.value for name, one in suggest(100, 30, False, {"n_steps": n_steps}, preset).items()}
        config = TypeAdapter(TrainConfig).validate_python({**preset, "n_steps": n_steps, **values})
        assert len(config.lr_schedule()) == n_steps
    for n_steps in (1000, 2000):
        assert not [name for name in suggest(100, 30, False, {"n_steps": n_steps}, preset) if name.endswith("_steps")]


def test_the_shape_of_what_a_run_begins_with_is_kept():
    begun = {"width": 64, "depth": 3, "heads": 2, "patch_size": 8, "n_registers": 0, "layer_scale": None,
             "position": "learned", "image_size": None, "ffn": "mlp", "rope_rescale": None}  # fmt: skip
    found = suggest(100, 30, False, {}, None, begun)
    assert found["vit"].value == {"width": 64, "depth": 3, "heads": 2, "patch_size": 8, "n_registers": 0,
                                  "layer_scale": None, "position": "learned", "image_size": 32}  # fmt: skip
    assert (found["image_size"].value, found["local_size"].value) == (32, 16)
    found = suggest(
        100, 30, False, {"vit": {"n_registers": 4}}, {"vit": {"drop_path": 0.3, "rope_rescale": 2.0}}, begun
    )
    vit = found["vit"].value
    assert (vit["n_registers"], vit["drop_path"], vit["rope_rescale"], vit["width"]) == (4, 0.3, None, 64)
    assert "augment" not in found
    scaled = {**begun, "layer_scale": 1.0, "position": "rope"}
    assert suggest(100, 30, False, {}, None, scaled)["vit"].value["layer_scale"] == 1.0  # in a short run too


def test_a_warmer_teacher_has_both_its_start_and_its_steps():
    for given in ({"teacher_temperature_start": None}, {"teacher_temperature_steps": 0}):
        assert config_of(10**6, 224, True, given).teacher_temperature_start is None
    assert config_of(10**6, 224, True, {"teacher_temperature_steps": 7}).teacher_temperature_start == 0.04


def test_a_run_on_a_cpu_ends_within_the_hour_or_ten_epochs():
    for n in N_IMAGES:
        for side in SIDES:
            found = suggest(n, side, gpu=False)
            values = {name: one.value for name, one in found.items()}
            seconds = values["n_steps"] * _step_flops(values) / CPU_FLOPS
            assert seconds <= CPU_SECONDS
            epochs = values["n_steps"] * values["batch"] / n
            assert seconds > 0.99 * CPU_SECONDS or values["n_steps"] == 500 or epochs == pytest.approx(10, abs=0.1)
            assert ("an hour" in found["n_steps"].reason) == (values["n_steps"] < max(500, round(10 * n / 64)))


def test_a_run_on_a_gpu():
    assert config_of(25_600, 400, True).n_steps == 100 * 100
    assert config_of(10**8, 400, True).n_steps == MAX_GPU_STEPS
    config = config_of(50_000, 32, True)
    assert (config.vit.width, config.vit.depth, config.vit.heads, config.vit.patch_size) == (192, 12, 3, 4)
    assert (config.image_size, config.local_size, config.precision, config.batch) == (32, 16, "bfloat16", 256)
    assert config.lr == pytest.approx(4e-3 * math.sqrt(256 / 1024))
    config = config_of(1_281_167, 400, True)
    assert (config.vit.width, config.vit.patch_size, config.image_size, config.local_size) == (384, 16, 224, 96)
    assert (config.teacher_temperature_start, config.teacher_temperature) == (0.04, 0.07)
    half_life = math.log(0.5) / math.log(config.momentum)
    assert half_life == pytest.approx(0.0015 * config.n_steps, rel=0.01)


def test_the_network_of_a_step_is_reckoned_by_its_products():
    """By hand, of a network without blocks to speak of: patches, two heads."""
    head = {"prototypes": 8, "hidden": 4, "bottleneck": 2}
    values = {"vit": {"width": 4, "depth": 1, "heads": 1, "patch_size": 2, "n_registers": 0}, "image_size": 4,
              "local_size": 2, "n_local": 1, "head": head, "ibot_head": head, "batch": 3}  # fmt: skip

    def forward(p):
        n = 1 + p
        return 2 * p * 12 * 4 + 8 * n * 16 + 4 * n * n * 4 + 4 * n * 4 * 16

    weights = 4 * 4 + 4 * 4 + 4 * 2 + 2 * 8
    masked = 2 * 4 * 0.5 * 0.3
    wanted = 3 * (2 * forward(4) + forward(1)) + 2 * forward(4) + 2 * weights * (3 * 3 + 2 + 4 * masked)
    assert _step_flops(values) == pytest.approx(3 * wanted)


def test_what_is_given_is_kept_and_followed():
    given = {"n_steps": 300, "batch": 16, "vit": {"width": 64, "patch_size": 8}, "head": {"prototypes": 512}}
    config = config_of(10**6, 30, False, given)
    assert (config.n_steps, config.batch, config.warmup_steps) == (300, 16, 30)
    assert (config.vit.width, config.vit.patch_size, config.vit.depth) == (64, 8, 6)
    assert (config.image_size, config.local_size) == (32, 16)
    assert config.head.prototypes == config.ibot_head.prototypes == 512
    assert config.vit.layer_scale is None
    assert config_of(100, 30, False, {"ibot_head": None}).ibot_head is None
    assert config_of(100, 30, False, {"n_steps": 0}).warmup_steps == 0
    every = {field.name: getattr(TrainConfig(), field.name) for field in fields(TrainConfig)}
    assert suggest(100, 30, False, {name: value for name, value in every.items() if name != "vit"}).keys() == {"vit"}


def test_what_cannot_be_meant_is_not_followed():
    """The config refuses it with a sentence of its own."""
    for given in ({"n_steps": "many"}, {"batch": -1}, {"vit": 3}, {"head": [1]}):
        found = suggest(100, 30, False, given)
        assert not given.keys() & found.keys()


def test_the_same_data_get_the_same_settings():
    assert suggest(12_345, 100, False) == suggest(12_345, 100, False)


def test_every_suggestion_has_a_reason():
    for gpu in (False, True):
        for side in (32, 300):
            assert all(one.reason for one in suggest(10**6, side, gpu).values())


def test_nothing_is_no_data():
    with pytest.raises(ValueError, match="at least 1: got 0 and 32"):
        suggest(0, 32, False)
