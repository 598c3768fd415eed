import math

import numpy as np
import pytest
import torch

from embedding.backbone import load_backbone, save_vit
from embedding.maps import cls_attention, heat_rgb, patch_maps, pca_rgb
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

SHAPES = {
    "rope": ViTConfig(width=24, depth=2, heads=3, patch_size=4, n_registers=2),
    "rope, no registers": ViTConfig(width=16, depth=1, heads=2, patch_size=4, n_registers=0, qkv_bias=False),
    "learned": ViTConfig(width=24, depth=2, heads=3, patch_size=4, n_registers=2, position="learned", image_size=8,
                         key_bias=True),
}  # fmt: skip


def strong_vit(config):
    """A ViT whose attention is far from even."""
    vit = ViT(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vit.named_parameters():
        parameter.normal_(1.0 if "norm" in name or "ls" in name else 0.0, 0.4, generator=generator)
    return vit


def last_input(vit, images):
    """The tokens that go into the first norm of the last block, (B, N, D)."""
    seen = []
    hook = vit.blocks[-1].norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vit(images)
    hook.remove()
    return seen[0].reshape(len(images), -1, vit.config.width)


def turned(vector, y, x, config):
    """A key as the rotary position of a patch with its centre at (y, x) turns it, by the formula."""
    e = len(vector)
    out = vector.copy()
    for i in range(e // 2):
        at, quarter = (y, i) if i < e // 4 else (x, i - e // 4)
        angle = 2 * math.pi * at / config.rope_base ** (4 * quarter / e)
        a, b = vector[i], vector[i + e // 2]
        out[i], out[i + e // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def explicit_attention(vit, images):
    """softmax(q k / sqrt E) of CLS, float64: one product at a time. Returns (B, heads, N) over all tokens."""
    config, block = vit.config, vit.blocks[-1]
    d, e = config.width, config.width // config.heads
    h, w = images.shape[2] // config.patch_size, images.shape[3] // config.patch_size
    tokens = block.norm1(last_input(vit, images)).double().numpy()
    weight = block.qkv.weight.double().numpy()
    bias = np.zeros(3 * d)
    if block.qkv.bias is not None:
        given = block.qkv.bias.double().numpy()
        bias[:d], bias[2 * d :] = given[:d], given[-d:]
        bias[d : 2 * d] = given[d : 2 * d] if config.key_bias else 0
    out = np.zeros((len(images), config.heads, tokens.shape[1]))
    for b, head in np.ndindex(out.shape[:2]):
        q = (weight[:d] @ tokens[b, 0] + bias[:d])[head * e : (head + 1) * e]
        for n in range(tokens.shape[1]):
            k = (weight[d : 2 * d] @ tokens[b, n] + bias[d : 2 * d])[head * e : (head + 1) * e]
            place = n - 1 - config.n_registers
            if config.position == "rope" and place >= 0:
                row, column = divmod(place, w)
                k = turned(k, 2 * (row + 0.5) / h - 1, 2 * (column + 0.5) / w - 1, config)
            out[b, head, n] = q @ k / math.sqrt(e)
    out = np.exp(out - out.max(-1, keepdims=True))
    return out / out.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_that_of_the_formula(name):
    vit = strong_vit(SHAPES[name])
    images = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    expected = explicit_attention(vit, images)
    n_prefix = 1 + vit.config.n_registers
    found = cls_attention(vit, images)
    assert found.shape == (2, vit.config.heads, 3, 2) and found.dtype == torch.float32
    np.testing.assert_allclose(found.flatten(2), expected[:, :, n_prefix:], rtol=1e-3, atol=1e-5)
    with_the_others = found.flatten(2).sum(-1).numpy() + expected[:, :, :n_prefix].sum(-1)
    np.testing.assert_allclose(with_the_others, 1, atol=1e-5)
    assert expected[:, :, n_prefix:].std() > 0.02, "even attention would show nothing"


def test_attention_is_what_the_block_does():
    """With the values of one patch alone set, the output of attention is its share: the network's own word for it."""
    vit = strong_vit(SHAPES["rope"])
    d, block = vit.config.width, vit.blocks[-1]
    images = torch.randn(1, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    found = cls_attention(vit, images).flatten(2)[0]  # heads, patches
    heads = vit.config.heads
    for patch in range(6):
        seen = []

        def only_one(module, inputs, output, patch=patch):
            out = output.clone().reshape(1, -1, 3, heads, d // heads)
            out[:, :, 2] = 0
            out[:, 3 + patch, 2] = 1
            return out.reshape(output.shape)

        hooks = [
            block.qkv.register_forward_hook(only_one),
            block.proj.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0])),
        ]
        vit(images)
        for hook in hooks:
            hook.remove()
        share = seen[0].reshape(-1, heads, d // heads)[0, :, 0]  # of CLS, the first token
        torch.testing.assert_close(share, found[:, patch], rtol=1e-4, atol=1e-6)


def test_a_look_leaves_no_hook_and_training_is_refused():
    vit = strong_vit(SHAPES["rope"])
    cls_attention(vit, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="multiples of 4"):
        cls_attention(vit, torch.zeros(1, 3, 9, 8))
    assert not vit.blocks[-1].qkv._forward_hooks
    with pytest.raises(ValueError, match="evaluation mode: got one in training"):
        cls_attention(vit.train(), torch.zeros(1, 3, 8, 8))


def test_components_come_from_all_images_together():
    """Each channel is, within rounding, the projection on an axis of the whole set's singular value decomposition."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 5, 6, 7)) * [9, 5, 3, 1, 1, 1, 1] + rng.normal(size=7)).astype("f4")
    flat = x.reshape(-1, 7).astype("f8")
    _, _, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    rgb = pca_rgb(x)
    assert rgb.shape == (4, 5, 6, 3) and rgb.dtype == np.uint8
    for c in range(3):
        axis = axes[c] * np.sign(axes[c][np.abs(axes[c]).argmax()])
        value = (flat - flat.mean(0)) @ axis
        low, high = np.percentile(value, [2, 98])
        np.testing.assert_allclose(rgb.reshape(-1, 3)[:, c], (255 * (value - low) / (high - low)).clip(0, 255), atol=1)
        assert {0, 255} <= set(rgb[..., c].ravel().tolist())


def test_colours_hang_on_nothing_but_what_patches_say():
    x = np.random.default_rng(1).normal(size=(3, 4, 4, 8)).astype("f4") * np.arange(1, 9, dtype="f4")
    np.testing.assert_array_equal(pca_rgb(x), pca_rgb(x.copy()))
    np.testing.assert_array_equal(pca_rgb(x), pca_rgb(4 * x))
    shifted = pca_rgb(x + 2).astype(int) - pca_rgb(x)
    assert np.abs(shifted).max() <= 1
    turned = pca_rgb(x[::-1]).astype(int)  # one colour means one thing in all images, in whatever order
    assert np.abs(turned - pca_rgb(x)[::-1]).max() <= 1


def test_a_patch_far_from_all_others_does_not_darken_them():
    x = np.random.default_rng(2).normal(size=(4, 8, 8, 6)).astype("f4")
    x[0, 0, 0, 2] = 1e4  # which the first component follows
    spread = np.percentile(pca_rgb(x)[..., 0], [10, 90])
    assert spread[1] - spread[0] > 100


@pytest.mark.parametrize(("shape", "n"), [((2, 3, 3, 2), 2), ((1, 2, 2, 1), 1)])
def test_channels_without_a_component_are_0(shape, n):
    rgb = pca_rgb(np.random.default_rng(0).normal(size=shape).astype("f4"))
    assert (rgb[..., n:] == 0).all() and all(rgb[..., c].max() == 255 for c in range(n))
    line = np.outer(np.arange(12.0), [1, 2, 3, 4]).reshape(1, 3, 4, 4).astype("f4")  # of rank 1
    assert (pca_rgb(line)[..., 1:] == 0).all() and len(np.unique(pca_rgb(line)[..., 0])) > 10
    assert (pca_rgb(np.ones((1, 2, 2, 5), "f4")) == 0).all()


def test_patches_that_are_not_finite_are_counted():
    with pytest.raises(ValueError, match="patches must be finite: 2 of 16 values are not"):
        pca_rgb(np.array([np.nan, np.inf, *range(14)], "f4").reshape(1, 2, 2, 4))


def test_heat_is_the_mean_over_heads_and_brightest_where_it_is_most():
    attention = np.zeros((2, 2, 2, 2), "f4")
    attention[0, 0, 0, 1], attention[0, 1, 0, 1], attention[0, 1, 1, 1] = 0.2, 0.4, 0.3
    attention[1] = 0.01
    rgb = heat_rgb(attention)
    assert rgb[0, 0, 1].tolist() == [252, 255, 164] and rgb[0, 0, 0].tolist() == [0, 0, 4]
    assert rgb[0, 1, 1].tolist() == [188, 55, 84]  # half of the most
    assert (rgb[1] == [252, 255, 164]).all()


@pytest.mark.parametrize(("name", "side"), [("rope", 16), ("learned", 8)])
def test_maps_of_a_backbone(tmp_path, name, side):
    """Twice the trained side where positions take any grid; the very patches and attention of the network."""
    vit = strong_vit(SHAPES[name])
    save_vit(tmp_path, vit, Preprocess(size=10, crop=8))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((30, 40), (9, 8), (64, 64))]
    found = patch_maps(load_backbone(str(tmp_path)), images)
    preprocess = Preprocess(size=10 * side // 8, crop=side)
    inputs = torch.from_numpy(np.stack([preprocess(image) for image in images]))
    np.testing.assert_array_equal(found.pixels, np.stack([preprocess.cropped(image) for image in images]))
    grid = side // 4
    patches = vit(inputs).patches.reshape(3, grid, grid, -1)
    np.testing.assert_allclose(found.patches, patches, atol=1e-5)
    np.testing.assert_allclose(found.attention, cls_attention(vit, inputs), atol=1e-6)


def test_maps_of_other_backbones(tmp_path):
    """Without the own ViT: patches as the backbone gives them, or nothing."""
    images = [np.full((9, 9, 3), 7, np.uint8)] * 2
    assert patch_maps(load_backbone("pixels"), images) is None
    model = torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 320, 320))
    model.save(tmp_path / "sscd_x.torchscript.pt")
    assert patch_maps(load_backbone(str(tmp_path / "sscd_x.torchscript.pt")), images) is None


def test_maps_of_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                    image_size=32, patch_size=8)  # fmt: skip
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    from embedding.preprocess import write_hf_preprocess

    write_hf_preprocess(tmp_path, Preprocess(size=32, crop=32))
    backbone = load_backbone(str(tmp_path))
    images = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8) for i in range(2)]
    found = patch_maps(backbone, images)
    assert found.attention is None and found.patches.shape == (2, 4, 4, 16) and found.pixels.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(found.patches, backbone.patches(found.pixels))
