"""``index``: WebDataset tars that came without an index, made ready for training; no byte of them is copied.

One part a tar, in the order of their names. Counts: ``rows`` are the samples that were looked at; ``kept`` are indexed;
``dropped`` have a key that an earlier sample of their tar has; ``bad`` are all others, by reason in ``rejected-*``.
``shards`` are the tars, ``broken_tars`` those of them that break off or are none: what they have cost nobody knows.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.execute import Executor
from curation.listing import ARCHIVE_SUFFIXES, Listing, Root, file_at, list_source, suffix, why_lost
from curation.store import Entry, Location
from pipelines.errors import UserError
from pipelines.stage import FOUND, Inputs, Output, Stage
from pipelines.stages.pool import check_bad
from training.stream import ShardChangedError, ShardGoneError
from training.tar_index import BAD_SAMPLES, BROKEN_TARS, CompressedTarError, IndexConfig, index_tar

UNPACK_HINT = "unpack it first, as with gunzip: an image is then read at its place, without what is before it"
OWN_INDEX = re.compile(r"(.*/)?part-\d{7,}\.parquet")  # of shards that were made here
OWN_SHARD = re.compile(r"(.*/)?shard-\d{7,}\.tar")


def look(config: IndexConfig) -> tuple[Sequence[Entry], Listing]:
    """List the tars, the same names as a pool of them has."""
    source = Location(config.source).resolved()
    try:
        listing = list_source(source)
    except ValueError as e:
        raise UserError(str(e), f"index reads plain tars; {UNPACK_HINT}") from e
    names = [entry.name for entry in listing.entries]
    packed = [name for name in names if name.lower().endswith(ARCHIVE_SUFFIXES) and suffix(name) != ".zip"]
    if packed:
        raise UserError(f"index.source must hold plain tars: got compressed {packed[0]} in {source}", UNPACK_HINT)
    if any(map(OWN_INDEX.fullmatch, names)) and any(map(OWN_SHARD.fullmatch, names)):
        raise UserError(
            f"index.source must hold tars without an index: got shards with one in {source}",
            "finished shards are trained on as they are: openlvd train --shards PATH; finish those that are not first",
        )
    tars = [entry for entry in listing.entries if suffix(entry.name) == ".tar"]
    if not tars:
        raise UserError(
            f"index.source must hold WebDataset tars: got none in {source}",
            "images in folders or Parquet files go through pool and shards first; or: openlvd balance-folder",
        )
    ignored = listing.ignored + len(listing.entries) - len(tars) + len(listing.sides)
    return tars, Listing(listing.root, tars, ignored)


def run(config: IndexConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write ``part-*``, the index of a tar each, and ``rejected-*``, what is left out of it."""
    listing: Listing = inputs[FOUND]
    items = [(i, entry.name) for i, entry in enumerate(listing.entries)]
    names = [[part_name(i, "rejected"), part_name(i)] for i, _ in items]
    out.make(partial(write_index, root=listing.root, out=out.location), items, names)
    counts = {"rows": 0, "kept": 0, "dropped": 0, "bad": 0, **add_counts(file.counts for file in out.files)}
    broken = sum(counts.get(reason, 0) for reason in BROKEN_TARS)
    counts |= {"shards": len(items), "broken_tars": broken, "ignored_files": listing.ignored}
    check_tars(config.max_bad_fraction, counts, out)
    check_bad(config.max_bad_fraction, counts, out, BAD_SAMPLES)
    if counts["kept"] == 0:
        raise UserError(
            f"the tars must hold at least one sample: got none in {len(items)} of {config.source}",
            "a sample is an image in a tar, such as 0001.jpg; the rejected-*.parquet files say what else there is",
        )
    return counts


def check_tars(most: float, counts: Counts, out: Output) -> None:
    """Stop when more than a share ``most`` of the tars break off or are none, with the first of them."""
    if counts["broken_tars"] <= most * counts["shards"]:
        return
    names = sorted(file.name for file in out.files if any(file.counts.get(reason) for reason in BROKEN_TARS))
    examples = []
    for name in names[:3]:
        table = read_table(out.location / name, ["source", "reason", "detail"])
        (row,) = table.filter(pc.is_in(table["reason"], pa.array(BROKEN_TARS))).to_pylist()
        examples.append(f"{row['source']} ({row['detail']})")
    raise UserError(
        f"at most {most:.3g} of the tars may break off or be none (max_bad_fraction): "
        f"got {counts['broken_tars']} of {counts['shards']}, first {'; '.join(examples)}",
        "fetch the tars named again; raise max_bad_fraction to train on what is before the break",
    )


def write_index(item: tuple[int, str], root: Root, out: Location) -> list[FileInfo]:
    """Index one tar; of one on S3 a temporary local copy is read. Raises UserError for one that cannot be read."""
    number, name = item
    tar = file_at(root, name)
    try:
        with tar.local_copy() as path:
            found = index_tar(path, name)
    except CompressedTarError as e:
        raise UserError(f"{tar} must be a plain tar: it is compressed", UNPACK_HINT) from e
    except OSError as e:
        hint = "put it back, or run again: the tars are listed anew"
        raise UserError(f"{tar} must be one of the tars: it {why_lost(tar, e)}", hint) from e
    n_kept, n_out = len(found.rows), len(found.left_out)
    reasons = {str(one["values"]): int(one["counts"]) for one in found.left_out["reason"].value_counts().to_pylist()}
    bad, broken = (sum(reasons.get(reason, 0) for reason in some) for some in (BAD_SAMPLES, BROKEN_TARS))
    n_out -= broken  # a tar is no sample
    counts = {"rows": n_out, "dropped": n_out - bad, "bad": bad, **dict(sorted(reasons.items()))}
    kept = {"rows": n_kept, "kept": n_kept, "seen_per_epoch": n_kept, "unused_images": found.unused_images}
    return [
        write_table(out / part_name(number, "rejected"), found.left_out, counts),
        write_table(out / part_name(number), found.rows, kept),
    ]


@contextmanager
def unchanged_shards() -> Iterator[None]:
    """A block that reads shards. Raises UserError when a tar is gone, or is not the one that was indexed."""
    try:
        yield
    except (ShardGoneError, ShardChangedError) as e:
        raise UserError(str(e), "put the tar back as it was, or make the index (or the shards) anew") from e


STAGE = Stage(version=1, config=IndexConfig, run=run, locations=("source",), look=look)
