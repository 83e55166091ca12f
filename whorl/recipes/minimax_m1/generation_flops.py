"""Operations of generation against its length: MiniMax-M1 beside DeepSeek-R1, counted, and a small hybrid beside
a small softmax model, counted and timed.

The paper (abstract and Figure 1): M1 needs less than 50% of R1's FLOPs at 64K tokens and about 25% at 100K. Read off
Figure 1 it is 39% at 64K, 29% near 100K and 24% at 128K. The counts are of the published shapes; how attention is
counted decides the outcome, so both ways of counting R1's are given: its keys and values expanded, as in training, and
the expansion absorbed into the query, as it is served.
"""

import time
from dataclasses import dataclass

import torch

from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import value
from whorl.experiments.trials import Outcome, Trial
from whorl.model.config import m1_456b, preset
from whorl.model.flops import PerToken, of_latent_attention, of_model, to_generate
from whorl.model.state import State
from whorl.model.transformer import Transformer
from whorl.recipes.minimax_m1.recipe import MinimaxM1
from whorl.settings import ColdStart

R1 = {"active_weights": 37e9, "num_layers": 61, "num_heads": 128}
"""DeepSeek-V3 and R1 (arXiv:2412.19437 section 4.2): 671B parameters, 37B of them active."""

COUNTED: dict[str, tuple[PerToken, float]] = {
    "m1": (of_model(m1_456b()), 1.0),
    # Keys of 128 + 64 rotated channels, values of 128.
    "r1": (of_latent_attention(**R1, key_dim=192, value_dim=128), 1.0),
    "half_of_r1": (of_latent_attention(**R1, key_dim=192, value_dim=128), 0.5),
    "quarter_of_r1": (of_latent_attention(**R1, key_dim=192, value_dim=128), 0.25),
    # The latent vector of 512, and beside it the 64 rotated channels.
    "r1_absorbed": (of_latent_attention(**R1, key_dim=576, value_dim=512), 1.0),
}
LENGTHS = {"8k": 8 * 1024, "64k": 64 * 1024, "100k": 100_000, "128k": 128 * 1024, "1m": 1024 * 1024}
"""Tokens generated. The curves are counted at others as well: every 4K up to 128K, as Figure 1 has it, and every
32K up to 1M."""

TIMED = {
    "hybrid_timed": "m1-nano,num_layers=8,softmax_period=8",
    "softmax_timed": "m1-nano,num_layers=8,softmax_period=1",
}
CONTEXTS = {
    "256": 256,
    "512": 512,
    "1k": 1024,
    "2k": 2048,
    "4k": 4096,
    "8k": 8192,
    "16k": 16_384,
    "32k": 32_768,
}
"""Tokens before those that the small models decode."""


@dataclass(frozen=True)
class Generation(MinimaxM1):
    """Nothing is trained; a model is chosen."""

    generated_by: str = "m1"
    """A name of `COUNTED` or of `TIMED`."""


def count_or_time(trial: Trial) -> Outcome:
    """FLOPs of a published shape, or FLOPs and times of a small model. Rows have the length as their step."""
    assert isinstance(trial.settings, Generation)
    name = trial.settings.generated_by
    if name in COUNTED:
        return count(*COUNTED[name])
    config = preset(TIMED[name], 32, max(CONTEXTS.values()) + 64)
    model = Transformer(config).initialise(trial.settings.seed)
    per_token, rows, values = of_model(config), [], {}
    for done, (length, context) in enumerate(CONTEXTS.items()):
        seconds = seconds_per_token(model, context)
        rows.append(
            {"step": context, "token_milliseconds": 1e3 * seconds, "token_mflops": per_token(context) / 1e6}
        )
        values[f"after_{length}"] = seconds
        trial.tell(done + 1, len(CONTEXTS), f"{1e3 * seconds:.2f} ms")
    values["growth"] = values["after_32k"] / values["after_1k"]
    values["counted_growth"] = per_token(CONTEXTS["32k"]) / per_token(CONTEXTS["1k"])
    return Outcome(rows, values)


def count(per_token: PerToken, share: float) -> Outcome:
    """FLOPs of generating so many tokens from nothing, of a share of the model's."""
    near, far = [4096 * i for i in range(33)], [32_768 * i for i in range(33)]
    near[0] = far[0] = 1024
    rows = [
        {"step": length, "petaflops_to_128k": share * to_generate(per_token, length) / 1e15}
        for length in near
    ]
    rows += [
        {"step": length, "petaflops_to_1m": share * to_generate(per_token, length) / 1e15} for length in far
    ]
    return Outcome(rows, {name: share * to_generate(per_token, length) for name, length in LENGTHS.items()})


@torch.inference_mode()
def seconds_per_token(model: Transformer, context: int, *, sequences: int = 8, repeats: int = 15) -> float:
    """Median time of a decode step of so many sequences after `context` tokens, per sequence. What is in the
    state does not matter to the time, so it holds zeros."""
    state = State(model.config, sequences, capacity=context + repeats + 4)
    state.length.fill_(context)
    tokens_S = torch.zeros(sequences, dtype=torch.int64)
    times = []
    for step in range(repeats + 3):
        begun = time.perf_counter()
        model.logits(model.decode(tokens_S, state).hidden_ND)
        if step >= 3:
            times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2] / sequences


EXPERIMENT = Experiment(
    name="generation_flops",
    question="How much less does a hybrid with lightning attention cost to generate with?",
    cpu=Generation(cold_start=ColdStart()),
    num_seeds=5,
    arms=tuple(
        Arm(name, "method" if name in ("m1", "hybrid_timed") else "baseline", {"generated_by": name})
        for name in (*COUNTED, *TIMED)
    ),
    measures=(
        *(
            Measure(n, f"FLOPs of generating {n.upper()} tokens", value(n), False, "FLOPs", "ratio")
            for n in LENGTHS
        ),
        *(
            Measure(f"after_{n}", f"time of a token after {c:,} others", value(f"after_{n}"), False, "seconds", "ratio")
            for n, c in CONTEXTS.items()
        ),
        Measure(
            "growth", "time of a token after 32,768 tokens over that after 1,024", value("growth"), False, "1", "ratio"
        ),
        Measure("counted_growth", "the same of its FLOPs", value("counted_growth"), False, "1", "ratio"),
    ),
    claims=(
        Claim(
            "M1 needs less than half of R1's FLOPs at 64K tokens", "< 50% (abstract)",
            "64k", "m1", "half_of_r1", "lower",
        ),
        Claim(
            "M1 needs about a quarter of R1's FLOPs at 100K tokens", "25% (abstract)",
            "100k", "m1", "quarter_of_r1", "equal", margin=1.2,
        ),
        Claim(
            "A hybrid's tokens slow down less with the length of the text", "section 2, no figure",
            "growth", "hybrid_timed", "softmax_timed", "lower",
        ),
        Claim(
            "After 32K tokens a hybrid's token takes less time", "section 2, no figure",
            "after_32k", "hybrid_timed", "softmax_timed", "lower", margin=1.1,
        ),
    ),
    trial=count_or_time,
    scale="FLOPs counted for the published shapes; times of models of m1-nano's width with 8 layers, untrained",
    curves=("petaflops_to_128k", "petaflops_to_1m", "token_milliseconds", "token_mflops"),
    rows_by="tokens of context",
)  # fmt: skip
