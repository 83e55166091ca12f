"""The writer on a GPU: decode steps as captured graphs, and nothing between them that waits for the host.

Tokens, positions, random numbers and the decision to stop stay on the device (`whorl.kernels.draw_triton`); a turn
that is over stands still there. The host launches step t + 1 and reads what step t wrote meanwhile, from pinned
memory. It decides again from the same numbers by the same rules, so the two never disagree; stop strings are its
alone, and what a row wrote past one is thrown away.

A graph serves a number of slots: 1, 2, 3, 4, 6, 8, 12, ... up to what the state has. Lengths are read on the device,
so it serves all lengths. It is captured when a number of slots comes for the second time (the first step runs as it
is, which compiles and warms up), and again when the state grows or the weights lie elsewhere. Rows keep their slot;
only when fewer slots would do are the last ones moved into the gaps.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from whorl.kernels.draw_triton import COLUMNS, Turns, draw_step, draw_uniforms, take_step
from whorl.model.adapter import Adapter
from whorl.model.state import Snapshot
from whorl.model.together import lie_together
from whorl.model.transformer import Transformer
from whorl.sampling.draw import DrawSettings, Sampling, draw
from whorl.sampling.request import Running
from whorl.sampling.table import Table
from whorl.sampling.writer import ExpertRecord, News, new_state


class _Step(NamedTuple):
    """What a step leaves on the device: logits of rows that are still to be drawn, or a record of what was."""

    out: Tensor
    experts: Tensor | None


class _Told(NamedTuple):
    """A record on its way to the host. `numbers` are the requests whose tokens it holds, -1 where none is."""

    numbers: np.ndarray
    record: Tensor
    experts: Tensor | None
    ready: torch.cuda.Event
    is_first: bool


class _Needs(NamedTuple):
    """Whether some row needs the order of its vocabulary to draw, and some the host's word after each token."""

    order: bool
    host: bool


class DeviceWriter:
    """A `Writer` for which a row keeps its slot until `_close_gaps`."""

    def __init__(
        self,
        model: Transformer,
        rows: list[Running],
        table: Table,
        experts: ExpertRecord,
        stop_tokens: list[int],
    ):
        self.model, self._rows, self._table, self._experts = model, rows, table, experts
        lie_together(model.projections())
        self.state = new_state(model, 1, capacity=64)
        max_running = len(table.count)
        self._device = self.state.length.device
        self._turns = Turns.of(max_running, stop_tokens, self._device)
        self._all_slots = torch.arange(max_running, device=self._device)
        self._slot = np.zeros(max_running, dtype=np.int64)
        """Of each row."""
        self._number = np.full(max_running, -1, dtype=np.int64)
        """Of the request in each slot, -1: none."""
        self._told: deque[_Told] = deque()
        self._aside = torch.cuda.Stream(self._device)
        self._needs: _Needs | None = None
        # In fp32, PyTorch's grouped product reads the sizes of its groups on the host.
        self._capture = not (model.config.num_experts and model.embed_tokens.weight.dtype == torch.float32)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, _Step] | None] = {}
        self._forget_graphs()
        self._weights: list[object] = []

    @property
    def num_pending(self) -> int:
        return len(self._told)

    def resize(self, num_slots: int, capacity: int) -> None:
        if num_slots <= self._highest():
            self._close_gaps()
        self.state.resize(num_slots, capacity)
        self._forget_graphs()

    def fork(self, first: int, count: int, snapshot: Snapshot) -> None:
        slots = np.flatnonzero(self._number[: self.state.num_slots] < 0)[:count]
        self._slot[first : first + count], self._number[slots] = slots, 0
        self.state.restore(slots.tolist(), snapshot)

    def begin(self, logits_SV: Tensor, first: int) -> None:
        if first == 0:
            self._check_weights()
        rows, table = slice(first, len(self._rows)), self._table
        slots = self._slot[rows]
        self._number[slots] = [running.number for running in self._rows[rows]]
        columns = {
            "key": table.key[rows].view(np.int64),
            "position": table.start[rows] + table.count[rows],
            "end": table.start[rows] + table.end(rows),
            "run": table.run[rows],
            "run_limit": table.run_limit[rows],
            "last": np.zeros_like(slots),
            "live": np.ones_like(slots),
        }
        self._needs = None
        samplings = [running.request.sampling for running in self._rows[rows]]
        temperature = np.array([sampling.temperature for sampling in samplings], dtype=np.float32)
        slots_S = torch.from_numpy(slots).to(self._device)
        whole = torch.from_numpy(np.stack([columns[name] for name in COLUMNS]))
        self._turns.whole[:, slots_S] = whole.to(self._device)
        self._turns.temperature[slots_S] = torch.from_numpy(temperature).to(self._device)
        self._turns.run_logp[slots_S] = torch.from_numpy(table.run_logp[rows]).to(self._device)
        self._tell(slots, _Step(self._drawn(logits_SV, slots_S, samplings), None), is_first=True)

    def write(self) -> None:
        """Returns before it is done. Rows whose turn is over stand still."""
        if _batch(len(self._rows)) < _batch(self._highest() + 1):
            self._close_gaps()
        batch = min(_batch(self._highest() + 1), self.state.num_slots)
        truncates = self._need().order
        out, experts = self._step(batch, draws=not truncates)
        if truncates:
            samplings = [Sampling()] * batch
            for row, running in enumerate(self._rows):
                samplings[self._slot[row]] = running.request.sampling
            out = self._drawn(out, self._all_slots[:batch], samplings)
        self._tell(np.arange(batch), _Step(out, experts))

    def _drawn(self, logits_SV: Tensor, slots_S: Tensor, samplings: list[Sampling]) -> Tensor:
        """Draw and advance; rows that truncate need the whole order of their vocabulary, and so PyTorch."""
        settings = DrawSettings.of(samplings, self._device)
        if not settings.truncated:
            return draw_step(logits_SV, self._turns, slots_S)
        drawn = draw(logits_SV, draw_uniforms(self._turns, slots_S), settings)
        return take_step(*drawn, self._turns, slots_S)

    def _compute(self, batch: int, draws: bool) -> _Step:
        turns = self._turns
        hidden = self.model.decode(turns.last[:batch], self.state, turns.live[:batch])
        experts = self._experts.of(hidden) if self._experts.wanted else None
        logits_SV = self.model.logits(hidden.hidden_ND)
        out = draw_step(logits_SV, turns, self._all_slots[:batch]) if draws else logits_SV
        return _Step(out, experts)

    def _step(self, batch: int, draws: bool) -> _Step:
        key = (batch, draws)
        if key not in self._graphs or not self._capture:
            self._graphs[key] = None
            return self._compute(batch, draws)
        captured = self._graphs[key]
        if captured is None:
            graph = torch.cuda.CUDAGraph()
            # Of this thread: others may allocate meanwhile.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                step = self._compute(batch, draws)
            self._graphs[key] = captured = graph, step
        captured[0].replay()
        return captured[1]

    def _check_weights(self) -> None:
        """A graph reads weights where they lay when it was captured, and adapters as they were switched."""
        weights: list[object] = [parameter.data_ptr() for parameter in self.model.parameters()]
        weights += [module.used for module in self.model.modules() if isinstance(module, Adapter)]
        if weights != self._weights:
            self._forget_graphs()
            self._weights = weights

    def _forget_graphs(self) -> None:
        """They share one pool of memory, since they never run at the same time; it goes with the last of them."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def _tell(self, slots: np.ndarray, step: _Step, *, is_first: bool = False) -> None:
        """Send a record to the host."""
        # Beside the steps, or each would wait for the copy before it. The next one writes over what this one left.
        kept = [None if x is None else x.clone() for x in step]
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._aside):
            here = [None if x is None else x.to("cpu", non_blocking=True) for x in kept]
            ready = torch.cuda.Event()
            ready.record()
        for x in kept:
            if x is not None:
                x.record_stream(self._aside)
        record, experts = here
        assert record is not None
        self._told.append(_Told(self._number[slots], record, experts, ready, is_first))

    def news(self, *, everything: bool = False) -> Iterator[News]:
        """The newest step may still run, and is told with the next."""
        while self._told and (everything or self._is_due()):
            numbers, record, experts, ready, _ = self._told.popleft()
            ready.synchronize()
            if not self._rows:
                continue
            # Rows come and go while a record is under way: each token is for the row that has its request now.
            now = self._number[self._slot[: len(self._rows)]]
            order = np.argsort(now)
            place = order[np.searchsorted(now, numbers, sorter=order).clip(max=len(now) - 1)]
            known = np.flatnonzero(now[place] == numbers)
            known = known[np.argsort(place[known])]
            if not len(known):
                continue
            token, logp, raw_logp, written = record.numpy()[known].T
            assert written.all(), "host and device disagree on whose turn is over"
            yield News(
                place[known], token.astype(np.int64), logp.copy().view(np.float32), raw_logp.copy().view(np.float32),
                None if experts is None else experts.numpy()[known],
            )  # fmt: skip

    def _is_due(self) -> bool:
        if len(self._told) > 1:
            return not self._told[-1].is_first
        # A stop string is found by the host alone; if the state is wanted, the row must not read on until then.
        return self._need().host

    def _need(self) -> _Needs:
        if self._needs is None:
            requests = [running.request for running in self._rows]
            self._needs = _Needs(
                any(request.sampling.truncates for request in requests),
                any(request.sampling.stop_strings and request.keep_state for request in requests),
            )
        return self._needs

    def snapshot(self, row: int) -> Snapshot:
        return self.state.snapshot(int(self._slot[row]))

    def remove(self, row: int) -> None:
        slot = int(self._slot[row])
        self._turns.live[slot].zero_()  # the host may have ended the turn alone
        self._number[slot] = -1
        self._slot[row] = self._slot[len(self._rows) - 1]
        self._needs = None

    def _highest(self) -> int:
        """The last slot in use, -1: none."""
        return int(np.flatnonzero(self._number >= 0).max(initial=-1))

    def _close_gaps(self) -> None:
        """Move the last slots into the gaps before them, all at once."""
        num_rows = len(self._rows)
        used = self._number >= 0
        sources = np.flatnonzero(used[num_rows:]) + num_rows
        targets = np.flatnonzero(~used[:num_rows])
        rows = np.flatnonzero(np.isin(self._slot[:num_rows], sources))
        sources = self._slot[rows]
        length = self._table.longest(num_rows, self.num_pending)
        self.state.move_all(sources.tolist(), targets.tolist(), min(length, self.state.capacity))
        self._turns.move(sources.tolist(), targets.tolist())
        self._slot[rows] = targets
        self._number[targets], self._number[sources] = self._number[sources], -1


def _batch(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third of the slots of a step are idle."""
    power = 1 << (max(count, 1) - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
