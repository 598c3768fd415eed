"""The bytes of samples, from tars that stay open: opening one for every image costs as much as reading the image."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from curation.listing import Root
from curation.store import Location
from training.stream import Sample, locate_tars, read_remote, shard_there

_OPEN = 64  # tars; a group of open shards, and that of several components of a mix


class Reader:
    """Reads the samples of a shard set; keeps at most 64 tars open, which end with it."""

    def __init__(self, shards: Location, root: Root | None = None) -> None:
        """``root``: as ``training.stream.locate_tar``."""
        self._shards, self._root = shards, root
        self._open: OrderedDict[int, int] = OrderedDict()  # shard to file, the one not used for longest first

    def __call__(self, samples: Sequence[Sample]) -> Iterator[bytes]:
        """The encoded bytes of each sample in turn, short or empty where the shard is.

        From local tars one at a time, so that a batch is never held; those of tars on S3 all at once, several requests
        at a time. Raises what ``training.stream.locate_tar`` does.
        """
        tars = locate_tars(self._shards, samples, self._root)
        remote = iter(read_remote(tars, samples))
        for sample in samples:
            tar = tars[sample.shard]
            if tar.is_local:
                yield os.pread(self._file(sample.shard, tar), sample.length, sample.offset)
            else:
                yield next(remote)

    def _file(self, shard: int, tar: Location) -> int:
        if shard not in self._open:
            if len(self._open) == _OPEN:
                os.close(self._open.popitem(last=False)[1])
            with shard_there(tar):
                self._open[shard] = os.open(tar.path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
