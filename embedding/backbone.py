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
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedding.config import POOLINGS
from embedding.preprocess import PIXELS_WIDTH, Preprocess, pixel_descriptor, read_hf_preprocess
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
    prepare: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]  # one image (h, w, 3) to a network input
    forward: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]  # inputs (n, ...) to vectors (n, width)

    def embed(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Vectors float32 (n, width), not normalised, of uint8 RGB images (h, w, 3), in one batch."""
        if not images:
            return np.zeros((0, self.width), np.float32)
        return self.forward(np.stack([self.prepare(image) for image in images]))


def load_backbone(spec: str, *, pooling: str = "cls", device: str = "cpu") -> Backbone:
    """The backbone that ``spec`` names.

    spec: "pixels"; a folder written by ``save_vit``; a folder written by transformers with its
    preprocessor_config.json (of CLIP and its kin the projected image embedding); a TorchScript file (``.pt``, see
    ``script_preprocess``) that gives vectors (n, width); or a name on the Hugging Face hub, downloaded once. A folder
    wins over a name.
    pooling: "cls", the CLS token after the final norm, or "mean", the mean of the patch tokens. Raises ValueError
    for a spec that is none of these, ImportError when transformers is needed and missing.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}: got {pooling!r}")
    if spec == "pixels":
        identity = {"name": "pixels", "weights": None, "preprocess": {"size": 16, "resample": "box"}}
        return Backbone(PIXELS_WIDTH, identity, pixel_descriptor, lambda batch: batch)
    if is_script(spec):
        return _script_backbone(Path(spec).expanduser(), device)
    folder = find_folder(spec)
    if _read_config(folder).get("format") == VIT_FORMAT:
        return _own_backbone(folder, pooling, device)
    return _hf_backbone(folder, pooling, device)


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
    config = _read_config(folder)
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"a backbone folder must hold config.json: {folder} does not")
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return config


def _own_backbone(folder: Path, pooling: str, device: str) -> Backbone:
    vit, preprocess = load_vit(folder)
    vit.float().to(device).requires_grad_(False)

    def pooled(batch: Tensor) -> Tensor:
        tokens: Tokens = vit(batch)
        return tokens.cls if pooling == "cls" else tokens.patches.mean(1)

    config = {k: v for k, v in dataclasses.asdict(vit.config).items() if k not in ("rope_rescale", "drop_path")}
    identity = _identity(VIT_FORMAT, folder, config, preprocess, pooling)
    return Backbone(vit.config.width, identity, preprocess, _forward(pooled, device))


def _hf_backbone(folder: Path, pooling: str, device: str) -> Backbone:
    preprocess = read_hf_preprocess(folder)
    model = _load_hf_model(folder).to(device)
    config = {k: v for k, v in _read_config(folder).items() if k not in ("transformers_version", "_name_or_path")}
    if hasattr(model, "get_image_features"):
        return _image_text_backbone(model, folder, config, preprocess, device)
    n_prefix = 1 + (getattr(model.config, "num_register_tokens", 0) or 0)

    def pooled(batch: Tensor) -> Tensor:
        tokens: Tensor = model(pixel_values=batch).last_hidden_state
        if tokens.ndim != 3:
            raise ValueError(
                f"the backbone must give tokens (n, tokens, width): got {tuple(tokens.shape)} from {folder}"
            )
        return tokens[:, 0] if pooling == "cls" else tokens[:, n_prefix:].mean(1)

    identity = _identity(str(model.config.model_type), folder, config, preprocess, pooling)
    return Backbone(model.config.hidden_size, identity, preprocess, _forward(pooled, device))


def _image_text_backbone(model: Any, folder: Path, config: Any, preprocess: Preprocess, device: str) -> Backbone:
    """CLIP and its kin: the vector is the projected image embedding, which the model pools by itself."""

    def pooled(batch: Tensor) -> Tensor:
        found = model.get_image_features(pixel_values=batch)
        vectors: Tensor = getattr(found, "pooler_output", found)  # a tensor before transformers 5
        return vectors

    forward = _forward(pooled, device)
    width = forward(np.zeros((1, 3, preprocess.side, preprocess.side), np.float32)).shape[1]
    identity = _identity(str(model.config.model_type), folder, config, preprocess, "model")
    return Backbone(width, identity, preprocess, forward)


def _script_backbone(script: Path, device: str) -> Backbone:
    if not script.is_file():
        raise ValueError(f"backbone must be 'pixels', a folder, a file or a Hugging Face name: no file {script}")
    preprocess = script_preprocess(script)
    try:
        model = torch.jit.load(script, map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"{script} must be a TorchScript file: {str(e).splitlines()[0]}") from e

    def pooled(batch: Tensor) -> Tensor:
        vectors: Tensor = model(batch)
        if vectors.ndim != 2:
            raise ValueError(f"a TorchScript backbone must give vectors (n, width): got {tuple(vectors.shape)}")
        return vectors

    forward = _forward(pooled, device)
    width = forward(np.zeros((1, 3, preprocess.side, preprocess.side), np.float32)).shape[1]
    with script.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    name = script.name.split(".")[0]
    identity = {"name": name, "weights": weights, "preprocess": dataclasses.asdict(preprocess)}
    return Backbone(width, json.loads(json.dumps(identity)), preprocess, forward)


def _forward(
    pooled: Callable[[Tensor], Tensor], device: str
) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    def forward(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            vectors: npt.NDArray[np.float32] = pooled(torch.from_numpy(batch).to(device)).float().cpu().numpy()
        return vectors

    return forward


def _identity(name: str, folder: Path, config: Any, preprocess: Preprocess, pooling: str) -> dict[str, Any]:
    identity = {
        "name": name,
        "weights": _weights_sha256(folder),
        "config": config,
        "preprocess": dataclasses.asdict(preprocess),
        "pooling": pooling,
    }
    as_json: dict[str, Any] = json.loads(json.dumps(identity, sort_keys=True))  # tuples as they come back from a file
    return as_json


def _weights_sha256(folder: Path) -> str:
    """Of the one weights file, or of the list of digests when the weights are in several."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if not digests:
        raise ValueError(f"a backbone folder must hold its weights as *.safetensors (pickle is not read): {folder}")
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _load_hf_model(folder: Path) -> Any:
    """A transformers model in eval mode, float32, every weight from the folder."""
    _weights_sha256(folder)  # its message comes before that of transformers
    _need_transformers(str(folder))
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"{folder} must hold a model that transformers knows, whole and without code: {e}") from e
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler.") and "mask_token" not in k)
    if missing:  # transformers would fill them with random values
        raise ValueError(
            f"{folder} must hold every weight of the model: {len(missing)} are missing, first {missing[0]}"
        )
    if not hasattr(model, "get_image_features") and not isinstance(getattr(model.config, "hidden_size", None), int):
        raise ValueError(
            f"the model must be an image encoder with hidden_size: got {model.config.model_type} in {folder}"
        )
    return model.eval().requires_grad_(False)


def _need_transformers(spec: str) -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as e:
        raise ImportError(f"backbone {spec!r} needs the package transformers: pip install 'openlvd[hf]'") from e


def _download(name: str) -> Path:
    """The local copy of a model on the hub: its configs and safetensors, no code and no pickle."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"backbone must be 'pixels', a folder or a Hugging Face name: no folder {name!r}")
    _need_transformers(name)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as e:
        raise ValueError(f"backbone must be 'pixels', a folder or a Hugging Face name: got {name!r}: {e}") from e
