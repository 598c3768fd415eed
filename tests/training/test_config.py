from dataclasses import replace

import numpy as np
import pytest

from training.config import HeadConfig, TrainConfig, TrainResources


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 30}, r"train.image_size must be a multiple of train.vit.patch_size \(8\): got 30"),
        ({"local_size": 12}, r"train.local_size must be a multiple"),
        ({"batch": 0}, "train.batch must be at least 1: got 0"),
        ({"n_steps": -1}, "train.n_steps must be at least 0: got -1"),
        ({"lr": float("nan")}, "train.lr must be above 0: got nan"),
        ({"momentum": 1.1}, r"train.momentum must be in \[0, 1\]: got 1.1"),
        ({"centering": "none"}, "train.centering must be 'sinkhorn' or 'softmax': got 'none'"),
        ({"final_lr": 1.0}, r"train.final_lr must be in \[0, train.lr\]: got 1.0"),
        ({"beta2": 1.0}, r"train.beta2 must be in \(0, 1\): got 1.0"),
        ({"weight_decay": -1}, "train.weight_decay must be at least 0: got -1"),
        ({"warmup_steps": 8}, r"\(train.cooldown_fraction\) must fit into train.n_steps \(8\): got 8 and 2"),
        ({"teacher_temperature_start": 0.0}, "train.teacher_temperature_start must be above 0"),
        ({"teacher_temperature_steps": 3}, "steps must be 0 without train.teacher_temperature_start: got 3"),
        ({"teacher_temperature_start": 0.03}, "steps must be at least 1 with train.teacher_temperature_start: got 0"),
        ({"init_frozen_steps": 3}, "train.init_frozen_steps must be 0 without train.init: got 3"),
        ({"init_gain": 0.0}, "train.init_gain must be above 0"),
        ({"final_momentum": 2.0}, r"train.final_momentum must be in \[0, 1\]: got 2.0"),
        ({"final_weight_decay": -1.0}, "train.final_weight_decay must be at least 0: got -1.0"),
        ({"clip": "all"}, "train.clip must be 'module' or 'parameter': got 'all'"),
        ({"koleo_crops": 3}, "train.koleo_crops must be 1 or 2: got 3"),
        ({"group": 3}, r"train.group must divide train.batch \(8\): got 3"),
        ({"group": 4, "koleo_group": 8}, r"train.koleo_group must divide the images of a group \(4\): got 8"),
        ({"result": "best"}, "train.knn_every must be set for train.result 'best': got 0"),
        ({"knn_every": -1}, "train.knn_every must be at least 0: got -1"),
        ({"ibot_weight": -1.0}, "train.ibot_weight must be at least 0: got -1.0"),
        ({"ibot_weight": float("nan")}, "train.ibot_weight must be at least 0: got nan"),
        ({"koleo_weight": -0.1}, "train.koleo_weight must be at least 0: got -0.1"),
        ({"mask_probability": 0.0}, r"train.mask_probability must be in \(0, 1\]: got 0.0"),
        ({"mask_ratio": (0.5, 0.1)}, "train.mask_ratio must be 0 <= low <= high < 1: got 0.5, 0.1"),
        ({"mask_ratio": (0.5, 1.0)}, "train.mask_ratio must be 0 <= low <= high < 1: got 0.5, 1.0"),
        (
            {"image_size": 8},
            "must hide at least one patch, or train.ibot_weight be 0: got none with 16 global crops of 1 x 1",
        ),
        ({"mask_probability": 0.05}, "got none with 16 global crops of 4 x 4 patches, train.mask_probability 0.05"),
    ],
)
def test_a_bad_field_is_named(tiny, fields, words):
    with pytest.raises(ValueError, match=words):
        replace(tiny, **fields)


def test_a_grid_too_small_for_masks_is_fine_without_ibot(tiny):
    assert replace(tiny, image_size=8, ibot_weight=0.0).image_size == 8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prototypes": 0}, "head.prototypes must be at least 1: got 0"),
        ({"hidden": 0}, "head.hidden must be at least 1: got 0"),
        ({"bottleneck": 0}, "head.bottleneck must be at least 1: got 0"),
        ({"norm": "weight"}, "head.norm must be 'fixed', 'trained' or 'none': got 'weight'"),
    ],
)
def test_a_bad_field_of_a_head_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        HeadConfig(**fields)


def test_bad_resources_are_named():
    with pytest.raises(ValueError, match=r"train\.resources\.micro_batch must be at least 1: got 0"):
        TrainResources(micro_batch=0)
    with pytest.raises(ValueError, match=r"train\.resources\.crops_on must be 'worker' or 'device': got 'gpu'"):
        TrainResources(crops_on="gpu")
    with pytest.raises(ValueError, match=r"train\.resources\.n_workers must be at least 0: got -1"):
        TrainResources(n_workers=-1)


def test_schedules_have_a_value_a_step(tiny):
    np.testing.assert_allclose(tiny.lr_schedule()[:3], [0, 5e-4, 1e-3])
    assert tiny.lr_schedule()[-1] == pytest.approx(tiny.final_lr)
    cosine = replace(tiny, schedule="cosine")
    assert len(cosine.lr_schedule()) == len(tiny.lr_schedule()) == tiny.n_steps
    assert cosine.lr_schedule()[-1] < cosine.lr
    ramp = replace(tiny, teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_temperature_steps=3)
    np.testing.assert_allclose(ramp.temperature_schedule(), [0.04, 0.05, 0.06] + [0.07] * 5)
    assert len(replace(ramp, n_steps=2, warmup_steps=0).temperature_schedule()) == 2
    assert len(replace(tiny, n_steps=0).lr_schedule()) == 0


def test_the_defaults_hold_together():
    assert TrainConfig().vit.width == 384
    assert TrainConfig().images_a_group == TrainConfig().batch


def test_cosines_between_two_values(tiny):
    moving = replace(tiny, momentum=0.992, final_momentum=1.0, final_weight_decay=0.4)
    np.testing.assert_allclose(moving.momentum_schedule()[[0, 4]], [0.992, 0.996])
    np.testing.assert_allclose(moving.weight_decay_schedule()[[0, 4]], [0.04, 0.22])
    assert moving.momentum_schedule()[-1] < 1
    assert set(tiny.momentum_schedule()) == {tiny.momentum} and set(tiny.weight_decay_schedule()) == {0.04}
