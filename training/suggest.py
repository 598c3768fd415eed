"""Settings of a training that nobody gave, from what is known of its data: how many images, how large, and on what.

A starting point that runs and learns, not the best there is. It is a pure function, and reckons time with constants:
the same data give the same settings on a slower machine too, so a run that was stopped is found again.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from embedding.flops import vit_flops
from embedding.vit_config import ViTConfig
from training.augment import N_GLOBAL
from training.config import HeadConfig, TrainConfig
from training.masks import mask_counts
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
MIN_PROTOTYPES = 1 << 4  # where there are so many images
LEAST_PATCHES = 2  # on a side of a global crop: some are to be hidden
HALF_LIFE, MIN_MOMENTUM = 0.0015, 0.99  # of the teacher: share of the steps
LR_AT_1024 = 4e-3  # effective, of the published recipes for ViT-S to L, at a batch of 1,024

_SHAPES = {  # (on a GPU, small images): width, depth, heads
    (False, True): (128, 6, 4),
    (False, False): (128, 6, 4),
    (True, True): (192, 12, 3),  # ViT-Ti
    (True, False): (384, 12, 6),  # ViT-S
}


_USUAL = asdict(TrainConfig())
_OF_DATA = ("batch", "image_size", "local_size", "head", "ibot_head", "precision", "n_steps", "warmup_steps", "lr",
            "momentum")  # fmt: skip  # what depends on images and on the length of the run
FIRST_STEPS = ("warmup_steps", "freeze_last_layer_steps", "teacher_temperature_steps", "init_frozen_steps")


class Suggested(NamedTuple):
    """A value of a field of ``TrainConfig``, as a recipe would have it, and why."""

    value: Any
    reason: str


class _Settings:
    """What is given and what is suggested, one field after the other."""

    def __init__(self, given: Mapping[str, Any], preset: Mapping[str, Any] | None) -> None:
        self._own = given
        self.preset = preset
        self.given = _laid_over(preset or {}, given)
        self.found: dict[str, Suggested] = {}
        self.values: dict[str, Any] = {}  # of both: what the next suggestion follows

    def suggest(self, name: str, value: Any, reason: str, shape: bool = False) -> Any:
        """Suggest a field unless it is given; of a field with keys of its own those that are not. Returns its value.

        What is given and cannot be meant is not followed: who makes the config says what is wrong with it. Beside a
        preset nothing but what depends on the data is suggested, and what must be so (``shape``: over the preset too).
        """
        given = self._own if shape else self.given
        if self.preset is not None and name not in _OF_DATA and not shape:
            value = _USUAL[name]
        if isinstance(value, dict) and isinstance(given.get(name), Mapping):
            self.values[name] = {**value, **given[name]}
        elif name in given:
            self.values[name] = given[name] if _is_meant(given[name], value) else value
            return self.values[name]
        else:
            self.values[name] = value
        keys = value.keys() if isinstance(value, dict) else ()
        if (self.preset is None or name in _OF_DATA or shape) and not (keys and keys <= given.get(name, {}).keys()):
            self.found[name] = Suggested(self.values[name], reason)
        return self.values[name]

    def is_own(self, name: str) -> bool:
        """Whether a field is given beside the preset."""
        return name in self._own


def _is_meant(given: Any, value: Any) -> bool:
    """Whether what is given can be followed where ``value`` would be suggested."""
    return isinstance(given, int | float) and isinstance(value, int | float) and given >= 0


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them, of fields with keys of their own key by key."""
    both = {key for key in above if isinstance(above[key], Mapping) and isinstance(below.get(key), Mapping)}
    return {**below, **above, **{key: {**below[key], **above[key]} for key in both}}


def suggest(
    n_images: int,
    median_side: int,
    gpu: bool,
    given: Mapping[str, Any] | None = None,
    preset: Mapping[str, Any] | None = None,
    shape: Mapping[str, Any] | None = None,
) -> dict[str, Suggested]:
    """Fields of ``TrainConfig`` that are not ``given``, each with its reason; those left out stay at their defaults.

    n_images: samples of an epoch. median_side: of the shorter sides, in pixels. given: what the user has set, as a
    recipe would have it; it is kept, and what depends on it follows it. preset: settings below those, if there are any;
    they are kept too, and so are the defaults that they mean: only what depends on the data and on the length of the
    run is suggested, and steps of a preset are shortened with its run. shape: keys of ``vit``, all that make the shape
    of a backbone to begin with, as ``begin.Shape.fields`` has them. Raises ValueError for numbers below 1, and for a
    given shape that no network has.
    """
    if n_images < 1 or median_side < 1:
        raise ValueError(f"n_images and median_side must be at least 1: got {n_images} and {median_side}")
    settings = _Settings(given or {}, preset)
    settings.suggest("batch", BATCH[gpu], "usual on one GPU" if gpu else "small, for a short run")
    _suggest_network(settings, n_images, median_side, gpu, shape)
    _suggest_heads(settings, n_images, gpu)
    _suggest_length(settings, n_images, gpu)
    _suggest_pace(settings, settings.values["n_steps"], settings.values["batch"], free_shape=shape is None)
    _shorten_steps(settings)
    return settings.found


def _suggest_network(settings: _Settings, n_images: int, side: int, gpu: bool, begun: Mapping[str, Any] | None) -> None:
    """Network and crops."""
    small, where = side < SMALL_SIDE, "on a GPU" if gpu else "on a CPU"
    width, depth, heads = _SHAPES[gpu, small]
    patch = (4 if side < TINY_SIDE else 8) if small else 16
    shape: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "patch_size": patch}
    why = f"a size for {'small images' if small else 'images'} {where}"
    if begun is not None:
        shape, why = _with_preset(begun, settings.preset or {}), "the shape of what the training begins with"
    vit = settings.suggest("vit", shape, why, shape=begun is not None)
    whole, part = (side, side // 2) if small else (224, 96) if gpu else (112, 48)
    seen = f"the shorter sides of the images have a median of {side:,} pixels"
    patch = vit["patch_size"]
    whole = max(_multiple(whole, patch), LEAST_PATCHES * patch)
    whole = settings.suggest("image_size", whole, seen + ("" if small or gpu else f"; {where}"))
    if begun is not None and vit.get("position") == "learned" and vit.get("image_size") is None:
        settings.suggest("vit", {**shape, "image_size": whole}, f"{why}, its positions for these crops", shape=True)
    settings.suggest("local_size", _multiple(part, patch), "about half of a global crop")
    settings.suggest("n_local", 4 if small else 8, "few for small images" if small else "as published")
    if small:
        mild = {"global_scale": [0.4, 1.0], "local_scale": [0.15, 0.4], "blur": [0.0, 0.0, 0.0]}
        settings.suggest("augment", mild, "small images lose their meaning in smaller parts, and when blurred")
    if vit["width"] < WIDE:
        settings.suggest("init_gain", 1.0, f"a network narrower than {WIDE} channels")


def _with_preset(begun: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """The shape to begin with, over that of a preset; of keys that nobody has set those that are no default."""
    below = preset.get("vit")
    below = below if isinstance(below, Mapping) else {}
    always = ("width", "depth", "heads", "patch_size")
    usual = _USUAL["vit"]
    return {**below, **{k: v for k, v in begun.items() if k in always or k in below or v != usual[k]}}


def _suggest_heads(settings: _Settings, n_images: int, gpu: bool) -> None:
    """Prototypes, and on a CPU smaller heads; of a preset that has heads nothing."""
    preset = settings.preset
    if preset is not None and ("head" in preset or "ibot_head" in preset):
        for name in ("head", "ibot_head"):
            settings.values[name] = {**_USUAL[name], **(settings.given.get(name) or {})}
        return
    few = {} if gpu or preset is not None else {"hidden": 256, "bottleneck": 64}
    n_cls = N_GLOBAL * (settings.values["batch"] or 1)
    count, why = _prototypes(n_images, gpu, n_cls)
    head = settings.suggest("head", {"prototypes": count, **few}, why)
    n_masked = _masked_patches(settings.values)
    if n_masked and head["prototypes"] == count and (most := _power_below(n_masked**2)) < count:
        why = f"no more than the square of the {n_masked:,} hidden patches of a step, which are balanced over them"
        settings.suggest("ibot_head", {**head, "prototypes": most}, why)
    else:
        settings.suggest("ibot_head", dict(head), "as the head of the CLS token")


def _prototypes(n_images: int, gpu: bool, n_targets: int) -> tuple[int, str]:
    """How many prototypes, a power of two, and why."""
    count = 2 ** round(math.log2(n_images / 16))
    why = f"a power of two near a 16th of {n_images:,} images"
    if count < MIN_PROTOTYPES:
        count = max(2, min(MIN_PROTOTYPES, _power_below(n_images)))
        why = f"few, for {n_images:,} images"
    if count > MAX_PROTOTYPES[gpu]:
        count, why = (
            MAX_PROTOTYPES[gpu],
            "as many as published recipes have" if gpu else "a run on a CPU sees few images",
        )
    if (most := _power_below(n_targets**2)) < count:  # as ``monitor.doubts`` has it
        count, why = (
            most,
            f"no more than the square of the {n_targets:,} targets of a step, which are balanced over them",
        )
    return count, why


def _power_below(n: int) -> int:
    """The largest power of two up to ``n``, which is at least 1."""
    return 1 << (n.bit_length() - 1)


def _masked_patches(values: Mapping[str, Any]) -> int:
    """Hidden patches of a step, with the usual masks."""
    side = values["image_size"] // values["vit"]["patch_size"]
    n_crops = N_GLOBAL * (values["batch"] or 1)
    return int(mask_counts(n_crops, side**2, _USUAL["mask_probability"], _USUAL["mask_ratio"]).sum())


def _suggest_length(settings: _Settings, n_images: int, gpu: bool) -> None:
    """Number of steps, and how they are reckoned."""
    batch = settings.values["batch"] or 1
    if gpu:
        settings.suggest("precision", "bfloat16", "on a GPU at least twice as fast")
    wanted = max(LEAST_STEPS, round(EPOCHS[gpu] * n_images / batch))
    most = MAX_GPU_STEPS if gpu else max(1, int(CPU_SECONDS * CPU_FLOPS / _step_flops(settings.values)))
    n_steps = min(wanted, most)
    limit = "the length of published recipes" if gpu else "what takes about an hour on one core"
    why = limit if n_steps < wanted else "the least that shows something" if n_steps == LEAST_STEPS else "as usual"
    settings.suggest("n_steps", n_steps, f"{n_steps * batch / n_images:.3g} epochs: {why}")


def _shorten_steps(settings: _Settings) -> None:
    """Bring the first steps of a preset, such as its warm-up, to a run that is shorter than its own."""
    whole, n_steps = (settings.preset or {}).get("n_steps"), settings.values["n_steps"]
    if not isinstance(whole, int) or not 0 <= n_steps < whole:
        return
    for name in FIRST_STEPS:
        steps = (settings.preset or {}).get(name)
        if isinstance(steps, int) and steps > 0 and not settings.is_own(name):
            less = max(1, steps * n_steps // whole)
            settings.found[name] = Suggested(less, f"{steps:,} of {whole:,} in the preset, so as many of {n_steps:,}")


def _suggest_pace(settings: _Settings, n_steps: int, batch: int, free_shape: bool) -> None:
    """What goes with a run of this length. free_shape: whether the network may be changed."""
    lr = float(f"{sqrt_scaled_lr(LR_AT_1024, batch):.4g}")
    settings.suggest("lr", lr, f"{LR_AT_1024:g} at a batch of 1,024, by its square root")
    settings.suggest("warmup_steps", round(n_steps / 10), "a tenth of the run")
    momentum = max(MIN_MOMENTUM, round(2 ** (-1 / (HALF_LIFE * n_steps)), 5)) if n_steps else MIN_MOMENTUM
    settings.suggest("momentum", momentum, f"a half-life of {HALF_LIFE:.2%} of the run, at least {MIN_MOMENTUM}")
    if n_steps < DAMPED_STEPS and free_shape:
        vit = settings.found.get("vit", Suggested({}, "as given"))
        shape = {**vit.value, "layer_scale": None}
        settings.suggest("vit", shape, f"{vit.reason}; no LayerScale below {DAMPED_STEPS:,} steps")
    start, steps = (settings.given.get(f"teacher_temperature_{name}", 1) for name in ("start", "steps"))
    if n_steps >= WARM_TEACHER_STEPS and start is not None and steps != 0:  # neither without the other
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
