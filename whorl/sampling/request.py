"""What the engine is asked for, what it answers, and the tokens that requests wait for."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from whorl.model.state import Snapshot
from whorl.sampling.draw import Sampling


@dataclass
class Request:
    """Read `tokens` after `snapshot` (None: from the beginning), then write one turn.

    `key` is the stream of the sample's randomness; the token at absolute position p uses number p of it.
    `keep_state` asks for a snapshot at the end of the turn, so that the conversation can go on from it.
    """

    tokens: Sequence[int]
    key: int
    sampling: Sampling = field(default_factory=Sampling)
    snapshot: Snapshot | None = None
    keep_state: bool = False

    @property
    def num_tokens_before(self) -> int:
        """Tokens that stand before the first one written."""
        return (self.snapshot.length if self.snapshot else 0) + len(self.tokens)


@dataclass
class Completion:
    """What was written. `unread` are the tokens (at the end) that `snapshot` has not consumed yet.

    `experts [R, L, k]`, if the engine records them: those that the R tokens which were read went to, layer by
    layer: the request's tokens, then the written ones but the last, which nobody has read yet.
    """

    tokens: np.ndarray
    logp: np.ndarray
    raw_logp: np.ndarray
    version: np.ndarray
    stop: str
    snapshot: Snapshot | None = None
    unread: tuple[int, ...] = ()
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class Written:
    """The part of a turn that a sequence has written so far. `run` counts repetitions at its end; `experts` are
    those of its tokens but the last."""

    tokens: np.ndarray
    logp: np.ndarray
    raw_logp: np.ndarray
    experts: np.ndarray
    run: int


class Running:
    """A request on its way through the engine. `number` counts requests in the order in which they came."""

    def __init__(self, request: Request, number: int, done: Callable[[Completion], None]):
        self.request, self.number, self.done = request, number, done
        self.written: Written | None = None
        self.experts: np.ndarray | None = None
        """Those of the request's own tokens, if they are recorded."""

    @property
    def unread(self) -> tuple[int, ...]:
        """What has to be read after the request's snapshot before a token can be drawn."""
        written = () if self.written is None else self.written.tokens.tolist()
        return (*self.request.tokens, *written)


class Prefix:
    """Tokens after a snapshot, being read once for all requests that wait for them.

    `snapshot` is the state after the first `num_read` of them; `logits_V` is there when all are read.
    """

    def __init__(self, parent: Snapshot | None, tokens: tuple[int, ...]):
        self.parent, self.tokens = parent, tokens
        self.address = (id(parent), tokens)
        self.start = parent.length if parent else 0
        self.waiting: deque[Running] = deque()
        self.forget()

    def forget(self) -> None:
        """Go back to the parent: everything has to be read again."""
        self.num_read = 0
        self.snapshot = self.parent
        self.experts: list[np.ndarray] = []
        self.logits_V: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the sequence when all are read."""
        return self.start + len(self.tokens)

    @property
    def num_held_tokens(self) -> int:
        """Tokens whose keys and values are kept here (a parent belongs to whoever sent it)."""
        return self.start + self.num_read if self.num_read else 0


class Waiting:
    """Requests that do not run yet, by what they read: in the order in which they came, but for those that
    ran before and were put back, which go first."""

    def __init__(self) -> None:
        self._prefixes: dict[tuple, Prefix] = {}

    def __bool__(self) -> bool:
        return bool(self._prefixes)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._prefixes.values())

    def add(self, running: Running) -> None:
        prefix = Prefix(running.request.snapshot, running.unread)
        self._prefixes.setdefault(prefix.address, prefix).waiting.append(running)

    def put_back(self, running: Running) -> None:
        """To the front. Of several, the one that came last has to be put back first."""
        others, self._prefixes = self._prefixes, {}
        self.add(running)
        for address, prefix in others.items():
            if address in self._prefixes:  # another sequence waits for the same tokens
                prefix.waiting.appendleft(running)
            self._prefixes[address] = prefix

    def take(self, prefix: Prefix) -> Running:
        """The first of those that wait for the prefix, which is forgotten with the last."""
        running = prefix.waiting.popleft()
        if not prefix.waiting:
            del self._prefixes[prefix.address]
        return running

    def drop(self, running: Running) -> None:
        """Forget a request, if it waits here."""
        for prefix in list(self):
            if running in prefix.waiting:
                prefix.waiting.remove(running)
                if not prefix.waiting:
                    del self._prefixes[prefix.address]

    @property
    def num_held_tokens(self) -> int:
        return sum(prefix.num_held_tokens for prefix in self._prefixes.values())

    def free_one(self) -> bool:
        """Forget what was read for the prefix that would run last; whether there was any."""
        for prefix in reversed(self._prefixes.values()):
            if prefix.num_held_tokens:
                prefix.forget()
                return True
        return False
