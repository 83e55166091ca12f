"""Whorl's side of `trl_cpu.py`: a few CISPO steps, timed, as one line of JSON.

Played as a run plays them: prompts are rendered and replies decoded by the tokenizer, every rollout is verified
by its environment, the batch is assembled, and the sampler takes the new weights at the end of a step. The
shape of the run arrives as JSON on the command line (`Run` in trl_cpu.py says what each entry means).
"""

import json
import random
import string
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

import whorl
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import with_settings
from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card, Environment, problem_rng
from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings
from whorl.model.config import ModelConfig
from whorl.model.tokenizer import Tokenizer
from whorl.model.transformer import Transformer
from whorl.rollouts import Player
from whorl.sampling.draw import Sampling
from whorl.sampling.engine import Engine

NUM_CHAT_TOKENS = 3  # around a prompt: <user> text <end> <assistant>


@dataclass(frozen=True)
class EvenTokens(Environment):
    """The reward is the share of even token ids: cheap, and different between samples of a random model."""

    num_prompt_tokens: int
    card = Card(
        prompt="random letters",
        turn="anything",
        ends="after one turn",
        reward="share of even token ids, 0..1",
        chance=0.5,
    )

    def problem(self, split: str, index: int) -> Problem:
        rng = random.Random(int(problem_rng(self.name, split, index).integers(2**32)))
        letters = rng.choices(string.ascii_letters, k=self.num_prompt_tokens - NUM_CHAT_TOKENS)
        return Problem(str(index), "".join(letters))

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        written = rollout.tokens_T[rollout.policy_T].tolist()
        return Score(sum(token % 2 == 0 for token in written) / len(written))


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Step times in seconds (in order, after warm-up) of the run described by trl_cpu.py."""
    torch.set_num_threads(run["num_threads"])
    tokenizer = Tokenizer.byte_level()
    assert tokenizer.vocab_size == run["model"]["vocab_size"]
    context = run["num_prompt_tokens"] + run["num_new_tokens"]
    model = Transformer(ModelConfig.from_dict({**run["model"], "max_context": context}))
    model.initialise(run["seed"])
    num_rollouts = run["num_prompts"] * run["group_size"]
    engine = Engine(model, max_running=num_rollouts)  # no stop tokens: every reply has its full length
    learner = Learner(
        model, OptimizerSettings(run["learning_rate"], max_grad_norm=1.0), router_aux_coefficient=0.0
    )
    # TRL divides by the tokens of the batch, the paper by those of a problem's group: the same at equal lengths.
    algorithm = with_settings("CISPO", ratio_max=run["ratio_max"], average="token_mean")
    environment = EvenTokens(run["num_prompt_tokens"])
    player = Player(environment, engine, tokenizer, run["seed"])
    sampling = Sampling(max_tokens=run["num_new_tokens"])
    steps, samplings, cpu = [], [], []
    for step in range(run["num_warmup_steps"] + run["num_steps"]):
        start, cpu_start = time.perf_counter(), time.process_time()
        first = step * run["num_prompts"]
        problems = [environment.problem("train", first + i) for i in range(run["num_prompts"])]
        groups, _ = player.play(problems, run["group_size"], sampling, (step,))
        samplings.append(time.perf_counter() - start)
        batch = assemble(groups, algorithm)
        learner.forward_backward(batch, algorithm.terms, compare_sampler=True)  # as every run does
        learner.optim_step()
        engine.load(learner.weights(), learner.version)
        steps.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        assert batch.num_tokens == num_rollouts * context
        assert int(batch["policy_N"].sum()) == num_rollouts * run["num_new_tokens"]
    assert learner.version == len(steps), "an update was skipped"
    return {
        "step_seconds": steps[run["num_warmup_steps"] :],
        "sampling_seconds": samplings[run["num_warmup_steps"] :],
        "cpu_seconds": cpu[run["num_warmup_steps"] :],
        "num_parameters": model.num_parameters,
        "versions": {"whorl": whorl.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
