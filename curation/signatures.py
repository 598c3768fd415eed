"""Signatures: 1,024 bits of a unit row, from which a distance can be told that hardly misses a similar pair.

A row is turned into 512 coordinates by orthonormal directions drawn from a seed (wider rows lose some by it, narrower
ones none), and each coordinate becomes one of -3, -1, 1, 3: its sign (Charikar, "Similarity Estimation Techniques
from Rounding Algorithms", 2002) and whether it is beyond 0.9957 of its standard deviation, which is the best place for
four evenly spaced values of a normal variable (Max, "Quantizing for Minimum Distortion", 1960). A value is 2 s + t
with s the sign and t the sign too for a large one, the other sign for a small one; so of two rows

    sum of products = 9 * 512 - 2 * distance,    distance = 4 |s ^ s'| + 2 (|s ^ t'| + |t ^ s'|) + |t ^ t'|

with |.| the number of set bits. The first eight words of a signature are s, the other eight t.

A pair is tested three times, each time by more: 256 signs, 512 signs, the distance. What a test lets pass is measured:
of random pairs at the lowest similarity asked for, all but the ``LOSS_SD`` tail of a normal distribution, 0.6 %.
Pairs that are more similar are lost less often still.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

COORDINATES = 512
WORDS = 16  # uint64 of a signature
LARGE = 0.9957  # standard deviations from which on a coordinate is large
LOSS_SD = 2.5  # standard deviations beyond the mean that each test lets pass
SLACK = (2, 2, 16)  # and so much more: near similarity 1, where few bits differ, nothing is normal
N_PAIRS = 8192  # random pairs the tests are measured on


class Limits(NamedTuple):
    """What each test lets pass at most."""

    first_signs: int  # of 256 that differ
    signs: int  # of 512 that differ
    distance: int

    def array(self) -> np.ndarray:
        """uint64 (3,), as ``loops_bits.scan`` takes them."""
        return np.array(self, np.uint64)


@lru_cache(maxsize=2)
def directions(width: int, seed: int) -> np.ndarray:
    """float32 (width, 512): what turns rows into coordinates. Lengths stay as they are up to a width of 512."""
    rng = np.random.default_rng([seed, width, COORDINATES])
    turned = np.linalg.qr(rng.normal(size=(max(width, COORDINATES), COORDINATES)))[0]
    found: np.ndarray = np.ascontiguousarray(turned[:width], np.float32)
    found.setflags(write=False)
    return found


def signatures(x: np.ndarray, seed: int) -> np.ndarray:
    """uint64 (n, 16) of unit rows x float32 (n, d). Holds 2 kB a row: the caller cuts x into blocks."""
    from curation import loops_bits

    found: np.ndarray = loops_bits.pack_coordinates(x @ directions(x.shape[1], seed), LARGE)
    return found


def signature_distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first signs, signs, distance), int64 (n,) each, of the pairs of signatures uint64 (n, 16)."""
    s, t, other_s, other_t = a[:, :8], a[:, 8:], b[:, :8], b[:, 8:]

    def differ(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        counts: np.ndarray = np.bitwise_count(x ^ y).sum(axis=1, dtype=np.int64)
        return counts

    signs = differ(s, other_s)
    distance = 4 * signs + 2 * (differ(s, other_t) + differ(t, other_s)) + differ(t, other_t)
    return differ(s[:, :4], other_s[:, :4]), signs, distance


def limits_at(min_similarity: float, width: int, seed: int) -> Limits:
    """The tests that pairs of rows from a similarity on pass: measured on random pairs at just this similarity."""
    rng = np.random.default_rng([seed, width, N_PAIRS])
    x, y = (rng.normal(size=(N_PAIRS, width)) for _ in range(2))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if width > 1:
        y -= x * np.einsum("nd,nd->n", x, y)[:, None]
        y /= np.linalg.norm(y, axis=1, keepdims=True)
    y = min_similarity * x + np.sqrt(1 - min_similarity**2) * y
    found = signature_distances(*(signatures(rows.astype(np.float32), seed) for rows in (x, y)))
    most = [d.mean() + LOSS_SD * d.std() + slack for d, slack in zip(found, SLACK, strict=True)]
    return Limits(*(int(m) for m in most))


def within_limits(limits: Limits, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool (n,): which pairs of signatures uint64 (n, 16) pass."""
    found = signature_distances(a, b)
    passed: np.ndarray = np.all([d <= most for d, most in zip(found, limits, strict=True)], axis=0)
    return passed
