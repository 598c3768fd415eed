"""The shape of a ViT; apart from the network, so that a recipe can be read without torch."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape and options of a ViT. The defaults are those of DINOv3 ViT-S/16."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    width: int = 384  # D, channels of a token
    depth: int = 12  # blocks
    heads: int = 6  # attention heads; width must be a multiple
    patch_size: int = 16  # pixels
    n_registers: int = 4  # extra tokens without a position
    mlp_ratio: float = 4.0  # hidden width of the FFN over D; swiglu takes 2/3 of it
    ffn: str = "mlp"  # "mlp" or "swiglu"
    swiglu_align: int = 8  # the hidden width of swiglu is rounded up to a multiple of this
    layer_scale: float | None = 1e-5  # initial scale of every branch; None: no such parameter
    position: str = "rope"  # "rope", or "learned": an embedding per patch and for CLS
    image_size: int | None = None  # pixels; the native grid of learned positions, None with rope
    rope_base: float = 100.0  # longest rotary period, nearly: base ** (1 - 4 / E)
    rope_rescale: float | None = None  # r: in training, coordinates times exp U(-ln r, ln r), one draw for all images
    # of one size; None: as they are
    rope_rescale_per: str = "forward"  # a draw for each "forward", or for each "block": so the DINOv3 code
    qkv_bias: bool = True  # biases on queries and values, and on keys with key_bias
    key_bias: bool = False  # a bias on keys cancels in the softmax, but DINOv2 has one
    norm_eps: float = 1e-5  # released DINOv3: 1e-5; DINO and DINOv2: 1e-6
    drop_path: float = 0.0  # share of the images that skip a branch in training

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch_size", "swiglu_align"):
            if getattr(self, name) < 1:
                raise ValueError(f"vit.{name} must be at least 1: got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"vit.width must be a multiple of vit.heads: got {self.width} and {self.heads}")
        if self.n_registers < 0:
            raise ValueError(f"vit.n_registers must be at least 0: got {self.n_registers}")
        if self.ffn not in ("mlp", "swiglu"):
            raise ValueError(f"vit.ffn must be 'mlp' or 'swiglu': got {self.ffn!r}")
        if self.rope_rescale_per not in ("forward", "block"):
            raise ValueError(f"vit.rope_rescale_per must be 'forward' or 'block': got {self.rope_rescale_per!r}")
        if self.key_bias and not self.qkv_bias:
            raise ValueError("vit.key_bias must be false without vit.qkv_bias: got true")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"vit.drop_path must be in [0, 1): got {self.drop_path}")
        for name in ("mlp_ratio", "norm_eps", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"vit.{name} must be above 0: got {getattr(self, name)}")
        self._check_position()

    def _check_position(self) -> None:
        if self.position == "rope":
            if (self.width // self.heads) % 4:
                raise ValueError(f"vit.width / vit.heads must be a multiple of 4: got {self.width} / {self.heads}")
            if self.image_size is not None:
                raise ValueError(f"vit.image_size must be null with rope positions: got {self.image_size}")
            if self.rope_rescale is not None and not self.rope_rescale >= 1:
                raise ValueError(f"vit.rope_rescale must be at least 1, or null: got {self.rope_rescale}")
        elif self.position == "learned":
            if not self.image_size or self.image_size < 0 or self.image_size % self.patch_size:
                raise ValueError(
                    f"vit.image_size must be a multiple of vit.patch_size ({self.patch_size}) with learned "
                    f"positions: got {self.image_size}"
                )
            if self.rope_rescale is not None:
                raise ValueError(f"vit.rope_rescale must be null with learned positions: got {self.rope_rescale}")
        else:
            raise ValueError(f"vit.position must be 'rope' or 'learned': got {self.position!r}")

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of the FFN: ratio * D, or 2/3 of it rounded up to a multiple of ``swiglu_align``."""
        if self.ffn == "mlp":
            return int(self.width * self.mlp_ratio)
        hidden = int(self.mlp_ratio * self.width * 2 / 3)
        return -(-hidden // self.swiglu_align) * self.swiglu_align
