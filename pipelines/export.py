"""``openlvd export``: a trained encoder as a folder that Hugging Face's transformers loads, and the proof."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from curation.artifact import Artifact
from curation.store import Location
from pipelines.commands import artifact_at, place_of
from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("config.json", "model.safetensors")  # of a trained encoder
MOST = 1e-5  # difference of a feature in float32


class Exported(NamedTuple):
    """What an export made."""

    folder: str
    model_type: str  # "dinov3_vit", "dinov2" or "dinov2_with_registers"
    parameters: int
    own_difference: float  # largest of a feature, to the folder read back by this package
    transformers_difference: float | None  # the same by transformers; None: it is not installed


def export(path: str, out: str) -> Exported:
    """Write the encoder at a path as transformers has it, read it back, and compare its features on random images.

    path: a train artifact, ROOT/STEP, or a folder that one was copied to. Rotary positions make a DINOv3 model, learned
    ones DINOv2. Raises UserError for what is no encoder, a shape transformers does not have, an out that is there, and
    when the features differ by more than 1e-5.
    """
    import torch

    from embedding.backbone import load_vit
    from embedding.hf_weights import hf_config, load_hf_vit, save_hf

    folder = Path(out).expanduser()
    if folder.exists():
        raise UserError(f"--out must be a new folder: got {out}", "nothing is written over")
    with tempfile.TemporaryDirectory(prefix="openlvd-") as copied:
        fetch(encoder_at(path), Path(copied))
        try:
            vit, preprocess = load_vit(copied)
            model_type = str(hf_config(vit.config, preprocess.side)["model_type"])
            save_hf(folder, vit, preprocess)
        except ValueError as e:
            raise UserError(str(e), "only encoders that openlvd has trained can be exported") from e
    images = torch.randn(2, 3, preprocess.side, preprocess.side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = vit(images)
        want = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
        again = load_hf_vit(folder, preprocess.side)(images)
        own = torch.cat([again.cls[:, None], again.registers, again.patches], dim=1)
        theirs = by_transformers(folder, images)
    differences = [float((want - each).abs().max()) for each in (own, theirs) if each is not None]
    if not max(differences) <= MOST:
        raise UserError(
            f"the exported model must give the same features within {MOST}: got a difference of {max(differences):.1e}",
            f"do not use {folder}; please report this",
        )
    n = sum(p.numel() for p in vit.parameters())
    return Exported(str(folder), model_type, n, differences[0], differences[1] if len(differences) > 1 else None)


def by_transformers(folder: Path, images: "Tensor") -> "Tensor | None":
    """The features that transformers makes of images, None without it."""
    try:
        from transformers import AutoModel
    except ImportError:
        return None
    features: Tensor = AutoModel.from_pretrained(folder).eval()(pixel_values=images).last_hidden_state
    return features


def encoder_at(path: str) -> Location:
    """Where the files of an encoder are. Raises UserError when there are none."""
    artifact: Artifact | None = artifact_at(path)
    at = place_of(path) if artifact is None else artifact.location
    if artifact is not None and artifact.kind != "train":
        raise UserError(f"PATH must be a trained encoder: got a {artifact.kind} artifact, {path}", "name a train step")
    if not all((at / name).exists() for name in FILES):
        raise UserError(
            f"PATH must be a trained encoder: no {' and '.join(FILES)} at {path}", "it is ROOT/STEP of a train step"
        )
    return at


def fetch(at: Location, folder: Path) -> None:
    """Copy the files of an encoder into a local folder."""
    for name in FILES:
        (folder / name).write_bytes((at / name).read())
