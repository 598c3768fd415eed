import pytest

from embedding.config import EmbedConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": ""}, "embed.backbone must be 'pixels', 'phash', a folder or a Hugging Face name"),
        ({"backbone": "pixels", "pooling": "max"}, r"embed.pooling must be one of .*: got 'max'"),
        ({"backbone": "pixels", "precision": "int8"}, r"embed.precision must be one of .*: got 'int8'"),
        ({"backbone": "pixels", "max_pixels": 0}, "embed.max_pixels must be at least 1: got 0"),
        ({"backbone": "pixels", "max_bad_fraction": 1.5}, r"embed.max_bad_fraction must be in \[0, 1\]: got 1.5"),
        ({"backbone": "pixels", "max_bad_fraction": float("nan")}, r"must be in \[0, 1\]: got nan"),
    ],
)
def test_configs_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EmbedConfig(**options)


def test_the_defaults_are_the_cls_token_and_half_a_gibibyte_of_pixels():
    config = EmbedConfig(backbone="pixels")
    assert (config.pooling, config.max_pixels) == ("cls", 178_956_970)
