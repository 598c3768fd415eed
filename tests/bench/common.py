"""What all benchmarks share: their arguments, interleaved timing, the machine, and the report."""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: ``--rows --data --seed --json``. Add to it, then ``parse_args()``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, help="rows of a case; default: each case's own")
    parser.add_argument("--data", type=Path, help="use this data instead of generated or sample data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here, a list of objects")
    return parser


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int = 5, before: Callable[[str], object] = str
) -> dict[str, float]:
    """Median seconds of each case. The cases take turns, so that what slows the machine slows all of them.

    Every case runs once before, untimed: compilers, caches. The order is turned round every time. ``before`` is called
    with the name of a case each time, untimed: to clear away what the last time left.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-1, repeats):
        for name, case in sorted(cases.items(), reverse=repeat % 2 == 1):
            before(name)
            start = time.perf_counter()
            case()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mb() -> float:
    """The most memory that this process or one of its ended children has had, in MB (10^6 bytes)."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return round(max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024 / 1e6, 1)


def most_mb(pid: int) -> float:
    """The most memory that a process has had, in MB. Not ``getrusage``: a child's begins with its parent's."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match, pid
    return round(int(match[1]) * 1024 / 1e6, 1)


def ray_workers() -> list[int]:
    """The processes below this one that do tasks for Ray."""
    pids = below(os.getpid())
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")]


def below(pid: int) -> Iterator[int]:
    """The processes that a process has started, and theirs."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from below(int(child))


def machine() -> str:
    """Processor, cores this process may use, memory, Python."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        model = next((value.strip() for name, _, value in lines if name.strip() == "model name"), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory:.0f} GB, Python {platform.python_version()}"


def report(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, missed: Sequence[str] = ()) -> int:
    """Print a table of the results and write ``--json``. Returns the exit code.

    A row has ``case``, ``ours``, ``peer``, ``peer_name``, ``ratio``, ``unit``, ``rows``, ``peak_mb`` and what else is
    told of the case; ``machine`` is added. The code is 1 when a row's ``equal`` is False, or when ``missed`` names
    floors that were not met: they are printed to stderr.
    """
    here = machine()
    done = [{**row, "machine": here} for row in rows]
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    cells: list[list[str]] = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for cell_row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(cell_row, widths, strict=True)).rstrip())
    print(here)
    if args.json:
        args.json.write_text(json.dumps(done, indent=1) + "\n")
    missed = [*missed, *(f"{row['case']}: not equal" for row in rows if row.get("equal") is False)]
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
