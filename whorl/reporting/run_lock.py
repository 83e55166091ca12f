"""One process at a time writes a run directory: an advisory lock on its file `lock`."""

import fcntl
import os
import weakref
from pathlib import Path

_held: "weakref.WeakValueDictionary[Path, RunLock]" = weakref.WeakValueDictionary()


class RunLock:
    """The right to write one run directory, until this object or its process is gone.

    The system takes a lock back when its owner dies, however that was, so one left behind never blocks. The
    file only names the owner. Where the file system has no locks (some network ones) nothing is refused.
    """

    def __init__(self, directory: Path) -> None:
        # Python's descriptors are closed in child processes, which would else hold the lock after the run died.
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            raise ValueError(
                f"another process (id {owner}) is at work on the run {directory}; wait for it or stop it first"
            ) from None
        except OSError:
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def lock(directory: Path) -> RunLock:
    """Take the lock of a run directory, or share the one that this process has.

    ValueError if another process has it, OSError if the directory cannot be written.
    """
    place = directory.resolve()
    found = _held.get(place)
    if found is None:
        _held[place] = found = RunLock(place)
    return found
