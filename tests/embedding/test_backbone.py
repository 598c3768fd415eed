import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedding.backbone import find_folder, load_backbone, load_vit, save_vit, weight_files
from embedding.preprocess import Preprocess, pixel_descriptor
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

REPO = Path(__file__).parents[2]
VIT = ViTConfig(width=32, depth=2, heads=2, patch_size=8, layer_scale=0.5)
LEARNED = ViTConfig(
    width=32, depth=1, heads=2, patch_size=8, position="learned", image_size=16, n_registers=0, key_bias=True
)
PREPROCESS = Preprocess(size=40, crop=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
HF_PREPROCESS = {
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.25],
    "resample": 3,
}


def pictures(n=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30 + 7 * i, 50, 3)).astype("u1") for i in range(n)]


def prepared(images):
    return torch.from_numpy(np.stack([PREPROCESS(image) for image in images]))


def test_pixels():
    backbone = load_backbone("pixels")
    images = pictures()
    np.testing.assert_array_equal(backbone.embed(images), np.stack([pixel_descriptor(x) for x in images]))
    assert backbone.width == 768
    assert backbone.embed([]).shape == (0, 768)
    assert backbone.identity["name"] == "pixels"
    assert backbone.patches is None


@pytest.mark.parametrize("config", [VIT, LEARNED])
def test_a_vit_comes_back_from_its_folder(tmp_path, config):
    vit = ViT(config, seed=3)
    save_vit(tmp_path / "a", vit, PREPROCESS)
    again, preprocess = load_vit(tmp_path / "a")
    assert again.config == config
    assert preprocess == PREPROCESS
    assert not again.training
    assert set(again.state_dict()) == set(vit.state_dict())
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in again.state_dict().items())
    save_vit(tmp_path / "b", again, preprocess)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_of_a_vit_folder(tmp_path, pooling):
    vit = ViT(VIT, seed=3).eval()
    save_vit(tmp_path, vit, PREPROCESS)
    backbone = load_backbone(str(tmp_path), pooling=pooling)
    out = backbone.embed(pictures())
    with torch.no_grad():
        tokens = vit(prepared(pictures()))
    want = tokens.cls if pooling == "cls" else tokens.patches.mean(1)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, want.numpy())
    assert backbone.width == 32
    assert backbone.embed([]).shape == (0, 32)


def test_a_saved_bfloat16_vit_embeds_in_float32(tmp_path):
    save_vit(tmp_path, ViT(VIT).bfloat16(), PREPROCESS)
    assert load_vit(tmp_path)[0].cls_token.dtype == torch.bfloat16
    want = ViT(VIT).bfloat16().float().eval()(prepared(pictures())).cls.detach().numpy()
    np.testing.assert_array_equal(load_backbone(str(tmp_path)).embed(pictures()), want)


def test_identity_says_what_made_the_vectors_and_not_where(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_vit(tmp_path / name, ViT(VIT, seed=seed), PREPROCESS)
    save_vit(tmp_path / "d", ViT(VIT), Preprocess(size=40, crop=24))
    a, b, c, d = (load_backbone(str(tmp_path / name)).identity for name in "abcd")
    assert a == b
    assert a["weights"] == hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()
    assert a != c
    assert a != d
    assert a != load_backbone(str(tmp_path / "a"), pooling="mean").identity
    assert a == json.loads(json.dumps(a))
    assert str(tmp_path) not in json.dumps(a)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "a backbone folder must hold config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "must hold the weights of its config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "must hold the weights of its config.json"),
        (lambda f: edit(f, vit={"width": 32, "hight": 3}), r"vit must be an object.*got \['hight'\]"),
        (lambda f: edit(f, vit=None), "vit must be an object"),
        (lambda f: edit(f, vit={"width": 64, "heads": 2}), "must hold the weights of its config.json"),
        (lambda f: edit(f, preprocess={"size": 40, "crop": 30}), "multiple of the patch size 8: got 30"),
    ],
)
def test_damaged_folders_are_named(tmp_path, damage, message):
    save_vit(tmp_path, ViT(VIT), PREPROCESS)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.bias"), "1 are missing, first norm.bias"),
        (lambda t: t.update({"head.bias": torch.ones(1), "a": torch.ones(1)}), "2 too many, first a"),
        (lambda t: t.update({"norm.bias": torch.ones(3)}), r"norm.bias must be \(32,\): got \(3,\)"),
    ],
)
def test_weights_that_do_not_match_the_config_are_named(tmp_path, change, message):
    save_vit(tmp_path, ViT(VIT), PREPROCESS)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors must hold the weights of its config.json: {message}\Z"):
        load_backbone(str(tmp_path))


def test_patches_are_the_tokens_of_the_picture_in_its_order(tmp_path):
    """Row by row, without CLS and registers, whatever the vectors are pooled from."""
    vit = ViT(VIT, seed=3).eval()
    save_vit(tmp_path, vit, PREPROCESS)
    with torch.no_grad():
        want = vit(prepared(pictures())).patches
    for pooling in ("cls", "mean"):
        backbone = load_backbone(str(tmp_path), pooling=pooling)
        assert backbone.patches is not None
        out = backbone.patches(np.stack([backbone.prepare(image) for image in pictures()]))
        assert (out.shape, out.dtype) == ((3, 4, 4, 32), np.float32)
        for y, x in np.ndindex(4, 4):
            np.testing.assert_array_equal(out[:, y, x], want[:, 4 * y + x])


def test_a_patch_stands_where_its_pixels_are(tmp_path):
    """When blocks add nothing a token depends on the pixels of its own patch alone."""
    vit = ViT(VIT, seed=3)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.mul_(not name.endswith((".ls1", ".ls2")))
    save_vit(tmp_path, vit, Preprocess(size=32, crop=32))
    backbone = load_backbone(str(tmp_path))
    assert backbone.patches is not None
    before = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype("u1")
    after = before.copy()
    after[8:16, 24:] ^= 255  # second row, last column
    tokens = backbone.patches(np.stack([backbone.prepare(image) for image in (before, after)]))
    assert np.argwhere((tokens[0] != tokens[1]).any(-1)).tolist() == [[1, 3]]


def test_load_vit_wants_its_own_format(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="must have format 'openlvd-vit': got None"):
        load_vit(tmp_path)


def test_preprocessing_that_does_not_fit_is_refused_on_saving(tmp_path):
    with pytest.raises(ValueError, match="multiple of the patch size 8: got 20"):
        save_vit(tmp_path, ViT(VIT), Preprocess(size=20, crop=20))


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(spec):
    with pytest.raises(ValueError, match=f"no folder '{spec}'"):
        load_backbone(spec)


def test_a_wrong_pooling_is_named():
    with pytest.raises(ValueError, match="got 'max'"):
        load_backbone("pixels", pooling="max")


def hf_model(kind):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    torch.manual_seed(0)
    if kind == "dinov3":
        return transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**shape, intermediate_size=64, num_register_tokens=3, layerscale_value=0.5)
        )
    if kind == "dinov2 registers":
        config = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=2)
        return transformers.Dinov2WithRegistersModel(config)
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**shape, intermediate_size=64), add_pooling_layer=False)
    return transformers.Dinov2Model(transformers.Dinov2Config(**shape))


N_PREFIX = {"dinov2": 1, "dinov2 registers": 3, "dinov3": 4, "vit": 1}


def hf_folder(folder, kind="dinov2"):
    model = hf_model(kind).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(HF_PREPROCESS))
    return model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", N_PREFIX)
def test_vectors_of_a_hugging_face_folder(tmp_path, kind, pooling):
    model = hf_folder(tmp_path, kind)
    backbone = load_backbone(str(tmp_path), pooling=pooling)
    with torch.no_grad():
        hidden = model(prepared(pictures())).last_hidden_state
    assert hidden.shape[1] == N_PREFIX[kind] + 16
    want = hidden[:, 0] if pooling == "cls" else hidden[:, N_PREFIX[kind] :].mean(1)
    np.testing.assert_allclose(backbone.embed(pictures()), want.numpy(), atol=1e-6)
    assert backbone.width == 32
    assert backbone.identity["name"] == kind.split()[0].replace("dinov3", "dinov3_vit") + (
        "_with_registers" if "registers" in kind else ""
    )
    assert backbone.identity == load_backbone(str(tmp_path), pooling=pooling).identity
    assert str(tmp_path) not in json.dumps(backbone.identity)


def test_weights_in_several_files_have_one_digest(tmp_path):
    model = hf_model("dinov2")
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF_PREPROCESS))
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(tmp_path.glob("*.safetensors"))]
    assert len(digests) > 1
    backbone = load_backbone(str(tmp_path))
    assert backbone.identity["weights"] == hashlib.sha256("\n".join(digests).encode()).hexdigest()


def test_missing_weights_are_not_filled_with_random_ones(tmp_path):
    hf_folder(tmp_path)
    edit(tmp_path, num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"must hold every weight of the model: .* are missing, first encoder\.layer\.2"
    ):
        load_backbone(str(tmp_path))


def test_damaged_hugging_face_weights_are_named(tmp_path):
    hf_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_backbone(str(tmp_path))


def test_a_folder_without_preprocessing_is_refused(tmp_path):
    hf_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="must come with its preprocessing"):
        load_backbone(str(tmp_path))


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def test_pickled_weights_are_never_read(tmp_path):
    hf_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"as \*\.safetensors \(pickle is not read\)"):
        load_backbone(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    hf_folder(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    with pytest.raises(ValueError, match="must hold a model that transformers knows, whole and without code"):
        load_backbone(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_without_transformers_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    hf_folder(tmp_path, "vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs the package transformers: pip install 'openlvd\[hf\]'"):
        load_backbone(str(tmp_path))


def test_a_name_that_the_hub_does_not_give_is_named(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def offline(name, allow_patterns):
        asked[name] = allow_patterns
        raise OSError("no network\n\nPass a token, or local_files_only=True.")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"got 'org/model': no network\Z"):
        load_backbone("org/model")
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["org/model"])


def test_a_name_on_the_hub_is_its_local_copy(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    hf_folder(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert find_folder("org/model") == find_folder(str(tmp_path)) == tmp_path
    assert load_backbone("org/model").identity == load_backbone(str(tmp_path)).identity


def test_importing_changes_no_thread_and_brings_no_transformers():
    code = """
import sys, torch
before = torch.get_num_threads()
import embedding.vit
assert not {"PIL", "safetensors", "transformers"} & set(sys.modules)
import embedding.backbone, embedding.embed
assert torch.get_num_threads() == before
assert "transformers" not in sys.modules and "training" not in sys.modules and "pipelines" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


class Descriptor(torch.nn.Module):
    """Averages of the image's channels, by rows of a matrix: a copy detector's form."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.arange(15.0).reshape(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) @ self.matrix.T


def scripted(path, module=None):
    torch.jit.script(module or Descriptor()).save(path)
    return str(path)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_file(tmp_path):
    """As the files of SSCD are: vectors out, no folder, no config."""
    backbone = load_backbone(scripted(tmp_path / "sscd_disc_mixup.torchscript.pt"))
    images = pictures()
    preprocess = Preprocess(size=320, keep_aspect=False, crop=None, resample="bilinear")
    x = np.stack([preprocess(image) for image in images])
    np.testing.assert_allclose(backbone.embed(images), x.mean((2, 3)) @ np.arange(15.0).reshape(5, 3).T, rtol=1e-4)
    assert (backbone.width, backbone.identity["name"], backbone.patches) == (5, "sscd_disc_mixup", None)
    sha = hashlib.sha256((tmp_path / "sscd_disc_mixup.torchscript.pt").read_bytes()).hexdigest()
    assert backbone.identity["weights"] == sha


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_another_torchscript_file_comes_with_its_preprocessing(tmp_path):
    spec = scripted(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"must come with its preprocessing: no preprocessor_config.json"):
        load_backbone(spec)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF_PREPROCESS))
    assert load_backbone(spec).identity["preprocess"]["crop"] == 32
    assert [path.name for path in weight_files(spec)] == ["other.pt", "preprocessor_config.json"]


class Tokens3(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_is_no_descriptor_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must give vectors \(n, width\): got \(1, 3, 102400\)"):
        load_backbone(scripted(tmp_path / "sscd_tokens.pt", Tokens3()))
    (tmp_path / "sscd_text.pt").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"sscd_text.pt must be a TorchScript file"):
        load_backbone(str(tmp_path / "sscd_text.pt"))
    torch.save({"a": torch.ones(1)}, tmp_path / "sscd_pickle.pt")  # a checkpoint, not a program: never unpickled
    with pytest.raises(ValueError, match=r"sscd_pickle.pt must be a TorchScript file"):
        load_backbone(str(tmp_path / "sscd_pickle.pt"))
    with pytest.raises(ValueError, match="no file"):
        load_backbone(str(tmp_path / "absent.pt"))


def test_clip_gives_its_projected_image_embedding(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 50}  # fmt: skip
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF_PREPROCESS))
    backbone = load_backbone(str(tmp_path))
    images = pictures()
    with torch.inference_mode():
        theirs = model.visual_projection(model.vision_model(pixel_values=prepared(images)).pooler_output)
    np.testing.assert_allclose(backbone.embed(images), theirs.numpy(), atol=1e-6)
    assert (backbone.width, backbone.identity["name"]) == (24, "clip")


def test_the_encoder_that_comes_with_the_package():
    backbone = load_backbone("openlvd-tiny")
    assert backbone.width == 128 and backbone.identity["preprocess"]["size"] == 32
    folder = find_folder("openlvd-tiny")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6
    assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {"torch.float16"}
    rng = np.random.default_rng(0)
    dark, light = ([rng.integers(low, low + 60, (40, 50, 3), dtype=np.uint8) for _ in range(4)] for low in (0, 190))
    x = backbone.embed([*dark, *light])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T
    assert similarity[:4, :4].mean() > similarity[:4, 4:].mean() + 0.1
