"""The three highest scores of every row among all centroids, in one kernel that never writes a score of the others.

A program holds M rows and walks through the centroids in tiles of N: products of bfloat16, added as float32, minus half
the squared lengths. Of a tile the three highest are found by halving it again and again: the higher of two scores goes
on, and of all the lower ones of a round only the highest can be second or third. A score carries in its last bits where
in its tile it stands; so it costs no label, and is cut to 2 ** -18 of itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import triton
import triton.language as tl

SLOTS = 8  # neighbouring columns of a tile that are kept apart to the end: in registers of different threads
LOW = tl.constexpr(-3.0e38)  # below every score
PADDING = 1.0e38  # half the squared length of a centroid that is none
SMALL_BYTES = 9 * 1024  # of shared memory, for all but tiles under way: 8.1 kB on sm_100, 1.1 on sm_90
OLDEST = (8, 0)  # compute capability with products of bfloat16
TENSOR_COPIES = (9, 0)  # compute capability from which tiles are copied by the hardware for that

F = TypeVar("F", bound=Callable[..., Any])
compiled = cast(Callable[[F], F], triton.jit)


class Config(NamedTuple):
    """How a kernel is cut."""

    rows: int  # of a program
    columns: int  # centroids of a tile
    depth: int  # coordinates multiplied at once
    n_warps: int
    n_stages: int  # tiles of coordinates under way
    tensor_copies: bool = False

    @property
    def shared_bytes(self) -> int:
        """Memory of a multiprocessor that a program takes, at most: the tiles under way, half lengths, barriers."""
        return 2 * self.n_stages * self.depth * (self.rows + self.columns) + SMALL_BYTES


# In the order they are tried. Compiled for sm_90 none spills registers, and products wait for none but the one before.
CONFIGS = (
    Config(128, 256, 64, 8, 4, True),
    Config(256, 128, 64, 8, 4, True),
    Config(128, 128, 64, 4, 3, True),  # two programs of a multiprocessor: one counts while the other multiplies
    Config(128, 256, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 64, 64, 4, 3),
    Config(64, 64, 64, 4, 2),
)


def configs_for(device: Any) -> list[Config]:
    """Those that a GPU can run, the likely fastest first."""
    import torch

    capability, most = torch.cuda.get_device_capability(device), facts_of(device)["max_shared_mem"]
    return [
        config
        for config in CONFIGS
        if config.shared_bytes <= most and capability >= (TENSOR_COPIES if config.tensor_copies else OLDEST)
    ]


def facts_of(device: Any) -> dict[str, int]:
    """What triton knows of a GPU: ``max_shared_mem`` of a program, ``multiprocessor_count`` and more."""
    facts: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return facts


def splits_for(n_blocks: int, n_tiles: int, n_processors: int) -> int:
    """Into how many pieces the centroids are cut so that few rows keep all multiprocessors busy: the fewest of those
    whose longest chain of tiles is shortest; a program costs one tile more than it has."""

    def chain(n_splits: int) -> int:
        return -(-n_blocks * n_splits // n_processors) * (-(-n_tiles // n_splits) + 1)

    return min(range(1, min(n_tiles, 64) + 1), key=chain)


def top_three(low: Any, centroids: Any, half: Any, config: Config) -> tuple[Any, Any]:
    """Of rows bfloat16 (n, w) among centroids bfloat16 (k, w): scores float32 (3, s, n), the highest first, and labels
    int32 (2, s, n) of the first two, for each of s pieces of the centroids.

    n, k and w are multiples of what the config says; half float32 (k,) is PADDING where there is no centroid. Scores
    are ``x . c - half``, the sum in float32. Writes 20 * s bytes a row and holds nothing else.
    """
    import torch

    (n, width), k = low.shape, len(centroids)
    n_processors = facts_of(low.device)["multiprocessor_count"]
    n_blocks, n_tiles = n // config.rows, k // config.columns
    tiles_of_split = -(-n_tiles // splits_for(n_blocks, n_tiles, n_processors))
    n_splits = -(-n_tiles // tiles_of_split)
    scores = torch.empty(3, n_splits, n, dtype=torch.float32, device=low.device)
    labels = torch.empty(2, n_splits, n, dtype=torch.int32, device=low.device)
    x, y = low, centroids
    if config.tensor_copies:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x = TensorDescriptor.from_tensor(low, [config.rows, config.depth])
        y = TensorDescriptor.from_tensor(centroids, [config.columns, config.depth])
    codes = config.columns // SLOTS
    with cast(Any, torch.cuda).device_of(low):
        cast(Any, three_highest)[(n_blocks, n_splits)](
            x, y, half, scores, labels, n, n_tiles, tiles_of_split, -codes,
            WIDTH=width, M=config.rows, N=config.columns, K=config.depth, LANES=SLOTS, ROUNDS=codes.bit_length() - 1,
            COPIES=config.tensor_copies, num_warps=config.n_warps, num_stages=config.n_stages,
        )  # fmt: skip
    return scores, labels


@compiled
def halves(x: tl.tensor) -> tl.tensor:
    """The left and the right half of the columns: of one thread where more than LANES are left."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@compiled
def highest(x: tl.tensor, ROUNDS: tl.constexpr) -> tl.tensor:
    """The columns halved so often, the higher stays."""
    for _ in tl.static_range(ROUNDS):
        left, right = halves(x)
        x = tl.maximum(left, right)
    return x


@compiled
def merged(
    a: tl.tensor, at_a: tl.tensor, b: tl.tensor, at_b: tl.tensor, c: tl.tensor, a2: tl.tensor, b2: tl.tensor,
    c2: tl.tensor, tile: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The three highest of a >= b >= c, with the tiles of two, and of a2 >= b2 >= c2 of a later tile."""
    ahead = a2 > a
    third = tl.maximum(tl.maximum(c, c2), tl.maximum(tl.minimum(a, b2), tl.minimum(b, a2)))
    loser, at_loser = tl.minimum(a, a2), tl.where(ahead, at_a, tile)
    runner, at_runner = tl.where(ahead, b2, b), tl.where(ahead, tile, at_b)
    at_second = tl.where(loser > runner, at_loser, at_runner)
    return tl.maximum(a, a2), tl.where(ahead, tile, at_a), tl.maximum(loser, runner), at_second, third


@compiled
def column_of(score: tl.tensor, tile: tl.tensor, slot: tl.tensor, N: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """The centroid whose place in the tile the last bits of a score tell."""
    return tile * N + (score.to(tl.int32, bitcast=True) & (N // LANES - 1)) * LANES + slot


@compiled
def three_highest(
    rows: tl.tensor, centroids: tl.tensor, half: tl.tensor, scores: tl.tensor, labels: tl.tensor,
    n_rows: tl.tensor, n_tiles: tl.tensor, tiles_of_split: tl.tensor,
    score_bits: tl.tensor,  # mask of the bits that stay a score's; as an argument one instruction cuts and marks
    WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
    ROUNDS: tl.constexpr, COPIES: tl.constexpr,
) -> None:  # fmt: skip
    """See ``top_three``. One loop over tiles and coordinates: the next tile is on its way while scores are compared."""
    row, split = tl.program_id(0) * M, tl.program_id(1)
    tile = split * tiles_of_split
    n_steps = (tl.minimum(tile + tiles_of_split, n_tiles) - tile) * (WIDTH // K)
    column, inner = tl.arange(0, N), tl.arange(0, K)
    if not COPIES:
        rows_at = rows + row.to(tl.int64) * WIDTH + tl.arange(0, M)[:, None] * WIDTH + inner[None, :]
        columns_at = column[:, None] * WIDTH + inner[None, :]
    a = tl.full((M, LANES), LOW, tl.float32)
    b, c = a, a
    at_a = tl.zeros((M, LANES), tl.int32)
    at_b = at_a
    products = tl.zeros((M, N), tl.float32)
    depth = 0
    for _ in range(n_steps):
        if COPIES:
            x, y = rows.load([row, depth]), centroids.load([tile * N, depth])
        else:
            x = tl.load(rows_at + depth)
            y = tl.load(centroids + tile.to(tl.int64) * (N * WIDTH) + depth + columns_at)
        products = tl.dot(x, y.T, products)
        depth += K
        if depth == WIDTH:
            score = products - tl.load(half + tile * N + column)[None, :]
            marked = (score.to(tl.int32, bitcast=True) & score_bits) | (column // LANES)[None, :]
            top = marked.to(tl.float32, bitcast=True)
            b2 = tl.full((M, LANES), LOW, tl.float32)
            c2 = b2
            for i in tl.static_range(ROUNDS):
                left, right = halves(top)
                top = tl.maximum(left, right)
                lower = highest(tl.minimum(left, right), ROUNDS - 1 - i)
                c2 = tl.maximum(c2, tl.minimum(b2, lower))
                b2 = tl.maximum(b2, lower)
            a, at_a, b, at_b, c = merged(a, at_a, b, at_b, c, top, b2, c2, tile)
            products = tl.zeros((M, N), tl.float32)
            depth = 0
            tile += 1
    slot = tl.arange(0, LANES)[None, :]
    label_a, label_b = column_of(a, at_a, slot, N, LANES), column_of(b, at_b, slot, N, LANES)
    n = n_rows.to(tl.int64) * tl.num_programs(1)
    place = split.to(tl.int64) * n_rows + row + tl.arange(0, M)
    for i in tl.static_range(3):
        score = tl.max(a, 1)
        tl.store(scores + i * n + place, score)
        if i < 2:
            label = tl.min(tl.where(a == score[:, None], label_a, 2147483647), 1)
            tl.store(labels + i * n + place, label)
            taken = (a == score[:, None]) & (label_a == label[:, None])
            a, b, c = tl.where(taken, b, a), tl.where(taken, c, b), tl.where(taken, LOW, c)
            label_a = tl.where(taken, label_b, label_a)
