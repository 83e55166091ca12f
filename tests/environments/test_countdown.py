import re

import numpy as np
import pytest

from whorl.data import Problem
from whorl.environments.countdown import Countdown
from whorl.environments.expression import parse
from whorl.environments.scripted import play_scripted

TASK = Countdown()
PROBLEM = Problem("p", "3 8 5=19", extra={"numbers": [3, 8, 5], "target": 19, "solution": "3*8-5"})


@pytest.mark.parametrize(
    ("reply", "reward", "legal", "why"),
    [
        ("3*8-5", 1.0, 1.0, "right"),
        ("8*3-5", 1.0, 1.0, "right"),
        ("three eights are 24, less 5 #3*8-5", 1.0, 1.0, "right"),
        ("3+8+5", 0.0, 1.0, "worth 16, not 19"),
        ("3*8", 0.0, 0.0, "not used: 5"),
        ("8+8+3", 0.0, 0.0, "used too often: 8"),
        ("19", 0.0, 0.0, "not given: 19"),
        ("3*8-5=19", 0.0, 0.0, "not an expression"),
        ("3*8-5 or 8*3-5", 0.0, 0.0, "not an expression"),
        ("#3*8-5#3*8-5", 0.0, 0.0, "2 '#'"),
        ("38-5-14", 0.0, 0.0, "not given"),
        ("__import__('os')", 0.0, 0.0, "not an expression"),
    ],
)
def test_only_each_number_once_and_the_exact_target_earn_the_reward(
    reply: str, reward: float, legal: float, why: str
) -> None:
    score = play_scripted(TASK, PROBLEM, [reply]).score
    assert score is not None
    assert (score.reward, score.parts["legal"]) == (reward, legal)
    assert why in score.why


@pytest.mark.parametrize("task", [TASK, Countdown(num_numbers=5, max_number=99, max_target=100)])
def test_problems_are_solvable_by_construction_and_within_their_settings(task: Countdown) -> None:
    for index in range(50):
        extra = task.problem("train", index).extra
        solution = parse(extra["solution"])
        assert sorted(solution.numbers) == sorted(extra["numbers"])
        assert solution.value == extra["target"]
        assert len(extra["numbers"]) == task.num_numbers
        assert max(extra["numbers"]) <= task.max_number
        assert 1 <= extra["target"] <= task.max_target


def test_the_same_numbers_in_another_order_are_in_the_same_split() -> None:
    task = Countdown(
        num_numbers=2, max_number=6
    )  # some 80 problems, so that 60 draws would meet a leaked one

    def contents(split: str) -> set[tuple]:
        problems = [task.problem(split, index).extra for index in range(60)]
        return {(*sorted(extra["numbers"]), extra["target"]) for extra in problems}

    train, validation, test = (contents(split) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_prompt_states_the_rules_on_request() -> None:
    problem = Countdown(instructions=True).problem("train", 0)
    assert isinstance(problem.prompt, str)
    assert "exactly once" in problem.prompt
    assert problem.extra["solution"] not in problem.prompt
    assert Countdown(instructions=True).gold(problem) == ("#" + problem.extra["solution"],)


def test_the_chance_level_is_claimed_only_where_it_was_measured() -> None:
    assert TASK.chance == Countdown(instructions=True).chance == 0.06
    assert Countdown(num_numbers=4).chance is None


@pytest.mark.parametrize(
    "settings",
    [
        {"num_numbers": 7},
        {"max_number": 3},
        {"max_target": 3},
        {"worked_frac": 1.5},
        {"max_attempts": 0},
    ],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Countdown(**settings)


def test_a_demonstrated_search_computes_right_and_ends_where_it_first_reaches_the_target() -> None:
    task = Countdown(num_numbers=4, max_number=10, max_target=100, worked_frac=1.0, max_attempts=5)
    rng = np.random.default_rng(0)
    lengths = set()
    for index in range(200):
        problem = task.problem("train", index)
        (reply,) = task.traces(problem, rng)
        search, _, answer = reply.partition("#")
        attempts = search.split(";")
        lengths.add(len(attempts))
        for attempt in attempts:
            pool = sorted(problem.extra["numbers"])
            for step in attempt.split(","):
                left, operator, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
                pool.remove(int(left))
                pool.remove(int(right))
                assert parse(f"{left}{operator}{right}").value == int(result)
                pool.append(int(result))
            assert (pool == [problem.extra["target"]]) == (attempt is attempts[-1])
        assert answer == problem.extra["solution"]
        assert play_scripted(task, problem, [reply]).score.reward == 1.0
    assert lengths == {1, 2, 3, 4, 5}


def test_without_a_share_of_searches_demonstrations_are_the_solution_alone() -> None:
    problem = Countdown().problem("train", 0)
    assert Countdown().traces(problem, np.random.default_rng(0)) == (problem.extra["solution"],)
