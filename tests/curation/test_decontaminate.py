import pytest

from curation.decontaminate import DecontaminateConfig


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("nan")])
@pytest.mark.parametrize("field", ["min_similarity", "max_drop_fraction"])
def test_shares_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"decontaminate.{field} must be in \(0, 1\]: got {value}"):
        DecontaminateConfig(**{"min_similarity": 0.45, field: value})


def test_a_threshold_has_no_default():
    with pytest.raises(TypeError, match="min_similarity"):
        DecontaminateConfig()
    assert DecontaminateConfig(min_similarity=1).max_drop_fraction == 0.5
