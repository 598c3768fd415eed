"""Drawings as inline SVG: the picture of a pipeline, curves and histograms. Colours come from the page's style sheet.

Charts are ``WIDTH`` units wide, so that their letters keep their size on a phone and grow a little on a desk.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 34  # margins of a chart
BOX_WIDTH, BOX_HEIGHT = 138, 54
LANE_WIDTH = 20  # of an arrow that passes a layer
GAP_X, GAP_Y = 16, 34
MAX_ALIKE = 3  # nodes that are used alike and still have a box each
APART_ROW = 5  # boxes without arrows beside one another
N_SWEEPS = 8  # over the layers, to untangle arrows
MAX_POINTS = 240  # of a curve


class Node(NamedTuple):
    """A box of the picture."""

    name: str
    kind: str  # a word for the style sheet
    lines: tuple[str, str]  # below the name


class Curve(NamedTuple):
    """A line of a chart."""

    label: str
    y: np.ndarray  # float (n,), against 0..n-1 or against what a chart is given
    css: str


def pipeline_picture(nodes: Sequence[Node], inputs: Mapping[str, Sequence[str]], apart: Sequence[Node] = ()) -> Markup:
    """Boxes in layers from the top down, an arrow from every input. ``inputs`` names earlier nodes of each node;
    the nodes ``apart`` have no arrows and stand below all others."""
    layers, arrows = layered([node.name for node in nodes], inputs)
    x = place(layers, arrows)
    for i, node in enumerate(apart):
        if i % APART_ROW == 0:
            layers.append([])
        layers[-1].append(node.name)
        x[node.name] = 4 + half_width(node.name) + i % APART_ROW * (BOX_WIDTH + GAP_X)
    y = {name: row * (BOX_HEIGHT + GAP_Y) + 4 for row, layer in enumerate(layers) for name in layer}
    boxes = {node.name: node for node in [*nodes, *apart]}
    width = max(x[name] + half_width(name) for layer in layers for name in layer) + 4
    height = len(layers) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 8
    lines = [arrow(x[a], y[a] + BOX_HEIGHT, x[b], y[b], b in boxes) for a, b in arrows]
    lines += [
        Markup('<path class="arrow" d="M{0:.1f} {1:.0f}V{2:.0f}"/>').format(x[name], y[name], y[name] + BOX_HEIGHT)
        for layer in layers
        for name in layer
        if name not in boxes
    ]
    drawn = [box(boxes[name], x[name], y[name]) for layer in layers for name in layer if name in boxes]
    head = Markup(
        '<svg class="graph" role="img" aria-label="The steps of the pipeline and what each reads" '
        'viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}"><defs><marker id="tip" viewBox="0 0 8 8" '
        'refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path class="tip" d="M0 0L8 4L0 8z"/>'
        "</marker></defs>"
    )
    return head.format(width, height) + Markup("").join([*lines, *drawn]) + Markup("</svg>")


def box(node: Node, x: float, y: float) -> Markup:
    """One step."""
    text = Markup('<text class="{0}" x="{1:.1f}" y="{2:.1f}" text-anchor="middle">{3}</text>')
    rows = zip(("name", "stage", "count"), (node.name, *node.lines), (18.0, 33.0, 47.0), strict=True)
    return (
        Markup('<rect class="box {0}" x="{1:.1f}" y="{2:.1f}" width="{3}" height="{4}" rx="6"/>').format(
            node.kind, x - BOX_WIDTH / 2, y, BOX_WIDTH, BOX_HEIGHT
        )
    ) + Markup("").join(text.format(css, x, y + dy, short(words)) for css, words, dy in rows)


def arrow(x0: float, y0: float, x1: float, y1: float, tip: bool) -> Markup:
    """A curve down from one layer to the next."""
    middle = (y0 + y1) / 2
    end = Markup(' marker-end="url(#tip)"') if tip else Markup("")
    path = Markup('<path class="arrow"{6} d="M{0:.1f} {1:.0f}C{0:.1f} {2:.1f} {3:.1f} {4:.1f} {3:.1f} {5:.1f}"/>')
    return path.format(x0, y0, middle, x1, middle, y1 - (1 if tip else 0), end)


def short(text: str, most: int = 20) -> str:
    """At most ``most`` letters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def layered(names: Sequence[str], inputs: Mapping[str, Sequence[str]]) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """Nodes by layer, each as late as its readers allow, and arrows from one layer to the next.

    What is read further down runs in a lane of its own through the layers between, one lane for all readers; a lane
    shows up as a node named ``name|layer``.
    """
    readers: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        for source in dict.fromkeys(inputs.get(name, ())):
            readers[source].append(name)
    up: dict[str, int] = {}  # layers below
    for name in reversed(names):
        up[name] = max((up[reader] + 1 for reader in readers[name]), default=0)
    n_layers = max(up.values(), default=0) + 1
    layer = {name: n_layers - 1 - up[name] for name in names}
    layers: list[list[str]] = [[] for _ in range(n_layers)]
    for name in names:
        layers[layer[name]].append(name)
    arrows: list[tuple[str, str]] = []
    for name in names:
        last = name
        for level in range(layer[name] + 1, max((layer[reader] for reader in readers[name]), default=0) + 1):
            arrows += [(last, reader) for reader in readers[name] if layer[reader] == level]
            if any(layer[reader] > level for reader in readers[name]):
                lane = f"{name}|{level}"
                layers[level].append(lane)
                arrows.append((last, lane))
                last = lane
    return layers, arrows


def place(layers: list[list[str]], arrows: Iterable[tuple[str, str]]) -> dict[str, float]:
    """The middle of every node: layers are ordered and shifted towards what they are joined to. Sorts ``layers``."""
    joined: dict[str, list[str]] = {name: [] for layer in layers for name in layer}
    above: dict[str, list[str]] = {name: [] for layer in layers for name in layer}
    for a, b in arrows:
        joined[a].append(b)
        above[b].append(a)
    x: dict[str, float] = {}
    for layer in layers:
        spread(layer, x, dict.fromkeys(layer, 0.0))
    for sweep in range(N_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            near = above if down else joined
            wish = {name: float(np.mean([x[other] for other in near[name]] or [x[name]])) for name in layer}
            layer.sort(key=lambda name: wish[name])  # stable: ties stay as they were
            spread(layer, x, wish)
    ends = [(x[name] - half_width(name), x[name] + half_width(name)) for layer in layers for name in layer]
    left, right = min(end[0] for end in ends) - 4, max(end[1] for end in ends) + 4
    if x[layers[0][0]] > (left + right) / 2:  # what comes first stands to the left, where a narrow screen begins
        return {name: right - at for name, at in x.items()}
    return {name: at - left for name, at in x.items()}


def spread(layer: Sequence[str], x: dict[str, float], wish: Mapping[str, float]) -> None:
    """Put a layer's nodes near where they wish to be, in order and apart: blocks that push share their error."""
    blocks: list[tuple[float, list[str], list[float]]] = []  # left end of the first node's middle, nodes, offsets
    for name in layer:
        blocks.append((wish[name], [name], [0.0]))
        while len(blocks) > 1:
            (a, left, at), (b, right, off) = blocks[-2:]
            step = at[-1] + half_width(left[-1]) + GAP_X + half_width(right[0])
            if a + step <= b:
                break
            names, offsets = left + right, at + [step + o for o in off]
            start = float(np.mean([wish[name] - o for name, o in zip(names, offsets, strict=True)]))
            blocks[-2:] = [(start, names, offsets)]
    for start, names, offsets in blocks:
        x.update({name: start + o for name, o in zip(names, offsets, strict=True)})


def fold(stages: Mapping[str, str], inputs: Mapping[str, Sequence[str]], which: Sequence[str]) -> dict[str, str]:
    """The box of every node: its own name, or one for more than ``MAX_ALIKE`` nodes that are alike.

    Alike are nodes of one stage among ``which`` that are made the same way (by stages) and read by nodes that are
    alike; ``inputs`` names earlier nodes of each node, in the order of ``stages``. Where a box is shared, the nodes
    come in order of their depth, so that boxes too read earlier ones.
    """
    numbers: dict[tuple[Hashable, ...], int] = {}

    def number(*what: Hashable) -> int:
        return numbers.setdefault(what, len(numbers))

    made: dict[str, int] = {}
    depth: dict[str, int] = {}
    for name, stage in stages.items():
        made[name] = number("made", stage, tuple(sorted(made[source] for source in inputs[name])))
        depth[name] = 1 + max((depth[source] for source in inputs[name]), default=0)
    readers: dict[str, set[int]] = {name: set() for name in stages}
    groups: dict[int, list[str]] = {}
    for name in reversed(list(stages)):
        likeness = number("alike", made[name], frozenset(readers[name])) if stages[name] in which else number(name)
        groups.setdefault(likeness, []).insert(0, name)
        for source in inputs[name]:
            readers[source].add(likeness)
    boxes = {name: name for name in stages}
    for names in groups.values():
        if len(names) > MAX_ALIKE:
            boxes |= dict.fromkeys(names, f"{names[0]} + {len(names) - 1}")
            boxes = {name: boxes[name] for name in sorted(boxes, key=lambda name: depth[name])}
    return boxes


def half_width(name: str) -> float:
    """Half the room that a box or a lane takes."""
    return (LANE_WIDTH if "|" in name else BOX_WIDTH) / 2


def line_chart(
    curves: Sequence[Curve], level: tuple[float, str] | None, x_label: str, y_label: str, alt: str
) -> Markup:
    """Curves over 0..n-1, from 0 up, and a dashed line at ``level``."""
    highest = max([*(float(np.nanmax(curve.y, initial=0)) for curve in curves), level[0] if level else 0.0])
    top = nice_ticks(highest * 1.02)
    n = max(len(curve.y) for curve in curves)
    parts = [y_axis(top), x_axis([0, n // 2, n], n, x_label), axis_name(y_label)]
    if level:
        at = y_of(level[0], top[-1])
        parts.append(
            Markup('<path class="level" d="M{0} {1:.1f}H{2}"/>').format(LEFT, at, WIDTH - RIGHT)
            + Markup('<text class="tick" x="{0}" y="{1:.1f}" text-anchor="end">{2}</text>').format(
                WIDTH - RIGHT, at - 4, level[1]
            )
        )
    for curve in curves:
        points = " ".join(f"{x_of(i, n):.1f},{y_of(v, top[-1]):.1f}" for i, v in binned(curve.y) if np.isfinite(v))
        parts.append(Markup('<polyline class="curve {0}" points="{1}"/>').format(curve.css, points))
    return chart(parts, alt)


def binned(y: np.ndarray) -> list[tuple[float, float]]:
    """(position, mean) of at most ``MAX_POINTS`` bins; a bin without a finite value is nan."""
    edges = np.linspace(0, len(y), min(len(y), MAX_POINTS) + 1).astype(int)
    found = []
    for start, end in pairwise(edges):
        finite = y[start:end][np.isfinite(y[start:end])]
        found.append(((start + end - 1) / 2, float(finite.mean()) if len(finite) else float("nan")))
    return found


def share_chart(x: np.ndarray, curves: Sequence[Curve], mark: float | None, x_label: str, alt: str) -> Markup:
    """Curves of shares, 0 to 1, against ascending ``x`` (n,), one or more, and a dashed upright line at ``mark``."""
    low, high = float(x[0]), float(x[-1])
    digits = 1 - int(np.floor(np.log10(high - low))) if high > low else 3

    def across(value: float) -> float:
        return x_of((value - low) / (high - low) if high > low else 0.5, 1)

    parts = [y_axis(nice_ticks(1.0)), x_axis([f"{v:.{digits}f}" for v in (low, (low + high) / 2, high)], 2, x_label)]
    if mark is not None:
        at, anchor = across(mark), "end" if across(mark) > across((low + high) / 2) else "start"
        parts.append(
            Markup('<path class="level" d="M{0:.1f} {1}V{2}"/>').format(at, TOP, HEIGHT - BOTTOM)
            + Markup('<text class="tick" x="{0:.1f}" y="{1:.1f}" text-anchor="{2}">{3}</text>').format(
                at + (4 if anchor == "start" else -4), y_of(0, 1) - 5, anchor, f"{mark:.{digits + 1}f}"
            )
        )
    for curve in curves:
        points = zip(x.tolist(), curve.y.tolist(), strict=True)
        line = " ".join(f"{across(v):.1f},{y_of(share, 1):.1f}" for v, share in points if np.isfinite(share))
        parts.append(Markup('<polyline class="curve {0}" points="{1}"/>').format(curve.css, line))
    return chart(parts, alt)


def rank_chart(ranks: np.ndarray, curves: Sequence[Curve], x_label: str, alt: str) -> Markup:
    """Sizes from the largest down against their places ``ranks`` int (n,) from 1, both on a scale of powers of ten.

    A size of 0 has no place on it: there a curve ends.
    """
    wide, high = decades(int(ranks[-1])), decades(max(int(curve.y[0]) for curve in curves))
    step = -(-high // 5)  # powers from one line to the next
    line = Markup(
        '<path class="grid" d="M{0} {1:.1f}H{2}"/><text class="tick" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
    )
    heights = [(y_of(power, high), f"{10.0**power:g}") for power in range(0, high + 1, step)]
    parts = [line.format(LEFT, at, WIDTH - RIGHT, LEFT - 5, at + 4, word) for at, word in heights]
    parts += [x_axis(["1", f"{10**wide:,}"], 1, x_label), axis_name("images")]
    for curve in curves:
        some = curve.y > 0
        points = zip(np.log10(ranks[some]).tolist(), np.log10(curve.y[some]).tolist(), strict=True)
        drawn = " ".join(f"{x_of(x, wide):.1f},{y_of(y, high):.1f}" for x, y in points)
        parts.append(Markup('<polyline class="curve {0}" points="{1}"/>').format(curve.css, drawn))
    return chart(parts, alt)


def decades(highest: int) -> int:
    """How many powers of ten an axis from 1 has up to at least ``highest``, one or more."""
    return max(len(str(max(highest, 1) - 1)), 1)


def bar_chart(series: Sequence[tuple[str, Sequence[float]]], ticks: Sequence[str], x_label: str, alt: str) -> Markup:
    """Thin bars side by side, one colour a series; ``ticks`` name the first, the middle and the last place."""
    top = nice_ticks(max([1.0, *(max(values, default=0) for _, values in series)]))
    n = max(1, *(len(values) for _, values in series))
    slot = (WIDTH - LEFT - RIGHT) / n
    wide = slot * (0.84 if n < 80 else 1.0) / len(series)
    parts = [y_axis(top), x_axis(ticks, len(ticks) - 1 or 1, x_label)]
    for k, (css, values) in enumerate(series):
        left = LEFT + slot * 0.08 + k * wide
        path = "".join(
            f"M{left + i * slot:.1f} {y_of(0, 1):.1f}h{wide:.2f}V{y_of(v, top[-1]):.1f}h{-wide:.2f}z"
            for i, v in enumerate(values)
            if v > 0
        )
        parts.append(Markup('<path class="bar {0}" d="{1}"/>').format(css, path))
    return chart(parts, alt)


def chart(parts: Sequence[Markup], alt: str) -> Markup:
    """A chart of its parts."""
    head = Markup('<svg class="chart" role="img" aria-label="{0}" viewBox="0 0 {1} {2}">').format(alt, WIDTH, HEIGHT)
    return head + Markup("").join(parts) + Markup("</svg>")


def nice_ticks(highest: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to at least ``highest``."""
    step = 10.0 ** np.floor(np.log10(max(highest, 1e-9)))
    for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0):
        if highest / (step * factor) <= most:
            step *= factor
            break
    return [float(step * i) for i in range(int(np.ceil(highest / step - 1e-9)) + 1)]


def y_axis(ticks: Sequence[float]) -> Markup:
    """Faint lines with their numbers."""
    line = Markup(
        '<path class="grid" d="M{0} {1:.1f}H{2}"/><text class="tick" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
    )
    rows = [(y_of(tick, ticks[-1]), tick) for tick in ticks]
    return Markup("").join(line.format(LEFT, at, WIDTH - RIGHT, LEFT - 5, at + 4, f"{tick:g}") for at, tick in rows)


def x_axis(ticks: Sequence[float | str], last: float, label: str) -> Markup:
    """Words below a chart: numbers at their place, strings evenly spread."""
    words = Markup('<text class="tick" x="{0:.1f}" y="{1}" text-anchor="{2}">{3}</text>')
    drawn = []
    for i, tick in enumerate(ticks):
        place_of = i if isinstance(tick, str) else tick
        anchor = "start" if i == 0 else "end" if i == len(ticks) - 1 else "middle"
        drawn.append(words.format(x_of(place_of, last), HEIGHT - BOTTOM + 14, anchor, tick))
    name = words.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "middle", label)
    return Markup("").join([*drawn, name])


def axis_name(label: str) -> Markup:
    """The unit of the upright axis."""
    return Markup(
        '<text class="tick" x="10" y="{0:.0f}" transform="rotate(-90 10 {0:.0f})" text-anchor="middle">{1}</text>'
    ).format((HEIGHT - BOTTOM + TOP) / 2, label)


def x_of(value: float, last: float) -> float:
    """Across."""
    return LEFT + (WIDTH - LEFT - RIGHT) * value / max(last, 1)


def y_of(value: float, top: float) -> float:
    """Upright."""
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top
