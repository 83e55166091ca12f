"""How packed sequences are cut into the segments that the lightning kernels sweep, one program per segment and head."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where programs begin and end. The segments of cut sequences have slots, for the states at which they start."""

    num_segments: int
    table: Tensor
    """`[G, 6]` int32, longest first: begin, end, sequence, slot, is it its sequence's first, is it the last."""
    num_slots: int
    cut_table: Tensor
    """`[num_slots, 6]` int32: the same, of the segments that have a slot, in their order."""
    num_cut: int
    cuts: Tensor
    """`[num_cut, 3]` int32: the number, first slot and number of segments of every cut sequence."""


MIN_SEGMENT = 256
"""Shorter ones are not worth their states."""

STATE_TOKENS = 200
"""Reading and writing the states of a cut takes as long as this many tokens (about three times 4 K^2 bytes to the
8 K of a token, for K = 128)."""


@functools.lru_cache(maxsize=32)
def cut(lengths: tuple[int, ...], programs_per_segment: int, places: int, device: torch.device) -> Segments:
    """Cut long sequences so that the programs of all segments fill the GPU's `places` evenly.

    A cut is worth its states only while places are idle, so the candidates are 1, 2, .. 6 rounds of programs.
    """
    length_S = np.asarray(lengths, dtype=np.int64)
    best_time, edge_S = math.inf, length_S
    for rounds in range(1, 7):
        wanted = max(1, rounds * places // programs_per_segment)
        pieces_S = ceil(length_S, max(MIN_SEGMENT, math.ceil(length_S.sum() / wanted)))
        candidate_S = np.where(pieces_S > 1, ceil(ceil(length_S, pieces_S), 64) * 64, length_S)
        pieces_S = ceil(length_S, candidate_S)
        longest = int(candidate_S.max()) + (STATE_TOKENS if pieces_S.max() > 1 else 0)
        time = math.ceil(pieces_S.sum() * programs_per_segment / places) * longest
        if time < 0.98 * best_time:
            best_time, edge_S = time, candidate_S
    pieces_S = ceil(length_S, edge_S)
    sequence_G = np.repeat(np.arange(len(length_S)), pieces_S)
    nth_G = np.arange(len(sequence_G)) - (np.cumsum(pieces_S) - pieces_S)[sequence_G]
    slots_S = np.where(pieces_S > 1, pieces_S, 0)
    first_slot_S = np.cumsum(slots_S) - slots_S
    start_G = (np.cumsum(length_S) - length_S)[sequence_G]
    begin_G = nth_G * edge_S[sequence_G]
    end_G = np.minimum(begin_G + edge_S[sequence_G], length_S[sequence_G])
    is_first_G, is_last_G = nth_G == 0, nth_G == pieces_S[sequence_G] - 1
    columns = [start_G + begin_G, start_G + end_G, sequence_G, first_slot_S[sequence_G] + nth_G]
    table = np.stack([*columns, is_first_G, is_last_G], axis=1)
    cut_S = np.flatnonzero(pieces_S > 1)
    there = [
        torch.from_numpy(x.astype(np.int32)).to(device)
        for x in (
            table[np.argsort(begin_G - end_G, kind="stable")],
            table[pieces_S[sequence_G] > 1],
            np.stack([cut_S, first_slot_S[cut_S], pieces_S[cut_S]], axis=1),
        )
    ]
    return Segments(len(table), there[0], len(there[1]), there[1], len(cut_S), there[2])


def ceil(a: Any, b: Any) -> Any:
    """a / b, rounded up."""
    return -(-a // b)
