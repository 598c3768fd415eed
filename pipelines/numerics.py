"""What the bits of a result on CPUs depend on besides recipe, data and seed: versions, BLAS core, SIMD."""

import hashlib
import json
import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("numpy", "scipy", "torch", "faiss-cpu", "faiss-gpu", "pyarrow", "pillow", "numba", "duckdb",
            "scikit-learn", "transformers", "safetensors")  # fmt: skip


@lru_cache(maxsize=1)
def numerics() -> dict[str, str]:
    """The tag of this machine. Steps write it; a worker with another one is refused. A GPU is not in it: what it
    computes is the same within a tolerance only, and a driver may have none."""
    from threadpoolctl import threadpool_info

    tag = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            tag[package] = version(package)
        except PackageNotFoundError:
            continue
    import numpy

    tag["simd"] = ",".join(numpy.show_config(mode="dicts")["SIMD Extensions"]["found"])
    cores = {str(lib.get("architecture")) for lib in threadpool_info() if lib.get("user_api") == "blas"}
    tag["blas"] = ",".join(sorted(cores))
    return tag


@lru_cache(maxsize=1)
def numerics_hash() -> str:
    """The tag in short, as it travels with every task."""
    return hashlib.sha256(json.dumps(numerics(), sort_keys=True).encode()).hexdigest()[:16]


def one_math_thread() -> None:
    """Hold the math libraries of this process to one thread: the bits of a product depend on their number.

    The environment holds libraries that are loaded later; an import that was earlier is held by threadpoolctl.
    """
    from threadpoolctl import threadpool_limits

    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    threadpool_limits(1)
