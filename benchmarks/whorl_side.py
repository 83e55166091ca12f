"""Whorl's side of `trl_cpu.py` and `trl_gpu.py`: a few CISPO steps, timed, as one line of JSON.

Played as a run plays them: prompts are rendered and replies decoded by the tokenizer, every rollout is verified
by its environment, the batch is assembled, and the sampler takes the new weights at the end of a step. The
shape of the run arrives as JSON on the command line (`Run` in sides.py says what each entry means).
"""

import json
import string
import sys
import time
from typing import Any

import torch
from even_tokens import EvenTokens

import whorl
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import with_settings
from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings
from whorl.model.config import ModelConfig
from whorl.model.tokenizer import SPECIAL_TOKENS, Tokenizer
from whorl.model.transformer import Transformer
from whorl.player_processes import PlayerProcesses
from whorl.rollouts import Player
from whorl.sampling.draw import Sampling
from whorl.sampling.engine import Engine


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """Of so many ids: bytes, or else characters, of which Unicode has enough for any vocabulary."""
    tokenizer = Tokenizer.byte_level()
    if vocab_size != tokenizer.vocab_size:
        more = vocab_size - len(SPECIAL_TOKENS) - len(string.ascii_letters)
        alphabet = string.ascii_letters + "".join(chr(0x20000 + i) for i in range(more))
        tokenizer = Tokenizer.characters(alphabet)
    assert tokenizer.vocab_size == vocab_size
    return tokenizer


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cpu_seconds(player: Player) -> float:
    """User and system time so far of this process and of those that play for it."""
    if not isinstance(player, PlayerProcesses):
        return time.process_time()
    # The number by which Linux knows the CPU clock of another process: clock_getcpuclockid(3).
    others = sum(time.clock_gettime(~process_id << 3 | 2) for process_id in player.process_ids)
    return time.process_time() + others


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Step times in seconds (in order, after warm-up) of the run described by trl_cpu.py."""
    torch.set_num_threads(1)  # as in every run: further cores get processes
    tokenizer = tokenizer_of(run["model"]["vocab_size"])
    context = run["num_prompt_tokens"] + run["num_new_tokens"]
    model = Transformer(ModelConfig.from_dict({**run["model"], "max_context": context}))
    model.checkpoint_activations = run["computes_again"]
    model.initialise(run["seed"])
    device = torch.device(run["device"])
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    num_rollouts = run["num_prompts"] * run["group_size"]
    engine = Engine(model, max_running=num_rollouts)  # no stop tokens: every reply has its full length
    learner = Learner(
        model,
        OptimizerSettings(run["learning_rate"], max_grad_norm=1.0),
        router_aux_coefficient=0.0,
        token_budget=run["token_budget"],
        num_threads=run["num_cores"],
    )
    # TRL divides by the tokens of the batch, the paper by those of a problem's group: the same at equal lengths.
    algorithm = with_settings("CISPO", ratio_max=run["ratio_max"], average="token_mean")
    environment = EvenTokens(run["num_prompt_tokens"])
    player = Player(environment, engine, tokenizer, run["seed"])
    if device.type == "cpu":
        player = PlayerProcesses(environment, engine, tokenizer, run["seed"], cores=run["num_cores"])
    player.start()
    sampling = Sampling(max_tokens=run["num_new_tokens"])
    steps, samplings, scorings, cpu = [], [], [], []
    for step in range(run["num_warmup_steps"] + run["num_steps"]):
        start, cpu_start = now(device), cpu_seconds(player)
        first = step * run["num_prompts"]
        problems = [environment.problem("train", first + i) for i in range(run["num_prompts"])]
        groups, scoring = player.play(problems, run["group_size"], sampling, (step,))
        samplings.append(now(device) - start)
        scorings.append(scoring)
        batch = assemble(groups, algorithm)
        learner.forward_backward(batch, algorithm.terms, compare_sampler=True)  # as every run does
        learner.optim_step()
        engine.load(learner.weights(), learner.version)
        steps.append(now(device) - start)
        cpu.append(cpu_seconds(player) - cpu_start)
        assert batch.num_tokens == num_rollouts * context
        assert int(batch["policy_N"].sum()) == num_rollouts * run["num_new_tokens"]
    assert learner.version == len(steps), "an update was skipped"
    return {
        "step_seconds": steps[run["num_warmup_steps"] :],
        "sampling_seconds": samplings[run["num_warmup_steps"] :],
        "scoring_seconds": scorings[run["num_warmup_steps"] :],
        "cpu_seconds": cpu[run["num_warmup_steps"] :],
        "gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        "num_parameters": model.num_parameters,
        "versions": {"whorl": whorl.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
