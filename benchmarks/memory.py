"""The memory that a process and its descendants hold together, seen from outside (Linux)."""

import threading
from pathlib import Path
from typing import Self

INTERVAL_SECONDS = 0.02
MIB = 1024  # /proc counts in KiB


class PeakMemory:
    """The most that the processes below `process_id` held at one time, while the `with` block ran.

    Pages of their own are added up. Pages of files (libraries) and of shared memory, which several processes map
    but the machine holds once, count once: as much as the process with the most of them has. Resident sizes
    added up would count a library again for each process that has loaded it.
    """

    def __init__(self, process_id: int):
        self.peak_mib = 0.0
        self._root = process_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            sizes = [size for pid in family(self._root) if (size := resident(pid))]
            if sizes:
                own, files, shared = zip(*sizes, strict=True)
                self.peak_mib = max(self.peak_mib, (sum(own) + max(files) + max(shared)) / MIB)


def family(process_id: int) -> list[int]:
    """The process and its descendants."""
    found = [process_id]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # the thread has just ended
                continue
    return found


def resident(process_id: int) -> tuple[int, int, int] | None:
    """KiB of anonymous, file and shared memory in a process's resident set; None if it has ended."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    if "RssAnon" not in sizes:  # a process that has ended and was not waited for
        return None
    anonymous, files, shared = (int(sizes[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem"))
    return anonymous, files, shared
