"""Mixing: several selections as one, and the shares in which a trainer draws its batches from them.

A step's batch is either homogeneous, of one component alone, or heterogeneous, of several in fixed ratios. The shares
and ratios stand in ``mix.json``, beside the selection and later beside the shards made from it. Without that file
there is one component: every image as often as its count says.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Counts, FileInfo, describe, read_table
from curation.selection import Selected, write_selection
from curation.store import Location

MIX_FILE = "mix.json"
SUM_TOLERANCE = 1e-6  # of shares and ratios that must sum to 1


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Which selections are mixed, and how a trainer draws its batches from them.

    Without shares and ratios the mix is the union of the selections: each image with the largest of its counts.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    components: tuple[str, ...]  # steps: selections of the pool or of a member of it, or such pools with all their rows
    homogeneous: Mapping[str, float] = field(default_factory=dict)  # share of the steps with a batch of this one alone
    heterogeneous: Mapping[str, float] = field(default_factory=dict)  # ratios in every other batch; they sum to 1

    def __post_init__(self) -> None:
        check_mix(self.components, self.homogeneous, self.heterogeneous)


@dataclass(frozen=True)
class MixSpec:
    """What a trainer needs to know of a mix; one value for each component, 0 where it is not drawn in that way."""

    components: tuple[str, ...]
    homogeneous: tuple[float, ...]  # shares of the steps
    heterogeneous: tuple[float, ...]  # ratios within the batch of every other step

    @property
    def columns(self) -> list[str]:
        """Of each component, the column that says how often an image is seen in one of its epochs (0: never)."""
        return [count_column(name) for name in self.components]


class Mixed(NamedTuple):
    """The rows of one part that are in a component."""

    rows: np.ndarray  # int32 (n,), ascending, within the part
    counts: np.ndarray  # int32 (n, n_components): how often an image is seen in an epoch of each; 0: not in it


def count_column(name: str) -> str:
    """``count:balanced`` for balanced."""
    return f"count:{name}"


def check_mix(components: Sequence[str], homogeneous: Mapping[str, float], heterogeneous: Mapping[str, float]) -> None:
    """Raise ValueError unless every step's batch has components to come from, and every component is drawn."""
    doubles = [name for i, name in enumerate(components) if name in components[:i]]
    if not components or doubles:
        got = f"{doubles[0]!r} twice" if doubles else "none"
        raise ValueError(f"mix.components must name at least one step, each once: got {got}")
    for key, shares in (("homogeneous", homogeneous), ("heterogeneous", heterogeneous)):
        for name, share in shares.items():
            if name not in components:
                raise ValueError(f"mix.{key} must name components ({', '.join(components)}): got {name!r}")
            if not 0 < share < math.inf:
                raise ValueError(f"mix.{key} must be above 0 and finite: got {share} for {name}")
    unused = [name for name in components if name not in homogeneous and name not in heterogeneous]
    if unused and (homogeneous or heterogeneous):
        raise ValueError(f"mix.homogeneous or mix.heterogeneous must name every component: got none for {unused[0]}")
    _check_sums(math.fsum(homogeneous.values()), math.fsum(heterogeneous.values()), bool(homogeneous))


def _check_sums(alone: float, together: float, any_alone: bool) -> None:
    """``alone`` and ``together``: sums of the homogeneous shares and of the heterogeneous ratios, 0 without any."""
    if alone > 1 + SUM_TOLERANCE:
        raise ValueError(f"mix.homogeneous must sum to at most 1: got {alone:.9g}")
    all_alone = abs(alone - 1) <= SUM_TOLERANCE
    if together and abs(together - 1) > SUM_TOLERANCE:
        raise ValueError(f"mix.heterogeneous must sum to 1: got {together:.9g}")
    if together and all_alone:
        raise ValueError(f"mix.homogeneous must sum to less than 1 beside mix.heterogeneous: got {alone:.9g}")
    if any_alone and not together and not all_alone:
        raise ValueError(f"mix.homogeneous must sum to 1 without mix.heterogeneous: got {alone:.9g}")


def spec_of(
    components: Sequence[str], homogeneous: Mapping[str, float], heterogeneous: Mapping[str, float]
) -> MixSpec | None:
    """The spec of a mix, None for one without shares and ratios. Raises ValueError as ``check_mix``."""
    check_mix(components, homogeneous, heterogeneous)
    if not homogeneous and not heterogeneous:
        return None
    alone, together = ([float(shares.get(name, 0)) for name in components] for shares in (homogeneous, heterogeneous))
    return MixSpec(tuple(components), tuple(alone), tuple(together))


def write_mix(name: str, spec: MixSpec, out: Location) -> FileInfo:
    """Write ``mix.json``. It is part of the content: other shares are another mix, equal specs give equal bytes."""
    shares = {
        key: {name: share for name, share in zip(spec.components, getattr(spec, key), strict=True) if share}
        for key in ("homogeneous", "heterogeneous")
    }
    (out / name).write((json.dumps({"components": list(spec.components), **shares}, indent=1) + "\n").encode())
    return describe(out / name)


def read_mix(folder: Location) -> MixSpec | None:
    """The spec beside a selection or shards, None when there is none. Raises ValueError for one that is no mix."""
    try:
        data = (folder / MIX_FILE).read()
    except FileNotFoundError:
        return None
    try:
        values = json.loads(data)
        if not isinstance(values["components"], list):
            raise TypeError(f"got {values['components']!r}")
        return spec_of(values["components"], values["homogeneous"], values["heterogeneous"])
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{folder / MIX_FILE} must have a list components and mappings homogeneous and heterogeneous of numbers: "
            f"{type(e).__name__} {e}"
        ) from e
    except ValueError as e:
        raise ValueError(f"{folder / MIX_FILE} must be a mix: {e}") from e


def combine(selected: Sequence[Selected | None]) -> Mixed:
    """The rows of one part that are in any component, with their counts in each. None: nothing of this part is.

    Memory: 8 bytes a row and component.
    """
    rows = [np.empty(0, np.int32), *(some.rows for some in selected if some is not None)]
    listed = np.unique(np.concatenate(rows)).astype(np.int32)
    counts = np.zeros((len(listed), len(selected)), np.int32)
    for column, some in enumerate(selected):
        if some is not None:
            counts[np.searchsorted(listed, some.rows), column] = some.counts
    return Mixed(listed, counts)


def write_mixed(location: Location, mixed: Mixed, names: Sequence[str], by_component: bool) -> FileInfo:
    """Write one part as a selection: each row with the largest of its counts, and ``by_component`` also with each.

    Counted are also ``rows:<name>`` and ``samples:<name>`` of every component.
    """
    also: Counts = {}
    for name, column in zip(names, mixed.counts.T, strict=True):
        also |= {f"rows:{name}": int((column > 0).sum()), f"samples:{name}": int(column.sum(dtype=np.int64))}
    each = zip(names, mixed.counts.T, strict=True) if by_component else ()
    columns = {count_column(name): pa.array(np.ascontiguousarray(column)) for name, column in each}
    kept = np.ones(len(mixed.rows), bool)
    return write_selection(
        location, mixed.rows, kept, also, count=pa.array(mixed.counts.max(axis=1, initial=0)), **columns
    )


def read_columns(location: Location, columns: Sequence[str]) -> np.ndarray:
    """int32 (n, n_columns): columns of the kept rows of one part of a selection."""
    table = read_table(location, ["kept", *columns])
    kept = table["kept"].to_numpy()
    counts = np.zeros((int(kept.sum()), len(columns)), np.int32)
    for i, name in enumerate(columns):
        counts[:, i] = table[name].to_numpy()[kept]
    return counts


def component_facts(names: Sequence[str], counts: Counts) -> tuple[dict[str, Counts], Counts]:
    """Rows and samples an epoch of each component, taken out of ``counts``; and the other counts."""
    facts = {name: {key: counts[f"{key}:{name}"] for key in ("rows", "samples")} for name in names}
    return facts, {key: value for key, value in counts.items() if ":" not in key}
