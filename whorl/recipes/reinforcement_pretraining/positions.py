"""Where a proxy is unsure of what comes next: the positions that are trained on."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from whorl.data import Metrics, Problem, cu_seqlens_of
from whorl.environments.next_token import NextToken
from whorl.environments.texts import NUMBER_TOKENS, draw_text
from whorl.experiments.starts import make_start
from whorl.model.layout import Layout
from whorl.recipes.reinforcement_pretraining.recipe import BINS, ReinforcementPretraining
from whorl.reporting.run_directory import write_atomically
from whorl.run import Run, open_run
from whorl.settings import Settings

TOP_TOKENS = 16
"""Section 3.2: entropy over the 16 most probable next tokens."""


@torch.no_grad()
def entropies(run: Run, problems: Sequence[Problem]) -> list[float]:
    """Entropy in nats of the policy's 16 most probable next tokens, renormalised, where each problem's context ends.

    The run's policy reads the contexts as the plain text that it continues, so it must have learned to continue plain
    text. Its tokens are characters: the entropy is that of the first character of the corpus's next token.
    """
    model, tokenizer, found = run.model, run.tokenizer, []
    for first in range(0, len(problems), 64):
        contexts = [
            [i for _, ids in tokenizer.render(problem.messages, generation=True) for i in ids]
            for problem in problems[first : first + 64]
        ]
        cu_seqlens = cu_seqlens_of([len(ids) for ids in contexts])
        tokens_N = torch.tensor([i for ids in contexts for i in ids], device=run.engine.device)
        hidden_ND = model(tokens_N, Layout(cu_seqlens.to(run.engine.device))).hidden_ND
        logits_SV = model.logits(hidden_ND[cu_seqlens[1:] - 1]).float()
        logp_SV = logits_SV.topk(min(TOP_TOKENS, logits_SV.shape[1])).values.log_softmax(-1)
        found += (-(logp_SV.exp() * logp_SV).sum(-1)).tolist()
    return found


def positions_of(texts: Iterable[int], split: str) -> list[tuple[int, int]]:
    """Every position of these texts after the page number."""
    return [(n, token) for n in texts for token in range(NUMBER_TOKENS, len(draw_text(split, n).tokens))]


def write_positions(run: Run, path: Path, num_texts: int, lowest: float = BINS["easy"]) -> Metrics:
    """Write the positions of the first training texts at which the run's policy is at least so unsure (nats).

    ValueError if there is none. Returns how many there were, how many were kept, and of how many texts.
    """
    places = positions_of(range(num_texts), "train")
    plain = NextToken(way="continue")
    found = entropies(run, [plain.at("train", *place) for place in places])
    kept = [(*place, entropy) for place, entropy in zip(places, found, strict=True) if entropy >= lowest]
    if not kept:
        raise ValueError(f"{run.directory.path} is sure of every next token in {num_texts} texts")
    rows = [{"text": text, "token": token, "entropy": round(entropy, 4)} for text, token, entropy in kept]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return {
        "positions": float(len(places)),
        "kept": float(len(kept)),
        "texts": float(len({text for text, _, _ in kept})),
    }


def prepare(folder: Path, start: Settings, asked: ReinforcementPretraining) -> Metrics:
    """Make a start, and write the positions at which it is unsure; what `write_positions` returns.

    They are in `folder/start/run` and `folder/positions.jsonl`. ValueError if the start did not pass its gate.
    """
    made = make_start(start, folder / "start", lambda done, total, note: None)
    if made.reason:
        raise ValueError(f"the start in {folder} did not pass its gate: {made.reason}")
    run = open_run(folder / "start" / "run", read_only=True)
    return write_positions(run, folder / "positions.jsonl", asked.train_texts, asked.lowest_entropy_nats)
