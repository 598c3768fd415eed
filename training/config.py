"""What a training run is (``TrainConfig``, fingerprinted) and how fast it may go (``TrainResources``, not)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from embedding.vit_config import ViTConfig
from training.augment import N_GLOBAL, AugmentConfig
from training.masks import mask_counts
from training.schedules import cosine_between, warmup_constant_cooldown, warmup_cosine


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The projection head between tokens and their prototypes."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    prototypes: int = 4096  # K; about a 16th of the images, a power of two
    hidden: int = 2048  # channels
    bottleneck: int = 256  # channels
    norm: str = "fixed"  # length of a prototype: "fixed" at 1, "trained" (DINOv2), or "none": a plain linear layer
    # (DINOv3), with which small runs stay long at a loss of ln K

    def __post_init__(self) -> None:
        """Raise ValueError naming the field that breaks its rule."""
        for name in ("prototypes", "hidden", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name} must be at least 1: got {getattr(self, name)}")
        if self.norm not in ("fixed", "trained", "none"):
            raise ValueError(f"head.norm must be 'fixed', 'trained' or 'none': got {self.norm!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of DINO, iBOT and KoLeo: architecture, crops, targets and optimiser. Every field changes the weights.

    The defaults fit a ViT-S/16 on images of 224 px and one GPU. The loss is DINO + ibot_weight * iBOT + koleo_weight *
    KoLeo; a part of weight 0 is left out: no head is made for it, and it costs nothing. Where the papers and the code
    they released differ, a field says which is meant; the default is what was released, unless its comment says why
    not.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    # backbone
    vit: ViTConfig = field(default_factory=ViTConfig)  # shape of the vision transformer
    init: str | None = None  # weights to begin with: a train step, a folder, or a name on the Hugging Face hub, of the
    # shape of vit; null: drawn from the seed. Heads are always new
    init_frozen_steps: int = 0  # first steps in which the backbone of init stands still while the heads learn
    init_gain: float | None = None  # matrices start at a deviation of gain / sqrt(inputs); null: .02, too little below
    # a width of about 256: a short run then spends its steps on growing them

    # crops
    image_size: int = 224  # pixels, side of a global crop, a multiple of vit.patch_size
    local_size: int = 96  # pixels, side of a local crop, a multiple of vit.patch_size
    n_local: int = 8  # local crops an image; global ones are 2
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # how crops are cut and changed

    # heads and targets
    head: HeadConfig = field(default_factory=HeadConfig)  # of the CLS token, for DINO
    ibot_head: HeadConfig | None = field(default_factory=HeadConfig)  # of the patches; null: ``head`` serves both
    centering: str = "sinkhorn"  # of the targets: "sinkhorn", or "softmax": a running centre is taken from the logits
    # (the papers' words put the softmax first; no released code does)
    centre_momentum: float = 0.9  # of the running centre, with centering softmax
    sinkhorn_iterations: int = 3  # with centering sinkhorn
    student_temperature: float = 0.1  # divides the student's logits
    teacher_temperature: float = 0.04  # divides the teacher's logits
    teacher_temperature_start: float | None = None  # teacher_temperature is reached linearly from here; null: constant
    teacher_temperature_steps: int = 0  # steps until it is reached, with teacher_temperature_start
    momentum: float = 0.996  # of the teacher; half-life ln 2 / (1 - momentum) steps
    final_momentum: float | None = None  # a cosine from momentum to this; null: constant

    # iBOT: the student's global crops have hidden patches, whose targets are the teacher's of the whole crop
    ibot_weight: float = 1.0  # of its loss beside DINO's; 0: off
    mask_probability: float = 0.5  # share of the global crops with hidden patches
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # hidden share of such a crop's patches, spread evenly over the crops

    # KoLeo: the CLS tokens of a batch keep away from one another, in each global crop on its own
    koleo_weight: float = 0.1  # of its loss beside DINO's; 0: off
    koleo_crops: int = 2  # global crops it is summed over: 2 as released, 1 as the papers say
    koleo_group: int | None = None  # images among which neighbours are sought (DINOv3: 16); null: all of a group

    # optimiser
    n_steps: int = 10_000  # 0: the initial weights are the result
    batch: int = 64  # images a step, of all processes and micro-batches together
    group: int | None = None  # images that are masked, kept apart and dropped together, as one GPU's share in the
    # papers; processes and micro-batches hold whole groups, so how many there are does not matter; null: the batch
    lr: float = 1e-3  # effective peak rate, no hidden factor: see schedules.sqrt_scaled_lr
    final_lr: float = 1e-6  # effective rate at the end
    warmup_steps: int = 1_000  # linear from 0
    schedule: str = "cooldown"  # of the rate: "cooldown": constant, then a cosine over the last part; or "cosine": all
    # the way
    cooldown_fraction: float = 0.2  # share of n_steps, with schedule cooldown
    weight_decay: float = 0.04  # decoupled; none on biases, norms, LayerScale
    final_weight_decay: float | None = None  # a cosine from weight_decay to this; null: constant
    decay_tokens: bool = False  # whether CLS, registers, mask and position are decayed too: they were in the released
    # code, against its own comment
    layer_decay: float = 1.0  # factor of the rate from one block to the one below
    patch_embed_lr: float = 1.0  # factor of the rate of the patch embedding
    beta2: float = 0.999  # of AdamW; beta1 is .9
    clip_norm: float = 3.0  # largest gradient norm
    clip: str = "module"  # on its own: each "module", so backbone and heads; or each "parameter" (DINO)
    freeze_last_layer_steps: int = 0  # first steps in which the prototypes stand still
    precision: str = "float32"  # of matrix products, or "bfloat16"; weights, losses and teacher targets stay float32

    # order and stops
    seed: int = 0  # of weights, order and crops
    n_open: int = 16  # shards whose samples are mixed with one another
    max_bad_steps: int = 10  # steps in a row with a loss or gradient that is not finite; the run stops after them

    # measuring on the way
    knn_every: int = 0  # steps between k-NN accuracies of the teacher, by labels in the shard index; 0: never
    knn_images: int = 2048  # labelled images that vote on one another
    result: str = "last"  # the teacher after the last step, or "best": that at the best k-NN accuracy

    def __post_init__(self) -> None:
        """Raise ValueError naming the field that breaks its rule."""
        for name in ("image_size", "local_size"):
            if getattr(self, name) < 1 or getattr(self, name) % self.vit.patch_size:
                raise ValueError(
                    f"train.{name} must be a multiple of train.vit.patch_size ({self.vit.patch_size}): "
                    f"got {getattr(self, name)}"
                )
        for names, least in (
            (("sinkhorn_iterations", "batch", "n_open", "max_bad_steps", "knn_images"), 1),
            (("n_local", "n_steps", "warmup_steps", "freeze_last_layer_steps", "teacher_temperature_steps", "seed",
              "init_frozen_steps", "knn_every"), 0),
        ):  # fmt: skip
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"train.{name} must be at least {least}: got {getattr(self, name)}")
        for name in ("student_temperature", "teacher_temperature", "lr", "layer_decay", "patch_embed_lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be above 0: got {getattr(self, name)}")
        for name in ("momentum", "final_momentum", "centre_momentum", "cooldown_fraction"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name} must be in [0, 1]: got {getattr(self, name)}")
        self._check_choices()
        self._check_rest()
        self._check_effects()
        self._check_groups()
        self._check_masks()

    def _check_choices(self) -> None:
        for name, allowed in (("centering", ("sinkhorn", "softmax")), ("schedule", ("cooldown", "cosine")),
                              ("precision", ("float32", "bfloat16")), ("clip", ("module", "parameter")),
                              ("koleo_crops", (1, 2)), ("result", ("last", "best"))):  # fmt: skip
            if getattr(self, name) not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"train.{name} must be {choices}: got {getattr(self, name)!r}")
        if self.result == "best" and not self.knn_every:
            raise ValueError("train.knn_every must be set for train.result 'best': got 0")

    def _check_rest(self) -> None:
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"train.final_lr must be in [0, train.lr]: got {self.final_lr}")
        for name in ("weight_decay", "final_weight_decay", "ibot_weight", "koleo_weight"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be at least 0: got {getattr(self, name)}")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"train.beta2 must be in (0, 1): got {self.beta2}")
        for name in ("teacher_temperature_start", "init_gain"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be above 0, or null: got {getattr(self, name)}")
        if self.n_steps and self.warmup_steps + self.cooldown_steps > self.n_steps:
            raise ValueError(
                f"train.warmup_steps and the steps of the cool-down (train.cooldown_fraction) must fit into "
                f"train.n_steps ({self.n_steps}): got {self.warmup_steps} and {self.cooldown_steps}"
            )

    def _check_effects(self) -> None:
        """Refuse what would change nothing."""
        start, steps = self.teacher_temperature_start, self.teacher_temperature_steps
        if steps and start is None:
            raise ValueError(
                f"train.teacher_temperature_steps must be 0 without train.teacher_temperature_start: got {steps}"
            )
        if start is not None and not steps:
            raise ValueError(
                "train.teacher_temperature_steps must be at least 1 with train.teacher_temperature_start: got 0"
            )
        if self.init_frozen_steps and self.init is None:
            raise ValueError(f"train.init_frozen_steps must be 0 without train.init: got {self.init_frozen_steps}")

    def _check_groups(self) -> None:
        if self.group is not None and (self.group < 1 or self.batch % self.group):
            raise ValueError(f"train.group must divide train.batch ({self.batch}): got {self.group}")
        if self.koleo_group is not None and (self.koleo_group < 1 or self.images_a_group % self.koleo_group):
            raise ValueError(
                f"train.koleo_group must divide the images of a group ({self.images_a_group}): got {self.koleo_group}"
            )

    def _check_masks(self) -> None:
        low, high = self.mask_ratio
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"train.mask_probability must be in (0, 1]: got {self.mask_probability}")
        if not 0 <= low <= high < 1:
            raise ValueError(f"train.mask_ratio must be 0 <= low <= high < 1: got {low}, {high}")
        side = self.image_size // self.vit.patch_size
        n_crops = N_GLOBAL * self.images_a_group
        if self.ibot_weight and not mask_counts(n_crops, side**2, self.mask_probability, self.mask_ratio).any():
            raise ValueError(
                f"a step must hide at least one patch, or train.ibot_weight be 0: got none with {n_crops} global crops "
                f"of {side} x {side} patches, train.mask_probability {self.mask_probability} and train.mask_ratio "
                f"{low}, {high}"
            )

    @property
    def images_a_group(self) -> int:
        """Images of a group."""
        return self.group or self.batch

    @property
    def patch_head(self) -> HeadConfig:
        """The head of the patches."""
        return self.ibot_head or self.head

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

    def momentum_schedule(self) -> np.ndarray:
        """Momentum of the teacher in each step, float64 (n_steps,)."""
        return cosine_between(self.n_steps, self.momentum, self.final_momentum)

    def weight_decay_schedule(self) -> np.ndarray:
        """Weight decay of each step, float64 (n_steps,)."""
        return cosine_between(self.n_steps, self.weight_decay, self.final_weight_decay)

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
    """How fast a run goes and how much of it a kill costs; on a CPU no field but
    ``threads``, ``micro_batch`` and ``crops_on`` changes a byte of the result: they change how numbers are rounded."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    device: str = "cpu"  # or "cuda", "cuda:1"
    threads: int = 1  # of torch; another number than 1 may change bits
    n_workers: int = 0  # processes that decode and crop ahead, of each process that trains; 0: in this process
    prefetch: int = 4  # batches ahead, of each worker
    checkpoint_every: int = 1_000  # steps; 0: none
    keep_checkpoints: int = 2  # newest ones that stay, beside that of the best k-NN accuracy
    micro_batch: int | None = None  # images that go forward and backward at a time in each process; null: its share of
    # the batch. Smaller takes less memory; the result is the same but for rounding
    crops_on: str = "worker"  # crops are cut and changed by the loader; or "device": where the model is
    compile: bool = False  # torch.compile of the blocks: a minute at the start, then faster on a GPU
    log_every: int = 10  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        """Raise ValueError naming the field that breaks its rule."""
        least = {"threads": 1, "n_workers": 0, "prefetch": 1, "checkpoint_every": 0, "keep_checkpoints": 1,
                 "micro_batch": 1, "log_every": 1}  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise ValueError(f"train.resources.{name} must be at least {value}: got {getattr(self, name)}")
        if self.crops_on not in ("worker", "device"):
            raise ValueError(f"train.resources.crops_on must be 'worker' or 'device': got {self.crops_on!r}")
