"""Whether a run learns, in plain words: what is said at its start, and what its measures tell on the way.

A loss of ln K with targets of entropy ln K is a run that learns nothing; targets on few prototypes are one that gives
every image the same answer. Neither shows in the loss alone: of the second it is low.
"""

import math

from training.augment import N_GLOBAL
from training.config import TrainConfig
from training.masks import mask_counts
from training.train_step import StepMetrics

SETTLED = 100  # steps before which nothing is said of collapse
_UNIFORM = 0.98  # share of ln K from which targets and losses count as uniform
_FEW = 5.0  # prototypes in use below which a run has collapsed onto them
_SAME = 0.999  # cosine between two crops from which the encoder does not see them


def doubts(config: TrainConfig, n_samples: int) -> list[str]:
    """What is odd about a run before it starts. n_samples: images of an epoch."""
    found = []
    head, patch = config.head.prototypes, config.patch_head.prototypes
    if head > n_samples:
        found.append(
            f"there are more prototypes (train.head.prototypes {head:,}) than images ({n_samples:,}): most will never "
            f"be used; a power of two near {max(16, n_samples // 16):,} fits"
        )
    n_cls = N_GLOBAL * config.batch
    n_patches = _masked(config)
    patch_head = "head" if config.ibot_head is None else "ibot_head"
    for what, k, n in (("head", head, n_cls), (patch_head, patch, n_patches)):
        if config.centering == "sinkhorn" and n and k > n**2:  # ln(k / n) is above half of ln k
            found.append(
                f"a step balances {n:,} targets over {k:,} prototypes (train.{what}.prototypes), so no target can be "
                f"surer than an entropy of ln({k / n:.0f}) = {math.log(k / n):.1f} of {math.log(k):.1f} nats; a larger "
                "train.batch or fewer prototypes make targets that say more"
            )
    if config.n_steps * config.batch < n_samples:
        share = config.n_steps * config.batch / n_samples
        found.append(f"the run ends after {share:.0%} of the images: train.n_steps is below an epoch")
    return found


def _masked(config: TrainConfig) -> int:
    """Masked patches of a step."""
    if not config.ibot_weight:
        return 0
    side, group = config.image_size // config.vit.patch_size, config.images_a_group
    counts = mask_counts(N_GLOBAL * group, side**2, config.mask_probability, config.mask_ratio)
    return int(counts.sum()) * (config.batch // group)


def alarms(step: int, metrics: StepMetrics, config: TrainConfig) -> dict[str, str]:
    """What is wrong at a step, by kind: "skipped", "uniform", "few", "blind". Empty when all is well."""
    found = {}
    if metrics.skipped:
        found["skipped"] = "loss or gradients were not finite: the step was left out"
    if step < SETTLED or not math.isfinite(metrics.loss):
        return found
    ln_k = math.log(config.head.prototypes)
    warm = step >= config.warmup_steps  # every run begins at ln K and blind, and stays so at low rates
    if warm and min(metrics.teacher_entropy, metrics.dino_loss) > _UNIFORM * ln_k:
        found["uniform"] = (
            f"targets say nothing: their entropy {metrics.teacher_entropy:.2f} and the loss {metrics.dino_loss:.2f} "
            f"are near ln K = {ln_k:.2f}; lower the teacher temperature or the number of prototypes, or raise init_gain"
        )
    if metrics.usage_perplexity < _FEW <= config.head.prototypes / 4:
        found["few"] = (
            f"all images fall on {metrics.usage_perplexity:.1f} prototypes: the encoder gives the same answer to all; "
            "lower the learning rate, or use centering sinkhorn"
        )
    if warm and metrics.crop_similarity > _SAME:
        found["blind"] = (
            f"two crops of an image have the same features (cosine {metrics.crop_similarity:.4f}), and if RankMe is "
            "near 1 so have all images: the encoder does not look at its input"
        )
    return found
