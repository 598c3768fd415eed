"""Checks of input arrays, with messages that say what must hold, what was got and where."""

import numpy as np


def check_unit_rows(x: np.ndarray, name: str, atol: float = 1e-3) -> None:
    """Raise ValueError unless ``x`` is float (n, d) with rows of L2 norm 1 within ``atol``.

    ``name`` stands in the message. Norms are taken in float32 (float64 rows in float64), so float16 rows do not
    overflow; NaN and infinite rows are bad. No rows are fine. Holds one converted copy of ``x`` if it is float16.
    """
    if x.ndim != 2 or x.dtype.kind != "f":
        raise ValueError(f"{name} must be a float array (n, d): got {x.dtype} {x.shape}")
    wide = x.astype(np.promote_types(x.dtype, np.float32), copy=False)
    norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    bad = np.flatnonzero(~(np.abs(norms - 1) <= atol))  # not <=, so that NaN is bad too
    if len(bad):
        raise ValueError(
            f"{name} must have unit rows: {len(bad)} of {len(x)} do not, first row {bad[0]} "
            f"has norm {norms[bad[0]]:.4g}; pass it through embedding.embed.unit_rows first"
        )
