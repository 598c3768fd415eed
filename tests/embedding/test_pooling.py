import numpy as np
import pytest
import torch

from embedding.config import POOLINGS
from embedding.pooling import GEM_MIN, POOLERS, Features

CLS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
PATCHES = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))


def test_every_pooling_of_the_config_has_a_function():
    assert tuple(POOLERS) == POOLINGS


def test_poolings_by_hand():
    features = Features(CLS, PATCHES)
    patches = PATCHES.double().numpy()
    want = {"cls": CLS.numpy(), "mean": patches.mean(1)}
    want["cls+mean"] = np.concatenate([want["cls"], want["mean"]], axis=1)
    want["gem"] = np.cbrt((np.maximum(patches, GEM_MIN) ** 3).mean(1))
    for pooling, values in want.items():
        np.testing.assert_allclose(POOLERS[pooling](features).numpy(), values, rtol=1e-5, atol=1e-6)


def test_gem_lies_between_the_mean_and_the_maximum():
    x = PATCHES.abs()
    out = POOLERS["gem"](Features(None, x))
    assert (out > x.mean(1)).all()
    assert (out < x.amax(1)).all()
    negative = POOLERS["gem"](Features(None, -x))
    torch.testing.assert_close(negative, torch.full_like(negative, GEM_MIN))


@pytest.mark.parametrize(
    ("pooling", "features", "message"),
    [
        ("cls", Features(None, PATCHES), "pooling must be 'mean' or 'gem' with a model without a CLS token"),
        ("cls+mean", Features(None, PATCHES), "pooling must be 'mean' or 'gem' with a model without a CLS token"),
        ("mean", Features(CLS, None), "pooling must be 'cls' with a model that shows no patch tokens"),
        ("gem", Features(CLS, None), "pooling must be 'cls' with a model that shows no patch tokens"),
    ],
)
def test_what_a_model_does_not_give_is_named(pooling, features, message):
    with pytest.raises(ValueError, match=message):
        POOLERS[pooling](features)
