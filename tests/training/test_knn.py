from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import training.knn as module
from embedding.vit import ViT
from training.knn import LabelledImages

CPU = torch.device("cpu")


class Flat(torch.nn.Module):
    """An encoder whose features are the pixels."""

    def forward(self, images):
        return SimpleNamespace(cls=images.flatten(1))


def by_hand(features, labels, k, temperature=0.07):
    """Every image judged by the others, one after the other, in float64."""
    x = features.astype("f8") / np.linalg.norm(features, axis=1, keepdims=True)
    right = 0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j: -(x[i] @ x[j]))[:k]
        votes = {}
        for j in near:
            votes[labels[j]] = votes.get(labels[j], 0) + np.exp((x[i] @ x[j]) / temperature)
        right += min(sorted(votes), key=lambda name: -votes[name]) == labels[i]
    return right / len(x)


def pixels(images, config):
    mean, std = (np.array(v, "f4") for v in (config.augment.mean, config.augment.std))
    return ((images / 255 - mean) / std).transpose(0, 3, 1, 2).reshape(len(images), -1)


@pytest.mark.parametrize("at_a_time", [7, 64])
def test_each_image_is_judged_by_all_others(labelled_digits, digits, tiny, monkeypatch, at_a_time):
    monkeypatch.setattr(module, "_AT_A_TIME", at_a_time)
    images = LabelledImages(labelled_digits, tiny)
    assert images.images.shape == (119, 32, 32, 3)  # the broken one is left out
    got = images.accuracy(Flat(), CPU)
    expected = by_hand(pixels(digits[0][:119], tiny), digits[1][:119], 20)
    assert got == pytest.approx(expected, abs=1e-9)
    assert 0.5 < got < 1
    monkeypatch.setattr(module, "N_NEIGHBORS", 1)
    assert images.accuracy(Flat(), CPU) == pytest.approx(by_hand(pixels(digits[0][:119], tiny), digits[1][:119], 1))


def test_few_images_vote_all_together(make_shards, digits, png, tiny, tmp_path):
    """Fewer than 20 others: those there are; two against one of each class are right, one alone is wrong."""
    images, labels = {"a": digits[0][0], "b": digits[0][0], "c": digits[0][1]}, {"a": "x", "b": "x", "c": "y"}
    shards = make_shards(tmp_path, [[(key, png(image)) for key, image in images.items()]], labels=labels)
    assert LabelledImages(shards, tiny).accuracy(Flat(), CPU) == pytest.approx(2 / 3)


def test_labels_stay_with_their_images_whatever_is_broken_or_has_none(make_shards, digits, png, tiny, tmp_path):
    samples, labels = [], {}
    for i in range(30):
        samples.append((f"{i:02d}", b"no image" if i % 7 == 3 else png(digits[0][i])))
        if i % 5:
            labels[f"{i:02d}"] = str(digits[1][i])
    images = LabelledImages(make_shards(tmp_path, [samples[:11], samples[11:]], labels=labels), tiny)
    kept = [i for i in range(30) if i % 5 and i % 7 != 3]
    names = sorted({str(digits[1][i]) for i in kept})
    found = {x.tobytes(): names[label] for x, label in zip(images.images.numpy(), images.labels, strict=True)}
    assert found == {digits[0][i].tobytes(): str(digits[1][i]) for i in kept}
    assert len(images.labels) == len(kept)


def test_so_many_are_drawn_by_the_seed(labelled_digits, tiny):
    def drawn(n, seed=0):
        return LabelledImages(labelled_digits, replace(tiny, knn_images=n, seed=seed)).images.numpy()

    assert len(drawn(30)) == 30
    np.testing.assert_array_equal(drawn(30), drawn(30))
    assert not np.array_equal(drawn(30), drawn(30, seed=1))
    assert len(drawn(10_000)) == 119
    one_shard = module._draw(labelled_digits, replace(tiny, knn_images=30))[0]
    assert len({sample.shard for sample in one_shard}) == 1  # no more are read than are needed


def test_the_generator_is_no_other_s(labelled_digits, tiny, monkeypatch):
    """Shards and rows of an epoch are permuted by [seed, epoch] and [seed, epoch, group]."""
    keys, real = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.append(tuple(key)) or real(key))
    module._draw(labelled_digits, tiny)
    (key,) = keys
    assert len(key) == 4 and key[-1] == 8  # numpy takes [s, 8] and [s, 8, 0, 0] for the same
    assert real([5, 8]).random() == real([5, 8, 0, 0]).random() != real([5, 0, 0, 8]).random()


@pytest.mark.parametrize("labels", [{}, {"a": "x"}, {"a": "x", "b": "x"}])
def test_one_class_is_named(make_shards, digits, png, tiny, tmp_path, labels):
    samples = [("a", png(digits[0][0])), ("b", png(digits[0][1])), ("c", b"broken")]
    shards = make_shards(tmp_path, [samples], labels=labels | {"c": "y"})
    with pytest.raises(ValueError, match=rf"two classes in the shard index: got {len(set(labels.values()))} in .*to 0"):
        LabelledImages(shards, tiny)


def test_an_encoder_is_left_as_it_was(labelled_digits, tiny):
    vit = ViT(tiny.vit).eval()
    images = LabelledImages(labelled_digits, tiny)
    assert images.accuracy(vit, CPU) == images.accuracy(vit, CPU)
    assert all(p.grad is None for p in vit.parameters())
