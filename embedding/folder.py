"""What stands in the folder of a model: its config, and its weights as safetensors."""

import hashlib
import json
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


def weights_sha256(folder: Path) -> str:
    """Of the one weights file, or of the list of digests when the weights are in several.

    Raises ValueError when there is none.
    """
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if not digests:
        raise ValueError(f"a backbone folder must hold its weights as *.safetensors (pickle is not read): {folder}")
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all weights files by name, mapped from the files, not copied.

    Raises ValueError when there is no file, or one is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{path} must be a whole safetensors file: {e}") from e
    if not tensors:
        raise ValueError(f"a backbone folder must hold its weights as *.safetensors (pickle is not read): {folder}")
    return tensors
