"""Settings of a training that nobody gave, from what is known of its data: how many images, how large, and on what.

A starting point that runs and learns, not the best there is. It is a pure function, and reckons time with constants:
the same data give the same settings on a slower machine too, so a run that was stopped is found again.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from embedding.flops import vit_flops
from embedding.vit_config import ViTConfig
from training.augment import N_GLOBAL
from training.config import HeadConfig, TrainConfig
from training.schedules import sqrt_scaled_lr

CPU_SECONDS = 3600  # that a run on a CPU may take, about
CPU_FLOPS = 4e10  # FLOP/s of one core in small float32 products: half of what a recent one gives alone
MAX_GPU_STEPS = 125_000  # of the published recipes for ImageNet-1k: 100 epochs of 1,250 steps
LEAST_STEPS = 500  # fewer show nothing
EPOCHS = {False: 10, True: 100}  # on a CPU, on a GPU
BATCH = {False: 64, True: 256}
SMALL_SIDE = 64  # pixels: smaller images are not enlarged
TINY_SIDE = 48  # pixels: still smaller ones need smaller patches
WIDE = 256  # channels: narrower networks start from larger weights
DAMPED_STEPS = 10_000  # from here on LayerScale pays
WARM_TEACHER_STEPS = 20_000  # from here on the teacher gets warmer
MAX_PROTOTYPES = {False: 1 << 12, True: 1 << 17}  # a run on a CPU sees few images, whatever there are
MIN_PROTOTYPES = 1 << 10
HALF_LIFE, MIN_MOMENTUM = 0.0015, 0.99  # of the teacher: share of the steps
LR_AT_1024 = 4e-3  # effective, of the published recipes for ViT-S to L, at a batch of 1,024

_SHAPES = {  # (on a GPU, small images): width, depth, heads
    (False, True): (128, 6, 4),
    (False, False): (128, 6, 4),
    (True, True): (192, 12, 3),  # ViT-Ti
    (True, False): (384, 12, 6),  # ViT-S
}


class Suggested(NamedTuple):
    """A value of a field of ``TrainConfig``, as a recipe would have it, and why."""

    value: Any
    reason: str


class _Settings:
    """What is given and what is suggested, one field after the other."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self.found: dict[str, Suggested] = {}
        self.values: dict[str, Any] = {}  # of both: what the next suggestion follows

    def suggest(self, name: str, value: Any, reason: str) -> Any:
        """Suggest a field unless it is given; of a field with keys of its own those that are not. Returns its value.

        What is given and cannot be meant is not followed: who makes the config says what is wrong with it.
        """
        given = self._given.get(name)
        if isinstance(value, dict) and isinstance(given, Mapping):
            self.values[name] = {**value, **given}
            if not value.keys() <= given.keys():
                self.found[name] = Suggested(self.values[name], reason)
        elif name in self._given:
            meant = isinstance(given, int | float) and isinstance(value, int | float) and given >= 0
            self.values[name] = given if meant else value
        else:
            self.values[name] = value
            self.found[name] = Suggested(value, reason)
        return self.values[name]


def suggest(n_images: int, median_side: int, gpu: bool, given: Mapping[str, Any] | None = None) -> dict[str, Suggested]:
    """Fields of ``TrainConfig`` that are not ``given``, each with its reason; those left out stay at their defaults.

    n_images: samples of an epoch. median_side: of the shorter sides, in pixels. given: what the user has set, as a
    recipe would have it; it is kept, and what depends on it follows it. Raises ValueError for numbers below 1, and for
    a given shape that no network has.
    """
    if n_images < 1 or median_side < 1:
        raise ValueError(f"n_images and median_side must be at least 1: got {n_images} and {median_side}")
    settings = _Settings(given or {})
    _suggest_network(settings, n_images, median_side, gpu)
    _suggest_length(settings, n_images, gpu)
    _suggest_pace(settings, settings.values["n_steps"], settings.values["batch"])
    return settings.found


def _suggest_network(settings: _Settings, n_images: int, side: int, gpu: bool) -> None:
    """Network, crops and heads."""
    small, where = side < SMALL_SIDE, "on a GPU" if gpu else "on a CPU"
    width, depth, heads = _SHAPES[gpu, small]
    patch = (4 if side < TINY_SIDE else 8) if small else 16
    shape = {"width": width, "depth": depth, "heads": heads, "patch_size": patch}
    vit = settings.suggest("vit", shape, f"a size for {'small images' if small else 'images'} {where}")
    whole, part = (side, side // 2) if small else (224, 96) if gpu else (112, 48)
    why = f"the shorter sides of the images have a median of {side:,} pixels"
    settings.suggest("image_size", _multiple(whole, vit["patch_size"]), why + ("" if small or gpu else f"; {where}"))
    settings.suggest("local_size", _multiple(part, vit["patch_size"]), "about half of a global crop")
    settings.suggest("n_local", 4 if small else 8, "few for small images" if small else "as published")
    if small:
        mild = {"global_scale": [0.4, 1.0], "local_scale": [0.15, 0.4], "blur": [0.0, 0.0, 0.0]}
        settings.suggest("augment", mild, "small images lose their meaning in smaller parts, and when blurred")
    prototypes = min(max(2 ** round(math.log2(n_images / 16)), MIN_PROTOTYPES), MAX_PROTOTYPES[gpu])
    head = {"prototypes": prototypes, **({} if gpu else {"hidden": 256, "bottleneck": 64})}
    head = settings.suggest(
        "head", head, f"about a prototype for 16 of {n_images:,} images, {MIN_PROTOTYPES:,} to {MAX_PROTOTYPES[gpu]:,}"
    )
    settings.suggest("ibot_head", dict(head), "as the head of the CLS token")
    if vit["width"] < WIDE:
        settings.suggest("init_gain", 1.0, f"a network narrower than {WIDE} channels")


def _suggest_length(settings: _Settings, n_images: int, gpu: bool) -> None:
    """Batch and number of steps."""
    batch = settings.suggest("batch", BATCH[gpu], "usual on one GPU" if gpu else "small, for a short run") or 1
    if gpu:
        settings.suggest("precision", "bfloat16", "on a GPU at least twice as fast")
    wanted = max(LEAST_STEPS, round(EPOCHS[gpu] * n_images / batch))
    most = MAX_GPU_STEPS if gpu else max(1, int(CPU_SECONDS * CPU_FLOPS / _step_flops(settings.values)))
    n_steps = min(wanted, most)
    limit = "the length of published recipes" if gpu else "what takes about an hour on one core"
    why = limit if n_steps < wanted else "the least that shows something" if n_steps == LEAST_STEPS else "as usual"
    settings.suggest("n_steps", n_steps, f"{n_steps * batch / n_images:.3g} epochs: {why}")


def _suggest_pace(settings: _Settings, n_steps: int, batch: int) -> None:
    """What goes with a run of this length."""
    lr = float(f"{sqrt_scaled_lr(LR_AT_1024, batch):.4g}")
    settings.suggest("lr", lr, f"{LR_AT_1024:g} at a batch of 1,024, by its square root")
    settings.suggest("warmup_steps", round(n_steps / 10), "a tenth of the run")
    momentum = max(MIN_MOMENTUM, round(2 ** (-1 / (HALF_LIFE * n_steps)), 5)) if n_steps else MIN_MOMENTUM
    settings.suggest("momentum", momentum, f"a half-life of {HALF_LIFE:.2%} of the run, at least {MIN_MOMENTUM}")
    if n_steps < DAMPED_STEPS:
        vit = settings.found.get("vit", Suggested({}, "as given"))
        shape = {**vit.value, "layer_scale": None}
        settings.suggest("vit", shape, f"{vit.reason}; no LayerScale below {DAMPED_STEPS:,} steps")
    if n_steps >= WARM_TEACHER_STEPS:
        settings.suggest("teacher_temperature", 0.07, f"from {WARM_TEACHER_STEPS:,} steps on")
        settings.suggest("teacher_temperature_start", 0.04, "the temperature of shorter runs")
        settings.suggest("teacher_temperature_steps", round(n_steps / 10), "a tenth of the run")


def _step_flops(values: Mapping[str, Any]) -> float:
    """FLOPs of the products of a step: a backward takes twice a forward, the teacher sees global crops alone."""
    vit, n_local, usual = ViTConfig(**values["vit"]), values["n_local"], TrainConfig()
    whole, part = vit_flops(vit, values["image_size"]), vit_flops(vit, values["local_size"])
    masked = usual.mask_probability * sum(usual.mask_ratio) / 2  # share of the patches of global crops
    n_masked = N_GLOBAL * (values["image_size"] // vit.patch_size) ** 2 * masked
    cls, patches = (2 * _head_weights(HeadConfig(**values[name]), vit.width) for name in ("head", "ibot_head"))
    heads = cls * (3 * (N_GLOBAL + n_local) + N_GLOBAL) + patches * (3 + 1) * n_masked
    return float((values["batch"] or 1) * (3 * (N_GLOBAL * whole + n_local * part) + N_GLOBAL * whole + heads))


def _head_weights(head: HeadConfig, width: int) -> int:
    """Weights of the matrices of a head."""
    return (width + head.hidden + head.bottleneck) * head.hidden + head.bottleneck * head.prototypes


def _multiple(pixels: int, patch_size: int) -> int:
    """The multiple of a patch that is nearest, at least one."""
    return max(1, math.floor(pixels / patch_size + 0.5)) * patch_size
