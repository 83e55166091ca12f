"""A run on the ranks of a `torchrun`: how they come together, and what each does when another is gone.

Ranks wait for one another within every step. One that was killed would be waited for until a timeout, so each watches
the processes of the others on its machine and ends itself with a sentence when one is gone; what the run had saved is
there to go on from. On other machines `torchrun` ends the ranks, half a minute after it asked them to stop.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from whorl.faults import intact
from whorl.learning.ranks import from_every_rank, this_rank
from whorl.reporting.run_directory import RunDirectory

TIMEOUT = timedelta(hours=1)
"""Longest wait for another rank that is alive: one may still generate while the other has nothing left to do."""

LAST_WORDS = timedelta(minutes=1)
"""What a rank that stops early leaves rank 0 for its report."""

WATCH = "watch of the ranks"

SAID = "said"
"""The key that rank 0 sets when it has said all."""

GRACE_SECONDS = 5.0
"""What stops all ranks alike stops this one too, in its own words, before so much time has passed."""


def is_launched() -> bool:
    """Whether this process is one of several that `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def introduced() -> Iterator[None]:
    """Within, the ranks know each other; in a process of its own nothing happens.

    ValueError if there are fewer GPUs than ranks.
    """
    if not is_launched():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} ranks here, and there are {count} GPUs; use "
                f"--nproc-per-node {count}"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    global _present
    _present = watch = _Watch()
    # torchrun sends it to all ranks as soon as one has ended, and would cut short what this one has to say.
    signal.signal(signal.SIGTERM, lambda number, frame: watch.asked.set())
    try:
        yield
        if not watch.ended:
            dist.barrier()
    except BaseException as error:
        if _is_lost_connection(error):
            watch.over.wait(2 * GRACE_SECONDS)  # the watching thread says who is gone, and ends this process
        watch.end(f"{type(error).__name__}: {error}")
        raise
    finally:
        watch.finish()
    if not watch.ended:
        dist.destroy_process_group()


def notes_go_to(directory: RunDirectory) -> None:
    """Let the reason be written there when a rank is gone."""
    if _present is not None:
        _present.directory = directory


def ends_early(reason: str) -> None:
    """Say that this rank stops, and why: those that do not stop for the same reason wait for it in vain."""
    if _present is not None:
        _present.end(reason)


class _Watch:
    """A thread of each rank that waits for the end of any other."""

    def __init__(self) -> None:
        self.over, self.asked = threading.Event(), threading.Event()
        self.ended = False
        """Whether this rank stops, for a reason that the others know."""
        self.directory: RunDirectory | None = None
        told = from_every_rank((os.environ.get("GROUP_RANK"), os.getpid()))
        self._rank, self._num_ranks = this_rank(), len(told)
        here = told[self._rank][0]
        self._ids = {r: pid for r, (node, pid) in enumerate(told) if node == here and r != self._rank}
        # Where the system has no such descriptors (other than Linux), torchrun's own message has to do.
        can = hasattr(os, "pidfd_open")
        self._processes = {os.pidfd_open(pid): rank for rank, pid in self._ids.items()} if can else {}
        # A connection of its own: the other one may be waiting for an answer.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, port, is_master=False, timeout=TIMEOUT
        )
        self._prefix = f"whorl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._thread = threading.Thread(target=self._watch, name=WATCH, daemon=True)
        self._thread.start()

    def end(self, reason: str) -> None:
        self.ended = True
        self._set(str(self._rank), reason)

    def finish(self) -> None:
        """Stop watching. A rank that ends early lets rank 0 finish first, whom torchrun would end with it."""
        if self._rank == 0:
            self._set(SAID, "")
        elif self.ended:
            with contextlib.suppress(RuntimeError):
                self._store.wait([f"{self._prefix}/{SAID}"], LAST_WORDS)
        self.over.set()
        # Python unwinds what is left of a daemon thread at its end, and aborts if that is inside a call of the store.
        self._thread.join(GRACE_SECONDS)

    def _watch(self) -> None:
        while not self.over.is_set():
            gone = _wait_for(list(self._processes), 0.5)
            lost = {self._processes[descriptor]: "" for descriptor in gone} | self._reasons()
            if not lost and not self.asked.is_set():
                continue
            if self.over.wait(GRACE_SECONDS) or self.ended:
                return
            if lost:
                self._end(lost | self._reasons())
            os._exit(128 + signal.SIGTERM)  # asked to end where no step is in work that could be finished

    def _end(self, lost: dict[int, str]) -> None:
        """Say who is gone, once, and end this process: its main thread may wait for ever."""
        first = min(lost)
        reason = f"rank {first} stopped: {lost[first]}"
        if not lost[first]:
            reason = f"rank {first} (process {self._ids[first]}) is gone: it was killed, by hand or for want of memory"
        elif first == self._num_ranks:
            reason = lost[first]
        if self.directory is not None and "whorl resume" not in reason:
            reason += (
                f". {intact(self.directory)}; `whorl resume {self.directory.path}` goes on with the run, on any number "
                "of ranks"
            )
        has_spoken = first == 0 and lost[first]
        if self._rank == min(set(range(self._num_ranks)) - set(lost)) and not has_spoken:
            if self.directory is not None:
                RunDirectory.stopped_early(self.directory, reason)
            print(f"error: {reason}", file=sys.__stderr__, flush=True)
        if self._rank == 0:
            self._set(SAID, "")
        os._exit(1)

    def _set(self, key: str, text: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self._prefix}/{key}", text)

    def _reasons(self) -> dict[int, str]:
        """Of the ranks that stop and said why; as if of one more, if there is nobody left to ask."""
        keys = {rank: f"{self._prefix}/{rank}" for rank in range(self._num_ranks) if rank != self._rank}
        try:
            return {r: self._store.get(key).decode() for r, key in keys.items() if self._store.check([key])}
        except RuntimeError:
            return {self._num_ranks: "torchrun, which started the ranks, is gone"}


_present: _Watch | None = None
"""The watch of this process, if it is a rank."""


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank was not there."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _wait_for(processes: list[int], seconds: float) -> list[int]:
    """Those of the processes (descriptors) that have ended, as soon as one has or the time is over."""
    poll = select.poll()
    for descriptor in processes:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(1000 * seconds)]
