"""Packed sequences cut into segments."""

import numpy as np
import pytest
import torch

from whorl.kernels.segments import cut


@pytest.mark.parametrize("lengths", [(1,), (64, 1, 1000), (65, 640, 64), tuple(range(1, 200))])
@pytest.mark.parametrize("places", [1, 3, 64])
def test_every_token_is_in_one_segment_and_every_cut_sequence_is_listed(lengths, places):
    plan = cut(lengths, 2, places, torch.device("cpu"))
    starts = np.cumsum(lengths) - np.asarray(lengths)
    rows = plan.table.tolist()
    assert sorted(token for a, b, *_ in rows for token in range(a, b)) == list(range(sum(lengths)))
    sizes = [b - a for a, b, *_ in rows]
    assert sizes == sorted(sizes, reverse=True), "long ones first"
    for a, b, s, _, is_first, is_last in rows:
        assert (a == starts[s], b == starts[s] + lengths[s]) == (bool(is_first), bool(is_last))
    own = sorted(row for row in rows if not (row[4] and row[5]))
    assert plan.cut_table.tolist() == own
    assert [row[3] for row in own] == list(range(plan.num_slots))
    slots = {s: [row[3] for row in own if row[2] == s] for s in sorted({row[2] for row in own})}
    assert plan.cuts.tolist() == [[s, mine[0], len(mine)] for s, mine in slots.items()]
    assert plan.num_cut == len(slots)


def test_a_gpu_that_is_full_cuts_nothing():
    device = torch.device("cpu")
    assert cut((2048,) * 64, 2, 128, device).num_cut == 0
    plan = cut((131072,), 32, 132, device)
    assert (plan.table[:, 1] - plan.table[:, 0]).tolist() == [32768] * 4, "4 x 32 programs for 132 places"
