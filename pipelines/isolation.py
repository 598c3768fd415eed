"""What was in work when a process ended is decoded in isolation when it is tried again.

A part is noted in scratch while its images are decoded. A note that is already there says that somebody died with it:
a decoder crashed or hung, or the machine was lost. Then every image is decoded in a process of its own (see
``embedding.isolate``), which costs time and changes no byte; it works alike for another worker and for another run.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from curation.store import Location
from embedding.isolate import Call, guarded


@contextmanager
def decoding(note: Location, apart: Call | None = None) -> Iterator[Call]:
    """What to call decoders through while the part of this note is in work: ``call(fn, data, *args)``.

    apart: what calls in other processes anyway, and so in isolation. The note goes when the block ends well.
    """
    died = note.exists()
    if not died:
        note.write(b"")
    with guarded(isolated=died) if apart is None else nullcontext(apart) as call:
        yield call
    note.delete()
