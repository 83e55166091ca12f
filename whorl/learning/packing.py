"""Cutting a batch into micro-batches: whole sequences of similar length, within a budget of padded tokens."""

from whorl.data import Batch


def micro_batches(batch: Batch, token_budget: int) -> list[Batch]:
    """The sequences of `batch`, each in exactly one of the returned batches.

    Attention works on rows padded to the longest of a micro-batch, so a micro-batch costs (its longest
    sequence) x (its number of sequences), and that is at most `token_budget`. A sequence longer than the
    budget stands alone. Sequences are taken longest first (equal ones in their own order), so neighbours
    are of similar length and little is padding. A function of the lengths alone.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1; got {token_budget}")
    lengths = batch.length_S.tolist()
    if max(lengths) * len(lengths) <= token_budget or len(lengths) == 1:
        return [batch]
    order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    cuts = []
    while order:
        count = max(token_budget // lengths[order[0]], 1)
        cuts.append(order[:count])
        order = order[count:]
    return [batch.select(cut) for cut in cuts]
