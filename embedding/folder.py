"""What stands in the folder of a model: its config, and its weights as safetensors."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``. Raises ValueError for a folder without one, or with one that is no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"a backbone folder must hold config.json: {folder} does not")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} must be a JSON object: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object: got {type(config).__name__}")
    return config


def weight_paths(folder: Path) -> list[Path]:
    """The weights files, sorted. Raises ValueError when there is none."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"a backbone folder must hold its weights as *.safetensors (pickle is not read): {folder}")
    return paths


def weights_sha256(folder: Path) -> str:
    """Of the one weights file, or of the list of digests when the weights are in several.

    Raises ValueError when there is none.
    """
    digests = []
    for path in weight_paths(folder):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all weights files by name, mapped from the files, not copied.

    Raises ValueError when there is no file, or one is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_paths(folder):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{path} must be a whole safetensors file: {e}") from e
    return tensors


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: Path) -> None:
    """Raise ValueError, which names the first that differs, unless both have the same names and shapes."""
    must = f"{where} must hold the weights of its config.json"
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise ValueError(f"{must}: {len(missing)} are missing, first {missing[0]}")
    if extra:
        raise ValueError(f"{must}: {len(extra)} too many, first {extra[0]}")
    for name in sorted(wanted):
        if found[name].shape != wanted[name].shape:
            raise ValueError(f"{must}: {name} must be {tuple(wanted[name].shape)}: got {tuple(found[name].shape)}")
