"""What a training run is (``TrainConfig``, fingerprinted) and how fast it may go (``TrainResources``, not)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from embedding.vit_config import ViTConfig
from training.augment import N_GLOBAL, AugmentConfig
from training.masks import mask_counts
from training.schedules import warmup_constant_cooldown, warmup_cosine


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of DINO, iBOT and KoLeo: architecture, crops, targets and optimiser. Every field changes the weights.

    The defaults fit a ViT-S/16 on images of 224 px and one GPU. The loss is DINO + ibot_weight * iBOT + koleo_weight *
    KoLeo; a part of weight 0 is left out: no head is made for it, and it costs nothing.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    # backbone
    width: int = 384  # channels of a token
    depth: int = 12  # blocks
    heads: int = 6  # attention heads
    patch_size: int = 16  # pixels
    n_registers: int = 4  # extra tokens without a position
    layer_scale: float | None = 1e-5  # initial scale of a branch; None: no such parameter, for runs of < 10^4 steps
    init_gain: float | None = None  # matrices start at a deviation of gain / sqrt(inputs); None: .02, too little below
    # a width of about 256: a short run then spends its steps on growing them
    drop_path: float = 0.0  # share of a batch that skips a branch
    rope_rescale: float | None = None  # r: positions are stretched by a factor of 1/r..r, one draw a forward
    # crops
    image_size: int = 224  # pixels, side of a global crop, a multiple of patch_size
    local_size: int = 96  # pixels, side of a local crop, a multiple of patch_size
    n_local: int = 8  # local crops an image; global ones are 2
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # how crops are cut and changed
    # DINO head and targets
    n_prototypes: int = 4096  # K; about a 16th of the images, a power of two
    head_hidden: int = 2048  # channels
    head_bottleneck: int = 256  # channels
    head_normalised: bool = True  # prototypes of length 1 (weight norm, gain frozen); False: plain linear; both heads
    centering: str = "sinkhorn"  # or "softmax": a running centre
    centre_momentum: float = 0.9  # of the running centre, with centering softmax
    sinkhorn_iterations: int = 3  # with centering sinkhorn
    student_temperature: float = 0.1  # divides the student's logits
    teacher_temperature: float = 0.04  # divides the teacher's logits
    teacher_temperature_start: float | None = None  # linear from here; None: constant
    teacher_temperature_steps: int = 0  # steps until teacher_temperature is reached
    momentum: float = 0.996  # of the teacher; half-life ln 2 / (1 - momentum) steps
    # iBOT: the student's global crops have hidden patches, whose targets are the teacher's of the whole crop
    ibot_weight: float = 1.0  # of its loss beside DINO's; 0: off
    mask_probability: float = 0.5  # share of the global crops with hidden patches
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # hidden share of such a crop's patches, spread evenly over the crops
    ibot_prototypes: int = 4096  # K of the patches
    ibot_hidden: int = 2048  # channels
    ibot_bottleneck: int = 256  # channels
    # KoLeo: the CLS tokens of a batch keep away from one another, in each global crop on its own
    koleo_weight: float = 0.1  # of its loss beside DINO's; 0: off
    # optimiser
    n_steps: int = 10_000  # 0: the initial weights are the result
    batch: int = 64  # images a step
    lr: float = 1e-3  # effective peak rate, no hidden factor: see schedules.sqrt_scaled_lr
    final_lr: float = 1e-6  # effective rate at the end
    warmup_steps: int = 1_000  # linear from 0
    schedule: str = "cooldown"  # constant, then a cosine over the last part; or "cosine" all the way
    cooldown_fraction: float = 0.2  # share of n_steps, with schedule cooldown
    weight_decay: float = 0.04  # decoupled; none on biases, norms, LayerScale
    decay_tokens: bool = False  # whether CLS, registers, mask and position are decayed
    layer_decay: float = 1.0  # factor of the rate from one block to the one below
    patch_embed_lr: float = 1.0  # factor of the rate of the patch embedding
    beta2: float = 0.999  # of AdamW; beta1 is .9
    clip_norm: float = 3.0  # largest gradient norm, of backbone and each head on its own
    freeze_last_layer_steps: int = 0  # first steps in which the prototypes stand still
    precision: str = "float32"  # or "bfloat16": matrix products; weights, losses and teacher targets stay float32
    # order and stops
    seed: int = 0  # of weights, order and crops
    n_open: int = 16  # shards whose samples are mixed with one another
    max_bad_steps: int = 10  # steps in a row with a loss or gradient that is not finite; the run stops after them

    def __post_init__(self) -> None:
        """Raise ValueError naming the field that breaks its rule."""
        self.vit()
        for name in ("image_size", "local_size"):
            if getattr(self, name) < 1 or getattr(self, name) % self.patch_size:
                raise ValueError(
                    f"train.{name} must be a multiple of train.patch_size ({self.patch_size}): "
                    f"got {getattr(self, name)}"
                )
        for name in ("n_prototypes", "head_hidden", "head_bottleneck", "ibot_prototypes", "ibot_hidden",
                     "ibot_bottleneck", "sinkhorn_iterations", "batch", "n_open", "max_bad_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1: got {getattr(self, name)}")
        for name in (
            "n_local",
            "n_steps",
            "warmup_steps",
            "freeze_last_layer_steps",
            "teacher_temperature_steps",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be at least 0: got {getattr(self, name)}")
        for name in ("student_temperature", "teacher_temperature", "lr", "layer_decay", "patch_embed_lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be above 0: got {getattr(self, name)}")
        for name in ("momentum", "centre_momentum", "cooldown_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name} must be in [0, 1]: got {getattr(self, name)}")
        self._check_rest()

    def _check_rest(self) -> None:
        for name, allowed in (("centering", ("sinkhorn", "softmax")), ("schedule", ("cooldown", "cosine")),
                              ("precision", ("float32", "bfloat16"))):  # fmt: skip
            if getattr(self, name) not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"train.{name} must be {choices}: got {getattr(self, name)!r}")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"train.final_lr must be in [0, train.lr]: got {self.final_lr}")
        for name in ("weight_decay", "ibot_weight", "koleo_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be at least 0: got {getattr(self, name)}")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"train.beta2 must be in (0, 1): got {self.beta2}")
        for name in ("teacher_temperature_start", "init_gain"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be above 0, or null: got {getattr(self, name)}")
        self._check_masks()
        if self.n_steps and self.warmup_steps + self.cooldown_steps > self.n_steps:
            raise ValueError(
                f"train.warmup_steps and the cool-down must fit into train.n_steps ({self.n_steps}): "
                f"got {self.warmup_steps} and {self.cooldown_steps}"
            )

    def _check_masks(self) -> None:
        low, high = self.mask_ratio
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"train.mask_probability must be in (0, 1]: got {self.mask_probability}")
        if not 0 <= low <= high < 1:
            raise ValueError(f"train.mask_ratio must be 0 <= low <= high < 1: got {low}, {high}")
        side = self.image_size // self.patch_size
        n_crops = N_GLOBAL * self.batch
        if self.ibot_weight and not mask_counts(n_crops, side**2, self.mask_probability, self.mask_ratio).any():
            raise ValueError(
                f"a step must hide at least one patch, or train.ibot_weight be 0: got none with {n_crops} global crops "
                f"of {side} x {side} patches, train.mask_probability {self.mask_probability} and train.mask_ratio "
                f"{low}, {high}"
            )

    def vit(self) -> ViTConfig:
        """The backbone's own config; its checks apply."""
        return ViTConfig(
            width=self.width, depth=self.depth, heads=self.heads, patch_size=self.patch_size,
            n_registers=self.n_registers, layer_scale=self.layer_scale, drop_path=self.drop_path,
            rope_rescale=self.rope_rescale,
        )  # fmt: skip

    @property
    def cooldown_steps(self) -> int:
        """Steps of the cool-down; 0 with schedule cosine."""
        return round(self.n_steps * self.cooldown_fraction) if self.schedule == "cooldown" else 0

    def lr_schedule(self) -> np.ndarray:
        """Learning rate of each step, float64 (n_steps,)."""
        if self.n_steps == 0:
            return np.zeros(0)
        if self.schedule == "cosine":
            return warmup_cosine(self.n_steps, self.warmup_steps, self.lr, self.final_lr)
        return warmup_constant_cooldown(self.n_steps, self.warmup_steps, self.cooldown_steps, self.lr, self.final_lr)

    def temperature_schedule(self) -> np.ndarray:
        """Teacher temperature of each step, float64 (n_steps,)."""
        out = np.full(self.n_steps, self.teacher_temperature)
        if self.teacher_temperature_start is not None:
            length = min(self.teacher_temperature_steps, self.n_steps)
            ramp = np.linspace(
                self.teacher_temperature_start, self.teacher_temperature, self.teacher_temperature_steps, endpoint=False
            )
            out[:length] = ramp[:length]
        return out


@dataclass(frozen=True, kw_only=True)
class TrainResources:
    """How fast a run goes and how much of it a kill costs; on a CPU no field changes a byte of the result."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    device: str = "cpu"  # or "cuda", "cuda:1"
    threads: int = 1  # of torch; another number than 1 may change bits
    n_workers: int = 0  # processes that decode and crop ahead; 0: in this process
    prefetch: int = 4  # batches ahead, of each worker
    checkpoint_every: int = 1_000  # steps; 0: none

    def __post_init__(self) -> None:
        """Raise ValueError naming the field that breaks its rule."""
        for name, least in (("threads", 1), ("n_workers", 0), ("prefetch", 1), ("checkpoint_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"train.resources.{name} must be at least {least}: got {getattr(self, name)}")
