"""Where packed tokens stand when an operation wants rows: the map between `[N]` and padded `[S, T]`."""

import torch
from torch import Tensor


class Layout:
    """Sequences laid end to end, as offsets `cu_seqlens [S + 1]`, with the index maps of their padded rows.

    Built once per forward pass and shared by all layers. Rows of equal length need no copy at all.
    """

    def __init__(self, cu_seqlens: Tensor):
        self.cu_seqlens = cu_seqlens
        self.length_S = cu_seqlens.diff()
        if len(self.length_S) == 0 or int(self.length_S.min()) < 1:
            raise ValueError("a packed batch needs at least one sequence, each with at least one token")
        self.num_sequences = len(self.length_S)
        self.num_tokens = int(cu_seqlens[-1])
        self.max_length = int(self.length_S.max())
        self.rectangular = self.num_sequences * self.max_length == self.num_tokens
        device = cu_seqlens.device
        sequence_N = torch.repeat_interleave(torch.arange(self.num_sequences, device=device), self.length_S)
        self.sequence_N = sequence_N
        self.position_N = torch.arange(self.num_tokens, device=device) - cu_seqlens[:-1][sequence_N]
        self._slot_N = sequence_N * self.max_length + self.position_N

    def pad(self, x: Tensor) -> Tensor:
        """`[N, ...]` to `[S, T, ...]`, zeros beyond each sequence's end."""
        rows = (self.num_sequences, self.max_length, *x.shape[1:])
        if self.rectangular:
            return x.view(rows)
        flat = x.new_zeros(self.num_sequences * self.max_length, *x.shape[1:])
        return flat.index_copy(0, self._slot_N, x).view(rows)

    def unpad(self, x: Tensor) -> Tensor:
        """`[S, T, ...]` back to `[N, ...]`."""
        flat = x.reshape(self.num_sequences * self.max_length, *x.shape[2:])
        return flat if self.rectangular else flat.index_select(0, self._slot_N)
