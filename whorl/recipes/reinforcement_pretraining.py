"""Reinforcement Pre-Training (arXiv:2506.08007): any text is verifiable data, one position at a time.

    (c_i, y_i) ~ pi(. | x_<t),  i = 1..G                a thought, then a prediction in a box
    r_i = 1 iff the bytes of y_i begin x_>=t and end where one of its tokens ends, else 0
    A_i = (r_i - mean) / std,   GRPO's loss over all tokens of (c_i, y_i): no KL, no entropy bonus, one update a batch

Positions at which a proxy is sure of the next token need no thought: they are left out before training, by the entropy
of the proxy's 16 most probable next tokens. In the second half groups that are all right or all wrong are replaced.

    whorl train reinforcement_pretraining                           any position of the corpus
    python -m whorl.recipes.reinforcement_pretraining RUN FILE      positions at which that run's policy is unsure

`--environment next_token,positions=FILE` then trains on those. The experiment does both.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from whorl.cold_start import cold_start
from whorl.data import Group, Metrics, Problem, cu_seqlens_of
from whorl.environments.catalog import make, spec_of
from whorl.environments.next_token import NextToken
from whorl.environments.texts import LONGEST_TOKEN, NUMBER_TOKENS, draw_text
from whorl.evaluation.power_law import fit_power_law
from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import value
from whorl.experiments.trials import Outcome, Trial, begin_or_go_on, train_run
from whorl.learning.optimizer import OptimizerSettings
from whorl.loop import begin
from whorl.model.layout import Layout
from whorl.reporting.run_directory import write_atomically
from whorl.run import Run, open_run, start_run
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings

PLAIN = "next_token,way=continue"
QUESTIONS = "chain_arithmetic,num_terms=4,modulus=6"
"""The same skill asked for in another form: `3+8+5+4=`, at once or worked out, and no text around it."""

START = (
    f"{PLAIN} + next_token,demonstrated_texts=2000 + next_token,way=answer,demonstrated_texts=2000"
    f" + chain_arithmetic,num_terms=3,modulus=6,worked_frac=1 + {QUESTIONS}"
)
"""Plain text, a small set of thoughts with a box and of boxes alone, eight boxes in ten with another token, and sums:
those that thoughts work out are too few to learn adding from in minutes."""

TOP_TOKENS = 16
"""Section 3.2: entropy over the 16 most probable next tokens."""

BINS = {"easy": 0.5, "medium": 1.0, "hard": 1.5}
"""Lowest entropy in nats of a position of each bin: hard ones are medium too. The paper gives no unit."""


@dataclass(frozen=True)
class ReinforcementPretraining(Settings):
    """GRPO without KL, strictly on-policy, on the next token of a corpus."""

    claim: ClassVar[str] = (
        "Reasoning before each next token, learned from the text alone, predicts better than next-token prediction: "
        "accuracy 45.11, 33.56 and 23.75% at easy, medium and hard positions against 41.60, 29.46 and 20.43%, and "
        "against 3.31, 1.66 and 1.41% of reasoning before training (arXiv:2506.08007 Table 1)."
    )
    scaled: ClassVar[tuple[str, ...]] = (
        "a hybrid of 1.2M parameters made here in place of R1-Distill-Qwen-14B",
        "texts by template with sums in them in place of competition mathematics",
        "the start is taught to work out sums, in texts and without, which a pretrained model can",
        "characters in place of byte-pair tokens for the policy; words, digits and marks are the corpus's tokens",
        "the start itself is the proxy that filters positions; the paper has a smaller model",
        "32 positions a step in place of 256; learning rate 3e-4 in place of 1e-6",
        "30 steps in place of 1,000; questions afterwards are sums, 3 steps, in place of competition mathematics",
    )
    unsaid: ClassVar[tuple[str, ...]] = (
        "the threshold of the filter of training positions: that of the easy bin, 0.5",
        "the unit of entropies: nats",
        "the bounds of the clip: 0.8 and 1.2, which never bind at one update per batch",
    )

    environment: str = "next_token"
    max_context: int = 160
    # The mean over plain text, thoughts, boxes alone and two kinds of sums, before they are worked out 0.25.
    cold_start: ColdStart = field(default_factory=lambda: ColdStart(1000, 0.45, 50, 500, 80))
    # Section 3.2: no KL, no entropy bonus. Dynamic sampling begins in the middle, as after step 500 of 1,000.
    algorithm: str = "GRPO,minus_kl_k3=0,dynamic_sampling=True"
    dynamic_sampling_after_steps: int = 15
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, max_tokens=64))
    optimizer: OptimizerSettings = field(
        # Adam's betas and the weight decay are the paper's, and so is the limit if "actor gradient clip" means that.
        default_factory=lambda: OptimizerSettings(
            3e-4, beta2=0.999, eps=1e-8, weight_decay=0.01, max_grad_norm=0.2, warmup_steps=5
        )
    )
    num_steps: int = 30
    problems_per_step: int = 32
    rollouts_per_problem: int = 8
    updates_per_batch: int = 1
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(0, 128, 1))
    stop_after_steps_without_signal: int = 0  # an arm that must not learn is trained to its end
    train_texts: int = 300
    """Texts of an experiment whose positions are filtered for training."""
    question_steps: int = 3
    """Steps of an experiment's second stage, on questions. After five there was nothing left to learn (one seed)."""


# -- where a proxy is unsure -------------------------------------------------------------------------------------------


@torch.no_grad()
def entropies(run: Run, problems: Sequence[Problem]) -> list[float]:
    """Entropy in nats of the 16 most probable next tokens, renormalised, where each problem's context ends.

    The run's policy reads the contexts as the plain text that it continues.
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

    ValueError if there is none. Returns how many there were, and how many were kept.
    """
    places = positions_of(range(num_texts), "train")
    plain = NextToken(way="continue")
    found = entropies(run, [plain.at("train", *place) for place in places])
    kept = [(*place, entropy) for place, entropy in zip(places, found, strict=True) if entropy >= lowest]
    if not kept:
        raise ValueError(f"{run.directory.path} is sure of every next token in {num_texts} texts")
    rows = [{"text": text, "token": token, "entropy": round(entropy, 4)} for text, token, entropy in kept]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return {"positions": float(len(places)), "kept": float(len(kept))}


# -- the experiment ----------------------------------------------------------------------------------------------------


def more_text(settings: Settings) -> ColdStart:
    """Continued next-token prediction: as many sequences forward and backward as RPT trains on, at the same positions.
    No accuracy ends it."""
    rollouts = settings.problems_per_step * settings.rollouts_per_problem
    return ColdStart(settings.num_steps, 1.0, settings.num_steps, 128, rollouts, settings.optimizer)


TEST_TEXTS = 40
"""Texts at all of whose positions arms are compared."""

LAW_EVERY_STEPS = 3
"""Steps between the checkpoints to which a power law of compute is fitted; the paper has 100 of 1,000."""

STARTS_OF_QUESTIONS = ("reasoning", "rpt", "more_text")
"""Arms whose policies are trained on questions afterwards, as in the paper's Table 2."""


def rpt_trial(trial: Trial) -> Outcome:
    """Positions by the start's entropies, training on them, and accuracy by bin."""
    asked, environment = trial.settings, make(trial.settings.environment)
    assert isinstance(asked, ReinforcementPretraining), f"expected the recipe's settings; got {type(asked)}"
    assert isinstance(environment, NextToken), f"texts are those of next_token; got {environment}"
    held_out, file = trial.folder / "held_out.json", trial.folder / "positions.jsonl"
    if not held_out.exists():
        shutil.rmtree(trial.folder / "proxy", ignore_errors=True)  # of a trial that was killed
        proxy = start_run(trial.arm, replace(trial.settings, environment=PLAIN), trial.folder / "proxy")
        write_positions(proxy, file, asked.train_texts)
        places = positions_of(range(TEST_TEXTS), "test")
        plain = NextToken(way="continue")
        found = [places, entropies(proxy, [plain.at("test", *p) for p in places])]
        write_atomically(held_out, json.dumps(found).encode())
    chosen = environment if trial.arm == "any_position" else replace(environment, positions=str(file))
    settings = replace(trial.settings, environment=spec_of(chosen))
    if trial.arm == "more_text":
        run = begin_or_go_on(replace(trial, settings=replace(settings, cold_start=more_text(settings))))
        if not run.warm:
            cold_start(run)
            begin(run)
        outcome = Outcome(run.directory.history(), run=run.directory.path)
    else:
        if trial.role == "method":
            kept = settings.num_steps // LAW_EVERY_STEPS + 2  # the start and the end
            settings = replace(settings, checkpoint_every_steps=LAW_EVERY_STEPS, keep_checkpoints=kept)
        outcome = train_run(replace(trial, settings=settings))
    assert outcome.run is not None
    run = open_run(outcome.run, read_only=True)
    places, entropy = json.loads(held_out.read_text())
    values = accuracies(run, places, entropy)
    if trial.role == "method":
        values |= law_of_compute(run, places, entropy)
    if trial.arm in STARTS_OF_QUESTIONS:
        values |= questions_from(trial, outcome.run, asked.question_steps)
    return replace(outcome, values=values)


def accuracies(run: Run, places: Sequence[Sequence[int]], entropy: Sequence[float]) -> Metrics:
    """Accuracy at test positions by bin, at the sums among them and at the others, and tokens per prediction. An
    empty bin is left out.

    Plain prediction is the most probable continuation; thoughts are drawn as in training. The reward is the paper's
    whatever the run was trained on.
    """
    environment = run.environment
    assert isinstance(environment, NextToken)
    judge = replace(environment, reward="prefix", positions=None)
    problems = [judge.at("test", text, token) for text, token in places]
    player = replace(run.player, environment=judge)
    sampling = run.settings.sampling
    if judge.way == "continue":  # one character more shows where the first token ends
        sampling = replace(sampling, temperature=0.0, max_tokens=LONGEST_TOKEN + 1)
    groups: list[Group] = player.play(problems, 1, sampling, ("held out",))[0]
    right = np.array([group.rewards[0] for group in groups])
    summed = np.array([token in draw_text("test", text).computed for text, token in places])
    unsure = np.asarray(entropy)
    values = {name: _mean(right[unsure >= lowest]) for name, lowest in BINS.items()}
    values |= {f"num_{name}": float((unsure >= lowest).sum()) for name, lowest in BINS.items()}
    values |= {"sums": _mean(right[summed]), "others": _mean(right[~summed]), "all": _mean(right)}
    values["tokens"] = _mean([group.rollouts[0].num_response_tokens for group in groups])
    return {name: number for name, number in values.items() if math.isfinite(number)}


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def law_of_compute(run: Run, places: Sequence[Sequence[int]], entropy: Sequence[float]) -> Metrics:
    """R² and exponent, by bin, of a power law of the tokens generated in training, over the run's checkpoints.

    The start is left out: no compute was spent there. So is a bin whose accuracy never changes.
    """
    path, history = run.directory.path, run.directory.history()
    unsure = [at for at, nats in enumerate(entropy) if nats >= min(BINS.values())]
    places, entropy = [places[at] for at in unsure], [entropy[at] for at in unsure]
    spent, found = [], []
    for step in filter(None, run.directory.checkpoint_steps()):
        spent.append(sum(row.get("generated_tokens") or 0.0 for row in history if row["step"] <= step))
        found.append(accuracies(open_run(path, step=step, read_only=True), places, entropy))
    values = {}
    for name in BINS:
        try:
            law = fit_power_law(spent, [accuracy[name] for accuracy in found])
        except (ValueError, KeyError):
            continue
        values |= {f"r2_{name}": law.r2, f"exponent_{name}": law.exponent}
    return values


def questions_from(trial: Trial, start: Path, num_steps: int) -> Metrics:
    """Accuracy at held-out questions before and after reinforcement learning on others, from the policy of a run."""
    settings = replace(
        trial.settings,
        environment=QUESTIONS, model=str(start), algorithm="GRPO,minus_kl_k3=0", num_steps=num_steps,
        sampling=replace(trial.settings.sampling, max_tokens=32), evaluation=Evaluation(0, 256, 4),
    )  # fmt: skip
    # Whatever the arm's role: the policy before training is a start here like the others.
    outcome = train_run(Trial(trial.arm, "method", settings, trial.folder / "questions"))
    accuracy = [row["eval_accuracy"] for row in outcome.rows if "eval_accuracy" in row]
    return {"questions_before": accuracy[0], "questions": accuracy[-1]}


def _claim(text: str, theirs: str, measure: str, baseline: str, margin: float | None = None) -> Claim:
    return Claim(text, theirs, measure, "rpt", baseline, margin=margin)


EXPERIMENTS = (
    Experiment(
        name="reinforcement_pretraining",
        question="Does reasoning learned from a text predict its next tokens better than plain prediction?",
        cpu=ReinforcementPretraining(),
        start={"environment": START, "cold_start": ReinforcementPretraining().cold_start},
        trial=rpt_trial,
        arms=(
            Arm("text", "start", {"environment": PLAIN}, "next-token prediction by the start, greedy"),
            Arm("reasoning", "start", note="the start's thoughts and predictions"),
            Arm("rpt", "method"),
            Arm("more_text", "baseline", {"environment": PLAIN}, "next-token prediction continued"),
            Arm("first_token", "control", {"environment": "next_token,reward=first_token"}, "one token exactly"),
            Arm("any_position", "control", note="no filter by entropy"),
            Arm("another_text", "control", {"environment": "next_token,reward=another_text"}, "must not learn"),
            Arm("no_thought", "control", {"environment": "next_token,way=answer"}, "the box alone"),
        ),
        measures=(
            *(
                Measure(name, f"held-out accuracy where the start's entropy is {lowest} nats or more", value(name))
                for name, lowest in BINS.items()
            ),
            Measure("sums", "held-out accuracy at sums", value("sums")),
            Measure("others", "held-out accuracy everywhere else", value("others")),
            Measure("all", "held-out accuracy at all positions", value("all")),
            Measure("questions_before", "held-out questions right, before training on them", value("questions_before")),
            Measure("questions", "the same after 3 steps on others", value("questions")),
            *(
                Measure(f"r2_{name}", f"R2 of a power law of compute, {name} positions", value(f"r2_{name}"))
                for name in BINS
            ),
            Measure("tokens", "tokens written per prediction", value("tokens"), False, "tokens"),
        ),
        claims=(
            *(
                _claim(f"better than plain prediction at {name} positions", f"{theirs} points (Table 1)", name, "text")
                for name, theirs in (("easy", "+3.51"), ("medium", "+4.10"), ("hard", "+3.32"))
            ),
            _claim("better than reasoning before training", "+22 to +42 points (Table 1)", "medium", "reasoning"),
            _claim("better than continued next-token prediction", "no such row in Table 1", "medium", "more_text"),
            _claim("the text's own continuation is what teaches", "no such arm", "medium", "another_text", 0.02),
            _claim("the thought is what helps, not the training", "no such arm", "medium", "no_thought", 0.02),
            _claim("unsure positions teach more than any", "no such arm", "medium", "any_position", 0.02),
            Claim(
                "prefix matching and first-token matching end alike",
                "about equal (appendix)",
                "medium", "rpt", "first_token", "equal", 0.03,
            ),
            Claim(
                "accuracy follows a power law of compute",
                "R2 0.995, 0.997 and 0.989 (Figure 4)",
                untestable="one decade of compute at one size shows no law, whatever the R2 of its fit",
            ),
            Claim(
                "a better start for reinforcement learning on questions",
                "58.3 against 52.7 (Table 2)",
                "questions", "rpt", "reasoning", margin=0.02,
            ),
            Claim(
                "a better start than continued next-token prediction makes",
                "58.3 against 13.0 (Table 2)",
                "questions", "rpt", "more_text", margin=0.02,
            ),
            Claim(
                "questions are answered better before any training on them",
                "56.3 against 51.2 (Table 2)",
                "questions_before", "rpt", "reasoning", margin=0.02,
            ),
        ),
    ),
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """`python -m whorl.recipes.reinforcement_pretraining RUN FILE`."""
    if len(arguments) != 2:
        print("usage: python -m whorl.recipes.reinforcement_pretraining RUN FILE", file=sys.stderr)
        return 2
    run = open_run(arguments[0], read_only=True)
    found = write_positions(run, Path(arguments[1]), ReinforcementPretraining().train_texts)
    print(f"{found['kept']:.0f} of {found['positions']:.0f} positions kept in {arguments[1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
