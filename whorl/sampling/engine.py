"""The rollout engine: continuous batching over the training model itself.

A request names tokens to read (after a snapshot, or from nothing) and how to sample what follows. Requests
that read the same tokens after the same snapshot share one prefill, whose state is then forked: the prompt
of a group is computed once. Prompts are prefilled in packed chunks between decode steps; running sequences
sit in dense slots, are admitted and retired at any step, and never see each other.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from whorl.data import cu_seqlens_of
from whorl.model.layout import Layout
from whorl.model.state import Snapshot, State
from whorl.model.transformer import Transformer
from whorl.sampling.draw import DrawSettings, NotFinite, Sampling, draw, uniforms


class ContextOverflow(ValueError):
    """A prompt that leaves no room for an answer in the model's context."""


UNIFORM_CHUNK = 64  # random numbers made at a time for one sequence


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


@dataclass
class Completion:
    """What was written. `unread` are the tokens (at the end) that `snapshot` has not consumed yet."""

    tokens: np.ndarray
    logp: np.ndarray
    raw_logp: np.ndarray
    version: np.ndarray
    stop: str
    snapshot: Snapshot | None = None
    unread: tuple[int, ...] = ()


class _Prefix:
    """Tokens after a snapshot, being read once for all requests that wait for them."""

    def __init__(self, parent: Snapshot | None, tokens: Sequence[int]):
        self.parent = parent
        self.tokens = list(tokens)
        self.num_read = 0
        self.slot: int | None = None
        self.waiting: deque[_Running] = deque()
        self.snapshot: Snapshot | None = None
        self.logits_V: Tensor | None = None


class _Running:
    """A request on its way through the engine."""

    def __init__(self, request: Request, done: Callable[[Completion], None]):
        self.request = request
        self.done = done
        self.start = request.snapshot.length if request.snapshot else 0
        self.start += len(request.tokens)


class Engine:
    """Generates with a model; many requests at once.

    model: shared with the learner, or the engine's own copy (then `load` copies new weights in).
    max_running: sequences decoded together. prefill_chunk_tokens: prompt tokens read between decode steps.
    stop_tokens: ids that end a turn (they are part of what the policy wrote). decode_text: ids to text, needed
    for stop strings only.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        stop_tokens: Sequence[int] = (),
        decode_text: Callable[[Sequence[int]], str] | None = None,
        max_running: int = 64,
        prefill_chunk_tokens: int = 4096,
    ):
        if max_running < 1 or prefill_chunk_tokens < 1:
            raise ValueError("max_running and prefill_chunk_tokens must be at least 1")
        self.model = model
        self.version = 0
        self.max_running = max_running
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.decode_text = decode_text
        self.stop_tokens = np.array(sorted(stop_tokens), dtype=np.int64)
        weight = model.embed_tokens.weight
        self.device = weight.device
        self._running_state = State(model.config, max_running, device=weight.device, dtype=weight.dtype)
        self._prefill_state = State(model.config, max_running, device=weight.device, dtype=weight.dtype)
        self._prefixes: dict[tuple, _Prefix] = {}
        self._free_prefill_slots = list(range(max_running))
        self._rows: list[_Running] = []
        self._settings: DrawSettings | None = None
        self._driver: asyncio.Task | None = None
        self._table = _Table(max_running)
        self.num_prefilled_tokens = 0
        self.num_generated_tokens = 0

    @property
    def max_context(self) -> int:
        return self.model.config.max_context

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete all requests; blocks until the last is done."""
        results: dict[int, Completion] = {}
        for index, request in enumerate(requests):
            self._submit(request, lambda completion, index=index: results.__setitem__(index, completion))
        while len(results) < len(requests):
            self.step()
        return [results[index] for index in range(len(requests))]

    async def complete(self, request: Request) -> Completion:
        """Complete one request; any number of coroutines may wait at once and are batched together."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()

        def resolve(completion: Completion) -> None:
            if not future.done():  # the coroutine may have been cancelled
                future.set_result(completion)

        self._submit(request, resolve)
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        # Waiting for the driver too: if a step raises, everyone who waits hears of it.
        await asyncio.wait({future, self._driver}, return_when=asyncio.FIRST_COMPLETED)
        while not future.done():
            await self._driver
            self._driver = loop.create_task(self._drive())
            await asyncio.wait({future, self._driver}, return_when=asyncio.FIRST_COMPLETED)
        return future.result()

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take the learner's weights (a no-op for tensors that are shared) and its policy version."""
        own = self.model.state_dict(keep_vars=True)
        missing = sorted(set(own) ^ set(weights))
        if missing:
            raise ValueError(f"weights do not fit the sampler's model: {missing[0]} is on one side only")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.data_ptr() != weights[name].data_ptr():
                    tensor.copy_(weights[name])
        self.version = version

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._prefixes)

    @torch.inference_mode()
    def step(self) -> None:
        """Read a chunk of waiting prompts, admit what is ready, decode one token for all that run."""
        self._prefill()
        self._admit()
        if self._rows:
            self._decode()

    async def _drive(self) -> None:
        while self.busy:
            self.step()
            await asyncio.sleep(0)

    def _submit(self, request: Request, done: Callable[[Completion], None]) -> None:
        running = _Running(request, done)
        context = self.max_context
        if not request.tokens:
            raise ValueError("a request must read at least one token before the model can write")
        if running.start >= context:
            raise ContextOverflow(
                f"a prompt of {running.start} tokens leaves no room in the model's context of {context}; "
                "shorten the prompt or raise max_context"
            )
        if request.sampling.stop_strings and self.decode_text is None:
            raise ValueError("stop strings need an engine that was given decode_text")
        address = (id(request.snapshot), tuple(request.tokens))
        if address not in self._prefixes:
            self._prefixes[address] = _Prefix(request.snapshot, request.tokens)
        self._prefixes[address].waiting.append(running)

    def _prefill(self) -> None:
        """Read the next chunk of prompts that are not read yet, packed into one forward pass."""
        budget = self.prefill_chunk_tokens
        pieces: list[tuple[_Prefix, list[int]]] = []
        for prefix in self._prefixes.values():
            if prefix.snapshot is not None or budget == 0:
                continue
            if prefix.slot is None:
                if not self._free_prefill_slots:
                    break
                prefix.slot = self._free_prefill_slots.pop()
                if prefix.parent is None:
                    self._prefill_state.clear(prefix.slot)
                else:
                    self._prefill_state.restore([prefix.slot], prefix.parent)
            piece = prefix.tokens[prefix.num_read : prefix.num_read + budget]
            pieces.append((prefix, piece))
            budget -= len(piece)
        if not pieces:
            return
        layout = Layout(cu_seqlens_of([len(piece) for _, piece in pieces]).to(self.device))
        tokens_N = torch.tensor([t for _, piece in pieces for t in piece], device=self.device)
        slots = torch.tensor([prefix.slot for prefix, _ in pieces], device=self.device)
        hidden_ND = self.model(tokens_N, layout, self._prefill_state, slots).hidden_ND
        logits_SV = self.model.logits(hidden_ND[layout.cu_seqlens[1:] - 1])
        self.num_prefilled_tokens += len(tokens_N)
        for (prefix, piece), logits_V in zip(pieces, logits_SV, strict=True):
            prefix.num_read += len(piece)
            if prefix.num_read == len(prefix.tokens):
                assert prefix.slot is not None
                prefix.snapshot = self._prefill_state.snapshot(prefix.slot)
                prefix.logits_V = logits_V
                self._free_prefill_slots.append(prefix.slot)
                prefix.slot = None

    def _admit(self) -> None:
        """Fork prefixes that have been read into free running slots, and draw their first tokens."""
        first = len(self._rows)
        logits: list[Tensor] = []
        for address, prefix in list(self._prefixes.items()):
            count = min(len(prefix.waiting), self.max_running - len(self._rows))
            if prefix.snapshot is None or count == 0:
                continue
            slots = list(range(len(self._rows), len(self._rows) + count))
            self._running_state.restore(slots, prefix.snapshot)
            for slot in slots:
                running = prefix.waiting.popleft()
                self._rows.append(running)
                assert prefix.logits_V is not None
                logits.append(prefix.logits_V)
                self._table.admit(slot, running.start, running.request, self.max_context)
            if not prefix.waiting:
                del self._prefixes[address]
        if logits:
            self._settings = None
            self._draw(torch.stack(logits), first)

    def _decode(self) -> None:
        tokens_S = torch.from_numpy(self._table.last[: len(self._rows)]).to(self.device)
        hidden_SD = self.model.decode(tokens_S, self._running_state).hidden_ND
        self._draw(self.model.logits(hidden_SD), 0)

    def _draw(self, logits_SV: Tensor, first: int) -> None:
        """Draw a token for the rows from `first` on, record it, and retire the rows that are done."""
        table, last = self._table, len(self._rows)
        if first == 0:
            if self._settings is None:
                self._settings = DrawSettings.of([r.request.sampling for r in self._rows], self.device)
            settings = self._settings
        else:
            settings = DrawSettings.of([r.request.sampling for r in self._rows[first:]], self.device)
        uniform_S = torch.from_numpy(table.uniform(first, last)).to(self.device)
        drawn = draw(logits_SV, uniform_S, settings)
        is_stop = np.isin(tokens := drawn.tokens_S.cpu().numpy(), self.stop_tokens)
        logp = drawn.logp_S.cpu().numpy()
        if not np.isfinite(logp).all():
            # One NaN or infinite logit makes every log-probability of its row NaN, and its token meaningless.
            row = first + int(np.flatnonzero(~np.isfinite(logp))[0])
            position = int(table.start[row] + table.count[row])
            raise NotFinite(
                f"the policy's logits for the token at position {position} are not finite (policy version "
                f"{self.version})",
                self._rows[row].request.key,
            )
        table.record(first, last, tokens, logp, drawn.raw_logp_S.cpu().numpy())
        self.num_generated_tokens += last - first
        finished = table.reasons(first, last, is_stop)
        for row in range(first, last):
            strings = self._rows[row].request.sampling.stop_strings
            if strings and row not in finished and self._ends_with(row, strings):
                finished[row] = "stop_string"
        for row in sorted(finished, reverse=True):
            self._retire(row, finished[row])

    def _ends_with(self, row: int, strings: tuple[str, ...]) -> bool:
        """Whether the newest token completed one of the strings.

        The string then lies within the last tokens whose text is long enough; most tokens have at least one
        byte of text, but special ones have none, so the tail grows until its text suffices.
        """
        assert self.decode_text is not None
        longest = count = max(len(s.encode()) for s in strings)
        while True:
            tail = self._table.tail(row, count)
            text = self.decode_text(tail)
            if any(s in text for s in strings):
                return True
            if len(text.encode(errors="surrogatepass")) >= longest or len(tail) < count:
                return False
            count *= 2

    def _retire(self, row: int, reason: str) -> None:
        """Hand the turn over and close the gap: the last running sequence moves into the freed slot."""
        running, request = self._rows[row], self._rows[row].request
        tokens, logp, raw_logp = self._table.result(row)
        snapshot, unread = None, ()
        if request.keep_state:
            snapshot = self._running_state.snapshot(row)
            # The last token was drawn but not yet read by the model.
            unread = (int(tokens[-1]),)
        last = len(self._rows) - 1
        if row != last:
            self._running_state.move(last, row)
            self._table.move(last, row)
            self._rows[row] = self._rows[last]
        self._rows.pop()
        self._settings = None
        version = np.full(len(tokens), self.version, dtype=np.int32)
        running.done(Completion(tokens, logp, raw_logp, version, reason, snapshot, unread))


class _Table:
    """Per-slot bookkeeping of running turns as arrays, so that a step costs no Python per token."""

    def __init__(self, num_slots: int):
        self.tokens = np.zeros((num_slots, 64), dtype=np.int64)
        self.logp = np.zeros((num_slots, 64), dtype=np.float32)
        self.raw_logp = np.zeros((num_slots, 64), dtype=np.float32)
        self.random = np.zeros((num_slots, UNIFORM_CHUNK))
        self.key = np.zeros(num_slots, dtype=np.uint64)
        self.start, self.count, self.limit, self.room, self.run, self.run_limit, self.last = (
            np.zeros(num_slots, dtype=np.int64) for _ in range(7)
        )
        self.run_logp = np.zeros(num_slots, dtype=np.float32)

    def admit(self, slot: int, start: int, request: Request, max_context: int) -> None:
        sampling = request.sampling
        self.start[slot], self.count[slot], self.run[slot] = start, 0, 0
        self.key[slot] = request.key
        self.limit[slot], self.room[slot] = sampling.max_tokens, max_context - start
        self.run_limit[slot] = sampling.repetition_run_tokens or np.iinfo(np.int64).max
        self.run_logp[slot] = np.log(sampling.repetition_probability)

    def move(self, source: int, target: int) -> None:
        for column in vars(self).values():
            column[target] = column[source]

    def uniform(self, first: int, last: int) -> np.ndarray:
        """The next random number of each row: number start + count of its stream."""
        rows = np.arange(first, last)
        place = self.count[rows] % UNIFORM_CHUNK
        for row in rows[place == 0]:
            position = int(self.start[row] + self.count[row])
            self.random[row] = uniforms(int(self.key[row]), position, UNIFORM_CHUNK)
        return self.random[rows, place]

    def record(self, first: int, last: int, tokens: np.ndarray, logp: np.ndarray, raw: np.ndarray) -> None:
        rows = np.arange(first, last)
        count = self.count[rows]
        if count.max() >= self.tokens.shape[1]:
            for name in ("tokens", "logp", "raw_logp"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)], axis=1))
        self.tokens[rows, count], self.logp[rows, count], self.raw_logp[rows, count] = tokens, logp, raw
        self.last[rows] = tokens
        self.run[rows] = np.where(raw > self.run_logp[rows], self.run[rows] + 1, 0)
        self.count[rows] += 1

    def reasons(self, first: int, last: int, is_stop: np.ndarray) -> dict[int, str]:
        """Rows whose turn is over, with the reason that comes first."""
        rows = slice(first, last)
        finished: dict[int, str] = {}
        # The context holds `room` more tokens; the last of them is written but never read.
        for mask, reason in (
            (self.count[rows] >= self.room[rows], "context"),
            (self.count[rows] >= self.limit[rows], "max_tokens"),
            (self.run[rows] >= self.run_limit[rows], "repetition"),
            (is_stop, "stop_token"),
        ):
            for row in np.flatnonzero(mask):
                finished[first + int(row)] = reason
        return finished

    def tail(self, row: int, count: int) -> list[int]:
        end = int(self.count[row])
        return self.tokens[row, max(0, end - count) : end].tolist()

    def result(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        end = int(self.count[row])
        return self.tokens[row, :end].copy(), self.logp[row, :end].copy(), self.raw_logp[row, :end].copy()
