"""What one training run consists of, put together from its settings, and how it is kept and continued."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from whorl.algorithms.algorithm import Algorithm
from whorl.curricula.base import Curriculum, Pick
from whorl.curricula.catalog import make_curriculum
from whorl.data import Group, Problem
from whorl.environments.base import Environment
from whorl.environments.catalog import make
from whorl.environments.several import Several
from whorl.learning import checkpoint
from whorl.learning.learner import Learner
from whorl.model.adapter import Lora
from whorl.model.config import PRESETS, ModelConfig
from whorl.model.lora import add_lora, merge, policy_parameters, strip, targets_of
from whorl.model.peft_format import save_adapter
from whorl.model.tokenizer import Tokenizer
from whorl.model.transformer import Transformer
from whorl.player_processes import PlayerProcesses
from whorl.reporting.console import Progress, Silent
from whorl.reporting.glossary import check_names
from whorl.reporting.run_directory import RunDirectory
from whorl.reporting.trackers import TensorBoard, Tracker, Trackio, WandB
from whorl.rollouts import Player
from whorl.sampling.engine import Engine
from whorl.settings import Settings, from_dict, settings_class

BASE = "base"
"""The folder of a run with adapters that holds the model they were put on. Its checkpoints hold the adapters, and
its folder `adapter` the newest of them in peft's format."""


@dataclass
class Run:
    """A run in memory. Make one with `start_run` or `open_run`; `whorl.loop.train` carries it on.

    Everything that decides how the run goes on is in the learner, the curriculum and `step`; randomness is
    addressed by seed and step, so there is no generator to save.
    """

    settings: Settings
    directory: RunDirectory
    environment: Environment
    tokenizer: Tokenizer
    algorithm: Algorithm
    model: Transformer
    engine: Engine
    learner: Learner
    player: Player
    curriculum: Curriculum
    progress: Progress
    tracker: Tracker | None = None
    step: int = 0
    """Steps that are finished. 0 with `warm` True: the cold start is over."""
    warm: bool = False
    steps_without_signal: int = 0
    kept_rollouts: dict[str, list[Group]] = field(default_factory=dict)
    """Held-out rollouts of the first and the last evaluation, for the summary."""

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

    def log(self, metrics: dict[str, Any]) -> None:
        """One finished step, to the run directory, the screen and the tracker."""
        check_names(metrics)
        self.directory.log(metrics)
        self.progress.log(metrics)
        if self.tracker is not None:
            self.tracker.log(self.step, metrics)

    def save(self) -> None:
        """A checkpoint of everything that decides how the run goes on."""
        tensors, state = self.learner.state_dict()
        state = {
            "learner": state,
            "step": self.step,
            "steps_without_signal": self.steps_without_signal,
            "curriculum": self.curriculum.state_dict(),
        }
        checkpoints = self.directory.path / "checkpoints"
        checkpoint.save(checkpoints, self.step, tensors, state)
        checkpoint.prune(checkpoints, self.settings.keep_checkpoints)
        if self.model.lora is not None:
            save_adapter(self.directory.path / "adapter", self.model, str(self.directory.path / BASE))

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of this run."""
        tensors, state = checkpoint.load(path)
        if any(name.startswith("reference/") for name in tensors):
            self.learner.set_reference()
        self.learner.load_state_dict(tensors, state["learner"])
        self.step, self.warm = state["step"], True
        self.steps_without_signal = state["steps_without_signal"]
        self.curriculum.load_state_dict(state["curriculum"])
        self.engine.load(self.learner.weights(), self.learner.version)

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
    kind = type(settings)
    config = {"recipe": recipe, "settings_class": f"{kind.__module__}.{kind.__qualname__}"}
    config |= {"settings": settings.to_dict(), "model": run_parts["model"].config.to_dict()}
    config |= {"algorithm": {name: str(v) for name, v in run_parts["algorithm"].settings.items()}}
    directory = RunDirectory.create(config, path)
    run_parts["tokenizer"].save(directory.path / "tokenizer.json")
    if settings.lora.rank:
        checkpoint.save_model(directory.path / BASE, run_parts["model"])
    return _run(settings, directory, run_parts, progress)


def open_run(
    path: Path | str, progress: Progress | None = None, step: int | None = None, *, read_only: bool = False
) -> Run:
    """An existing run at its newest (or the given) checkpoint; at its beginning if it has none.

    Unless `read_only`, what was logged after the checkpoint is forgotten, to be done again.
    """
    directory = RunDirectory.open(path)
    missing = [name for name in ("settings_class", "settings", "model") if name not in directory.config]
    if missing:
        raise ValueError(
            f"{directory.path}/config.json has no {missing[0]!r}; was this run made by another version?"
        )
    settings = from_dict(settings_class(directory.config["settings_class"]), directory.config["settings"])
    parts = _assemble(settings, directory)
    if settings.lora.rank and directory.checkpoint_steps():
        parts["model"] = checkpoint.load_model(directory.path / BASE)
    run = _run(settings, directory, parts, progress)
    checkpoints = directory.path / "checkpoints"
    chosen = checkpoint.newest(checkpoints) if step is None else directory.checkpoint(step)
    if step is not None and step not in directory.checkpoint_steps():
        steps = ", ".join(map(str, directory.checkpoint_steps())) or "none"
        raise ValueError(f"{directory.path} has no checkpoint of step {step}; it has {steps}")
    if chosen is not None:
        run.restore(chosen)
    elif read_only:
        raise ValueError(f"{directory.path} has no checkpoint yet")
    if not read_only:
        directory.truncate_after(run.step if run.warm else -1)
        if not run.warm:
            directory.truncate_supervised_after(0)
    return run


def new_curriculum(settings: Settings, environment: Environment) -> Curriculum:
    """The settings' curriculum over the environment's training problems, at its beginning."""
    parts = environment.parts if isinstance(environment, Several) else (environment,)
    return make_curriculum(settings.curriculum, [part.num_problems("train") for part in parts], settings.seed)


def on_cuda(settings: Settings) -> bool:
    return settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())


def num_cores(settings: Settings) -> int:
    """Cores that the run uses: those of the settings, or all that this process may use, at most 4."""
    if on_cuda(settings):
        return 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.cores or min(allowed, 4)


def memory_gib(player: Player) -> float:
    """Peak memory: the device's where there is one, else the resident sets of the run's processes, added up."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return player.memory_gib


def _assemble(settings: Settings, existing: RunDirectory | None = None) -> dict[str, Any]:
    """Environment, tokenizer, algorithm and model: what can be refused before a directory is made.

    The model of an existing run has the shape and the tokenizer that were recorded with it.
    """
    if not on_cuda(settings):
        # Further cores get processes and threads of our own. torch's threads wait for one another within every
        # operation: spinning they fall many times behind one thread as soon as anything else runs on the
        # machine, and sleeping they are slower than one on operations as small as a small model's.
        torch.set_num_threads(1)
    environment = make(settings.environment)
    algorithm = settings.resolve_algorithm()
    source = Path(settings.model)
    if existing is not None and (settings.model in PRESETS or existing.checkpoint_steps()):
        tokenizer = Tokenizer.load(existing.path / "tokenizer.json")
        model = Transformer(ModelConfig.from_dict(existing.config["model"])).initialise(settings.seed)
    elif settings.model in PRESETS:
        alphabet = environment.alphabet
        tokenizer = Tokenizer.byte_level() if alphabet is None else Tokenizer.characters(alphabet)
        preset = PRESETS[settings.model]
        model = Transformer(preset(tokenizer.vocab_size, settings.max_context)).initialise(settings.seed)
    elif source.is_dir():
        model, tokenizer = _load_start(source)
    else:
        raise ValueError(
            f"unknown model {settings.model!r}; expected one of {', '.join(PRESETS)} or the path of a run "
            "directory"
        )
    if settings.lora.rank:
        targets_of(model, settings.lora)  # refuses targets that it has not
    check_prompts(environment, tokenizer, model.config.max_context)
    return {
        "environment": environment,
        "tokenizer": tokenizer,
        "algorithm": algorithm,
        "model": model,
        "curriculum": new_curriculum(settings, environment),
    }


def check_prompts(environment: Environment, tokenizer: Tokenizer, max_context: int) -> None:
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


def _load_start(path: Path) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of the newest checkpoint of a run directory; adapters are merged into their base."""
    directory = RunDirectory.open(path)
    newest = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise ValueError(f"{path} has no checkpoint to start from")
    tensors, _ = checkpoint.load(newest)
    weights = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    lora = from_dict(Lora, directory.config["settings"].get("lora", {}))
    if lora.rank:
        model = add_lora(checkpoint.load_model(path / BASE), lora, seed=0)
    else:
        model = Transformer(ModelConfig.from_dict(directory.config["model"]))
    own = policy_parameters(model.to(next(iter(weights.values())).dtype))
    checkpoint.check_tensors(own, weights)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    if lora.rank:
        merge(model)
        strip(model)
    return model, Tokenizer.load(path / "tokenizer.json")


def _run(
    settings: Settings, directory: RunDirectory, parts: dict[str, Any], progress: Progress | None
) -> Run:
    model, tokenizer, algorithm = parts["model"], parts["tokenizer"], parts["algorithm"]
    model.checkpoint_activations = settings.checkpoint_activations
    model.to("cuda" if on_cuda(settings) else "cpu", getattr(torch, settings.dtype))
    if settings.lora.rank:
        add_lora(model, settings.lora, settings.seed)
    engine = Engine(
        model, stop_tokens=[tokenizer.end_id], decode_text=tokenizer.decode, max_running=settings.max_running
    )
    learner = Learner(
        model,
        settings.optimizer.over(settings.num_steps * settings.updates_per_batch),
        temperature=settings.sampling.temperature,
        token_budget=settings.token_budget,
        value_head="value_old_N" in algorithm.needs,
        num_threads=num_cores(settings),
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
        player=PlayerProcesses(
            parts["environment"], engine, tokenizer, settings.seed, cores=num_cores(settings)
        ),
        progress=progress or Silent(),
    )


def open_tracker(run: Run) -> Tracker | None:
    """The tracker that the settings name; what it already holds of later steps is drawn over."""
    name, directory = run.settings.tracker, run.directory
    if name == "tensorboard":
        return TensorBoard(directory.path / "tensorboard", first_step=run.step + 1 if run.warm else None)
    if name == "wandb":
        return WandB(directory.path, "whorl", directory.name, directory.config)
    if name == "trackio":
        return Trackio("whorl", directory.name, directory.config)
    return None
