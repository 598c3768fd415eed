"""Image files to unit rows: decode, prepare, embed, in batches cut at fixed places."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedding.backbone import Backbone
from embedding.decode import MAX_PIXELS, BadImage, decode_rgb

BATCH_IMAGES = 32  # files a batch; part of the stage version, since the height of a product changes its bits


class Embedded(NamedTuple):
    """Unit rows of the images that could be decoded."""

    embeddings: npt.NDArray[np.float32]  # (n_good, width), unit rows
    good: npt.NDArray[np.int64]  # (n_good,), ascending: which image each row belongs to
    bad: dict[int, BadImage]  # the others


def unit_rows(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Rows of x (n, d) divided by their L2 norm, float32.

    Raises ValueError for a row that has no direction: norm 0, or a value that is not finite.
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype.kind not in "fiu":
        raise ValueError(f"rows must be an array of numbers (n, d): got {x.dtype} {x.shape}")
    norms = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    bad = np.flatnonzero(~((norms > 0) & (norms < np.inf)))  # negated, so that NaN is bad too
    if len(bad):
        raise ValueError(
            f"rows must have a finite norm above 0: {len(bad)} of {len(x)} do not, "
            f"first row {bad[0]} has norm {norms[bad[0]]}"
        )
    unit: npt.NDArray[np.float32] = (x / norms[:, None]).astype(np.float32)
    return unit


def embed_images(backbone: Backbone, images: Sequence[bytes], max_pixels: int = MAX_PIXELS) -> Embedded:
    """Unit rows of image files; a file that cannot be decoded is listed with its reason.

    Batches are cut every ``BATCH_IMAGES`` files, bad ones included, so the result depends on the list alone:
    cut a part at multiples of that number and the bytes stay the same. Holds one decoded image and
    one batch of prepared ones (3 * side ** 2 * 4 bytes each). Raises ValueError if the backbone gives a row without
    a direction.
    """
    good: list[int] = []
    bad: dict[int, BadImage] = {}
    rows = [np.zeros((0, backbone.width), np.float32)]
    for start in range(0, len(images), BATCH_IMAGES):
        batch = []
        for i in range(start, min(start + BATCH_IMAGES, len(images))):
            pixels = decode_rgb(images[i], max_pixels)
            if isinstance(pixels, BadImage):
                bad[i] = pixels
            else:
                batch.append(backbone.prepare(pixels))
                good.append(i)
        if batch:
            rows.append(unit_rows(backbone.forward(np.stack(batch))))
    return Embedded(np.concatenate(rows), np.array(good, np.int64), bad)
