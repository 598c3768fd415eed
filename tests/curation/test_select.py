import pytest

from curation.select import SelectConfig


@pytest.mark.parametrize("where", ["", "  \n"])
def test_an_expression_is_needed(where):
    with pytest.raises(ValueError, match=r"select.where must be an expression over columns: got an empty string"):
        SelectConfig(where=where)
    assert SelectConfig(where="width > 3").where == "width > 3"
