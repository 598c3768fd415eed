"""How fast a run goes: images/s, the share of time without a batch, and MFU where the peak of the device is known."""

from embedding.flops import vit_flops
from training.augment import N_GLOBAL
from training.config import HeadConfig, TrainConfig
from training.masks import mask_counts


def train_flops(config: TrainConfig) -> int:
    """FLOPs of the products of one step, per image: teacher forward on the global crops, student there and back.

    Backbones by ``embedding.flops.vit_flops``, a backward twice a forward, branches that stochastic depth leaves out
    not counted; heads with their prototypes on the crops and masked patches that go through them. What is made again
    (logits in Sinkhorn-Knopp) is not counted, so it lowers MFU.
    """
    seen = N_GLOBAL * vit_flops(config.vit, config.image_size)
    student = (seen + config.n_local * vit_flops(config.vit, config.local_size)) * (1 - config.vit.drop_path)
    crops, patches = N_GLOBAL + config.n_local, 0.0
    if config.ibot_weight:
        n_patches = (config.image_size // config.vit.patch_size) ** 2
        group = config.images_a_group
        masked = mask_counts(N_GLOBAL * group, n_patches, config.mask_probability, config.mask_ratio)
        patches = float(masked.sum()) / group
    cls_head = _head_flops(config.head, config.vit.width) * (N_GLOBAL + 3 * crops)
    patch_head = _head_flops(config.patch_head, config.vit.width) * 4 * patches
    return round(seen + 3 * student + cls_head + patch_head)


def _head_flops(head: HeadConfig, width: int) -> int:
    """Of one token."""
    return 2 * (
        width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck + head.bottleneck * head.prototypes
    )


class Timing:
    """Wall-clock figures of this process; no part of the deterministic result."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of all steps run here
        self.wait_seconds = 0.0  # of them, without a batch
        self.images = 0  # of all processes
        self.steps = 0
        self.resumed_at = 0  # step this process began with

    @property
    def images_per_second(self) -> float:
        """Images of the stream, not crops."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for the loader."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def since(self, before: "Timing") -> "Timing":
        """What was added after a copy was taken."""
        out = Timing()
        for name in ("seconds", "wait_seconds", "images", "steps"):
            setattr(out, name, getattr(self, name) - getattr(before, name))
        return out

    def copy(self) -> "Timing":
        """The figures as they are now."""
        return self.since(Timing())
