"""Sources with wildcards."""

import pytest

from curation.listing import list_source, source_root
from curation.store import Location

NAMES = ["a.jpg", "b.png", "sub/a.jpg", "sub/deep/a.jpg", "sub/deep/[1] x.jpg", "photos [old]/c.jpg", "train-0.parquet"]


@pytest.fixture
def there(place):
    for name in NAMES:
        (place / name).write(b"x")
    return place


@pytest.mark.parametrize(
    ("pattern", "root", "names"),
    [
        ("*.jpg", "", ["a.jpg"]),
        ("?.*", "", ["a.jpg", "b.png"]),
        ("**/*.jpg", "", ["a.jpg", "photos [old]/c.jpg", "sub/a.jpg", "sub/deep/[1] x.jpg", "sub/deep/a.jpg"]),
        ("sub/**/a.jpg", "sub", ["a.jpg", "deep/a.jpg"]),
        ("sub/*/a.jpg", "sub", ["deep/a.jpg"]),
        ("[ab].*", "", ["a.jpg", "b.png"]),
        ("[!a].*", "", ["b.png"]),
        ("train-*.parquet", "", ["train-0.parquet"]),
        ("photos [old]/*.jpg", "photos [old]", ["c.jpg"]),
        ("photos [old]", "photos [old]", ["c.jpg"]),
        ("sub/deep/[1] x.jpg", "sub/deep", ["[1] x.jpg"]),
    ],
)
def test_a_pattern_finds_names_below_the_folder_before_it(there, pattern, root, names):
    source = there / pattern
    listing = list_source(source)
    assert [entry.name for entry in listing.entries] == names
    assert listing.root == source_root(source)
    assert listing.root.uri.rstrip("/") == (there / root).uri.rstrip("/")


def test_a_pattern_that_fits_nothing_is_named(there):
    with pytest.raises(FileNotFoundError, match=r"no file that fits .*/\*\.tiff"):
        list_source(there / "*.tiff")
    with pytest.raises(FileNotFoundError, match="no file that fits"):
        list_source(there / "nowhere/*.jpg")


def test_a_pattern_may_be_relative(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert [entry.name for entry in list_source(Location("*.jpg").resolved()).entries] == ["a.jpg"]


def test_a_pattern_does_not_find_what_runs_wrote(there):
    (there / "runs/mine/run.json").write(b'{"steps": {}}')
    (there / "runs/mine/shards/1/a.jpg").write(b"x")
    assert not [e for e in list_source(there / "**/a.jpg").entries if e.name.startswith("runs/")]
    with pytest.raises(ValueError, match="must not be the root of a run"):
        list_source(there / "runs/mine/*.jpg")


def test_a_pattern_that_means_nothing_is_named(there):
    with pytest.raises(ValueError, match=r"a pattern must be .* got .*img\[9-0\]"):
        list_source(there / "img[9-0].png")
