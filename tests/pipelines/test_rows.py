from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.rows import by_part, place_in_parts


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_found_where_a_list_of_all_rows_has_them(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 4, 9)  # some parts are empty
    pool = SimpleNamespace(starts=np.cumsum([0, *sizes]))
    places = [(part, row) for part, size in enumerate(sizes.tolist()) for row in range(size)]
    assert [place_in_parts(position, pool) for position in range(len(places))] == places
    wanted = np.flatnonzero(rng.random(len(places)) < 0.5)
    found = [(part, row) for part, rows in by_part(wanted, pool) for row in rows.tolist()]
    assert found == [places[row_id] for row_id in wanted.tolist()]
