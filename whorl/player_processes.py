"""Rollouts on several cores: the problems of a request are divided between processes.

A small model decodes by small operations, between which Python works: a second thread waits for the
interpreter and a second torch thread for the first one, so a further core needs a process of its own. The other
processes map the very memory in which the learner updates its weights and never hold a copy of them.
With each answer comes what they compute for a probe (`whorl/sampling/probe.py`), and it is compared here.

Which process plays a problem follows from the request alone. A rollout's random stream is named by its place
in the whole request and its tokens do not depend on its company, so any number of processes plays the same
rollouts (log-probabilities differ by rounding), and a run with the same number has the same bits again.

The processes are started anew (never forked), without running the user's script again, and end with the run:
when they are closed, at exit, or at the end of file on their standard input, which comes however the run died.

A process says every now and then that its event loop turns. If it falls silent for twice the time that an
environment may take over a rollout, code that never awaits holds it up: it is ended, the rollouts it was to play
have failed, and the next play starts the processes again.
"""

import asyncio
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from whorl.data import Group, Problem
from whorl.environments.base import Environment
from whorl.model.adapter import Lora
from whorl.model.config import ModelConfig
from whorl.model.lora import add_lora
from whorl.model.tokenizer import ChatTokenizer
from whorl.model.transformer import Transformer
from whorl.reporting.console import Advance
from whorl.rollouts import Player, Share, failed_rollout, peak_memory_gib
from whorl.sampling.draw import Sampling
from whorl.sampling.engine import Engine
from whorl.sampling.probe import Probe, probe_gap

MIN_ROLLOUTS = 8  # fewer are played where they are asked for
ALIGNMENT = 64  # bytes; what torch gives tensors of its own


@dataclass(frozen=True)
class _Setup:
    """What a process is told once."""

    environment: Environment
    tokenizer: ChatTokenizer
    seed: int
    rollout_timeout_seconds: float
    config: ModelConfig
    lora: Lora | None
    dtype: torch.dtype
    engine: dict[str, Any]


@dataclass(frozen=True)
class _Request:
    """A part of a request: `play_share`'s arguments, and the version of the weights that play it."""

    numbered: Sequence[tuple[int, Problem]]
    num_samples: int
    sampling: Sampling
    address: tuple[int | str, ...]
    version: int


@dataclass(frozen=True)
class _Answer:
    share: Share
    probe: Probe | None
    num_generated_tokens: int
    num_preemptions: int
    memory_gib: float


@dataclass(frozen=True)
class Failure:
    error: Exception
    trace: str


class ElsewhereError(Exception):
    """The traceback of another process, as the cause of what is raised here."""


READY = "ready"
"""What a process says first. Later come: a number of finished rollouts (0: it is alive), an answer or a failure."""

SIGN_OF_LIFE_SECONDS = 1.0


@dataclass
class PlayerProcesses(Player):
    """A `Player` that plays on `cores` processes, this one included.

    The others are started by `start`, or by the first play that is large enough for them. They need a model on
    the CPU and an environment that can be pickled; ValueError where that is not so. The weights may change
    between plays, in place; not during one.
    """

    cores: int = 1
    probe_gap_limit_nats: float = 1e-5
    _others: "list[_Other]" = field(default_factory=list, init=False, repr=False)
    _mapped: list[int] = field(default_factory=list, init=False, repr=False)
    _end: Callable[[], object] | None = field(default=None, init=False, repr=False)
    _probe_gap_nats: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.cores < 1:
            raise ValueError(f"cores must be at least 1; got {self.cores}")
        if self.cores > 1 and self.sampler.device.type != "cpu":
            raise ValueError(
                f"processes share weights in main memory, and the model is on {self.sampler.device}; use cores=1"
            )

    @property
    def probe_gap_nats(self) -> float:
        """Largest difference between the log-probs of a probe that this process and another computed, in nats."""
        return self._probe_gap_nats

    @property
    def memory_gib(self) -> float:
        """Peak resident memory of each process, added up (what they share counts in each)."""
        return super().memory_gib + sum(other.memory_gib for other in self._others)

    @property
    def process_ids(self) -> list[int]:
        """Of the other processes that were started."""
        return [other.process.pid for other in self._others]

    def start(self) -> None:
        """Start the other processes if they are not there. Returns at once: their imports take seconds."""
        if self.cores == 1:
            return
        model = self.sampler.model
        if self._others and self._mapped == [p.data_ptr() for p in model.parameters()]:
            return
        self.close()  # also if somebody moved the weights: those processes would go on with the old ones
        setup = _pickled_setup(self)
        weights_file, setup_file = _memory_file(), _memory_file()
        try:
            setup_file.write(setup)
            setup_file.flush()
            _map_parameters(model, weights_file.fileno(), write=True)
            self._mapped = [p.data_ptr() for p in model.parameters()]
            self._end = weakref.finalize(self, _close_all, self._others)
            for _ in range(self.cores - 1):
                self._others.append(_Other(setup_file.fileno(), weights_file.fileno()))
        finally:
            weights_file.close()
            setup_file.close()

    def close(self) -> None:
        """End the other processes. A further play starts them again."""
        if self._end is not None:
            self._end()
        self._others, self._end = [], None

    def __enter__(self) -> "PlayerProcesses":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def play(
        self,
        problems: Sequence[Problem],
        num_samples: int,
        sampling: Sampling,
        address: tuple[int | str, ...],
        advance: Advance | None = None,
    ) -> tuple[list[Group], float]:
        """As `Player.play`. What stops one process stops all of them, and is raised here.

        ChildProcessError if a process was killed; an exception of another process has its traceback as its cause.
        """
        if self.cores == 1 or len(problems) == 1 or len(problems) * num_samples < MIN_ROLLOUTS:
            return super().play(problems, num_samples, sampling, address, advance)
        self.start()
        numbered = list(enumerate(problems))
        # Dealt out like cards: problems that are alike, and alike in length, often stand side by side.
        parts = [numbered[first :: self.cores] for first in range(min(self.cores, len(problems)))]
        try:
            shares = asyncio.run(self._play_parts(parts, num_samples, sampling, address, advance))
        except BaseException:
            self.close()  # what they still play would be taken for the answer to the next request
            raise
        if any(other.hung for other in self._others):
            self.close()
        groups: dict[int, Group] = {}
        for part, share in zip(parts, shares, strict=True):
            for (place, problem), group in zip(part, share.groups, strict=True):
                # Copies of the problem came back: everyone here goes on with the one that was given.
                for rollout in group.rollouts:
                    rollout.problem = problem
                groups[place] = Group(problem, group.rollouts)
        last_played = max(share.last_played for share in shares)
        last_judged = max(share.last_judged for share in shares)
        return [groups[place] for place, _ in numbered], last_judged - last_played

    async def _play_parts(self, parts, num_samples, sampling, address, advance) -> list[Share]:
        """The first part here, while the others play theirs."""
        requests = [
            _Request(part, num_samples, sampling, address, self.sampler.version) for part in parts[1:]
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                elsewhere = [
                    tasks.create_task(other.play(request, advance, 2 * self.rollout_timeout_seconds))
                    for other, request in zip(self._others, requests, strict=False)
                ]
                here = tasks.create_task(self.play_share(parts[0], num_samples, sampling, address, advance))
        except ExceptionGroup as several:
            error = several.exceptions[0]
            raise error from error.__cause__
        answers = [task.result() for task in elsewhere]
        self._compare_probes([answer.probe for answer in answers])
        self._generated_elsewhere += sum(answer.num_generated_tokens for answer in answers)
        self._preempted_elsewhere += sum(answer.num_preemptions for answer in answers)
        return [here.result(), *(answer.share for answer in answers)]

    def _compare_probes(self, told: Sequence[Probe | None]) -> None:
        """ValueError if another process played with other weights than those of this one's sampler."""
        expected = self.sampler.probe()
        gaps = [
            probe_gap(
                probe,
                expected,
                limit_nats=self.probe_gap_limit_nats,
                teller=f"process {other.process.pid}, which plays rollouts,",
            )
            for other, probe in zip(self._others, told, strict=False)
            if probe is not None
        ]
        self._probe_gap_nats = max(gaps, default=0.0)


class _Other:
    """One of the other processes, as seen from here."""

    def __init__(self, setup_fd: int, weights_fd: int):
        self._connection, theirs = Pipe()
        # Nothing of the process that starts it is imported again, so a script needs no `if __name__` guard.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {__name__} import serve; serve({theirs.fileno()}, {setup_fd}, {weights_fd})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            pass_fds=(theirs.fileno(), setup_fd, weights_fd),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            process_group=0,  # Ctrl-C is for the run to handle, which then closes this process
        )
        theirs.close()
        self.memory_gib = 0.0
        self.hung = False
        self._ready = False
        self._heard = 0.0
        self._num_finished = 0

    async def play(self, request: _Request, advance: Advance | None, patience_seconds: float) -> _Answer:
        """Let it play its part. Messages are read between the steps of this process's own engine.

        If nothing is heard of it for `patience_seconds` (0: wait for ever), it is ended and its part has failed.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Answer] = loop.create_future()

        def read() -> None:
            try:
                while not answer.done() and self._connection.poll():
                    self._take(self._connection.recv(), request, answer, advance)
            except (EOFError, OSError):
                answer.set_exception(ChildProcessError(self._how_it_died()))
            except Exception as error:
                answer.set_exception(error)

        try:
            if self._ready:
                self._send(request)
        except OSError:
            raise ChildProcessError(self._how_it_died()) from None
        loop.add_reader(self._connection.fileno(), read)
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=patience_seconds or None)
                # What was sent while this process was busy itself has been read by now.
                silent = loop.time() - self._heard
                if self._ready and not answer.done() and 0 < patience_seconds <= silent:
                    return self._give_up(request, advance, silent)
            return answer.result()
        finally:
            loop.remove_reader(self._connection.fileno())

    def _give_up(self, request: _Request, advance: Advance | None, silent: float) -> _Answer:
        self.hung = True
        self.process.kill()
        error = (
            f"environment: the process that played this rollout was ended: it was silent for {silent:.0f} s, twice "
            "the rollout_timeout_seconds, so an episode computes and never awaits (this one or another)"
        )
        groups = [
            Group(problem, [failed_rollout(problem, place, s, error) for s in range(request.num_samples)])
            for place, problem in request.numbered
        ]
        if advance is not None:
            advance(len(request.numbered) * request.num_samples - self._num_finished)
        now = time.monotonic()
        return _Answer(Share(groups, now, now), None, 0, 0, self.memory_gib)

    def _take(self, message: Any, request: _Request, answer: asyncio.Future, advance: Advance | None) -> None:
        self._heard = asyncio.get_running_loop().time()
        if message == READY:
            self._ready = True
            self._send(request)
        elif isinstance(message, int):
            self._num_finished += message
            if advance is not None and message:
                advance(message)
        elif isinstance(message, _Answer):
            self.memory_gib = message.memory_gib
            answer.set_result(message)
        else:
            assert isinstance(message, Failure), f"another process said {message!r}"
            message.error.__cause__ = ElsewhereError(message.trace)
            answer.set_exception(message.error)

    def _send(self, request: _Request) -> None:
        self._heard, self._num_finished = asyncio.get_running_loop().time(), 0
        try:
            self._connection.send(request)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            source = request.numbered[0][1].source
            raise ValueError(
                f"a problem of {source or 'this environment'} cannot be sent to another process ({error}); "
                "keep plain values in it, or use cores=1"
            ) from error

    def _how_it_died(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            ending = "closed its connection"
        else:
            known = -code in set(signal.Signals)
            ending = f"was ended by {signal.Signals(-code).name}" if known else f"ended with exit code {code}"
        return (
            f"a process that plays rollouts {ending}; if memory ran out, use fewer cores, a smaller max_running "
            "or a limit (max_cached_tokens). The run goes on from its newest checkpoint"
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._connection.close()


def _close_all(others: list[_Other]) -> None:
    for other in others:
        other.close()


def _memory_file() -> Any:
    """An open file without a name, in memory where the system has such files.

    Not /dev/shm, which containers often limit to 64 MiB and which kills whoever writes beyond that.
    """
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("whorl"), "w+b")
    return tempfile.TemporaryFile()


def _map_parameters(model: Transformer, fd: int, *, write: bool) -> None:
    """Let the parameters live in the file, each on a storage of its own, in the order of `parameters()`.

    With `write` the file gets their values; without, they get the file's.
    """
    sizes = [-(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT for p in model.parameters()]
    if write:
        os.ftruncate(fd, sum(sizes))
    memory = mmap.mmap(fd, sum(sizes))
    offset = 0
    for parameter, size in zip(model.parameters(), sizes, strict=True):
        shared = torch.frombuffer(memory, dtype=parameter.dtype, count=parameter.numel(), offset=offset)
        shared = shared.view(parameter.shape)
        if write:
            shared.copy_(parameter.data)
        parameter.data = shared
        offset += size


def _pickled_setup(player: Player) -> bytes:
    engine = player.sampler
    if type(player.environment).__module__ == "__main__":
        raise ValueError(
            f"{type(player.environment).__name__} is defined in the script that runs, which other processes do "
            "not import; define it in a module of its own, or use cores=1"
        )
    settings = {
        "stop_tokens": engine.stop_tokens.tolist(),
        "decode_text": engine.decode_text,
        "max_running": engine.max_running,
        "prefill_chunk_tokens": engine.prefill_chunk_tokens,
        "max_cached_tokens": engine.max_cached_tokens,
        "record_experts": engine.record_experts,
    }
    dtype = engine.model.embed_tokens.weight.dtype
    setup = _Setup(
        player.environment,
        player.tokenizer,
        player.seed,
        player.rollout_timeout_seconds,
        engine.model.config,
        engine.model.lora,
        dtype,
        settings,
    )
    try:
        return pickle.dumps(setup)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{type(player.environment).__name__} cannot be sent to another process ({error}); define it and "
            "its parts in a module, or use cores=1"
        ) from error


# In the other processes.


def serve(connection_fd: int, setup_fd: int, weights_fd: int) -> None:
    """Play what is asked for on the connection until it is closed."""
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    torch.set_num_threads(1)
    connection = Connection(connection_fd)
    try:
        player = _player(setup_fd, weights_fd)
        connection.send(READY)
        while True:
            request = connection.recv()
            connection.send(_play(player, request, connection.send))
    except (EOFError, ConnectionError):
        return  # the run is over
    except Exception as error:
        connection.send(failure_of(error))


def _player(setup_fd: int, weights_fd: int) -> Player:
    setup: _Setup = pickle.loads(os.pread(setup_fd, os.fstat(setup_fd).st_size, 0))
    model = Transformer(setup.config)
    if setup.lora is not None:
        add_lora(model, setup.lora, seed=0)  # only the shapes: the values are mapped
    model.to(setup.dtype)
    _map_parameters(model, weights_fd, write=False)
    engine = Engine(model, **setup.engine)
    return Player(setup.environment, engine, setup.tokenizer, setup.seed, setup.rollout_timeout_seconds)


def _play(player: Player, request: _Request, send: Callable[[int], None]) -> _Answer:
    player.sampler.version = request.version
    generated, preempted = player.num_generated_tokens, player.num_preemptions

    def advance(count: int = 1, note: str = "") -> None:
        send(count)

    async def play() -> Share:
        alive = asyncio.create_task(say_so())
        try:
            return await player.play_share(
                request.numbered, request.num_samples, request.sampling, request.address, advance
            )
        finally:
            alive.cancel()

    async def say_so() -> None:
        while True:
            send(0)
            await asyncio.sleep(min(SIGN_OF_LIFE_SECONDS, player.rollout_timeout_seconds or math.inf))

    share = asyncio.run(play())
    return _Answer(
        share,
        player.sampler.probe(),
        player.num_generated_tokens - generated,
        player.num_preemptions - preempted,
        peak_memory_gib(),
    )


def failure_of(error: Exception) -> Failure:
    """The exception with its traceback, or its text where it does not survive being pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return Failure(RuntimeError(f"{type(error).__name__}: {error}"), trace)
    return Failure(error, trace)


def _end_with_the_run() -> None:
    """End at once when standard input does: the process at its other end is gone, however it went."""
    while os.read(0, 1):
        pass
    os._exit(0)
