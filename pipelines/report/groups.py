"""What the page says of the groups of a dedup step: which image stays, how large they are, and how tight."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pipelines.report import drawings


def rule_text(config: Mapping[str, Any]) -> str:
    """Which images stay, in a sentence."""
    keep = str(config["keep"]).replace("_", " ")
    rule, max_chain = config.get("rule", "component"), config.get("max_chain", 0)
    if rule == "greedy":
        return f"In the order of {keep} an image stays unless it is near one that stays before it."
    if rule == "semdedup":
        return f"In the order of {keep} an image stays unless it is near one before it, whether that one stays or not."
    text = f"Of all images that near copies join one stays: {keep}"
    if max_chain:
        text += f"; those less than {max_chain:g} similar to it are judged again among themselves"
    return f"{text}."


def search_text(facts: Mapping[str, Any]) -> str:
    """How near copies were looked for, and what share of them was found; nothing where it is not known."""
    method = facts.get("method")
    if method == "exact":
        return "Every image was compared with every other."
    if method == "clusters":
        return "Images were compared within clusters alone."
    if method is None:
        return ""
    text = f"Images were compared in {facts['nlist']:,} cells, each in {facts['nprobe']:,} of them"
    if facts["recall"] is None:
        return f"{text}; a sample of them has no near image."
    n = facts["recall_edges"]
    return (
        f"{text}: {100 * facts['recall']:.2f} % of {n:,} pairs that an exact search of sampled images finds are there."
    )


def retracted_text(counts: Mapping[str, int]) -> str:
    """What an earlier run kept and this one drops; nothing when there was none."""
    if "retracted" not in counts:
        return ""
    return f"Of the images that were kept before later ones came, {counts['retracted']:,} go now."


def shape_text(facts: Mapping[str, Any]) -> str:
    """How many groups there are and the size of the largest; nothing where that was not counted."""
    groups = facts.get("groups")
    if not groups or not groups["n"]:
        return ""
    n, largest, tight = groups["n"], groups["largest"], groups["tightness"]
    text = f"{n:,} group{'' if n == 1 else 's'} of near copies, the largest of {largest:,} images."
    return text if tight["share"] == 1 else f"{text} Their tightness is that of a sample of {tight['n']:,}."


def group_charts(facts: Mapping[str, Any]) -> list[Markup]:
    """How large groups are, and how tight: the lowest similarity in a group to the image that stays of it."""
    groups = facts.get("groups")
    if not groups or not groups["n"]:
        return []
    names = [str(high) if low == high else f"{low:,}-{high:,}" for low, high, _ in groups["sizes"]]
    counts = [n for *_, n in groups["sizes"]]
    words = ", ".join(f"{name} images: {n:,}" for name, n in zip(names, counts, strict=True))
    ticks = names if len(names) < 3 else [names[0], names[len(names) // 2], names[-1]]
    sizes = drawings.bar_chart([("after", counts)], ticks, "images of a group", f"Groups by size: {words}")
    tight = groups["tightness"]
    if not tight["n"]:
        return [sizes]
    low = tight["low"]
    alt = f"Histogram of the lowest similarity in each of {tight['n']} groups to what stays of it, from {low:.4g} to 1"
    ticks = [f"{low:.3g}", f"{(low + 1) / 2:.3g}", "1"]
    return [sizes, drawings.bar_chart([("after", tight["bins"])], ticks, "lowest similarity in a group", alt)]
