"""The settings of a run. A recipe is a subclass whose defaults are the paper's numbers.

Every field can be overridden on the command line: `whorl train quickstart --num-steps 20
--optimizer.learning-rate 1e-3`. Two are one-line specs with settings of their own:
`--environment countdown,num_numbers=4` and `--algorithm GRPO,ratio_max=1.28`.
"""

import ast
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar

from whorl.algorithms.algorithm import Algorithm
from whorl.algorithms.catalog import algorithm_named, with_settings
from whorl.learning.optimizer import OptimizerSettings
from whorl.model.adapter import Lora
from whorl.sampling.draw import Sampling
from whorl.window import LengthWindow


@dataclass(frozen=True)
class ColdStart:
    """Supervised fine-tuning on the environment's demonstrations before reinforcement learning.

    Ended by accuracy, never by time: small models learn a way of answering in a jump, and a start that
    stops before the jump leaves reinforcement learning without a signal.
    """

    max_updates: int = 0
    """Updates after which it gives up waiting for the accuracy; 0: no cold start."""
    until_accuracy: float = 0.45
    """Accuracy (fraction) of answers sampled at temperature 1 to validation problems that ends it."""
    check_every_updates: int = 50
    """Updates between looks at the accuracy."""
    check_problems: int = 128
    """Validation problems sampled at each check (none of them is ever reported or trained on)."""
    examples_per_update: int = 64
    """Demonstrations per update, each of a new problem."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(2e-3, warmup_steps=20))


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on held-out problems, sampled as in training."""

    every_steps: int = 10
    """Steps between evaluations; the start and the end are always evaluated. 0: only those."""
    num_problems: int = 128
    """Problems of the test split (all of it, if it has fewer)."""
    samples_per_problem: int = 4
    """k of avg@k and pass@k."""


@dataclass(frozen=True)
class Settings:
    """A run of reinforcement learning with verifiable rewards."""

    claim: ClassVar[str] = ""
    """What the paper says."""
    scaled: ClassVar[tuple[str, ...]] = ()
    """What is smaller here than in the paper."""
    unsaid: ClassVar[tuple[str, ...]] = ()
    """What the paper leaves unsaid, and what was chosen."""

    environment: str = "chain_arithmetic"
    """Task, as name[:argument][,setting=value]*: countdown,num_numbers=4 | reasoning_gym:chain_sum |
    data:problems.jsonl,prompt=question. `whorl list` shows the names."""
    model: str = "m1-nano"
    """Preset (m1-nano, m1-small; m1-nano,num_experts=0 with other settings), a run directory from whose newest
    checkpoint to start, or a checkpoint folder or hub name whose tokenizer Whorl can read."""
    tokenizer: str | None = None
    """For a preset: run, model folder or hub name whose tokenizer to use (by default one is made for the task)."""
    max_context: int = 512
    """Longest sequence, prompt included, in tokens."""
    cold_start: ColdStart = field(default_factory=ColdStart)
    algorithm: str = "CISPO"
    """Row of the catalogue with settings: CISPO,ratio_max=4.0,average=token_mean. `whorl list` shows the names."""
    watch: str = ""
    """Text whose tokens are watched, such as "?" or " wait": what the algorithm's clip does to them is logged."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=128))
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(3e-4, warmup_steps=5))
    lora: Lora = field(default_factory=Lora)
    """Train low-rank adapters and leave the model's own weights as they are (--lora.rank 8)."""
    length_window: LengthWindow = field(default_factory=LengthWindow)
    """Training answers whose limit grows in steps: --length-window.tokens 40 48 56."""
    curriculum: str = "uniform"
    """Which problems come next: uniform, or difficulty_band (problems that are neither solved nor hopeless)."""
    num_steps: int = 100
    """Steps of reinforcement learning: one batch of rollouts each."""
    num_generated_tokens: int = 0
    """The run ends before that, with the step in which the policy has written so many training tokens; 0: not. For
    comparisons at equal tokens; schedules of the learning rate still go by num_steps."""
    problems_per_step: int = 16
    """Groups of rollouts in a step's batch."""
    rollouts_per_problem: int = 8
    """Size of a group."""
    updates_per_batch: int = 1
    """Optimizer updates from one batch of rollouts; above 1 the later ones are off-policy."""
    max_redraws: int = 4
    """With dynamic sampling: how often a step may sample further problems to replace groups without signal."""
    dynamic_sampling_after_steps: int = 0
    """With dynamic sampling: steps before it begins (RPT, arXiv:2506.08007: half of them)."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    max_running: int = 128
    """Sequences the engine decodes together (in each process that plays rollouts)."""
    max_cached_tokens: int = 0
    """Tokens whose keys and values the engine may hold, every running sequence counted as long as the longest; 0: no
    limit. A token takes 2 x softmax layers x key/value heads x head size numbers. Beyond the limit the newest
    sequences wait and are read again: less memory, more time, the same rollouts."""
    token_budget: int = 16_384
    """Padded tokens of a micro-batch; changes memory and speed, not results."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    checkpoint_every_steps: int = 10
    """Steps between checkpoints; the start and the end always get one."""
    checkpoint_every_minutes: float = 30.0
    """A checkpoint also whenever this time has passed since the last one, for long steps; 0: never."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    rollouts_every_steps: int = 10
    """Steps between rollouts that are kept for good. Those of the first and the last step, and of a step with a
    skipped update, are kept too; those since the oldest checkpoint stay until it goes, for `whorl replay`."""
    stop_after_steps_without_signal: int = 20
    """Give up when no group had differing rewards for so many steps in a row; 0: never."""
    stop_after_skipped_updates: int = 3
    """Stop when so many updates in a row were skipped because something was not finite; 0: never."""
    rollout_timeout_seconds: float = 600.0
    """Seconds that the environment may take over a rollout (waiting for the sampler not counted) and its verifier over
    a verdict; then the rollout has failed. 0: no limit. An episode that blocks Python can be ended only where another
    process plays it: that process is ended after twice the time and all rollouts it was playing have failed."""
    record_experts: bool = False
    """Log the share of tokens that sampler and learner send to other experts (costs some sampling speed)."""
    replay_experts: bool = False
    """Train each token on the experts that the sampler chose, with weights from the router as it is now (rollout
    routing replay, arXiv:2510.11370). Implies record_experts."""
    sampler_gap_limit_nats: float | None = None
    """Stop if a token's log-prob differs by more between sampler and learner. None: 1e-3, in bfloat16 1."""
    probe_gap_limit_nats: float | None = None
    """Stop if the log-probs of a fixed sequence differ by more between the learner and what was loaded into a
    sampler: its weights are old then. None: 1e-5, which is rounding in fp32, and in bfloat16 0.1."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides the run directory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that compute. bfloat16: the optimizer keeps them, and adds up gradients, in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto: on the GPU if there is one."""
    cores: int = 0
    """CPU cores to use: processes that play rollouts, threads that train. 0: all, at most 4. On a GPU always 1."""
    seed: int = 0
    """All randomness of the run: weights, problems' order, samples."""

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"settings: {message}")

        counts = (
            "num_steps",
            "problems_per_step",
            "rollouts_per_problem",
            "updates_per_batch",
            "max_running",
        )
        for name in (*counts, "token_budget", "checkpoint_every_steps", "keep_checkpoints", "max_context"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1; got {getattr(self, name)}")
        need(
            self.checkpoint_every_minutes >= 0,
            f"checkpoint_every_minutes must not be negative; got {self.checkpoint_every_minutes}",
        )
        need(
            self.max_cached_tokens >= 0,
            f"max_cached_tokens must be 0 (no limit) or more; got {self.max_cached_tokens}",
        )
        need(
            self.num_generated_tokens >= 0,
            f"num_generated_tokens must be 0 (no limit) or more; got {self.num_generated_tokens}",
        )
        need(
            self.dynamic_sampling_after_steps >= 0,
            f"dynamic_sampling_after_steps must not be negative; got {self.dynamic_sampling_after_steps}",
        )
        for name in ("stop_after_skipped_updates", "stop_after_steps_without_signal"):
            need(
                getattr(self, name) >= 0,
                f"{name} must be at least 1, or 0 for never; got {getattr(self, name)}",
            )
        need(
            self.rollout_timeout_seconds >= 0,
            f"rollout_timeout_seconds must be 0 (no limit) or more; got {self.rollout_timeout_seconds}",
        )
        need(self.cores >= 0, f"cores must be at least 1, or 0 for all; got {self.cores}")
        need(
            self.updates_per_batch <= self.problems_per_step,
            f"updates_per_batch {self.updates_per_batch} exceeds problems_per_step {self.problems_per_step}; "
            "a batch is divided between updates by problem",
        )
        need(
            self.sampling.max_tokens < self.max_context,
            f"sampling.max_tokens {self.sampling.max_tokens} leaves no room for a prompt in max_context "
            f"{self.max_context}",
        )
        need(
            all(tokens <= self.sampling.max_tokens for tokens in self.length_window.tokens),
            f"length_window.tokens {self.length_window.tokens} go beyond sampling.max_tokens "
            f"{self.sampling.max_tokens}",
        )
        need(
            self.sampling.temperature > 0,
            "sampling.temperature must be above 0: there is nothing to learn from greedy rollouts",
        )
        self.resolve_algorithm().check_group_size(self.rollouts_per_problem)

    @property
    def sampler_gap_limit(self) -> float:
        """The limit in nats, chosen by dtype where none is given."""
        if self.sampler_gap_limit_nats is not None:
            return self.sampler_gap_limit_nats
        return 1e-3 if self.dtype == "float32" else 1.0

    @property
    def probe_gap_limit(self) -> float:
        """The limit in nats, chosen by dtype where none is given."""
        if self.probe_gap_limit_nats is not None:
            return self.probe_gap_limit_nats
        return 1e-5 if self.dtype == "float32" else 0.1

    def resolve_algorithm(self) -> Algorithm:
        """The catalogue row that `algorithm` names, with its settings."""
        name, *assignments = (part.strip() for part in self.algorithm.split(","))
        given = read_assignments(assignments, f"algorithm {name}: expected setting=value")
        return with_settings(algorithm_named(name), **given)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_assignments(texts: Iterable[str], expected: str) -> dict[str, Any]:
    """Texts like `optimizer.eps=1e-8`, by name; a value that is no Python literal is text.

    ValueError that begins with what was `expected` for a text without `=`.
    """
    given = {}
    for assignment in texts:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{expected}; got {assignment!r}")
        try:
            given[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            given[name.strip()] = text.strip()
    return given


@dataclass(frozen=True)
class SupervisedSettings:
    """A run of supervised fine-tuning on chats."""

    claim: ClassVar[str] = ""
    scaled: ClassVar[tuple[str, ...]] = ()
    unsaid: ClassVar[tuple[str, ...]] = ()

    data: str
    """A .jsonl or .parquet file of chats: a column `messages`, or `prompt` and `completion`."""
    held_out: str | None = None
    """A file of chats to evaluate on; by default a tenth of `data`, by a hash of the prompt."""
    model: str = "m1-nano"
    """Preset (m1-nano, m1-small), or a run directory from which to start."""
    tokenizer: str | None = None
    """For a preset: run, model folder or hub name whose tokenizer to use (by default one id per byte)."""
    max_context: int = 1024
    """Longest chat in tokens; longer ones are left out, and it is said how many."""
    num_epochs: int = 2
    """Passes over the data."""
    chats_per_update: int = 32
    """Chats whose gradients are added up before each update; every token of them weighs the same."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(1e-3, warmup_steps=5))
    lora: Lora = field(default_factory=Lora)
    """Train low-rank adapters and leave the model's own weights as they are (--lora.rank 8)."""
    evaluate_every_updates: int = 25
    """Updates between evaluations of the loss on held-out chats; the start and the end are always evaluated."""
    patience: int = 4
    """Stop when so many evaluations in a row were no better than the best; 0: never."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=256))
    """How `whorl play` and `whorl evaluate` answer; training samples nothing."""
    max_running: int = 128
    """Sequences the engine decodes together."""
    token_budget: int = 16_384
    """Padded tokens of a micro-batch; changes memory and speed, not results."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    checkpoint_every_updates: int = 25
    """Updates between checkpoints; the start and the end are always kept, and the best evaluation's."""
    checkpoint_every_minutes: float = 30.0
    """A checkpoint also whenever this time has passed since the last one, for long updates; 0: never."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    stop_after_skipped_updates: int = 3
    """Stop when so many updates in a row were skipped because something was not finite; 0: never."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides the run directory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that compute. bfloat16: the optimizer keeps them, and adds up gradients, in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto: on the GPU if there is one."""
    cores: int = 0
    """CPU cores to use: threads that train. 0: all, at most 4. On a GPU always 1."""
    seed: int = 0
    """All randomness of the run: weights, order of the chats."""

    def __post_init__(self) -> None:
        counts = ("num_epochs", "chats_per_update", "evaluate_every_updates", "checkpoint_every_updates")
        for name in (*counts, "max_context", "token_budget", "max_running", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"settings: {name} must be at least 1; got {getattr(self, name)}")
        for name in ("patience", "cores", "checkpoint_every_minutes", "stop_after_skipped_updates"):
            if getattr(self, name) < 0:
                raise ValueError(f"settings: {name} must not be negative; got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


AnySettings = Settings | SupervisedSettings


def settings_class(place: str) -> type[AnySettings]:
    """The class at `package.module.Name`, as a run's configuration records it."""
    module, _, name = place.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, AnySettings)):
        raise ValueError(
            f"the run was made by {place}, which is not a recipe here; is another version installed?"
        )
    return found


SomeSettings = TypeVar("SomeSettings")


def from_dict(kind: type[SomeSettings], values: Mapping[str, Any]) -> SomeSettings:
    """A dataclass from what `asdict` made of one and JSON kept of it (ValueError for unknown names)."""
    hints = typing.get_type_hints(kind)
    names = {f.name for f in fields(typing.cast(Any, kind))}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no setting {unknown[0]!r}; was this run made by another version?"
        )
    given = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint) and isinstance(value, Mapping):
            value = from_dict(typing.cast(Any, hint), value)
        elif isinstance(value, list) and typing.get_origin(hint) in (tuple, types.GenericAlias):
            value = tuple(value)
        given[name] = value
    return kind(**given)
