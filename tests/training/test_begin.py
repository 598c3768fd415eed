from dataclasses import replace

import pytest
import torch

from curation.store import Location
from embedding.backbone import save_vit
from embedding.hf_weights import save_hf
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from training.begin import begin_with, differences, shape_of
from training.trainer import TrainResources, schedule, train

PREPROCESS = Preprocess(size=32, crop=32)
SHAPE = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "layer_scale": 0.5}
LEARNED = {"position": "learned", "image_size": 32, "key_bias": True, "norm_eps": 1e-6}
SOURCES = {
    "own": (save_vit, {"n_registers": 1}),
    "DINOv2": (save_hf, LEARNED | {"n_registers": 0}),
    "DINOv2 with registers": (save_hf, LEARNED | {"n_registers": 4}),
    "DINOv3": (save_hf, {"n_registers": 4}),
    "DINOv3 swiglu": (save_hf, {"n_registers": 4, "ffn": "swiglu", "mlp_ratio": 6.0}),
}


def random_vit(config, seed=1):
    vit, generator = ViT(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return vit


@pytest.fixture
def saved(tmp_path):
    """A folder of random weights of a source, and the model in it."""

    def make(name, **options):
        save, fields = SOURCES[name]
        vit = random_vit(ViTConfig(**SHAPE | fields | options))
        save(tmp_path / name, vit, PREPROCESS)
        return str(tmp_path / name), vit

    return make


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_begins_with_the_weights_of_a_folder(saved, name):
    folder, vit = saved(name)
    # what is drawn in training is no matter of shape
    ours = ViT(replace(vit.config, drop_path=0.3, layer_scale=1e-5), seed=3)
    begin_with(ours, folder, 32)
    for key, value in vit.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images).patches, vit(images).patches, atol=1e-5, rtol=1e-5)


def test_learned_positions_come_to_the_grid_of_the_crops(saved):
    folder, vit = saved("DINOv2 with registers")
    ours = ViT(replace(vit.config, image_size=48))
    begin_with(ours, folder, 48)
    assert ours.pos_embed.shape == (1, 37, 32)
    torch.testing.assert_close(ours.pos_embed[:, 0], vit.pos_embed[:, 0])
    with pytest.raises(ValueError, match=r"has image_size 48 \(32 here\)$"):
        begin_with(ViT(vit.config), folder, 48)


OTHERS = {
    "width": ("own", {"width": 48}, r"has width 32 \(48 here\)$"),
    "depth": ("own", {"depth": 3}, r"has depth 2 \(3 here\)$"),
    "heads": ("own", {"heads": 4}, r"has heads 2 \(4 here\)$"),
    "patch_size": ("own", {"patch_size": 16}, r"has patch_size 8 \(16 here\)$"),
    "registers": ("DINOv3", {"n_registers": 1}, r"has n_registers 4 \(1 here\)$"),
    "ffn": ("DINOv3", {"ffn": "swiglu", "mlp_ratio": 3.0}, r"has mlp_ratio 4.0 \(3.0 here\), ffn mlp \(swiglu here\)$"),
    "position": (
        "DINOv2",
        {"position": "rope", "image_size": None},
        r"position learned \(rope here\), image_size 32 \(null here\)$",
    ),
    "eps": ("DINOv2", {"norm_eps": 1e-5}, r"norm_eps 1e-06 \(1e-05 here\)$"),
    "ratio": ("DINOv3 swiglu", {"mlp_ratio": 4.0}, r"has mlp_ratio 6.0 \(4.0 here\)$"),
    "layer scale": ("own", {"layer_scale": None}, r"has layer_scale 0.5 \(null here\)$"),
    "layer scale, HF": ("DINOv3", {"layer_scale": None}, r"has layer_scale 0.5 \(null here\)$"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_shape_is_named_and_changes_nothing(saved, name):
    source, fields, words = OTHERS[name]
    folder, vit = saved(source)
    ours = ViT(replace(vit.config, **fields))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=words) as e:
        begin_with(ours, folder, 32)
    assert str(e.value).startswith("train.init must be a backbone of the shape of train.vit")
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_a_layer_scale_that_is_not_there_is_named(saved):
    folder, vit = saved("own", layer_scale=None)
    with pytest.raises(ValueError, match=r"has layer_scale null \(1e-05 here\)$"):
        begin_with(ViT(replace(vit.config, layer_scale=1e-5)), folder, 32)


@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 with registers", "DINOv3", "DINOv3 swiglu"])
def test_scales_of_one_are_no_matter_of_shape(saved, name):
    """An exported ViT without LayerScale has scales of 1: it begins a ViT without, and one with."""
    folder, vit = saved(name, layer_scale=None)
    assert shape_of(folder).plain_scales and shape_of(folder).fields()["layer_scale"] is None
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for layer_scale in (None, 1e-5):
        ours = ViT(replace(vit.config, layer_scale=layer_scale), seed=3)
        begin_with(ours, folder, 32)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(images).cls, vit(images).cls, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_a_shape_is_known_before_its_weights_are_read(saved, name):
    """A ViT of the fields that are told is one that the weights fit."""
    folder, vit = saved(name)
    shape = shape_of(folder)
    assert shape.plain_scales is False and shape.config.mlp_ratio == vit.config.mlp_ratio
    assert differences(shape, vit.config) == {}
    assert shape.resized == name.startswith("DINOv2")
    fields = shape.fields()
    if shape.resized:
        assert fields["image_size"] is None
        fields["image_size"] = 48
    begin_with(ViT(ViTConfig(**fields)), folder, 48)
    assert differences(shape_of(folder, 48), ViTConfig(**fields)) == {}


def test_what_is_no_vit_of_ours_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        ValueError, match=r"must be a DINOv2 or DINOv3 ViT to begin a training with: got model_type 'bert'"
    ):
        shape_of(str(tmp_path))


def test_no_folder_is_named(tmp_path, tiny):
    with pytest.raises(ValueError, match="nowhere"):
        begin_with(ViT(tiny.vit), str(tmp_path / "nowhere" / "at" / "all"), 32)


def test_a_run_holds_the_backbone_still_for_some_steps(saved, digit_shards, tiny, tmp_path):
    folder, vit = saved("own")
    config = replace(tiny, vit=vit.config, init=folder, init_frozen_steps=3, n_steps=4, warmup_steps=0)
    assert [s.backbone_frozen for s in schedule(config)] == [True] * 3 + [False]
    assert not any(s.backbone_frozen for s in schedule(replace(config, init=None, init_frozen_steps=0)))

    def after(n, **fields):
        out = Location(str(tmp_path / f"{n}{sorted(fields)}"))
        return train(replace(config, n_steps=n, **fields), digit_shards, out).backbone.state_dict()

    def is_there(state):
        return [torch.equal(value, state[key]) for key, value in vit.state_dict().items()]

    assert all(is_there(after(0)))
    assert all(is_there(after(3)))  # teacher and student began there, and none moved
    assert not any(torch.equal(value, after(4)[key]) for key, value in vit.state_dict().items())
    assert not all(is_there(after(3, init_frozen_steps=0)))


def test_a_run_that_goes_on_does_not_begin_again(saved, digit_shards, tiny, tmp_path):
    folder, vit = saved("own")
    config, resources = replace(tiny, vit=vit.config, init=folder, n_steps=6), TrainResources(checkpoint_every=4)
    whole = train(config, digit_shards, Location(str(tmp_path / "out")), resources)
    again = train(config, digit_shards, Location(str(tmp_path / "out")), resources)
    assert again.timing.resumed_at == 4
    ours, theirs = again.backbone.state_dict(), whole.backbone.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
