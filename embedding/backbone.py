"""What makes a vector of an image: its pixels or a hash of them, a ViT of this project, a Hugging Face model, or a
TorchScript file.

Weights are read from safetensors alone, and no Python code that comes with a model is run. A TorchScript file is a
program of tensor operations; name one only if you trust whom it comes from.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedding.config import BUNDLED, check_pooling, check_precision
from embedding.folder import check_tensors, read_config, weight_paths, weights_sha256
from embedding.hf_models import load_hf_model
from embedding.hf_weights import load_hf_vit, uncovered, vit_config
from embedding.network import Backbone, Running, begin_with, network_backbone, prepared_backbone, vit_backbone
from embedding.phash import PHASH_LEAST_SIDE, PHASH_WIDTH, POINTS_SIDE, phash_input, phash_vectors
from embedding.preprocess import PIXELS_LEAST_SIDE, PIXELS_WIDTH, Preprocess, pixel_descriptor, read_hf_preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

VIT_FORMAT = "openlvd-vit"
WEIGHTS = Path(__file__).parent / "weights"  # of the encoders that come with the package
SCRIPT_SUFFIXES = (".pt", ".torchscript")

_T = TypeVar("_T")


def load_backbone(
    spec: str, *, pooling: str = "cls", device: str = "cpu", precision: str = "float32", compiled: bool = False
) -> Backbone:
    """The backbone that ``spec`` names.

    spec: "pixels"; "phash", see ``embedding.phash``; "openlvd-tiny", which comes with the package; a folder written by
    ``save_vit``; a folder written by transformers with its preprocessor_config.json; a TorchScript file (``.pt``, see
    ``script_preprocess``) that gives vectors (n, width); or a name on the Hugging Face hub, downloaded once. A folder
    wins over a name. DINOv2, with registers, and DINOv3 ViT run in the project's own ViT and need no transformers; see
    ``embedding.hf_models`` for what others give.
    pooling: "cls", the CLS token after the final norm (of CLIP and SigLIP the image embedding); "mean" of the patch
    tokens; "cls+mean", one behind the other; "gem", see ``embedding.pooling``. TorchScript files pool by themselves.
    What is not to be pooled is in ``Backbone.patches``.
    precision: "float32", "bfloat16" or "float16" products. compiled: torch.compile of the own ViT, on a GPU alone.
    Raises ValueError for a spec that is none of these, ImportError when transformers is needed and missing.
    """
    check_pooling(pooling, "pooling")
    check_precision(precision, "precision")
    how = Running(device, precision, compiled and device == "cuda")
    if spec == "pixels":
        identity = {"name": "pixels", "weights": None, "preprocess": {"size": 16, "resample": "box"}}
        return Backbone(PIXELS_WIDTH, identity, pixel_descriptor, lambda batch: batch, least_side=PIXELS_LEAST_SIDE)
    if spec == "phash":
        identity = {"name": "phash", "weights": None, "preprocess": {"size": POINTS_SIDE, "resample": "tent"}}
        return Backbone(PHASH_WIDTH, identity, phash_input, phash_vectors, least_side=PHASH_LEAST_SIDE)
    if is_script(spec):
        return _script_backbone(find_script(spec), how._replace(compiled=False))
    folder = find_folder(spec)
    if read_config(folder).get("format") == VIT_FORMAT:
        return _own_backbone(folder, pooling, how)
    return _hf_backbone(folder, pooling, how)


def find_folder(spec: str) -> Path:
    """The folder of a backbone's config and weights: ``spec`` itself, or the local copy of a model on the hub.

    An encoder that comes with the package is a folder of it. Raises ValueError when there is neither, ImportError when
    a name is given and transformers is missing.
    """
    folder = Path(spec).expanduser()
    if spec in BUNDLED and not folder.is_dir():
        return WEIGHTS / spec
    return folder if folder.is_dir() else _download(spec)


def is_script(spec: str) -> bool:
    """Whether ``spec`` names a TorchScript file."""
    return spec.endswith(SCRIPT_SUFFIXES) and not Path(spec).expanduser().is_dir()


def find_script(spec: str) -> Path:
    """The TorchScript file that ``spec`` names. Raises ValueError when there is none."""
    script = Path(spec).expanduser()
    if not script.is_file():
        raise ValueError(
            f"backbone must be 'pixels', 'phash', a folder, a file or a Hugging Face name: no file {script}"
        )
    return script


def weight_files(spec: str) -> list[Path]:
    """The files whose content decides about the vectors of a model that is named by folder, file or hub name.

    Raises ValueError when one of them is missing, or config or preprocessing are spoilt. Weights are not read.
    """
    if is_script(spec):
        script = find_script(spec)
        script_preprocess(script)
        return [path for path in (script, script.parent / "preprocessor_config.json") if path.is_file()]
    folder = find_folder(spec)
    if read_config(folder).get("format") != VIT_FORMAT:
        read_hf_preprocess(folder)
    weight_paths(folder)
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))


def script_preprocess(script: Path) -> Preprocess:
    """What a TorchScript file wants to see: ``preprocessor_config.json`` beside it, in the format of Hugging Face.

    The files of SSCD (https://github.com/facebookresearch/sscd-copy-detection, ``sscd_*.torchscript.pt``) do without:
    320 x 320 pixels without keeping the aspect, ImageNet mean and deviation, as their authors publish. Raises
    ValueError for another file without one: a guess would give other vectors unnoticed.
    """
    if not script.name.startswith("sscd_") or (script.parent / "preprocessor_config.json").is_file():
        return read_hf_preprocess(script.parent)
    return Preprocess(size=320, keep_aspect=False, crop=None, resample="bilinear")


def save_vit(folder: str | Path, vit: ViT, preprocess: Preprocess) -> None:
    """Write ``config.json`` and ``model.safetensors``: the same bytes for the same model.

    Each file is written aside and renamed, the config last: a folder with a config is whole. Raises
    ValueError if the preprocessed image does not fit the patch size.
    """
    _check_side(preprocess, vit.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in vit.state_dict().items()}
    config = {
        "format": VIT_FORMAT,
        "vit": dataclasses.asdict(vit.config),
        "preprocess": dataclasses.asdict(preprocess),
    }
    (folder / "config.json").unlink(missing_ok=True)
    aside = folder / ".aside"
    save_file(tensors, aside)
    os.replace(aside, folder / "model.safetensors")  # noqa: PTH105  # one rename
    aside.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
    os.replace(aside, folder / "config.json")  # noqa: PTH105


def load_vit(folder: str | Path) -> tuple[ViT, Preprocess]:
    """The ViT and the preprocessing of a folder written by ``save_vit``, in eval mode, on the CPU.

    Raises ValueError for a folder that is not one, or whose weights are damaged or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.get("format") != VIT_FORMAT:
        raise ValueError(f"{folder}/config.json must have format {VIT_FORMAT!r}: got {config.get('format')!r}")
    vit_config = _from_fields(ViTConfig, config.get("vit"), f"{folder}/config.json: vit")
    preprocess = _from_fields(Preprocess, config.get("preprocess"), f"{folder}/config.json: preprocess")
    _check_side(preprocess, vit_config)
    with torch.device("meta"):  # shapes alone: the values come from the file
        vit = ViT(vit_config)
    weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{weights} must hold the weights of its config.json: {e}") from e
    check_tensors(tensors, vit.state_dict(), weights)
    vit.load_state_dict(tensors, assign=True)
    return vit.eval(), preprocess


def _from_fields(cls: type[_T], fields: Any, where: str) -> _T:
    """A config dataclass from JSON; lists become tuples, unknown keys are refused."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(fields, dict) or set(fields) - names:
        unknown = sorted(set(fields) - names) if isinstance(fields, dict) else fields
        raise ValueError(f"{where} must be an object with keys among {sorted(names)}: got {unknown}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _check_side(preprocess: Preprocess, config: ViTConfig) -> None:
    if preprocess.side % config.patch_size:
        raise ValueError(
            f"the preprocessed side must be a multiple of the patch size {config.patch_size}: got {preprocess.side}"
        )


def _own_backbone(folder: Path, pooling: str, how: Running) -> Backbone:
    vit, preprocess = load_vit(folder)
    training = ("rope_rescale", "rope_rescale_per", "drop_path")
    config = {k: v for k, v in dataclasses.asdict(vit.config).items() if k not in training}
    identity = _identity({"name": VIT_FORMAT}, folder, config, preprocess, pooling, how)
    return vit_backbone(vit, identity, preprocess, pooling, how)


def _hf_backbone(folder: Path, pooling: str, how: Running) -> Backbone:
    """DINOv2 and DINOv3 by the own ViT, whether transformers is installed or not; other families by transformers.

    Which of the two is said in the identity: their vectors differ in the last bits.
    """
    preprocess = read_hf_preprocess(folder)
    config = {k: v for k, v in read_config(folder).items() if k not in ("transformers_version", "_name_or_path")}
    name = {"name": str(config.get("model_type")), "network": "transformers"}
    if uncovered(config) is not None:
        features = load_hf_model(folder, how.device)
        identity = _identity(name, folder, config, preprocess, pooling, how)
        return network_backbone(features, identity, preprocess, pooling, how._replace(compiled=False))
    _check_side(preprocess, vit_config(config))
    vit = load_hf_vit(folder, preprocess.side)
    identity = _identity({**name, "network": VIT_FORMAT}, folder, config, preprocess, pooling, how)
    return vit_backbone(vit, identity, preprocess, pooling, how)


def _script_backbone(script: Path, how: Running) -> Backbone:
    if how.precision != "float32":
        raise ValueError(f"precision must be float32 with a TorchScript file: got {how.precision}")
    preprocess = script_preprocess(script)
    try:
        model = torch.jit.load(script, map_location=how.device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"{script} must be a TorchScript file: {str(e).splitlines()[0]}") from e

    def pooled(batch: Tensor) -> Tensor:
        vectors: Tensor = model(batch)
        if vectors.ndim != 2:
            raise ValueError(f"a TorchScript backbone must give vectors (n, width): got {tuple(vectors.shape)}")
        return vectors

    begin = begin_with(pooled, preprocess, how)
    width = begin(np.zeros((1, preprocess.side, preprocess.side, 3), np.uint8)).rows().shape[1]
    with script.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    name = script.name.split(".")[0]
    identity = {"name": name, "weights": weights, "preprocess": dataclasses.asdict(preprocess)}
    return prepared_backbone(width, json.loads(json.dumps(identity)), preprocess, how, begin)


def _identity(
    name: dict[str, Any], folder: Path, config: Any, preprocess: Preprocess, pooling: str, how: Running
) -> dict[str, Any]:
    identity = {
        **name,
        "weights": weights_sha256(folder),
        "config": config,
        "preprocess": dataclasses.asdict(preprocess),
        "pooling": pooling,
        "precision": how.precision,
    }
    as_json: dict[str, Any] = json.loads(json.dumps(identity, sort_keys=True))  # tuples as they come back from a file
    return as_json


def _download(name: str) -> Path:
    """The local copy of a model on the hub: its configs and safetensors, no code and no pickle."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"backbone must be 'pixels', 'phash', a folder or a Hugging Face name: no folder {name!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ImportError(f"backbone {name!r} is to come from the hub: pip install 'openlvd[hf]'") from e

    patterns = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as e:
        first = next(
            iter(str(e).strip().splitlines()), type(e).__name__
        )  # the hub says several, with advice for its own callers
        raise ValueError(
            f"backbone must be 'pixels', 'phash', a folder or a Hugging Face name: got {name!r}: {first}"
        ) from e
