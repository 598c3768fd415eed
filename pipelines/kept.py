"""The kept images of a folder as files, and a list of the others.

Files go under the name they have in their source, those of a tar or Parquet file below the name of that file. A record
of what was written stands in the root of the run, so that the next run knows its own files from the user's: it never
writes over or removes a file that somebody changed, nor one whose image is no longer in the source.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Artifact, Counts, add_counts, part_name, read_table, write_table
from curation.decontaminate import is_among
from curation.embeddings import embedding_parts
from curation.execute import Executor, Ref, on_worker
from curation.listing import file_at
from curation.pool import source_of_part
from curation.sources import read_checked
from curation.store import SIDE_PREFIX, Location, file_sha256
from curation.tar_writer import EXTENSIONS
from pipelines.fingerprint import content_id
from pipelines.rows import by_part, unchanged_images

MAX_PIECE, MAX_NAME = 255, 1024  # bytes of a file's own name, and of its path below the folder
NAME_COLUMNS = ["source", "member", "offset", "key", "format"]
CSV_COLUMNS = ("file", "reason", "copy_of", "similarity", "detail")
RECORDS, PIECES, DROPPED = "kept", "dropped", "dropped.csv"  # below the root


class Folder(NamedTuple):
    """What a run has decided about a folder of images, and where the kept ones go."""

    pool: Artifact
    vectors: Artifact
    unique: Artifact
    kept: Path
    root: Location

    @property
    def record(self) -> Location:
        """Where the names of this decision are: a Parquet file a part, and ``done`` when all files were written."""
        return self.root / RECORDS / content_id([self.pool.digest, self.unique.digest])[:16]


class Names(NamedTuple):
    """Hashes of the names of files, and of the folders they are in."""

    files: np.ndarray  # uint64 (n,), in any order
    folders: np.ndarray  # uint64 (m,), ascending, each once


class Copies(NamedTuple):
    """Which row stays for each image that stands in the source more than once."""

    key: np.ndarray  # uint64 (n,), ascending: first bytes of its key
    row_id: np.ndarray  # int64 (n,), -1 where none of its kind could be used


class Known(NamedTuple):
    """What earlier runs have written, and what there is to choose from now."""

    ours: np.ndarray  # uint64, ascending: hashes of name and key
    keys: np.ndarray  # uint64, ascending: first bytes of the keys in the pool


def write_kept(folder: Folder, executor: Executor) -> Counts:
    """Write the kept images and ``dropped.csv``. Counts ``copied``, ``there``, ``edited``, ``removed`` and ``left``.

    A file that is there is left as it is, unless it is a copy that this program wrote of an image that is still in
    the source. ``edited`` are kept images whose file somebody changed, ``left`` are earlier files whose image is no
    longer in the source. Holds 8 bytes a row in one task. Raises TaskError when an image is not what the pool saw.
    """
    folder.kept.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    items = range(len(folder.pool.parts))
    clash = on_worker(
        executor, clashing, {"names": executor.reduce(partial(names_of_part, folder.pool), items, add_names)}
    )
    for _ in executor.map(partial(write_record, folder=folder), items, {"clash": clash}):
        pass
    finished = (folder.record / "done").exists() and not earlier_records(folder)
    known, gone = know(folder, executor)
    moved = executor.map(
        partial(remove_gone, folder=folder), earlier_records(folder), {"known": known, "planned": gone}
    )
    counts = add_counts(moved)
    work = partial(write_part, folder=folder, finished=finished)
    counts = add_counts([{"removed": 0, "left": 0}, counts, *executor.map(work, items, {"known": known})])
    write_dropped(folder, clash, executor)
    (folder.record / "done").write(b"")
    for record in {location.parent for location in earlier_records(folder)}:
        record.delete()
    return counts


def sweep(folder: Folder) -> None:
    """Remove what a killed run left unfinished among the files; the root of the run sweeps its own."""
    for child in folder.kept.iterdir():
        if child.name.startswith(SIDE_PREFIX):
            child.unlink()
        elif not child.is_symlink() and str(child) != folder.root.uri:
            Location(str(child)).sweep()


def hashed(text: str) -> int:
    """The first 8 bytes of the sha256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def hash_all(texts: Iterator[str]) -> np.ndarray:
    """uint64 (n,): ``hashed`` of each text."""
    return np.fromiter((hashed(text) for text in texts), np.uint64)


def key_heads(keys: pa.ChunkedArray) -> np.ndarray:
    """uint64 (n,): the first 8 bytes of hex sha256 keys."""
    heads = "".join(pc.utf8_slice_codeunits(keys, 0, 16).to_pylist())
    return np.frombuffer(bytes.fromhex(heads), ">u8").astype(np.uint64)


def join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The values of both, ascending, each once."""
    return np.union1d(a, b)


def clean_pieces(name: str) -> list[str]:
    """The pieces of a path that lead further down, never up or out."""
    return [piece for piece in name.split("/") if piece not in ("", ".", "..")]


def own_name(row: dict[str, Any]) -> str:
    """A file name made of the key."""
    return f"{row['key']}.{EXTENSIONS.get(row['format'], row['format'])}"


def plain_name(row: dict[str, Any]) -> str:
    """Where an image goes below the folder: its name in the source, of which nothing leads out of the folder.

    Images in a container go below its name; one without a name, or whose name no file can have, is called by its key.
    """
    inside = row["offset"] is not None
    above = clean_pieces(row["source"])
    pieces = [*above, *(clean_pieces(row["member"] or "") or [own_name(row)])] if inside else above
    name = "/".join(pieces)
    if "\0" in name or len(name.encode()) > MAX_NAME or max(len(piece.encode()) for piece in pieces) > MAX_PIECE:
        return "/".join([*(above if inside and len(row["source"].encode()) <= MAX_PIECE else []), own_name(row)])
    return name


def beside(name: str, own: str) -> str:
    """The name of a file in the same folder."""
    return name[: name.rfind("/") + 1] + own


def names_of_part(pool: Artifact, index: int) -> Names:
    """The names of the images of a part, and of the folders above them."""
    names = [plain_name(row) for row in read_table(pool.part(index), NAME_COLUMNS).to_pylist()]
    above = {str(folder) for name in names for folder in Path(name).parents}
    return Names(hash_all(iter(names)), np.unique(hash_all(iter(above))))


def add_names(a: Names, b: Names) -> Names:
    """Both, for ``executor.reduce``."""
    return Names(np.concatenate([a.files, b.files]), join(a.folders, b.folders))


def clashing(names: Names) -> np.ndarray:
    """uint64, ascending: the names that two images have, or that are a folder of another image."""
    files, n = np.unique(names.files, return_counts=True)
    return join(files[n > 1], np.intersect1d(files, names.folders))


def final_names(table: pa.Table, clash: np.ndarray) -> list[str]:
    """The names of pool rows; where ``plain_name`` would be another's too, the key is the name."""
    rows = table.select(NAME_COLUMNS).to_pylist()
    names = [plain_name(row) for row in rows]
    taken = is_among(hash_all(iter(names)), clash).tolist()
    return [beside(name, own_name(row)) if twice else name
            for name, row, twice in zip(names, rows, taken, strict=True)]  # fmt: skip


def kept_rows(folder: Folder, index: int) -> np.ndarray:
    """int32 (n,): the rows of a part that stay."""
    table = read_table(folder.unique.part(index), ["row", "kept"])
    rows: np.ndarray = table["row"].to_numpy()[table["kept"].to_numpy()]
    return rows


def write_record(index: int, folder: Folder, clash: np.ndarray) -> None:
    """Note the name and key of every kept image of a part, before the first of them is written."""
    table = read_table(folder.pool.part(index)).take(pa.array(kept_rows(folder, index)))
    named = pa.table({"name": pa.array(final_names(table, clash), pa.string()), "key": table["key"]})
    own = pa.array([own_name(row) for row in table.select(["key", "format"]).to_pylist()], pa.string())
    write_table(folder.record / part_name(index), named.append_column("own", own))


def earlier_records(folder: Folder) -> list[Location]:
    """The records of runs that decided otherwise."""
    records = folder.root / RECORDS
    now = folder.record.name + "/"
    return [records / entry.name for entry in records.list()
            if entry.name.endswith(".parquet") and not entry.name.startswith(now)]  # fmt: skip


def know(folder: Folder, executor: Executor) -> tuple[Known | Ref[Known], np.ndarray | Ref[np.ndarray]]:
    """What earlier runs wrote, and hashes of the names that this one will; both empty when there was none."""
    none = np.zeros(0, np.uint64)
    earlier, items = earlier_records(folder), range(len(folder.pool.parts))
    if not earlier:
        return Known(none, none), none
    ours = executor.reduce(pairs_of_record, earlier, join)
    keys = executor.reduce(partial(keys_of_part, folder.pool), items, join)
    planned = executor.reduce(names_of_record, [folder.record / part_name(i) for i in items], join)
    return on_worker(executor, Known, {"ours": ours, "keys": keys}), planned


def pairs_of_record(record: Location) -> np.ndarray:
    """Hashes of the names in a record together with their keys: of the image's own name, and of that beside it."""
    rows = read_table(record).to_pylist()
    named = [pair_of(name, row["key"]) for row in rows for name in names_for(row)]
    return np.unique(hash_all(iter(named)))


def names_for(row: dict[str, Any]) -> tuple[str, str]:
    """The name of an image in a record, and the one beside it that it gets when somebody has taken that."""
    return row["name"], beside(row["name"], row["own"])


def pair_of(name: str, key: str) -> str:
    """A name and a key as one text."""
    return f"{name}\0{key}"


def keys_of_part(pool: Artifact, index: int) -> np.ndarray:
    """The heads of the keys of a part."""
    return np.unique(key_heads(read_table(pool.part(index), ["key"])["key"]))


def names_of_record(record: Location) -> np.ndarray:
    """Hashes of the names in a record."""
    return np.unique(hash_all(name for row in read_table(record).to_pylist() for name in names_for(row)))


def has(ascending: np.ndarray, value: int) -> bool:
    """Whether a value is among ascending ones."""
    return bool(is_among(np.array([value], np.uint64), ascending)[0])


def remove_gone(record: Location, folder: Folder, known: Known, planned: np.ndarray) -> Counts:
    """Remove the unchanged files that an earlier run wrote of images that are copies now, and still in the source.

    What a link leads to is not a file of this folder, and may be an original: it stays, and so does the link.
    """
    counts, kept = {"removed": 0, "left": 0}, folder.kept.resolve()
    for row in read_table(record).to_pylist():
        for name in names_for(row):
            path = folder.kept / name
            if has(planned, hashed(name)) or not path.is_file() or path.resolve() != kept / name:
                continue
            if file_sha256(path) != row["key"]:
                continue
            if not has(known.keys, int(row["key"][:16], 16)):
                counts["left"] += 1
                continue
            path.unlink()
            counts["removed"] += 1
            for above in path.relative_to(folder.kept).parents[:-1]:
                if any((folder.kept / above).iterdir()):
                    break
                (folder.kept / above).rmdir()
    return counts


def write_part(index: int, folder: Folder, finished: bool, known: Known) -> Counts:
    """Copy the kept images of a part to where they are not yet, one image in memory at a time."""
    rows = read_table(folder.record / part_name(index)).to_pylist()
    targets = [target_of(row, folder.kept, finished, known) for row in rows]
    todo = [i for i, (path, _) in enumerate(targets) if path is not None]
    counts = add_counts([{"copied": 0, "there": 0, "edited": 0}, *({said: 1} for _, said in targets)])
    if not todo:
        return counts
    table = read_table(folder.pool.part(index)).take(pa.array(kept_rows(folder, index)[todo]))
    root, image_column = source_of_part(folder.pool, index)
    images = read_checked(root, table, image_column)
    with unchanged_images():
        for i, row, data in zip(todo, table.select(NAME_COLUMNS).to_pylist(), images, strict=True):
            path = targets[i][0]
            assert path is not None
            check_inside(path, folder.kept)
            Location(str(path)).write(data)
            if root.is_local and row["offset"] is None:  # a photo keeps its time
                times = os.stat(file_at(root, row["source"]).path)  # noqa: PTH116
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return counts


def target_of(row: dict[str, Any], kept: Path, finished: bool, known: Known) -> tuple[Path | None, str]:
    """Where an image must be written, None when nowhere; and what to count it as."""
    name, other = names_for(row)
    path = kept / name
    if not os.path.lexists(path):
        return path, "copied"
    if finished:
        return None, "there"
    found = file_sha256(path) if path.is_file() else ""
    if found == row["key"] or os.path.lexists(kept / other):
        return None, "there"
    if has(known.ours, hashed(pair_of(name, found))):  # ours, of an image that has another name now, or is gone
        return path if has(known.keys, int(found[:16], 16)) else kept / other, "copied"
    if has(known.ours, hashed(pair_of(name, row["key"]))):
        return None, "edited"
    return kept / other, "copied"


def check_inside(path: Path, kept: Path) -> None:
    """A link among the kept files must not lead a write to another place."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.resolve().is_relative_to(kept.resolve()):
        raise ValueError(f"{path} must be in {kept}: a link leads to {parent.resolve()}")


def write_dropped(folder: Folder, clash: Ref[np.ndarray], executor: Executor) -> None:
    """Write ``dropped.csv``: bad images and exact copies, then near copies, in the order of the pool."""
    pieces = folder.root / PIECES
    rejected = [file.name for file in folder.pool.files if file.name.startswith("rejected-")]
    items = range(len(folder.pool.parts))
    wanted = executor.reduce(partial(copied_keys, folder.pool), rejected, join)
    copies = executor.reduce(partial(copies_of_part, folder=folder), items, join_copies, {"wanted": wanted})
    shared = {"clash": clash, "copies": copies}
    for _ in executor.map(partial(write_rejected_rows, folder=folder), rejected, shared):
        pass
    for _ in executor.map(partial(write_near_copies, folder=folder), items, {"clash": clash}):
        pass
    made = [*(pieces / name for name in rejected), *(pieces / part_name(i) for i in items)]
    with (folder.root / DROPPED).side_file() as side, side.open("wb") as file:
        file.write(csv_text([CSV_COLUMNS]))
        for piece in made:
            file.write(piece.read())
    pieces.delete()


def csv_text(rows: list[Any]) -> bytes:
    """Rows as CSV, UTF-8."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def copied_keys(pool: Artifact, name: str) -> np.ndarray:
    """The key heads of exact copies in one file of rejected rows."""
    table = read_table(pool.location / name, ["key", "reason"])
    return np.unique(key_heads(table.filter(pc.equal(table["reason"], "exact_duplicate"))["key"]))


def copies_of_part(index: int, folder: Folder, wanted: np.ndarray) -> Copies:
    """The rows of a part that have exact copies, and the row that stays for each."""
    heads = key_heads(read_table(folder.pool.part(index), ["key"])["key"])
    stays = np.full(len(heads), -1)
    table = read_table(folder.unique.part(index), ["row", "representative"])
    stays[table["row"].to_numpy()] = table["representative"].to_numpy()
    mine = np.flatnonzero(is_among(heads, wanted))
    mine = mine[np.argsort(heads[mine], kind="stable")]
    return Copies(heads[mine], stays[mine])


def join_copies(a: Copies, b: Copies) -> Copies:
    """Both, ascending by key, for ``executor.reduce``."""
    key, row_id = np.concatenate([a.key, b.key]), np.concatenate([a.row_id, b.row_id])
    order = np.argsort(key, kind="stable")
    return Copies(key[order], row_id[order])


def write_rejected_rows(name: str, folder: Folder, clash: np.ndarray, copies: Copies) -> None:
    """The lines of one file of rejected rows: bad images, and exact copies with the file that stays for them."""
    table = read_table(folder.pool.location / name)
    rows = table.to_pylist()
    again = [i for i, row in enumerate(rows) if row["reason"] == "exact_duplicate"]
    heads = key_heads(table.take(pa.array(again, pa.int64()))["key"])
    stays = dict(zip(again, copies.row_id[np.searchsorted(copies.key, heads)].tolist(), strict=True))
    names = names_at(np.unique([row for row in stays.values() if row >= 0]).astype(np.int64), folder, clash)
    lines = [
        (
            "/".join(filter(None, [row["source"], row["member"]])),
            row["reason"],
            names.get(stays.get(i, -1), ""),
            "1" if i in stays else "",
            row["detail"],
        )
        for i, row in enumerate(rows)
    ]
    (folder.root / PIECES / name).write(csv_text(lines))


def write_near_copies(index: int, folder: Folder, clash: np.ndarray) -> None:
    """The lines of one part: images that decoded once and not again, and near copies with the file that stays."""
    pool, start = read_table(folder.pool.part(index), NAME_COLUMNS), int(folder.pool.starts[index])
    bad = read_table(folder.vectors.part(index, "rejected"))
    names = final_names(pool.take(bad["row"]), clash)
    lines = [(name, row["reason"], "", "", row["detail"]) for name, row in zip(names, bad.to_pylist(), strict=True)]
    table = read_table(folder.unique.part(index), ["row", "kept", "representative"])
    table = table.filter(pc.invert(table["kept"]))
    rows, stays = table["row"].to_numpy(), table["representative"].to_numpy()
    similarity = similarities(rows + np.int64(start), stays, folder)
    names = final_names(pool.take(pa.array(rows)), clash)
    at = names_at(np.unique(stays), folder, clash)
    lines += [(name, "near_copy", at[stay], f"{value:.4f}", "")
              for name, stay, value in zip(names, stays.tolist(), similarity.tolist(), strict=True)]  # fmt: skip
    (folder.root / PIECES / part_name(index)).write(csv_text(lines))


def names_at(row_ids: np.ndarray, folder: Folder, clash: np.ndarray) -> dict[int, str]:
    """The names of some rows, int64, ascending; one part in memory at a time."""
    found: list[str] = []
    for index, rows in by_part(row_ids, folder.pool):
        found += final_names(read_table(folder.pool.part(index), NAME_COLUMNS).take(pa.array(rows)), clash)
    return dict(zip(row_ids.tolist(), found, strict=True))


def vectors_at(row_ids: np.ndarray, folder: Folder) -> np.ndarray:
    """float32 (n, d): the vectors of some rows, int64, ascending; one part in memory at a time."""
    parts = embedding_parts(folder.vectors)
    found = [np.zeros((0, folder.vectors.facts["width"]), np.float32)]
    for index, rows in by_part(row_ids, folder.pool):
        covered, x = parts[index].read()
        found.append(x[np.searchsorted(covered, rows)])
    return np.concatenate(found)


def similarities(row_ids: np.ndarray, others: np.ndarray, folder: Folder) -> np.ndarray:
    """float32 (n,): the cosine of each row and another, int64 (n,) each; no chain of copies in between."""
    from curation import loops

    either = np.unique(np.concatenate([row_ids, others]))
    x = vectors_at(either, folder)
    similarity: np.ndarray = loops.pair_dots(x, x, np.searchsorted(either, row_ids), np.searchsorted(either, others))
    return similarity
