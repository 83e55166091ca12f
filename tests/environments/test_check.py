"""What `whorl check` measures, on every generated environment and on some that break a promise."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from whorl.data import Problem, Rollout, Score
from whorl.environments.catalog import make
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.environments.check import BABBLE, Check, check_environment
from whorl.environments.data_files import DataFile
from whorl.environments.reverse_digits import ReverseDigits


def outcome(checks: list[Check]) -> dict[str, bool]:
    return {check.what: check.ok for check in checks}


@pytest.mark.parametrize(
    "spec",
    [
        "chain_arithmetic",
        "chain_arithmetic,modulus=3,num_terms=6",
        "reverse_digits",
        "countdown",
        "countdown,num_numbers=4,instructions=true",
        "general_points",
        "general_points,form=formula,rule=rank,force_face=true,hint=true,num_cards=3,target=12",
        "general_points,rewards=paper,max_turns=2",
        "guess_number",
        "guess_number,width=2,max_turns=1",
        "function_calling",
    ],
)
def test_every_generated_environment_keeps_its_promises(spec: str) -> None:
    failed = [check for check in check_environment(make(spec), num_problems=20) if not check.ok]
    assert failed == []


def test_a_documented_chance_level_that_is_off_by_two_is_found() -> None:
    class Optimist(ChainArithmetic):
        @property
        def chance(self) -> float:
            return 0.2

    checks = outcome(check_environment(Optimist(), num_problems=100))
    assert checks.pop("a guess in the right form earns the chance level") is False
    assert all(checks.values())


def test_a_verifier_that_rejects_its_own_gold_is_found() -> None:
    class Forgetful(ReverseDigits):
        def gold(self, problem: Problem) -> tuple[str, ...]:
            return ((problem.answer or "")[::-1],)

    assert outcome(check_environment(Forgetful(), num_problems=20))["gold replies earn 1"] is False


@pytest.mark.parametrize(
    ("verdict", "finding"),
    [
        (lambda: Score(1.0, why="fine"), "reward 1.0"),
        (lambda: Score(None, why="no idea"), "reward None"),
        (lambda: Score(0.0), "no reason given"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_babble_must_earn_zero_with_a_reason_and_never_raise(verdict, finding: str) -> None:
    class Lenient(ReverseDigits):
        def verify(self, problem: Problem, rollout: Rollout) -> Score:
            return Score(1.0, why="right") if rollout.reply == problem.answer else verdict()

        def guess(self, problem: Problem, rng: np.random.Generator) -> None:
            return None

    [check] = [c for c in check_environment(Lenient(), num_problems=1) if c.what.startswith("babble")]
    assert not check.ok
    assert check.measured.count(finding) == len(BABBLE)


def test_a_verifier_that_takes_any_declared_answer_is_found(tmp_path: Path) -> None:
    """It rejects every reply that declares nothing, so babble as such says little about it."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": str(n)}) + "\n" for n in range(20)))

    class Gullible(DataFile):
        def verify(self, problem: Problem, rollout: Rollout) -> Score:
            answered = "\\boxed" in rollout.reply
            return Score(float(answered), why="right" if answered else "no box")

    checks = outcome(check_environment(make(f"data:{file}"), 3))
    assert all(checks.values())
    assert "babble declared as the answer is not right" in checks
    wrong = outcome(check_environment(Gullible(str(file)), 3))
    assert [what for what, ok in wrong.items() if not ok] == ["babble declared as the answer is not right"]


def test_a_mixture_is_checked_task_by_task(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = make("chain_arithmetic + reverse_digits")
    levels = [make(spec).chance for spec in ("chain_arithmetic", "reverse_digits")]
    assert mixture.chance == sum(level for level in levels if level is not None) / 2
    checks = check_environment(mixture, num_problems=20)
    assert all(outcome(checks).values())
    [babble] = [check for check in checks if check.what.startswith("babble earns")]
    assert babble.measured == f"{2 * len(BABBLE)} of {2 * len(BABBLE)}"
    assert "a guess in the right form earns the chance level" in outcome(checks)
    # A fault of the second task alone.
    monkeypatch.setattr(ReverseDigits, "verify", lambda self, problem, rollout: Score(1.0, why="fine"))
    assert outcome(check_environment(mixture, num_problems=20))["babble earns 0 and is told why"] is False


def test_a_verifier_that_raises_on_its_own_gold_is_a_finding_and_not_a_crash() -> None:
    class Broken(ReverseDigits):
        def verify(self, problem: Problem, rollout: Rollout) -> Score:
            raise KeyError("lost")

    [check] = [c for c in check_environment(Broken(), 3) if c.what.startswith("gold")]
    assert (check.ok, check.measured) == (
        False,
        "0 of 3 (first failure: it raised KeyError: 'lost')",
    )


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "leg_counting"])
def test_tasks_of_reasoning_gym_reject_declared_babble(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whorl.environments.reasoning_gym._DEADLINE_SECONDS", 1.0)
    checks = outcome(check_environment(make(f"reasoning_gym:{task}"), 2))
    assert all(checks.values())
    assert "babble declared as the answer is not right" in checks


def test_a_generator_that_ignores_the_split_is_found() -> None:
    class Leaky(ChainArithmetic):
        def problem(self, split: str, index: int) -> Problem:
            return super().problem("train", index)

    assert outcome(check_environment(Leaky(), num_problems=5))["splits share no problem"] is False


def test_a_generator_with_a_hidden_counter_is_found() -> None:
    @dataclass(frozen=True)
    class Counting(ReverseDigits):
        counter: Iterator[int] = iter(range(10**6))  # noqa: RUF009  shared on purpose: that is the bug

        def problem(self, split: str, index: int) -> Problem:
            return super().problem(split, next(self.counter))

    assert outcome(check_environment(Counting(), 5))["a problem asked for again is the same"] is False


def test_a_character_outside_the_alphabet_is_named() -> None:
    class Wordy(ReverseDigits):
        alphabet = "0123456789"

    [check] = [c for c in check_environment(Wordy(), 3) if "alphabet" in c.what]
    assert check.measured == "outside: '>'"


def test_nothing_to_check_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_problems=0"):
        check_environment(ReverseDigits(), num_problems=0)
