import base64
import math
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from curation.artifact import describe, finish, pool_of, read_table, write_table
from curation.embeddings import embedding_parts, read_embeddings
from curation.store import Location
from pipelines.engine import read_root, run_recipe
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.report import browser, drawings
from pipelines.report.classes import balance
from pipelines.report.clusters import agreement_text, how_drawn, how_made
from pipelines.report.groups import group_charts, retracted_text, rule_text, search_text, shape_text
from pipelines.report.page import build_page
from pipelines.report.run import ReportConfig, Run
from pipelines.stage import SELECTIONS
from pipelines.stages.certificate import read_certificates
from pipelines.stages.maps import MAPS
from pipelines.stages.report import STAGE
from pipelines.stages.table import STAGES

VOID = {"meta", "img", "br", "link", "input", "hr"}
MAX_BYTES = 4_000_000


class Page(HTMLParser):
    """Tags with their attributes and text; complains about a tag that is not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.cells, self.text = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"closes {tag} in the wrong place"

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def words(self):
        return " ".join(" ".join(self.text).split())

    def images(self):
        return [attrs for tag, attrs in self.tags if tag == "img"]


def artifacts(tiny):
    return {name: tiny.artifact(name) for name in tiny.results if name != "page"}


def page_of(steps, labels=None, **config):
    return build_page(Run(steps, ReportConfig(**config), labels, LocalExecutor(Resources())))


@pytest.fixture(scope="module")
def html(tiny):
    return (tiny.artifact("page").location / "index.html").read().decode()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def table_below(page, first_header):
    start = next(i for i, row in enumerate(page.cells) if row and row[0] == first_header)
    found = []
    for row in page.cells[start + 1 :]:
        if len(row) != len(page.cells[start]) or row[0] in ("step", "after step", "backbone"):
            break
        found.append([" ".join(cell.split()) for cell in row])
    return found


def test_the_table_has_every_step_with_its_counts(tiny, page):
    rows = {row[0]: row for row in table_below(page, "step")}
    assert list(rows) == [name + artifact.stage for name, artifact in artifacts(tiny).items()]
    for name, artifact in artifacts(tiny).items():
        row = rows[name + artifact.stage]  # on a phone the stage stands below the name
        shown = [int(cell.replace(",", "")) if cell else None for cell in row[3:7]]
        assert shown == [artifact.counts.get(key) for key in ("rows", "kept", "dropped", "bad")]
        assert row[1] == artifact.stage


def test_the_picture_has_a_box_for_every_step_and_an_arrow_to_every_reader(tiny, html, page):
    svg = html[html.index('<svg class="graph"') : html.index("</svg>", html.index('<svg class="graph"'))]
    names = re.findall(r'<text class="name"[^>]*>([^<]*)<', svg)
    assert sorted(names) == sorted(artifacts(tiny))
    n_reads = sum(
        len({read["path"].split("/")[0] for read in entry.manifest["inputs"].values()})
        for entry in artifacts(tiny).values()
    )
    assert svg.count("marker-end") == n_reads


def test_pairs_show_the_similarity_of_the_two_images(tiny, html):
    unique = tiny.artifact("unique")
    starts = tiny.artifact("web").starts
    vectors = {}
    for i, part in enumerate(embedding_parts(tiny.artifact("web_copy"))):
        rows, x = part.read()
        vectors |= {int(starts[i]) + int(row): vector for row, vector in zip(rows, x, strict=True)}
    expected = []
    for i in range(len(unique.parts)):
        for row in read_table(unique.part(i)).to_pylist():
            if not row["kept"]:
                a, b = vectors[int(starts[i]) + row["row"]], vectors[row["representative"]]
                expected.append(f"{float(a.astype(float) @ b.astype(float)):.4f}")
    section = html[html.index('id="duplicates"') : html.index('id="leaks"')]
    shown = re.findall(r"<b>(\d\.\d{4})</b>", section)
    assert len(expected) == unique.counts["dropped"] == 10
    assert sorted(shown) == sorted(expected)  # all ten fit on the page
    assert section.count("<img") == 20


def test_groups_are_drawn_by_size_and_tightness(tiny, html):
    groups = tiny.artifact("unique").facts["groups"]
    section = html[html.index('id="duplicates"') : html.index('id="leaks"')]
    assert "Of all images that near copies join one stays: most pixels. 10 groups of near copies, the largest of 2" in (
        section
    )
    assert 'aria-label="Groups by size: 2 images: 10"' in section
    assert f"of 10 groups to what stays of it, from {groups['tightness']['low']:.4g} to 1" in section
    older = shape_text({}), group_charts({})
    sampled = groups | {"tightness": groups["tightness"] | {"share": 0.5, "n": 4}}
    assert older == ("", []) and shape_text({"groups": sampled}).endswith("Their tightness is that of a sample of 4.")


def test_how_pairs_were_looked_for_is_told():
    cells = {"method": "cells", "nlist": 2048, "nprobe": 17, "recall": 0.9971, "recall_edges": 1234}
    assert search_text(cells) == (
        "Images were compared in 2,048 cells, each in 17 of them: 99.71 % of 1,234 pairs that an exact search of "
        "sampled images finds are there."
    )
    assert search_text({**cells, "recall": None}).endswith("each in 17 of them; a sample of them has no near image.")
    assert search_text({"method": "exact"}) == "Every image was compared with every other."
    assert search_text({"method": "clusters"}) == "Images were compared within clusters alone."
    assert search_text({}) == retracted_text({"kept": 3}) == ""
    assert retracted_text({"retracted": 1200}) == "Of the images that were kept before later ones came, 1,200 go now."


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"keep": "first"}, "Of all images that near copies join one stays: first."),
        (
            {"rule": "component", "keep": "first", "max_chain": 0.5},
            "first; those less than 0.5 similar to it are judged",
        ),
        (
            {"rule": "greedy", "keep": "largest_file"},
            "In the order of largest file an image stays unless it is near one",
        ),
        ({"rule": "semdedup", "keep": "farthest"}, "near one before it, whether that one stays or not."),
    ],
)
def test_the_rule_is_told_in_a_sentence(config, words):
    assert words in rule_text(config)


def test_leaks_stand_beside_their_reference_image(tiny, html):
    clean = tiny.artifact("clean")
    section = html[html.index("<h3>clean: ") :]
    names = re.findall(r'alt="(reference|dropped) ([^"]*)"', section[: section.index("<h3>", 4)])
    dropped = [name for kind, name in names if kind == "dropped"]
    assert clean.counts["dropped"] == len(dropped) == 5
    for (_, reference), (_, leak) in zip(names[::2], names[1::2], strict=True):
        assert leak.removeprefix("leak-") == reference.rpartition("/")[2]


def test_components_show_what_joins_an_image_to_a_reference(tiny, html):
    step = tiny.artifact("clean_components")
    section = html[html.index("<h3>clean_components: ") :]
    section = section[: section.index("<h3>", 4)]
    counts = step.counts
    assert counts["transitive"] > 0
    words = " ".join(section.split())
    assert (
        f"{counts['direct']} images are near a reference image themselves, {counts['transitive']} are joined" in words
    )
    assert f"the largest component has {step.facts['largest_component']} image" in words
    assert "Joined through the left one" in section


def test_every_reference_has_its_certificate_its_histogram_and_its_pictures(tiny, html):
    step = tiny.artifact("clean_searched")
    section = html[html.index("<h3>clean_searched: ") :]
    section = section[: section.index("Joined through the left one")]
    known = read_certificates(step)
    assert list(known) == ["some_copy", "exam_copy"] == re.findall(r"<p><b>(\w+): ", section)
    exam, leaks = (
        tiny.artifact("exam"),
        [row for i in range(len(step.parts)) for row in read_table(step.part(i)).to_pylist()],
    )
    names = [name for i in range(len(exam.parts)) for name in read_table(exam.part(i))["source"].to_pylist()]
    for index, (shown, one) in enumerate(zip(section.split("<p><b>")[1:], known.values(), strict=True)):
        assert shown.startswith(one["statement"])
        assert f"{one['dropped_direct']} were dropped and {one['dropped_transitive']} joined to those" in shown
        assert f"{one['images']} images of {one['reference']}" in shown
        theirs = {names[row["near_row"]] for row in leaks if row["hops"] == 1 and row["reference"] == index}
        pictured = re.findall(r'alt="reference ([^"]*)"', shown)
        assert pictured and set(pictured) <= theirs


def test_retrieval_counts_what_each_seed_set_asked_for_and_got(tiny, html):
    section = html[html.index('id="retrieved"') : html.index('id="clusters"')]
    table = Page(section[section.index("<h3>near_seeds") : section.index("<h3>near_clusters")])
    rows = {row[0]: row[1:] for row in table_below(table, "seeds")}
    facts = tiny.artifact("near_seeds").facts["seed_pools"]
    assert list(rows) == list(facts)
    for name, fact in facts.items():
        assert rows[name] == [f"{fact[key]:,}" for key in ("n_seeds", "nominal", "retrieved", "kept")]
    assert "at most 70 for a seed set; 60 in all, shared fairly" in table.words()
    shown = re.findall(r'alt="(seed|retrieved) ([^"]*)"', section)
    assert len(shown) == 2 * 2 * ReportConfig().n_pairs and {kind for kind, _ in shown[::2]} == {"seed"}


def test_a_mix_says_how_its_components_share_the_batches(tiny, html):
    section = Page(html[html.index('<h2 id="mixed"') : html.index('<h2 id="classes"')])
    rows = {row[0]: row[1:] for row in table_below(section, "component")}
    facts = tiny.artifact("mixed").facts["components"]
    assert {name: row[0] for name, row in rows.items()} == {name: str(fact["rows"]) for name, fact in facts.items()}
    assert rows["exam"][2:] == ["10.0 %", "", "10.0 %"]
    assert rows["balanced"][2:] == ["", "70.0 %", "63.0 %"] and rows["more"][2:] == ["", "30.0 %", "27.0 %"]


def test_many_steps_used_alike_share_a_box():
    """Five seed sets and their vectors feed one step; the pool, its vectors and a lone reader keep their own."""
    stages, inputs = {"web": "pool", "web_vec": "embed"}, {"web": [], "web_vec": ["web"]}
    for i in range(5):
        stages |= {f"s{i}": "pool", f"v{i}": "embed"}
        inputs |= {f"s{i}": [], f"v{i}": [f"s{i}"]}
    stages |= {"near": "retrieve", "other": "pool", "other_vec": "embed", "near_other": "retrieve", "page": "report"}
    inputs |= {"near": ["web_vec", *(f"v{i}" for i in range(5))], "other": [], "other_vec": ["other"],
               "near_other": ["web_vec", "other_vec"], "page": ["near", "near_other"]}  # fmt: skip
    boxes = drawings.fold(stages, inputs, ("pool", "embed"))
    assert {boxes[f"s{i}"] for i in range(5)} == {"s0 + 4"} and {boxes[f"v{i}"] for i in range(5)} == {"v0 + 4"}
    alone = ("web", "web_vec", "near", "other", "other_vec", "near_other", "page")
    assert [boxes[name] for name in alone] == list(alone)
    order = list(dict.fromkeys(boxes.values()))
    for name, some in inputs.items():
        assert all(order.index(boxes[source]) < order.index(boxes[name]) for source in some)


def test_refused_files_are_counted_by_reason(tiny, html):
    counts = tiny.artifact("web").counts
    for reason in ("undecodable", "too_small", "exact_duplicate"):
        assert f"<h4>{reason.replace('_', ' ')}: {counts[reason]}</h4>" in html
    assert "broken.jpg" in html and "page.png" in html


class Clustered:
    """What a hierarchy of two levels and a sample of it say, row by row."""

    def __init__(self, root):
        tree, balanced = (read_root(root)[name] for name in ("tree", "balanced"))
        parts = range(len(tree.parts))
        labels = np.concatenate([read_table(tree.part(i), ["label"])["label"].to_numpy() for i in parts])
        upper = read_table(tree.location / "labels-1-0000000.parquet", ["label"])["label"].to_numpy()
        self.kept = np.concatenate([read_table(balanced.part(i), ["kept"])["kept"].to_numpy() for i in parts])
        self.clusters = [labels, upper[labels]]
        self.upper, self.facts = upper, balanced.facts
        self.names = [row["source"] for i in parts for row in read_table(pool_of(tree).part(i)).to_pylist()]

    def sizes(self, level, which=slice(None)):
        return np.bincount(self.clusters[level][which], minlength=(20, 5)[level]).tolist()


@pytest.fixture(scope="module")
def clustered(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clustered")
    html = small_page(tiny.images / "web", folder, clusters=[20, 5], target=60)
    begin, end = (html.index(f'<h2 id="{section}"') for section in ("clusters", "backbones"))
    return Clustered(Location(str(folder / "root"))), html[begin:end]


def test_clusters_show_their_sizes_and_images_of_theirs(clustered):
    known, section = clustered
    top = section[section.index('<div class="sheets">') :]
    shown = re.findall(
        r"<section class=\"(\w+)\"><header><b>cluster (\d+)</b><span class=\"quiet\">(\d+) images?, (\d+) sampled", top
    )
    sizes, sampled = ([known.sizes(level, which) for level in (0, 1)] for which in (slice(None), known.kept))
    assert {int(c): (int(a), int(b)) for kind, c, a, b in shown if kind == "sheet"} == {
        c: (sizes[1][c], sampled[1][c]) for c in range(5)
    }
    assert min(sizes[1]) > 0 and sum(sampled[1]) == 60 < sum(sizes[1])
    inner = [(int(c), int(a), int(b)) for kind, c, a, b in shown if kind == "inner"]
    assert inner == [(c, sizes[0][c], sampled[0][c]) for c, *_ in inner]
    most, few = ReportConfig().n_images, browser.N_IMAGES_BELOW
    n_pictures = sum(min(size, most) for size in sizes[1]) + sum(min(size, few) for _, size, _ in inner)
    assert section.count("<img") == n_pictures
    chosen = dict(zip(known.names, known.kept.tolist(), strict=True))
    cluster_of = [dict(zip(known.names, clusters.tolist(), strict=True)) for clusters in known.clusters]
    pictures = re.findall(r'alt="cluster (\d+) of level (\d), (\w+) ([^"]*)"', section)
    assert len(pictures) == n_pictures
    for cluster, level, kind, name in pictures:
        assert cluster_of[int(level)][name] == int(cluster) and chosen[name] == (kind == "sampled")


def test_every_cluster_opens_to_some_of_those_in_it(clustered):
    """The largest, a middle one and the smallest that have images."""
    known, section = clustered
    sizes = known.sizes(0)
    sheets = section.split('<section class="sheet">')[1:]
    assert len(sheets) == 5
    for sheet in sheets:
        numbers = [int(c) for c in re.findall(r"<header><b>cluster (\d+)</b>", sheet)]
        inside = [int(c) for c in np.flatnonzero(known.upper == numbers[0]) if sizes[c]]
        order = sorted(inside, key=lambda c: (-sizes[c], c))
        assert numbers[1:] == (order if len(order) <= 3 else [order[0], order[(len(order) - 1) // 2], order[-1]])
        some = f"{len(inside)} cluster" if len(inside) <= 3 else f"3 of {len(inside)} clusters"
        assert f"<summary>{some}" in sheet


def test_a_sample_says_how_even_it_made_every_level(clustered):
    known, section = clustered
    rows = [[cell.strip() for cell in row] for row in Page(section).cells if row[0].isdigit()]
    assert len(rows) == 2
    for level, (told, row) in enumerate(zip(known.facts["levels"], rows, strict=True)):
        before, after = told["before"], told["after"]
        assert row == [
            str(level), str(told["clusters"]), f"{before['effective']:.1f}", f"{after['effective']:.1f}",
            f"{before['gini']:.3f}", f"{after['gini']:.3f}", f"{before['kl_to_uniform']:.3f}",
            f"{after['kl_to_uniform']:.3f}",
        ]  # fmt: skip
        assert f"Sizes of the {told['clusters']} clusters of level {level} by rank, before and after" in section
        assert (
            f"before {', '.join(words(told['before']['sizes']))}; after {', '.join(words(told['after']['sizes']))}"
            in (section)
        )
    assert "balanced: 60 images drawn</h4>" in section and "Shared from the top down, every cluster" in section


def test_a_level_in_two_steps_says_so_and_how_often_the_nearest_was_found(tiny, html):
    tree = tiny.artifact("split_tree")
    config, shared = tree.manifest["config"], tree.facts["agreement"]
    assert (config["n_clusters"], config["n_splits"], set(shared)) == ([20, 5], [4, 1], {"0"})
    x = np.concatenate([np.concatenate(list(part.blocks())) for part in embedding_parts(tree.input("embeddings"))])
    [centroids] = [read_embeddings(tree.location / f.name)[1] for f in tree.files if f.name.startswith("centroids-0")]
    labels = np.concatenate([read_table(tree.part(i), ["label"])["label"].to_numpy() for i in range(len(tree.parts))])
    near = ((x[:, None].astype("f8") - centroids) ** 2).sum(-1).argmin(1) == labels  # of all, fewer than are sampled
    assert 0.5 < near.mean() < 1
    part_of = html[html.index("<h3>split_tree:") :]
    part_of = part_of[: part_of.index('<div class="key">')]
    assert (
        "Level 0 was made in two steps: a first k-means of 5 clusters, and then one in each of these. "
        f"{math.floor(1000 * near.mean()) / 10:.1f} % of sampled images have the nearest of all 20 clusters of level "
        "0; the others a farther one."
    ) in part_of
    assert "in two steps" not in html[html.index("<h3>tree:") : html.index("<h3>split_tree:")]


def test_how_clusters_were_made_is_told_level_by_level():
    config = {"n_clusters": [200_001, 70_000, 9], "n_splits": [2000, 1, 1]}
    facts = {"n_clusters": [200_000, 70_000, 9], "agreement": {"0": 0.98799, "1": 1.0}}
    assert how_made(config, facts) == (
        "Level 0 was made in two steps: a first k-means of 101 clusters, and then one in each of these. 98.7 % of "
        "sampled images have the nearest of all 200,000 clusters of level 0; the others a farther one. All sampled "
        "clusters of level 0 have the nearest of all 70,000 clusters of level 1."
    )
    assert how_made({"n_clusters": [9], "n_splits": None}, {"n_clusters": [9]}) == ""
    assert agreement_text(0.99999, "images", "9").startswith("99.9 %")  # not all are all


def words(bins):
    return [f"{high if low == high else f'{low:,}-{high:,}'} images: {n:,}" for low, high, n in bins]


def test_a_sample_that_found_too_few_says_so(tiny, tmp_path):
    html = small_page(tiny.images / "web", tmp_path, target=5000)
    n = read_root(Location(str(tmp_path / "root")))["web"].counts["kept"]
    assert f"balanced: {n} images drawn, all there are: 5,000 were asked for</h4>" in html


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "Shared from the top down, every cluster as much as the others in it allow."),  # of an older sample
        ({"mode": "uniform", "max_per_label": 1200}, "Drawn from all images alike, at most 1,200 images of a label."),
        ({"mode": "level", "level": 2}, "Shared by the clusters of level 2 alone."),
        ({"mode": "level", "pick": "closest"}, "the clusters of level 0 alone, the closest to its centroid first."),
        ({"mode": "inverse_frequency", "max_copies": 4}, "of level 0, an image at most 4 times."),
        ({"mode": "tree", "max_per_source": 3}, ", at most 3 images of a source."),
    ],
)
def test_the_way_of_a_sample_is_told_in_a_sentence(config, text):
    assert how_drawn({"pick": "random", "max_copies": 1, **config}).endswith(text)


def test_a_browser_is_bounded_and_goes_down_to_the_finest_level(tmp_path):
    """Five levels of which the top one has more clusters than have place: some of them open, each down to level 0."""
    n_clusters, rng = [4000, 800, 160, 80, 40], np.random.default_rng(0)
    upper = [rng.permutation(a) * b // a for a, b in pairwise(n_clusters)]
    for t, labels in enumerate(upper, 1):
        write_table(Location(str(tmp_path)) / f"labels-{t}-0000000.parquet", pa.table({"label": labels}))
    files = [describe(Location(str(tmp_path)) / f"labels-{t}-0000000.parquet") for t in range(1, 5)]
    tree = finish(Location(str(tmp_path)), files, {"stage": "cluster"})
    sizes = rng.integers(0, 30, (2, 4000))
    planned = browser.plan(sizes, tree, 5, 24)
    tops = [i for i, some in enumerate(planned.shown) if some.above < 0]
    assert len(tops) == 24 and 24 + 100 < len(planned.shown) <= 24 + browser.MAX_BELOW
    nodes = [np.arange(4000)]
    for labels in upper:
        nodes.append(labels[nodes[-1]])
    for i, some in enumerate(planned.shown):
        inside = nodes[some.level] == some.cluster
        assert some.sizes == tuple(sizes[:, inside].sum(axis=1))
        if some.above >= 0:
            above = planned.shown[some.above]
            assert some.above < i and above.level == some.level + 1
            assert upper[some.level][some.cluster] == above.cluster
    opened = {some.above for some in planned.shown} & set(tops)
    assert len(opened) == browser.MAX_BELOW // 12
    for top in opened:
        at, depth = top, 0
        while (below := [i for i, some in enumerate(planned.shown) if some.above == at]) != []:
            at, depth = below[0], depth + 1
        assert depth == 4
    assert (np.diff(planned.top[0]) <= 0).all() and planned.top.sum(axis=1).tolist() == sizes.sum(axis=1).tolist()
    flat = browser.plan(sizes[:1], tree, 1, 3)
    assert [some.above for some in flat.shown] == [-1] * 3


def test_classes_come_from_the_file_of_labels(tiny, page):
    target = load_digits().target
    names = [
        row["source"]
        for i in range(len(tiny.artifact("web").parts))
        for row in read_table(tiny.artifact("web").part(i)).to_pylist()
    ]
    known = [str(target[int(name[:4])]) for name in names if name[:4].isdigit()]
    rows = {row[0]: row[1:] for row in table_below(page, "after step")}
    web = tiny.artifact("web").digest
    chosen = [name for name, a in artifacts(tiny).items() if a.stage in SELECTIONS and pool_of(a).digest == web]
    assert list(rows) == ["web", *chosen] and {"unique", "clean", "near_seeds", "balanced"} < set(chosen)
    assert rows["web"][0] == str(len(known))
    n = np.array(list(Counter(known).values()))
    assert rows["web"][3] == f"{n.max() / n.min():.1f} : 1"


def test_without_labels_there_are_no_classes(tiny):
    unlabelled = {name: step for name, step in artifacts(tiny).items() if name != "some_exam"}  # it selects by label
    assert 'id="classes"' not in page_of(unlabelled)


def test_curves_accuracies_and_backbones_are_those_of_the_artifacts(tiny, html, page):
    table = read_table(tiny.artifact("first").part(0))
    assert f"ln K = {math.log(64):.2f}" in html
    assert f"The DINO loss ends at {np.nanmean(table['dino_loss'].to_numpy()[-1:]):.2f} nats" in page.words()
    facts = tiny.artifact("score").facts
    bars = html[html.index('id="accuracy"') : html.index('id="patches"')]
    for css, accuracy in (("after", "accuracy"), ("before", "linear_accuracy")):
        bar = rf'<i class="{css}"[^>]* style="width:{100 * facts[accuracy]:.2f}%"><b>{100 * facts[accuracy]:.1f} %</b>'
        assert len(re.findall(bar, bars)) == 1
    digest = next(f.sha256 for f in tiny.artifact("first").files if f.name == "model.safetensors")
    rows = {row[1]: row for row in table_below(page, "backbone")}
    assert rows["first"][2] == digest[:16] and rows["first"][4] == "web_vec, exam_vec, score, fit"


def test_patches_are_shown_beside_their_images(tiny, html, page):
    rows = read_table(tiny.artifact("score").location / MAPS).to_pylist()
    section = html[html.index('id="patches"') : html.index('id="backbones"')]
    assert f"first on exam: {2 * 32} x {2 * 32} pixels, 8 x 8 patches" in section
    assert [row["label"] for row in rows] == re.findall(r"<figcaption[^>]*>label (\w+)<", section)
    shown = re.findall(r'<img src="data:image/(\w+);base64,([^"]*)" alt="([^"]*)"', section)
    assert len(shown) == 3 * len(rows) == 24
    for i, row in enumerate(rows):
        _, components, attention = shown[3 * i : 3 * i + 3]
        assert (components[0], base64.b64decode(components[1])) == ("png", row["components"])
        assert (attention[0], base64.b64decode(attention[1])) == ("png", row["attention"])
    one = page_of(artifacts(tiny), n_maps=1)
    assert one[one.index('id="patches"') : one.index('id="backbones"')].count("<img") == 3


def test_what_an_evaluation_lacks_is_left_out(tiny, tmp_path):
    """A page of artifacts of an older version, without a probe and maps; and of an encoder without attention."""
    score, steps = tiny.artifact("score"), artifacts(tiny)
    folder = Location(str(tmp_path)) / "score" / "made"
    for file in score.files:
        table = read_table(score.location / file.name)
        if file.name == MAPS:
            empty = pa.nulls(len(table), pa.binary())
            table = table.set_column(table.schema.get_field_index("attention"), "attention", empty)
        write_table(folder / file.name, table, file.counts)
    head = {key: value for key, value in score.manifest.items() if key not in ("files", "digest", "format")}
    head["inputs"] = {key: {**entry, "path": str((score.location.parent.parent / entry["path"]).path)}
                      for key, entry in head["inputs"].items()}  # fmt: skip
    head["facts"] = {key: value for key, value in head["facts"].items() if "linear" not in key}
    infos = [describe(folder / file.name) for file in score.files]
    bare = page_of({**steps, "score": finish(folder, infos, head)})
    Page(bare)
    assert (
        "linear probe" not in bare
        and bare[bare.index('id="patches"') : bare.index('id="backbones"')].count("<img") == 2 * 8
    )
    older = page_of({**steps, "score": finish(folder, [info for info in infos if info.name != MAPS], head)})
    assert 'id="patches"' not in older and 'id="accuracy"' in older


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(html, page):
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:image/"))
    assert "url(http" not in html and "@import" not in html


def test_every_picture_has_words_for_who_cannot_see_it(page):
    assert all(attrs["alt"].strip() for attrs in page.images())
    assert all(attrs["aria-label"].strip() for tag, attrs in page.tags if tag == "svg")


def test_a_page_says_neither_where_nor_when(tiny, html):
    assert str(tiny.root.parent) not in html
    assert page_of(artifacts(tiny)) == page_of(artifacts(tiny))


def test_names_of_files_are_words_not_markup(tmp_path):
    folder = tmp_path / "<b>images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / f"<script>alert({i})<&\"'>.png")
    (folder / "<script>bad.png").write_bytes(b"<script>alert(1)</script>")
    html = small_page(folder, tmp_path, title="<script>x</script>")
    assert "<script" not in html
    assert "&lt;script&gt;alert(" in html
    Page(html)


def small_page(folder, tmp_path, clusters=(3,), target=4, **config):
    tree = {
        "steps": {
            "web": {"stage": "pool", "source": str(folder), "part_rows": 16, "max_bad_fraction": 0.5},
            "vectors": {"stage": "embed", "pool": "web", "backbone": "pixels"},
            "tree": {"stage": "cluster", "embeddings": "vectors", "n_clusters": list(clusters)},
            "balanced": {"stage": "sample", "hierarchy": "tree", "target": target},
            "page": {"stage": "report", **config},
        }
    }
    steps = list(run_recipe(parse_recipe(tree, STAGES), Location(str(tmp_path / "root")), LocalExecutor(Resources())))
    return (steps[-1].location / "index.html").read().decode()


def test_a_recipe_without_a_kind_of_step_has_no_such_section(tiny, html):
    steps = artifacts(tiny)
    bare = page_of({"exam": steps["exam"]})
    for section in ("rejected", "duplicates", "leaks", "clusters", "classes", "training", "accuracy", "patches",
                    "backbones", "thresholds"):  # fmt: skip
        assert f'id="{section}"' in html
        assert f'id="{section}"' not in bare
    Page(bare)


def test_pictures_are_bounded_and_can_be_left_out(tiny, html):
    assert len(html) < MAX_BYTES
    few = Page(page_of(artifacts(tiny), n_pairs=1, n_images=2, n_clusters=3, n_rejected=1, n_maps=2))
    n_pair_sections = 1 + 4 + 2 + 2 + 1  # dedup, references, what components join, retrieve, calibrate
    n_hierarchies = sum(entry.stage == "cluster" for entry in artifacts(tiny).values())
    in_clusters = n_hierarchies * (3 * 2 + 3 * browser.N_CHILDREN * 2)
    assert len(few.images()) <= 2 * 3 * n_pair_sections + in_clusters + 3 + 3 * 2
    none = Page(page_of(artifacts(tiny), n_pairs=0, n_images=0, n_clusters=0, n_rejected=0, n_classes=0, n_maps=0))
    assert not none.images()
    with pytest.raises(ValueError, match=r"report\.n_pairs must be in 0\.\.48: got 49"):
        ReportConfig(n_pairs=49)


def test_a_file_that_has_gone_costs_its_picture_alone(tiny, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 24, 3), np.uint8)).save(folder / f"{i}.png")
    small_page(folder, tmp_path)
    (folder / "3.png").unlink()
    steps = {name: artifact for name, artifact in read_root(Location(str(tmp_path / "root"))).items() if name != "page"}
    page = Page(page_of(steps))
    assert len(page.images()) == 4 and page.words().count("no picture") == 1


def test_even_classes_count_fully():
    assert balance({"a": 5, "b": 5, "c": 0}) == {
        "images": 10,
        "classes": 2,
        "effective": pytest.approx(2.0),
        "ratio": 1.0,
    }
    assert balance({})["images"] == 0
    assert 1 < balance({"a": 99, "b": 1})["effective"] < 1.1


@pytest.mark.parametrize("seed", range(10))
def test_boxes_of_a_picture_do_not_overlap_and_arrows_lead_down(seed):
    rng = np.random.default_rng(seed)
    names = [f"step{i}" for i in range(25)]
    inputs = {
        name: rng.choice(names[:i], min(i, int(rng.integers(0, 4))), replace=False).tolist()
        for i, name in enumerate(names)
        if i
    }
    layers, arrows = drawings.layered(names, inputs)
    x = drawings.place(layers, arrows)
    level = {name: i for i, layer in enumerate(layers) for name in layer}
    assert all(level[b] == level[a] + 1 for a, b in arrows)
    reached = {(a.partition("|")[0], b) for a, b in arrows if "|" not in b}
    assert reached == {(source, name) for name, some in inputs.items() for source in some}
    for layer in layers:
        for left, right in pairwise(sorted(layer, key=x.get)):
            assert x[right] - x[left] >= drawings.half_width(left) + drawings.half_width(right) + drawings.GAP_X - 1e-6
    assert min(x[name] - drawings.half_width(name) for name in level) >= 0


@pytest.mark.parametrize("highest", [0.003, 0.9, 1, 4.7, 250, 99_999])
def test_ticks_are_few_round_and_reach_the_top(highest):
    ticks = drawings.nice_ticks(highest)
    assert ticks[0] == 0 and ticks[-1] >= highest * (1 - 1e-9) and 2 <= len(ticks) <= 7


def test_the_truth_of_a_pool_is_noticed_when_it_changes(tmp_path):
    path = tmp_path / "labels.parquet"
    listed = []
    for label in ("a", "b"):
        pq.write_table(pa.table({"source": ["x.png"], "label": [label]}), path)
        listed.append(STAGE.look(ReportConfig(labels=str(path)))[0])
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / "other.parquet")
    assert listed[0] != listed[1]
    assert STAGE.look(ReportConfig(labels=str(tmp_path / "elsewhere" / "other.parquet")))[0] == listed[1]
