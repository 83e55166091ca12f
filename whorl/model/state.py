"""What a model remembers of running sequences: lightning states and key/value rows, in slots."""

from dataclasses import dataclass

import torch
from torch import Tensor

from whorl.kernels.lightning import on_gpu
from whorl.model.config import ModelConfig
from whorl.model.rotation import rotation


@dataclass(frozen=True)
class Snapshot:
    """The state of one sequence after `length` tokens, on its own storage: `[L, H, K, K]` of lightning layers, `[L, KV,
    length, K]` of softmax layers. (One tensor, since a copy of each layer by itself is a launch of each.)
    """

    length: int
    lightning: Tensor
    keys: Tensor
    values: Tensor


class State:
    """Slots for sequences that are being prefilled or decoded.

    Per lightning layer `[slots, H, K, K]`, fp32 whatever the model's dtype (a bf16 state drifts by whole
    percents within thousands of tokens); per softmax layer keys and values `[slots, KV, capacity, K]`.
    `length` counts the tokens each slot has consumed.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        *,
        capacity: int = 256,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.config = config
        self.num_slots = num_slots
        self.length = torch.zeros(num_slots, dtype=torch.int64, device=device)
        num_lightning = config.attention.count("lightning")
        num_softmax = config.attention.count("softmax")
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        head = (config.num_heads, config.head_dim, config.head_dim)
        self.lightning = [
            torch.zeros(num_slots, *head, dtype=state_dtype, device=device) for _ in range(num_lightning)
        ]
        self.capacity = min(capacity, config.max_context)
        row = (config.kv_heads, self.capacity, config.head_dim)
        self.keys = [torch.zeros(num_slots, *row, dtype=dtype, device=device) for _ in range(num_softmax)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self._make_tables()

    def _make_tables(self) -> None:
        """What the kernels of a decode step read beside the cache: cos and sin of every position, and counters.

        They belong to the state because a captured graph reads them where they lie.
        """
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.arrived = self.length.new_zeros(self.num_slots * self.config.kv_heads, dtype=torch.int32)
        """0 but while a kernel runs: how many programs of a row and key head are done."""
        if self.keys and on_gpu(self.keys[0][:0, 0]):
            place = torch.arange(self.capacity, device=self.length.device)
            cos, sin = rotation(self.config, place, self.keys[0].dtype)
            self.rotation = cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens (doubling, up to the model's context)."""
        if length <= self.capacity:
            return
        if length > self.config.max_context:
            context = self.config.max_context
            raise ValueError(f"a sequence of {length} tokens exceeds the context of {context}")
        self.resize(self.num_slots, min(max(length, 2 * self.capacity), self.config.max_context))

    def resize(self, num_slots: int, capacity: int) -> None:
        """Another number of slots, another room in each; what lies beyond either is lost.

        One layer is copied after the other, so what is held twice is a layer and not the state.
        """
        num_kept, length = min(num_slots, self.num_slots), min(capacity, self.capacity)
        if num_slots != self.num_slots:
            self.length = _copied(self.length, self.length.new_zeros(num_slots), num_kept)
            for layer, old in enumerate(self.lightning):
                self.lightning[layer] = _copied(old, old.new_zeros(num_slots, *old.shape[1:]), num_kept)
        for rows in (self.keys, self.values):
            for layer, old in enumerate(rows):
                new = old.new_zeros(num_slots, old.shape[1], capacity, old.shape[3])
                new[:num_kept, :, :length] = old[:num_kept, :, :length]
                rows[layer] = new
        self.num_slots, self.capacity = num_slots, capacity
        self._make_tables()

    def snapshot(self, slot: int) -> Snapshot:
        """A copy of the slot that later decoding does not touch."""
        length = int(self.length[slot])
        return Snapshot(
            length,
            _stacked([state[slot] for state in self.lightning]),
            _stacked([keys[slot, :, :length] for keys in self.keys]),
            _stacked([values[slot, :, :length] for values in self.values]),
        )

    def restore(self, slots: list[int], snapshot: Snapshot) -> None:
        """Put a snapshot into every one of `slots`: a fork, or a rewind."""
        self.reserve(snapshot.length)
        index: slice | Tensor = slice(slots[0], slots[-1] + 1)  # a view, which takes a third of the time
        if slots != list(range(slots[0], slots[-1] + 1)):
            index = torch.tensor(slots, device=self.length.device)
        self.length[index] = snapshot.length
        for state, saved in zip(self.lightning, snapshot.lightning, strict=True):
            state[index] = saved
        for rows, saved_rows in ((self.keys, snapshot.keys), (self.values, snapshot.values)):
            for row, saved in zip(rows, saved_rows, strict=True):
                row[index, :, : snapshot.length] = saved

    def move(self, source: int, target: int) -> None:
        """Copy slot `source` over slot `target` (the running slots are kept dense)."""
        length = int(self.length[source])
        self.length[target] = length
        for state in self.lightning:
            state[target] = state[source]
        for rows in (self.keys, self.values):
            for row in rows:
                row[target, :, :length] = row[source, :, :length]

    def move_all(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy many slots over others at once; no slot is both, and none of them holds more than `length` tokens.

        Nothing waits for the device.
        """
        here, there = (torch.tensor(slots, device=self.length.device) for slots in (sources, targets))
        self.length[there] = self.length[here]
        for state in self.lightning:
            state[there] = state[here]
        for rows in (self.keys, self.values):
            for row in rows:
                row[there, :, :length] = row[here, :, :length]


def _stacked(layers: list[Tensor]) -> Tensor:
    return torch.stack(layers) if layers else torch.empty(0)


def _copied(old: Tensor, new: Tensor, count: int) -> Tensor:
    new[:count] = old[:count]
    return new
