"""What one training run consists of, put together from its settings, and how it is kept and continued."""

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whorl.algorithms.algorithm import Algorithm
from whorl.algorithms.watched import watching
from whorl.curricula.base import Curriculum, Pick
from whorl.curricula.catalog import make_curriculum
from whorl.data import Problem
from whorl.environments.base import Environment
from whorl.environments.catalog import make
from whorl.environments.several import Several
from whorl.learning import checkpoint
from whorl.learning.learner import Learner
from whorl.learning.ranks import from_every_rank, num_ranks, on_first_rank, this_rank
from whorl.learning.shards import shard_model
from whorl.model.lora import add_lora, targets_of
from whorl.model.peft_format import save_adapter
from whorl.model.tokenizer import ChatTokenizer
from whorl.model.transformer import Transformer
from whorl.origin import BASE, origin_of
from whorl.player_processes import PlayerProcesses
from whorl.player_ranks import PlayerOnRanks
from whorl.reporting.console import Progress, Silent
from whorl.reporting.glossary import check_names
from whorl.reporting.run_directory import Onlooker, RunDirectory
from whorl.reporting.trackers import TensorBoard, Tracker, Trackio, WandB
from whorl.rollouts import Player
from whorl.sampling.draw import Sampling
from whorl.sampling.engine import Engine
from whorl.sampling.probe import Probe, probe_batch, probe_gap
from whorl.settings import AnySettings, Settings, from_dict, settings_class
from whorl.window import Window


class Kept:
    """What runs of every kind have in common: how a finished step is logged, and when time asks for a checkpoint."""

    settings: Any
    directory: RunDirectory
    progress: Progress
    tracker: Tracker | None
    step: int
    saved_at: float
    """When the newest checkpoint was written, or when this process began to work on the run (`time.monotonic`)."""
    stopping: bool
    """Whether somebody asked for the run to stop. It does when a step is finished, with a checkpoint."""

    def log(self, metrics: dict[str, Any]) -> None:
        """One finished step, to the run directory, the screen and the tracker."""
        check_names(metrics)
        self.directory.log(metrics)
        self.progress.log(metrics)
        if self.tracker is not None:
            self.tracker.log(self.step, metrics)

    def told_to_stop(self) -> bool:
        """Whether somebody asked any rank for the run to stop; all ranks ask at the same places."""
        return any(from_every_rank(self.stopping))  # not kept: who is asked meanwhile would be forgotten

    def is_due_by_time(self) -> bool:
        """Whether the first rank's last checkpoint is older than the settings allow; all ranks ask together."""
        every_minutes = self.settings.checkpoint_every_minutes
        age_seconds = time.monotonic() - self.saved_at
        return every_minutes > 0 and from_every_rank(age_seconds)[0] >= every_minutes * 60


@dataclass
class Run(Kept):
    """A run in memory. Make one with `start_run` or `open_run`; `whorl.loop.train` carries it on.

    Everything that decides how the run goes on is in the learner, the curriculum, the window and `step`; randomness is
    addressed by seed and step, so there is no generator to save.
    """

    settings: Settings
    directory: RunDirectory
    environment: Environment
    tokenizer: ChatTokenizer
    algorithm: Algorithm
    model: Transformer
    engine: Engine
    learner: Learner
    player: Player
    curriculum: Curriculum
    window: Window
    progress: Progress
    tracker: Tracker | None = None
    step: int = 0
    """Steps that are finished. 0 with `warm` True: the cold start is over."""
    warm: bool = False
    generated_tokens: int = 0
    """Tokens that the policy has written in all steps so far."""
    steps_without_signal: int = 0
    saved_step: int | None = None
    """Step of the newest checkpoint; None before the first."""
    saved_at: float = field(default_factory=time.monotonic)
    stopping: bool = False
    skipped_in_a_row: int = 0
    """Updates that were not taken since the last one that was."""
    faulty_steps: list[int] = field(default_factory=list)
    """Steps with an update that was not taken: their rollouts are kept."""

    @property
    def num_steps(self) -> int:
        return self.settings.num_steps

    @property
    def finished(self) -> bool:
        limit = self.settings.num_generated_tokens
        return self.warm and (self.step >= self.num_steps or 0 < limit <= self.generated_tokens)

    @property
    def sampling(self) -> Sampling:
        """How training answers are sampled in the present step."""
        chosen = self.settings.sampling
        return replace(chosen, max_tokens=self.window.limit(chosen.max_tokens))

    # -- problems --------------------------------------------------------------------------------------

    def training_problems(self, picks: Sequence[Pick]) -> list[Problem]:
        """The training problems at these addresses; none of them may be one that is evaluated on."""
        problems = []
        for part, index in picks:
            if isinstance(self.environment, Several):
                problem = self.environment.problem_of(part, "train", index)
            else:
                problem = self.environment.problem("train", index)
            if problem.content_key in self.held_out_keys:
                raise ValueError(
                    f"training problem {problem.id} is also among the held-out problems: "
                    f"{problem.messages[-1].text[:80]!r}; remove it from one of them"
                )
            problems.append(problem)
        return problems

    def held_out(self, split: str, count: int) -> list[Problem]:
        """The first `count` problems of a split that is never trained on."""
        size = self.environment.num_problems(split)
        count = count if size is None else min(count, size)
        if count == 0:
            raise ValueError(f"{self.settings.environment} has no {split} problems to evaluate on")
        return [self.environment.problem(split, index) for index in range(count)]

    @property
    def held_out_keys(self) -> frozenset[str]:
        """Content of all problems that are evaluated on."""
        if not hasattr(self, "_held_out_keys"):
            test = self.held_out("test", self.settings.evaluation.num_problems)
            keys = {problem.content_key for problem in test}
            if self.settings.cold_start.max_updates:
                check = self.held_out("validation", self.settings.cold_start.check_problems)
                keys |= {problem.content_key for problem in check}
            self._held_out_keys = frozenset(keys)
        return self._held_out_keys

    # -- keeping ---------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of everything that decides how the run goes on."""
        tensors, state = self.learner.state_dict()
        state = {
            "learner": state,
            "step": self.step,
            "generated_tokens": self.generated_tokens,
            "steps_without_signal": self.steps_without_signal,
            "skipped_in_a_row": self.skipped_in_a_row,
            "faulty_steps": self.faulty_steps,
            "curriculum": self.curriculum.state_dict(),
            "window": self.window.state_dict(),
        }
        on_first_rank(lambda: self._write(tensors, state))
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        checkpoints = self.directory.path / "checkpoints"
        checkpoint.save(checkpoints, self.step, tensors, state)
        checkpoint.prune(checkpoints, self.settings.keep_checkpoints, self.step)
        if self.model.lora is not None:
            save_adapter(self.directory.path / "adapter", self.model, str(self.directory.path / BASE))

    def deliver(self) -> dict[str, float]:
        """Load the learner's weights into the sampler, and see by a probe that they arrived.

        ValueError if they did not, on any rank. Other processes are compared with the sampler of this one when they
        play.
        """
        self.engine.load(self.learner.weights(), self.learner.version)
        logp_N = self.learner.logprobs(probe_batch(self.model.config))
        expected = Probe(self.learner.version, logp_N[1:].numpy())
        gaps = [
            probe_gap(
                told,
                expected,
                limit_nats=self.settings.probe_gap_limit,
                teller="the sampler" if num_ranks() == 1 else f"the sampler of rank {rank}",
            )
            for rank, told in enumerate(from_every_rank(self.engine.probe(self.learner.temperature)))
        ]
        return {"probe_gap_nats": max(*gaps, self.player.probe_gap_nats)}

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of this run."""
        tensors, state = checkpoint.load(path)
        if any(name.startswith("reference/") for name in tensors):
            self.learner.set_reference()
        self.learner.load_state_dict(tensors, state["learner"])
        self.step, self.warm = state["step"], True
        self.saved_step = self.step
        self.generated_tokens = state.get("generated_tokens", 0)
        self.steps_without_signal = state["steps_without_signal"]
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.faulty_steps = list(state.get("faulty_steps", []))
        self.curriculum.load_state_dict(state["curriculum"])
        if "window" in state:
            self.window.load_state_dict(state["window"])
        self.deliver()

    def with_environment(self, spec: str | None) -> "Run":
        """The same policy on another task (None: on its own)."""
        if spec is None:
            return self
        environment = make(spec)
        check_prompts(environment, self.tokenizer, self.model.config.max_context)
        player = replace(self.player, environment=environment)
        settings = replace(self.settings, environment=spec)
        return replace(self, environment=environment, player=player, settings=settings)


def start_run(
    recipe: str, settings: Settings, path: Path | None = None, progress: Progress | None = None
) -> Run:
    """A new run in a new directory. ValueError for settings that cannot work, before anything is written."""
    run_parts = _assemble(settings)
    kind, tokenizer = type(settings), run_parts["tokenizer"]
    config = {"recipe": recipe, "settings_class": f"{kind.__module__}.{kind.__qualname__}"}
    config |= {"settings": settings.to_dict(), "model": run_parts["model"].config.to_dict()}
    config |= {"algorithm": {name: str(v) for name, v in run_parts["algorithm"].settings.items()}}
    config |= {"tokenizer": tokenizer.fingerprint, "start": run_parts["start"]}
    files = {n: text.encode() for n, text in tokenizer.files().items()}
    directory = create_directory(config, path, files)
    if settings.lora.rank:
        on_first_rank(lambda: checkpoint.save_model(directory.path / BASE, run_parts["model"]))
    return _run(settings, directory, run_parts, progress)


def open_run(
    path: Path | str, progress: Progress | None = None, step: int | None = None, *, read_only: bool = False
) -> Run:
    """An existing run at its newest (or the given) checkpoint; at its beginning if it has none yet.

    Unless `read_only`, no other process may be at work on it, and what was logged after the checkpoint is
    forgotten, to be done again. ValueError if the run cannot go on, with nothing changed.
    """
    directory = open_directory(path, read_only)
    missing = [name for name in ("settings_class", "settings", "model") if name not in directory.config]
    if missing:
        raise ValueError(
            f"{directory.path}/config.json has no {missing[0]!r}; was this run made by another version?"
        )
    settings = settings_of(directory)
    if not isinstance(settings, Settings):
        raise ValueError(
            f"{directory.path} is a run of supervised fine-tuning, not of reinforcement learning"
        )
    parts = _assemble(settings, directory)
    run = _run(settings, directory, parts, progress)
    checkpoints = directory.path / "checkpoints"
    if step is not None:
        chosen = directory.existing_checkpoint(step)
    else:
        chosen = on_first_rank(lambda: checkpoint.newest(checkpoints))
    if chosen is not None:
        run.restore(chosen)
    elif read_only:
        raise ValueError(f"{directory.path} has no checkpoint yet")
    if not read_only:
        on_first_rank(lambda: _go_back(run))
    return run


def create_directory(config: dict[str, Any], path: Path | None, files: dict[str, bytes]) -> RunDirectory:
    """A new run directory, which rank 0 makes and alone writes."""
    made: list[RunDirectory] = []

    def make() -> Path:
        made.append(RunDirectory.create(config, path, files=files))
        return made[0].path

    place = on_first_rank(make)
    return made[0] if made else Onlooker.open(place)


def open_directory(path: Path | str, read_only: bool) -> RunDirectory:
    """An existing run directory; unless `read_only`, locked, by rank 0."""
    directory = (Onlooker if this_rank() > 0 else RunDirectory).open(path)
    if not read_only:
        on_first_rank(directory.lock)
    return directory


def _go_back(run: Run) -> None:
    """Bring the run directory back to the state of the checkpoint, or to the run's beginning if it has none."""
    directory = run.directory
    last_row = max((row["step"] for row in directory.history()), default=-1)
    if not run.warm and last_row > 0:
        raise ValueError(
            f"{directory.path} has logged {last_row} steps but has no checkpoint to go on from; nothing was "
            "changed. Put one back, or start a new run"
        )
    if run.warm and last_row < run.step:
        warnings.warn(
            f"{directory.path}/metrics.jsonl lacks the rows of steps {last_row + 1} to {run.step}: the run goes "
            "on from its checkpoint, but they are lost",
            stacklevel=3,
        )
    checkpoint.remove_unfinished(directory.path / "checkpoints")
    directory.truncate_after(run.step if run.warm else -1)
    if not run.warm:
        directory.truncate_supervised_after(0)


def settings_of(directory: RunDirectory) -> AnySettings:
    """The settings that were recorded with a run."""
    kind, values = directory.config["settings_class"], directory.config["settings"]
    try:
        if not isinstance(kind, str) or not isinstance(values, dict):
            raise TypeError(f"expected a class and its values; got {kind!r:.40} and {values!r:.40}")
        return from_dict(settings_class(kind), values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the settings in {directory.path}/config.json cannot be read: {error}") from error


def new_curriculum(settings: Settings, environment: Environment) -> Curriculum:
    """The settings' curriculum over the environment's training problems, at its beginning."""
    parts = environment.parts if isinstance(environment, Several) else (environment,)
    return make_curriculum(settings.curriculum, [part.num_problems("train") for part in parts], settings.seed)


def on_cuda(settings: AnySettings) -> bool:
    return settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())


def num_cores(settings: AnySettings) -> int:
    """Cores that this process uses: those of the settings, or all that it may use, at most 4. One for each rank."""
    if on_cuda(settings) or num_ranks() > 1:
        return 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.cores or min(allowed, 4)


def use_own_threads(settings: AnySettings) -> None:
    """On a CPU: one thread of torch. Further cores get processes and threads of our own.

    torch's threads wait for one another within every operation: spinning they fall many times behind one thread as
    soon as anything else runs on the machine, and sleeping they are slower than one on operations as small as a
    small model's.
    """
    if not on_cuda(settings):
        torch.set_num_threads(1)


def refuse_on_ranks(settings: AnySettings) -> None:
    """ValueError for what does not work on the ranks of a torchrun, before anything is written."""
    if num_ranks() > 1 and settings.optimizer.state == "8bit":
        raise ValueError(
            "optimizer.state 8bit works in one process only: on several ranks the moments are kept in parts already"
        )


def memory_gib(player: Player) -> float:
    """Peak memory: the fullest device's where there is one, else the resident sets of all processes, added up."""
    if torch.cuda.is_available():
        return max(from_every_rank(torch.cuda.max_memory_allocated() / 2**30))
    return sum(from_every_rank(player.memory_gib))


def _assemble(settings: Settings, existing: RunDirectory | None = None) -> dict[str, Any]:
    """Environment, tokenizer, algorithm and model: what can be refused before a directory is made.

    The model of an existing run has the shape and the tokenizer that were recorded with it.
    """
    use_own_threads(settings)
    refuse_on_ranks(settings)
    environment = make(settings.environment)
    algorithm = settings.resolve_algorithm()
    model, tokenizer, start = origin_of(settings, environment.alphabet, existing)
    if settings.watch:
        algorithm = watching(algorithm, tokenizer.encode(settings.watch))
    if settings.lora.rank:
        targets_of(model, settings.lora)  # refuses targets that it has not
    if (settings.record_experts or settings.replay_experts) and not model.config.num_experts:
        raise ValueError(
            f"record_experts and replay_experts need a model with experts; those of {settings.model} are dense"
        )
    check_prompts(environment, tokenizer, model.config.max_context)
    return {
        "environment": environment,
        "tokenizer": tokenizer,
        "algorithm": algorithm,
        "model": model,
        "start": start,
        "curriculum": new_curriculum(settings, environment),
    }


def check_prompts(environment: Environment, tokenizer: ChatTokenizer, max_context: int) -> None:
    """Refuse prompts that the tokenizer or the context cannot hold: all of a file's, the first of endless ones."""
    for split in ("train", "test"):
        size = environment.num_problems(split)
        if size == 0:
            raise ValueError(
                f"{environment.name} has no {split} problems; training and evaluation need some of each"
            )
        for index in range(1 if size is None else size):
            problem = environment.problem(split, index)
            segments = tokenizer.render(problem.messages, generation=True)
            num_tokens = sum(len(ids) for _, ids in segments)
            if num_tokens >= max_context:
                raise ValueError(
                    f"the prompt of {problem.id} has {num_tokens} tokens, which leaves no room for an answer in the "
                    f"context of {max_context}; raise max_context or leave the problem out"
                )


def _run(
    settings: Settings, directory: RunDirectory, parts: dict[str, Any], progress: Progress | None
) -> Run:
    model, tokenizer, algorithm = parts["model"], parts["tokenizer"], parts["algorithm"]
    model.checkpoint_activations = settings.checkpoint_activations
    model.to(getattr(torch, settings.dtype))
    if settings.lora.rank:
        add_lora(model, settings.lora, settings.seed)
    learned = placed(model, settings)
    engine = Engine(
        model,
        stop_tokens=tokenizer.stop_ids,
        decode_text=tokenizer.decode,
        max_running=settings.max_running,
        max_cached_tokens=settings.max_cached_tokens,
        record_experts=settings.record_experts or settings.replay_experts,
    )
    learner = Learner(
        learned,
        settings.optimizer.over(settings.num_steps * settings.updates_per_batch),
        temperature=settings.sampling.temperature,
        token_budget=settings.token_budget,
        value_head="value_old_N" in algorithm.needs,
        num_threads=num_cores(settings),
        replay_experts=settings.replay_experts,
    )
    return Run(
        settings=settings,
        directory=directory,
        environment=parts["environment"],
        tokenizer=tokenizer,
        algorithm=algorithm,
        model=model,
        engine=engine,
        learner=learner,
        curriculum=parts["curriculum"],
        window=Window(settings.length_window),
        player=_player(settings, parts["environment"], engine, tokenizer),
        progress=progress or Silent(),
    )


def placed(model: Transformer, settings: AnySettings) -> Transformer:
    """Put the model on the run's device, and return the one that learns: the same, or on several ranks one in parts.

    A sampler needs all weights at every token, so there the model itself, in one piece, is the sampler's: each rank
    holds a copy of the policy, in the dtype that computes, beside its part of the masters and moments.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda(settings) else torch.device("cpu")
    learned = model if num_ranks() == 1 else shard_model(model, device)
    model.to(device)
    return learned


def _player(
    settings: Settings, environment: Environment, engine: Engine, tokenizer: ChatTokenizer
) -> PlayerProcesses | PlayerOnRanks:
    seconds = settings.rollout_timeout_seconds
    if num_ranks() > 1:
        if settings.cores > 1:
            warnings.warn(f"cores={settings.cores} does nothing: each rank uses one core", stacklevel=2)
        return PlayerOnRanks(environment, engine, tokenizer, settings.seed, seconds)
    return PlayerProcesses(
        environment,
        engine,
        tokenizer,
        settings.seed,
        seconds,
        cores=num_cores(settings),
        probe_gap_limit_nats=settings.probe_gap_limit,
    )


def open_tracker(run: Any) -> Tracker | None:
    """The tracker that the settings of a run of any kind name; what it already holds of later steps is drawn over."""
    name, directory = run.settings.tracker, run.directory
    if name == "tensorboard":
        return TensorBoard(directory.path / "tensorboard", first_step=run.step + 1 if run.warm else None)
    if name == "wandb":
        return WandB(directory.path, "whorl", directory.name, directory.config)
    if name == "trackio":
        return Trackio("whorl", directory.name, directory.config)
    return None
