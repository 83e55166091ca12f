"""The tasks of reasoning-gym: arithmetic, algorithms, games, graphs, logic; generated without end.

One environment per task, `reasoning_gym:chain_sum,min_terms=2`. What differs from using the library as it is:

* An answer counts only between <answer> and </answer>. The library's default scorer pays in part for a long
  text that contains the right answer somewhere.
* `strict`: full marks or nothing. Many scorers give up to 0.05 for anything at all, which an algorithm that
  compares rollouts within a group takes for a difference.
* Scorers run in worker processes that can be killed, since some hang; answers that some of them would evaluate
  as code are refused; and three scorers that give full marks to wrong answers get a second opinion
  (`whorl/verifiers/worker_gym.py`).
* Splits share no question, and problems without an answer that could be written down are left out.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import whorl.verifiers
from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card, Environment, split_of
from whorl.environments.generated import first_draw
from whorl.verifiers.answer import MAX_ANSWER_CHARACTERS, tagged
from whorl.verifiers.pool import Pool

INSTRUCTION = "Put your final answer, and nothing else, between <answer> and </answer>."

_NUM_ITEMS = {"acre": 2_000, "word_ladder": 20_000, "gsm_symbolic": 1_000_000, "list_functions": 1_000_000}
"""Tasks that lay out or limit their items in advance: as many as take a second (acre: 0.5 ms an item)."""
_MAX_ITEMS = 1 << 31
_DEADLINE_SECONDS = 10.0


@dataclass(frozen=True)
class ReasoningGym(Environment):
    """A task of reasoning-gym under the given settings (those of its configuration class)."""

    task: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seed: int = 0
    """Another seed gives other problems."""
    strict: bool = True
    """Whether only full marks count. Otherwise the reward is the scorer's value, part credit included."""

    card = Card(
        prompt="the task's question, then how to give the answer",
        turn="one: anything, with the final answer between <answer> and </answer>",
        ends="after the reply",
        reward="1 if the task's scorer gives the answer full marks, else 0 (strict=False: the scorer's value)",
        chance=0.0,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.seed < _MAX_ITEMS:
            raise ValueError(f"reasoning_gym: expected a seed from 0 to {_MAX_ITEMS - 1}; got {self.seed}")
        _check(self.task, self.settings)

    @property
    def name(self) -> str:
        return f"reasoning_gym:{self.task}"

    @property
    def chance(self) -> float | None:
        """Unknown: it differs from task to task (one half for true or false, nothing for a sudoku)."""
        return None

    def problem(self, split: str, index: int) -> Problem:
        def propose(rng: np.random.Generator) -> Problem | None:
            item = int(rng.integers(_NUM_ITEMS.get(self.task, _MAX_ITEMS)))
            try:
                entry = self._entry(item)
            except Exception:  # a generator that finds nothing for this item; first_draw counts the attempts
                return None
            question, gold = entry["question"], entry["answer"]
            if split_of(question) != split or (gold is not None and not _can_be_written(gold)):
                return None
            prompt = f"{question.rstrip()}\n\n{INSTRUCTION}"
            name = f"{self.name}/{split}/{index}"
            return Problem(name, prompt, gold, self.name, extra={"item": item})

        return first_draw(self, split, index, propose)

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        place = tagged(rollout.reply)
        answer = place[1].strip() if place else ""
        if not answer:
            return Score(0.0, {"answered": 0.0}, "no final answer between <answer> and </answer>")
        gold_length = len(problem.answer or "")
        if len(answer) > max(MAX_ANSWER_CHARACTERS, 4 * gold_length):
            return Score(0.0, {"answered": 1.0}, f"the final answer has {len(answer):,} characters")
        entry = self._entry(problem.extra["item"])
        result = _pool().call(
            self.task, dict(self.settings), entry, answer, deadline_seconds=_DEADLINE_SECONDS
        )
        if not isinstance(result, dict):
            return Score(None, {"answered": 1.0}, f"the scorer of {self.task} {result}")
        value, why = result["value"], str(result["why"])
        if value is None:
            return Score(None, {"answered": 1.0}, why)
        reward = float(value == 1.0) if self.strict else float(value)
        return Score(reward, {"answered": 1.0, "scorer": float(value)}, why)

    def gold(self, problem: Problem) -> tuple[str, ...] | None:
        """The stored answer; None in the tasks that store none (graph colouring and four others)."""
        return None if problem.answer is None else (f"<answer>{problem.answer}</answer>",)

    @functools.cached_property
    def _entry(self) -> Callable[[int], dict[str, Any]]:
        """Item by number. Remembers many, for some tasks take half a second to make one."""
        from reasoning_gym.factory import create_dataset

        size = _NUM_ITEMS.get(self.task, _MAX_ITEMS)
        dataset = create_dataset(self.task, **self.settings, size=size, seed=self.seed)

        @functools.lru_cache(maxsize=4096)
        def entry(item: int) -> dict[str, Any]:
            dataset.size = size  # word_ladder shrinks itself when it finds no words for an item
            return dataset[item]

        return entry

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_entry"}


def _can_be_written(gold: str) -> bool:
    """Whether the gold answer survives the tags: it is not blank, has nothing to strip and no tag in it."""
    return bool(gold) and gold == gold.strip() and "answer>" not in gold


@functools.cache
def tasks() -> Mapping[str, str | None]:
    """Every task of the installed reasoning-gym, with None, or the reason why it cannot be used here."""
    _require_extra()
    from reasoning_gym.factory import DATASETS, create_dataset

    reasons: dict[str, str | None] = {}
    for task in sorted(DATASETS):
        reasons[task] = None
        if task == "composite":
            reasons[task] = "it mixes other tasks; mix their environments with a curriculum instead"
            continue
        try:
            create_dataset(task, size=1, seed=0)
        except Exception as error:  # a task of another version may need anything: files, a network, a package
            reasons[task] = f"it does not build: {type(error).__name__}: {error}"
    return reasons


def _check(task: str, settings: Mapping[str, Any]) -> None:
    """ValueError that says what is valid, for an unknown task, an unusable one or a wrong setting."""
    _require_extra()
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    if task == "composite":
        raise ValueError(f"reasoning_gym:composite cannot be used: {tasks()[task]}")
    valid = {
        item.name: item.default_factory() if callable(item.default_factory) else item.default
        for item in dataclasses.fields(DATASETS[task][1])
        if item.name not in ("size", "seed")
    }
    described = ", ".join(f"{name}={value!r}" for name, value in valid.items()) or "none"
    for setting in settings:
        if setting not in valid:
            raise ValueError(f"reasoning_gym:{task} has no setting {setting!r}; its settings are {described}")
    try:
        create_dataset(task, **settings, size=1, seed=0)
    except Exception as error:
        raise ValueError(
            f"reasoning_gym:{task} cannot be built with {dict(settings)}: {error or type(error).__name__}; "
            f"its settings and defaults are {described}"
        ) from None


def _require_extra() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError('reasoning_gym tasks need reasoning-gym, not installed: pip install "whorl[tasks]"')


@functools.cache
def _pool() -> Pool:
    return Pool(Path(whorl.verifiers.__path__[0], "worker_gym.py"), "score")
