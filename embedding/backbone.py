"""What makes a vector of an image: the pixels, a ViT of this project, a Hugging Face model, or a TorchScript file.

Weights are read from safetensors alone, and no Python code that comes with a model is run. A TorchScript file is a
program of tensor operations; name one only if you trust whom it comes from.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedding.config import check_pooling, check_precision
from embedding.fast_decode import Reduced
from embedding.folder import read_config, weights_sha256
from embedding.hf_models import load_hf_model
from embedding.hf_weights import load_hf_vit, uncovered, vit_config
from embedding.pooling import POOLERS, Features
from embedding.preprocess import PIXELS_LEAST_SIDE, PIXELS_WIDTH, Preprocess, pixel_descriptor, read_hf_preprocess
from embedding.vit import Tokens, ViT
from embedding.vit_config import ViTConfig

VIT_FORMAT = "openlvd-vit"
SCRIPT_SUFFIXES = (".pt", ".torchscript")

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A function from images to float32 vectors, and what it is made of."""

    width: int  # of a vector
    identity: dict[str, Any]  # JSON values; equal when the vectors are equal, wherever the weights lie
    prepare: Callable[[npt.NDArray[np.uint8] | Reduced], npt.NDArray[np.float32]]  # an image to a network input
    forward: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]  # inputs (n, ...) to vectors (n, width)
    device: str = "cpu"  # where forward works; inputs for "cuda" come faster from pinned memory

    @property
    def least_side(self) -> int | None:
        """Pixels that ``prepare`` makes of a shorter side, for ``decode_reduced``; None: only whole images will do."""
        return self.prepare.least_side if isinstance(self.prepare, Preprocess) else PIXELS_LEAST_SIDE

    def embed(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Vectors float32 (n, width), not normalised, of uint8 RGB images (h, w, 3), in one batch."""
        if not images:
            return np.zeros((0, self.width), np.float32)
        return self.forward(np.stack([self.prepare(image) for image in images]))


class Running(NamedTuple):
    """How a network is run."""

    device: str
    precision: str  # of its products; what is added up and what comes out is float32
    compiled: bool


def load_backbone(
    spec: str, *, pooling: str = "cls", device: str = "cpu", precision: str = "float32", compiled: bool = False
) -> Backbone:
    """The backbone that ``spec`` names.

    spec: "pixels"; a folder written by ``save_vit``; a folder written by transformers with its
    preprocessor_config.json; a TorchScript file (``.pt``, see ``script_preprocess``) that gives vectors (n, width); or
    a name on the Hugging Face hub, downloaded once. A folder wins over a name. DINOv2, with registers, and DINOv3 ViT
    run in the project's own ViT and need no transformers; see ``embedding.hf_models`` for what others give.
    pooling: "cls", the CLS token after the final norm (of CLIP and SigLIP the image embedding); "mean" of the patch
    tokens; "cls+mean", one behind the other; "gem", see ``embedding.pooling``. TorchScript files pool by themselves.
    precision: "float32", "bfloat16" or "float16" products. compiled: torch.compile of the own ViT, on a GPU alone.
    Raises ValueError for a spec that is none of these, ImportError when transformers is needed and missing.
    """
    check_pooling(pooling, "pooling")
    check_precision(precision, "precision")
    how = Running(device, precision, compiled and device == "cuda")
    if spec == "pixels":
        identity = {"name": "pixels", "weights": None, "preprocess": {"size": 16, "resample": "box"}}
        return Backbone(PIXELS_WIDTH, identity, pixel_descriptor, lambda batch: batch)
    if is_script(spec):
        return _script_backbone(Path(spec).expanduser(), how)
    folder = find_folder(spec)
    if read_config(folder).get("format") == VIT_FORMAT:
        return _own_backbone(folder, pooling, how)
    return _hf_backbone(folder, pooling, how)


def find_folder(spec: str) -> Path:
    """The folder of a backbone's config and weights: ``spec`` itself, or the local copy of a model on the hub.

    Raises ValueError when there is neither, ImportError when a name is given and transformers is missing.
    """
    folder = Path(spec).expanduser()
    return folder if folder.is_dir() else _download(spec)


def is_script(spec: str) -> bool:
    """Whether ``spec`` names a TorchScript file."""
    return spec.endswith(SCRIPT_SUFFIXES) and not Path(spec).expanduser().is_dir()


def weight_files(spec: str) -> list[Path]:
    """The files whose content decides about the vectors of a model that is named by folder, file or hub name."""
    if is_script(spec):
        script = Path(spec).expanduser()
        return [path for path in (script, script.parent / "preprocessor_config.json") if path.is_file()]
    return sorted(path for path in find_folder(spec).iterdir() if path.suffix in (".json", ".safetensors"))


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
    try:
        vit.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    except (OSError, SafetensorError, RuntimeError) as e:
        raise ValueError(f"{folder}/model.safetensors must hold the weights of its config.json: {e}") from e
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
    config = {k: v for k, v in dataclasses.asdict(vit.config).items() if k not in ("rope_rescale", "drop_path")}
    identity = _identity({"name": VIT_FORMAT}, folder, config, preprocess, pooling, how)
    return _network_backbone(_vit_features(vit, how), identity, preprocess, pooling, how)


def _hf_backbone(folder: Path, pooling: str, how: Running) -> Backbone:
    """DINOv2 and DINOv3 by the own ViT, whether transformers is installed or not; other families by transformers.

    Which of the two is said in the identity: their vectors differ in the last bits.
    """
    preprocess = read_hf_preprocess(folder)
    config = {k: v for k, v in read_config(folder).items() if k not in ("transformers_version", "_name_or_path")}
    if uncovered(config) is None:
        network = VIT_FORMAT
        _check_side(preprocess, vit_config(config))
        features = _vit_features(load_hf_vit(folder, preprocess.side), how)
    else:
        network = "transformers"
        features = load_hf_model(folder, how.device)
    name = {"name": str(config.get("model_type")), "network": network}
    identity = _identity(name, folder, config, preprocess, pooling, how)
    return _network_backbone(features, identity, preprocess, pooling, how)


def _vit_features(vit: ViT, how: Running) -> Callable[[Tensor], Features]:
    vit.float().to(how.device).requires_grad_(False)
    if how.compiled:
        vit.compile()

    def features(images: Tensor) -> Features:
        tokens: Tokens = vit(images)
        return Features(tokens.cls, tokens.patches)

    return features


def _network_backbone(
    features: Callable[[Tensor], Features],
    identity: dict[str, Any],
    preprocess: Preprocess,
    pooling: str,
    how: Running,
) -> Backbone:
    pool = POOLERS[pooling]

    with torch.inference_mode():  # one image, for the width and for what does not fit
        try:
            found = features(torch.zeros(1, 3, preprocess.side, preprocess.side, device=how.device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as e:
            raise ValueError(f"{identity['name']} must take images of {preprocess.side} pixels: {e}") from e
        width = pool(found).shape[1]
    forward = _forward(lambda images: pool(features(images)), how)
    return Backbone(width, identity, preprocess, forward, how.device)


def _script_backbone(script: Path, how: Running) -> Backbone:
    if how.precision != "float32":
        raise ValueError(f"precision must be float32 with a TorchScript file: got {how.precision}")
    if not script.is_file():
        raise ValueError(f"backbone must be 'pixels', a folder, a file or a Hugging Face name: no file {script}")
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

    forward = _forward(pooled, how)
    width = forward(np.zeros((1, 3, preprocess.side, preprocess.side), np.float32)).shape[1]
    with script.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    name = script.name.split(".")[0]
    identity = {"name": name, "weights": weights, "preprocess": dataclasses.asdict(preprocess)}
    return Backbone(width, json.loads(json.dumps(identity)), preprocess, forward, how.device)


def _forward(
    pooled: Callable[[Tensor], Tensor], how: Running
) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    dtype, reduced = getattr(torch, how.precision), how.precision != "float32"

    def forward(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        # A batch in pinned memory is copied while the GPU still works.
        images = torch.from_numpy(batch).to(how.device, non_blocking=True)
        with torch.inference_mode(), torch.autocast(how.device, dtype, enabled=reduced):
            vectors: npt.NDArray[np.float32] = pooled(images).float().cpu().numpy()
        return vectors

    return forward


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
        raise ValueError(f"backbone must be 'pixels', a folder or a Hugging Face name: no folder {name!r}")
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
        raise ValueError(f"backbone must be 'pixels', a folder or a Hugging Face name: got {name!r}: {first}") from e
