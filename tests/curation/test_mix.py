import json

import numpy as np
import pytest

from curation.artifact import describe, read_table
from curation.mix import (
    MIX_FILE,
    MixConfig,
    MixSpec,
    combine,
    component_facts,
    read_columns,
    read_mix,
    spec_of,
    write_mix,
    write_mixed,
)
from curation.selection import Selected, read_selection
from curation.store import Location

ABC = ("a", "b", "c")


def selected(rows, counts=None):
    rows = np.array(rows, np.int32)
    return Selected(rows, np.ones(len(rows), np.int32) if counts is None else np.array(counts, np.int32))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"components": ()}, "mix.components must name at least one step, each once: got none"),
        ({"components": ("a", "a")}, "mix.components must name at least one step, each once: got 'a' twice"),
        ({"homogeneous": {"d": 1.0}}, r"mix.homogeneous must name components \(a, b, c\): got 'd'"),
        ({"heterogeneous": {"d": 1.0}}, r"mix.heterogeneous must name components \(a, b, c\): got 'd'"),
        ({"heterogeneous": {"a": 0.0}}, "mix.heterogeneous must be above 0 and finite: got 0.0 for a"),
        ({"heterogeneous": dict.fromkeys(ABC, 0.0)}, "mix.heterogeneous must be above 0 and finite: got 0.0 for a"),
        ({"homogeneous": {"b": -0.1}}, "mix.homogeneous must be above 0 and finite: got -0.1 for b"),
        ({"homogeneous": {"b": float("nan")}}, "mix.homogeneous must be above 0 and finite: got nan for b"),
        ({"homogeneous": {"b": float("inf")}}, "mix.homogeneous must be above 0 and finite: got inf for b"),
        ({"heterogeneous": {"a": 0.5, "b": 0.5}}, "must name every component: got none for c"),
        ({"heterogeneous": {"a": 0.5, "b": 0.4, "c": 0.2}}, "mix.heterogeneous must sum to 1: got 1.1"),
        ({"heterogeneous": {"a": 0.5, "b": 0.4, "c": 0.099}}, "mix.heterogeneous must sum to 1: got 0.999"),
        ({"homogeneous": {"a": 0.5, "b": 0.4, "c": 0.2}}, "mix.homogeneous must sum to at most 1: got 1.1"),
        ({"homogeneous": {"a": 0.5, "b": 0.1, "c": 0.2}}, "must sum to 1 without mix.heterogeneous: got 0.8"),
        (
            {"homogeneous": {"a": 1.0}, "heterogeneous": {"b": 0.5, "c": 0.5}},
            "mix.homogeneous must sum to less than 1 beside mix.heterogeneous: got 1",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        MixConfig(**{"components": ABC, **fields})


def test_shares_that_sum_to_one_but_for_rounding_are_fine():
    tenths = tuple(f"c{i}" for i in range(10))
    MixConfig(components=tenths, heterogeneous=dict.fromkeys(tenths, 0.1))
    MixConfig(components=tenths, homogeneous=dict.fromkeys(tenths, 0.1))
    MixConfig(components=ABC, heterogeneous=dict.fromkeys(ABC, 0.3333333))
    MixConfig(components=ABC)


def test_a_component_may_come_alone_and_with_others():
    spec = spec_of(ABC, {"c": 0.1, "a": 0.2}, {"b": 0.7, "a": 0.3})
    assert spec == MixSpec(ABC, (0.2, 0.0, 0.1), (0.3, 0.7, 0.0))
    assert spec.columns == ["count:a", "count:b", "count:c"]
    assert spec_of(ABC, {}, {}) is None


def test_a_spec_comes_back_and_equal_ones_are_equal_bytes(tmp_path):
    here, there = Location(str(tmp_path / "a")), Location(str(tmp_path / "b"))
    assert read_mix(here) is None
    spec = spec_of(ABC, {"c": 0.1}, {"b": 0.7, "a": 0.3})
    info = write_mix(MIX_FILE, spec, here)
    assert read_mix(here) == spec and info == describe(here / MIX_FILE)
    write_mix(MIX_FILE, spec_of(ABC, {"c": 0.1}, {"a": 0.3, "b": 0.7}), there)  # in another order
    assert (there / MIX_FILE).read() == (here / MIX_FILE).read()
    write_mix(MIX_FILE, spec_of(ABC, {"c": 0.1}, {"a": 0.4, "b": 0.6}), there)
    assert (there / MIX_FILE).read() != (here / MIX_FILE).read()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must have a list components and mappings"),
        ('{"components": ["a"], "homogeneous": {}}', "must have a list components and mappings.* 'heterogeneous'"),
        ('{"components": ["a"], "homogeneous": {"a": "1"}, "heterogeneous": {}}', "must have a list components"),
        ('{"components": "a", "homogeneous": {"a": 1}, "heterogeneous": {}}', "must have a list components"),
        ('{"components": ["a"], "homogeneous": {"a": 2}, "heterogeneous": {}}', "must be a mix: .* at most 1: got 2"),
        ("{", "must be a mix: Expecting"),
    ],
)
def test_a_file_that_is_no_mix_is_one_sentence(tmp_path, text, words):
    (tmp_path / MIX_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"mix\.json {words}"):
        read_mix(Location(str(tmp_path)))


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_combined_as_a_dictionary_would(seed):
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(int(rng.integers(1, 5))):
        rows = np.flatnonzero(rng.random(30) < rng.random())
        parts.append(None if rng.random() < 0.2 else selected(rows, rng.integers(1, 6, len(rows))))
    expected = {}
    for column, some in enumerate(parts):
        for row, count in zip(*some, strict=True) if some else ():
            expected.setdefault(int(row), [0] * len(parts))[column] = int(count)
    mixed = combine(parts)
    assert mixed.rows.dtype == mixed.counts.dtype == np.int32
    assert dict(zip(mixed.rows.tolist(), mixed.counts.tolist(), strict=True)) == expected
    assert mixed.rows.tolist() == sorted(expected)


@pytest.mark.parametrize("by_component", [True, False])
def test_a_part_is_a_selection_with_the_largest_counts(tmp_path, by_component):
    mixed = combine([selected([1, 4], [2, 1]), None, selected([0, 4, 7], [1, 5, 1])])
    at = Location(str(tmp_path / "part-0000000.parquet"))
    info = write_mixed(at, mixed, ABC, by_component)
    rows, counts = read_selection(at)
    assert (rows.tolist(), counts.tolist()) == ([0, 1, 4, 7], [1, 2, 5, 1])
    assert read_table(at).column_names == ["row", "kept", "count", *(MixSpec(ABC, (), ()).columns * by_component)]
    if by_component:
        columns = read_columns(at, ["count:a", "count:b", "count:c"])
        assert columns.dtype == np.int32
        assert columns.T.tolist() == [[0, 2, 1, 0], [0, 0, 0, 0], [1, 0, 5, 1]]
    facts, counts = component_facts(ABC, info.counts)
    assert facts == {"a": {"rows": 2, "samples": 3}, "b": {"rows": 0, "samples": 0}, "c": {"rows": 3, "samples": 7}}
    assert counts == {"rows": 4, "kept": 4, "dropped": 0}
    json.dumps(facts)


def test_a_part_without_rows_is_a_selection_too(tmp_path):
    at = Location(str(tmp_path / "part-0000000.parquet"))
    info = write_mixed(at, combine([None, selected([])]), ("a", "b"), True)
    assert info.rows == 0 and len(read_selection(at).rows) == 0
    assert read_columns(at, ["count:a"]).shape == (0, 1)
