"""The vision transformer: one class, from the ViT of DINO to that of DINOv3.

Legend: B images, N tokens, T tokens of all images of all views, P patches, R registers, D width, A attention heads,
E width of a head, H x W the grid of patches. Token order everywhere: [CLS, registers, patches row-major].
Needs torch alone.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedding.vit_config import ViTConfig

_WRITTEN_OUT = 512  # tokens of an image up to which their similarities may lie in memory
_MAX_CACHED_GRIDS = 32  # rotary tables kept, one a grid and device; a table of 14 x 14 takes 50 kB


class Tokens(NamedTuple):
    """The output tokens, after the final norm."""

    cls: Tensor  # (B, D)
    registers: Tensor  # (B, R, D)
    patches: Tensor  # (B, P, D), row-major


class Rope(NamedTuple):
    """Rotary tables of one grid, float32 (N, E / 2); the rows of CLS and registers turn by nothing."""

    cos: Tensor
    sin: Tensor


def rope_tables(
    grid: tuple[int, int], head_width: int, n_prefix: int, base: float, *, scale: float = 1.0, device: str = "cpu"
) -> Rope:
    """Rotary tables of a grid (H, W) of patches behind ``n_prefix`` tokens without a position.

    Patch centres lie in [-1, 1] on both axes whatever the grid ("separate"), times ``scale``. Angle
    2 pi c / base ** (4 i / E) for i in 0 .. E/4 - 1; the first E/4 columns are y, the others x.
    """
    y, x = (scale * (2 * (torch.arange(n, device=device) + 0.5) / n - 1) for n in grid)
    periods = base ** (torch.arange(head_width // 4, dtype=torch.float32, device=device) / (head_width // 4))
    centre_P2 = torch.cartesian_prod(y, x).float()
    angle_PE = (2 * math.pi * centre_P2[:, :, None] / periods).flatten(1)
    angle_NE = F.pad(angle_PE, (0, 0, n_prefix, 0))  # cos 0 = 1 and sin 0 = 0 leave a token as it is
    return Rope(angle_NE.cos(), angle_NE.sin())


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of x (..., N, E) by its token's angle.

    Reckoned in float32 or wider, returned in the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    turned = (first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


class QKV(nn.Module):
    """One product D -> 3D for queries, keys and values.

    ``weight`` (3D, D) has the rows [q | k | v]; ``bias`` is (3D,) in that order, (2D,) as [q | v]
    when keys have none, or absent.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.width
        self.weight = nn.Parameter(torch.empty(3 * d, d))
        self.bias = nn.Parameter(torch.empty(3 * d if config.key_bias else 2 * d)) if config.qkv_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 3D)."""
        bias: Tensor | None = self.bias
        d = x.shape[-1]
        if bias is not None and len(bias) == 2 * d:
            bias = torch.cat([bias[:d], bias.new_zeros(d), bias[d:]])
        return F.linear(x, self.weight, bias)


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.ffn_hidden)
        self.fc2 = nn.Linear(config.ffn_hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), all three with a bias."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_hidden)
        self.up = nn.Linear(config.width, config.ffn_hidden)
        self.down = nn.Linear(config.ffn_hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class View(NamedTuple):
    """Images of one size, whose tokens lie one image after the other in a flat (T, D)."""

    n_images: int
    n_tokens: int  # of an image
    rope: Rope | None


class Kept(NamedTuple):
    """The tokens that take a branch under stochastic depth, in order of their views."""

    rows_T: Tensor  # int64, of the flat tokens
    gain_T1: Tensor  # float32: images over images kept, so that the expectation is the full branch
    views: tuple[View, ...]  # what is kept, with fewer images


class Block(nn.Module):
    """x + ls1 * attention(norm1 x), then x + ls2 * ffn(norm2 x), on the flat tokens of all views at once.

    Every product and norm runs once over all tokens, attention once a view: nothing is padded.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, self.heads = config.width, config.heads
        scaled = config.layer_scale is not None
        self.norm1 = nn.LayerNorm(d, eps=config.norm_eps)
        self.qkv = QKV(config)
        self.proj = nn.Linear(d, d)
        self.ls1 = nn.Parameter(torch.empty(d)) if scaled else None
        self.norm2 = nn.LayerNorm(d, eps=config.norm_eps)
        self.ffn = MLP(config) if config.ffn == "mlp" else SwiGLU(config)
        self.ls2 = nn.Parameter(torch.empty(d)) if scaled else None

    def forward(self, x_TD: Tensor, views: Sequence[View], kept: Sequence[Kept] | None = None) -> Tensor:
        """One block. kept: who takes the first and the second branch; None: all."""
        if kept is None:
            x_TD = x_TD + self.attention_branch(x_TD, views)
            return x_TD + self.ffn_branch(x_TD)
        x_TD = _add_rows(x_TD, kept[0], self.attention_branch(x_TD[kept[0].rows_T], kept[0].views))
        return _add_rows(x_TD, kept[1], self.ffn_branch(x_TD[kept[1].rows_T]))

    def attention_branch(self, x_TD: Tensor, views: Sequence[View]) -> Tensor:
        """ls1 * attention(norm1 x), (T, D)."""
        per_view = self.qkv(self.norm1(x_TD)).split([view.n_images * view.n_tokens for view in views])
        out = [self._attend(qkv_T3D, view) for qkv_T3D, view in zip(per_view, views, strict=True)]
        return _scaled(self.proj(out[0] if len(out) == 1 else torch.cat(out)), self.ls1)

    def _attend(self, qkv_T3D: Tensor, view: View) -> Tensor:
        """Attention among the tokens of each image of one view, (T, D)."""
        qkv_BN3AE = qkv_T3D.view(view.n_images, view.n_tokens, 3, self.heads, -1)
        qkv_3BANE = qkv_BN3AE.permute(2, 0, 3, 1, 4)
        qk_2BANE, v_BANE = qkv_3BANE[:2], qkv_3BANE[2]
        if view.rope is not None:
            qk_2BANE = rotate(qk_2BANE, view.rope)
        out_BANE = _attention(qk_2BANE[0], qk_2BANE[1], v_BANE)
        return out_BANE.transpose(1, 2).reshape(len(qkv_T3D), -1)

    def ffn_branch(self, x_TD: Tensor) -> Tensor:
        """ls2 * ffn(norm2 x), (T, D)."""
        return _scaled(self.ffn(self.norm2(x_TD)), self.ls2)


def _attention(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E)) v, (B, A, N, E)."""
    few = q_BANE.shape[-2] <= _WRITTEN_OUT
    if few and q_BANE.device.type == "cpu" and q_BANE.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # The CPU's fused kernel has a backward in bfloat16 five times as slow as the two products written out.
        similarity = (q_BANE * q_BANE.shape[-1] ** -0.5) @ k_BANE.mT
        return torch.softmax(similarity, dim=-1, dtype=torch.float32).to(v_BANE.dtype) @ v_BANE
    return F.scaled_dot_product_attention(q_BANE, k_BANE, v_BANE)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _add_rows(x: Tensor, kept: Kept, y: Tensor) -> Tensor:
    return x.index_add(0, kept.rows_T, (y * kept.gain_T1).to(x.dtype))


class Draws(NamedTuple):
    """What a training forward draws at random for one view."""

    kept: Tensor | None  # int64 (depth, 2, n): the images that take each branch of each block; None: all
    rope_scales: tuple[float, ...] = (1.0,)  # of the coordinates: one for all blocks, or one a block


class ViT(nn.Module):
    """Images (B, 3, H, W) to tokens. Same config and seed, same weights; torch's global generator is not used.

    Weights are made on the default device, as float32; under ``torch.device("meta")`` they have shapes
    alone. ``mask_token`` gets a gradient from every forward, masked or not. Parameters: patch_embed, cls_token
    (1, 1, D), mask_token (1, 1, D), registers (1, R, D), pos_embed (1, 1 + P0, D) or none,
    blocks.i.{norm1, qkv, proj, ls1, norm2, ffn, ls2}, norm.
    """

    def __init__(self, config: ViTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self._tables: dict[tuple[int, int, str], Rope] = {}
        device = torch.get_default_device()
        with torch.device("meta"):  # no memory and no draws until init_weights
            d, p = config.width, config.patch_size
            self.patch_embed = nn.Conv2d(3, d, kernel_size=p, stride=p)
            self.cls_token = nn.Parameter(torch.empty(1, 1, d))
            self.mask_token = nn.Parameter(torch.empty(1, 1, d))
            self.registers = nn.Parameter(torch.empty(1, config.n_registers, d))
            n_positions = 1 + (config.image_size // p) ** 2 if config.image_size else 0
            self.pos_embed = nn.Parameter(torch.empty(1, n_positions, d)) if n_positions else None
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}  # they belong to the device where they were made

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter anew from ``seed``, drawn on the CPU: the same values on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            value = torch.full(parameter.shape, torch.nan, device="cpu")  # what no rule fills shows itself
            parameter.copy_(_initial_value(name, value, self.config, generator))

    def forward(
        self, images_B3HW: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tokens:
        """Tokens of images whose sides are multiples of the patch size.

        mask: bool (B, P), True where the patch embedding gives way to the mask token. generator: source of
        the rotary rescale (one draw for the whole batch) and of drop_path, needed in training when
        one of them is on, not read otherwise. Raises ValueError for shapes that do not fit.
        """
        draws = None if generator is None else [self.draw(len(images_B3HW), generator)]
        return self.forward_views([images_B3HW], [mask], draws)[0]

    def forward_views(
        self,
        views: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        draws: Sequence[Draws] | None = None,
    ) -> list[Tokens]:
        """Tokens of several batches of images, each of one size, in one pass: equal to a ``forward`` of each.

        masks, draws: one of each view. Draws are read in training alone, and needed there when ``drop_path`` or
        ``rope_rescale`` is on. Raises ValueError for shapes that do not fit.
        """
        masks = masks if masks is not None else [None] * len(views)
        grids = [self._grid(images, mask) for images, mask in zip(views, masks, strict=True)]
        if self.training and draws is None and (self.config.drop_path or self.config.rope_rescale):
            raise ValueError("a training forward with vit.rope_rescale or vit.drop_path must be given a generator")
        draws = draws if self.training and draws is not None else [Draws(None)] * len(views)
        embedded = [self._embed(*each) for each in zip(views, masks, grids, strict=True)]
        layouts = self._layouts([x.shape[:2] for x in embedded], grids, draws, views[0].device)
        kept = _kept_tokens(layouts, [draw.kept for draw in draws])
        x_TD = torch.cat([x.flatten(0, 1) for x in embedded])
        for i, block in enumerate(self.blocks):
            x_TD = block(x_TD, layouts[min(i, len(layouts) - 1)], None if kept is None else kept[i])
        sizes = [b * n for b, n in (x.shape[:2] for x in embedded)]
        parts = self.norm(x_TD).split(sizes)
        return [self._tokens(part.view(*x.shape[:2], -1)) for part, x in zip(parts, embedded, strict=True)]

    def _tokens(self, x_BND: Tensor) -> Tokens:
        n_prefix = 1 + self.config.n_registers
        return Tokens(x_BND[:, 0], x_BND[:, 1:n_prefix], x_BND[:, n_prefix:])

    def _grid(self, images: Tensor, mask: Tensor | None) -> tuple[int, int]:
        p = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % p or images.shape[3] % p or not images.numel():
            raise ValueError(f"images must be (B, 3, H, W) with sides that are multiples of {p}: got {images.shape}")
        grid = (images.shape[2] // p, images.shape[3] // p)
        expected = (len(images), grid[0] * grid[1])
        if mask is not None and (mask.dtype != torch.bool or mask.shape != expected):
            raise ValueError(f"mask must be bool {expected}: got {mask.dtype} {tuple(mask.shape)}")
        return grid

    def _embed(self, images: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        x_BPD = self.patch_embed(images.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        cls_11D = self.cls_token + 0 * self.mask_token  # a gradient, be it 0, without a mask too
        if mask is not None:
            x_BPD = torch.where(mask[:, :, None], self.mask_token.to(x_BPD.dtype), x_BPD)
        if self.pos_embed is not None:
            pos_1ND = resize_positions(self.pos_embed, grid)
            cls_11D, x_BPD = cls_11D + pos_1ND[:, :1], x_BPD + pos_1ND[:, 1:]
        b = len(images)
        return torch.cat([cls_11D.expand(b, -1, -1), self.registers.expand(b, -1, -1), x_BPD], dim=1)

    def _layouts(
        self,
        shapes: Sequence[tuple[int, ...]],
        grids: Sequence[tuple[int, int]],
        draws: Sequence[Draws],
        device: torch.device,
    ) -> list[tuple[View, ...]]:
        """The views as a block sees them: one entry for all blocks, or one a block when their rotary tables differ."""
        n = max(len(draw.rope_scales) for draw in draws)
        layouts = []
        for i in range(n):
            scales = [draw.rope_scales[min(i, len(draw.rope_scales) - 1)] for draw in draws]
            ropes = [self._rope(grid, device, scale) for grid, scale in zip(grids, scales, strict=True)]
            layouts.append(tuple(View(b, t, rope) for (b, t), rope in zip(shapes, ropes, strict=True)))
        return layouts

    def _rope(self, grid: tuple[int, int], device: torch.device, scale: float) -> Rope | None:
        if self.pos_embed is not None:
            return None
        config = self.config
        head_width, n_prefix = config.width // config.heads, 1 + config.n_registers
        if scale != 1:
            return rope_tables(grid, head_width, n_prefix, config.rope_base, scale=scale, device=str(device))
        key = (*grid, str(device))
        if key not in self._tables:
            if len(self._tables) >= _MAX_CACHED_GRIDS:
                self._tables.clear()
            with torch.inference_mode(False):  # a table made in inference mode could not serve training later
                self._tables[key] = rope_tables(grid, head_width, n_prefix, config.rope_base, device=str(device))
        return self._tables[key]

    def draw(self, n_images: int, generator: torch.Generator) -> Draws:
        """What a forward of so many images draws; nothing is drawn in evaluation."""
        if not self.training:
            return Draws(None)
        scales = self.draw_scales(generator)
        return Draws(self.draw_kept(n_images, generator), scales)

    def draw_scales(self, generator: torch.Generator) -> tuple[float, ...]:
        """The rotary rescale, exp U(-ln r, ln r): one, or one a block."""
        config = self.config
        if not config.rope_rescale:
            return (1.0,)
        n_scales = config.depth if config.rope_rescale_per == "block" else 1
        u = torch.rand(n_scales, generator=generator, device=generator.device).tolist()
        return tuple(config.rope_rescale ** (2 * x - 1) for x in u)

    def draw_kept(self, n_images: int, generator: torch.Generator) -> Tensor | None:
        """Who takes each branch: int64 (depth, 2, n), n = max(floor(B (1 - drop_path)), 1) images without order."""
        config = self.config
        if not config.drop_path:
            return None
        n = max(int(n_images * (1 - config.drop_path) + 1e-6), 1)
        noise = torch.rand(config.depth, 2, n_images, generator=generator, device=generator.device)
        return noise.argsort(dim=-1, stable=True)[..., :n]


def _kept_tokens(layouts: Sequence[tuple[View, ...]], kept: Sequence[Tensor | None]) -> list[list[Kept]] | None:
    """For each block and branch the tokens that take it; None when all do. Either all views have ``kept`` or none."""
    chosen = [each for each in kept if each is not None]
    if not chosen:
        return None
    if len(chosen) != len(kept):
        raise ValueError(f"draws must have kept images of every view or of none: got {len(chosen)} of {len(kept)}")
    device, offset, rows, gains = chosen[0].device, 0, [], []
    for view, each in zip(layouts[0], chosen, strict=True):
        tokens_DDnN = each[..., None] * view.n_tokens + torch.arange(view.n_tokens, device=device) + offset
        rows.append(tokens_DDnN.flatten(2))
        gains.append(torch.full((rows[-1].shape[-1], 1), view.n_images / each.shape[-1], device=device))
        offset += view.n_images * view.n_tokens
    rows_DDT, gain_T1 = torch.cat(rows, dim=-1), torch.cat(gains)
    out = []
    for i, rows_DT in enumerate(rows_DDT):
        views = layouts[min(i, len(layouts) - 1)]
        fewer = tuple(view._replace(n_images=each.shape[-1]) for view, each in zip(views, chosen, strict=True))
        out.append([Kept(rows_T, gain_T1, fewer) for rows_T in rows_DT])
    return out


def resize_positions(pos_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions (1, 1 + S * S, D) for another grid: (1, 1 + H * W, D).

    CLS keeps its own; the square S x S is resized bicubically with antialiasing, in float32. The
    native grid gives back the same values.
    """
    side = math.isqrt(pos_1ND.shape[1] - 1)
    if grid == (side, side):
        return pos_1ND
    square_1DSS = pos_1ND[:, 1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square_1DSS, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([pos_1ND[:, :1], resized.flatten(2).transpose(1, 2).to(pos_1ND.dtype)], dim=1)


def _initial_value(name: str, value: Tensor, config: ViTConfig, generator: torch.Generator) -> Tensor:
    """Initial value of one parameter, as DINOv3; ``value`` is overwritten.

    Matrices, tokens and positions N(0, 0.02): the truncation of the published trunc_normal lies at 100 sigma.
    """
    leaf = name.rpartition(".")[2]
    if name.startswith("patch_embed."):
        bound = (3 * config.patch_size**2) ** -0.5
        return value.uniform_(-bound, bound, generator=generator)
    if leaf in ("ls1", "ls2"):
        return value.fill_(config.layer_scale or 0)
    if leaf in ("bias", "mask_token"):
        return value.zero_()
    if name.rpartition(".")[0].rpartition(".")[2].startswith("norm"):
        return value.fill_(1)
    return value.normal_(0, 0.02, generator=generator)
