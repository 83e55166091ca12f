import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from whorl.data import Problem
from whorl.environments.catalog import make, spec_of
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.environments.countdown import Countdown
from whorl.environments.expression import judge, parse
from whorl.environments.function_calling import FunctionCalling
from whorl.environments.reflect_retry import CONSTANT, ReflectRetry, saying
from whorl.environments.reflections import RIGHT_AFTER, calls_lesson, chain_lesson, countdown_lesson
from whorl.environments.scripted import play_scripted
from whorl.model.tokenizer import Tokenizer
from whorl.sampling.dialogue import Dialogue, Script

TASK = ReflectRetry("countdown", {"max_number": 9, "max_target": 20})
PROBLEM = Problem("p", "3 8 5=19", source="reflect_retry", extra={"numbers": [3, 8, 5], "target": 19})
RIGHT, WRONG = "3*8-5", "3+8+5"


def texts(task, replies, problem=PROBLEM) -> tuple[Any, list[tuple[str, str]]]:
    rollout = play_scripted(task, problem, replies)
    assert rollout.score is not None
    return rollout, [(turn.role, turn.text) for turn in rollout.transcript]


def test_a_failure_is_told_reflected_on_and_the_task_is_asked_again():
    rollout, said = texts(TASK, [WRONG, "try 3*8=24", RIGHT])
    assert said == [
        ("user", "3 8 5=19"),
        ("assistant", WRONG),
        ("user", "wrong"),
        ("reflection", "try 3*8=24"),
        ("user", "3 8 5=19"),
        ("retry", RIGHT),
    ]
    assert rollout.score.parts == {"first_try": 0.0, "second_try": 1.0, "told_answer": 0.0}
    assert rollout.reward == 1.0


def test_the_message_discloses_the_bit_and_nothing_of_the_fault():
    told = [texts(TASK, [attempt, "x", RIGHT])[1][2:] for attempt in (WRONG, "3*8", "9", "", "#")]
    assert all(one == told[0] for one in told)


def test_a_right_first_try_ends_the_episode():
    rollout, said = texts(TASK, [RIGHT, "never", "said"])
    assert len(said) == 2
    assert (rollout.reward, rollout.score.parts) == (1.0, {"first_try": 1.0, "second_try": 1.0})


def test_only_one_retry_is_given_and_its_failure_is_the_reward():
    rollout, said = texts(TASK, [WRONG, "x", WRONG, RIGHT])
    assert len(said) == 6
    assert rollout.reward == 0.0


@pytest.mark.parametrize("reflection", [RIGHT, f"it is {RIGHT}", f"answer:{RIGHT}", f"#{RIGHT}"])
def test_an_answer_within_the_reflection_is_seen(reflection):
    assert texts(TASK, [WRONG, reflection, RIGHT])[0].score.parts["told_answer"] == 1.0


@pytest.mark.parametrize(
    ("reflection", "told"),
    [
        ("try 3*8=24,24-5=19", 1.0),
        ("3*8=24,24-5=19", 1.0),
        ("try 9+9=18,18+1=19", 0.0),  # numbers that are not there
        ("try 8+5=13,13+3=19", 0.0),  # false
        ("try 3*8=24,24-5=20", 0.0),
        ("try 3*8=24", 0.0),
        ("=19", 0.0),
        ("24-5=19", 0.0),
        ("20 not 19", 0.0),
        ("", 0.0),
    ],
)
def test_working_tells_an_answer_only_if_all_of_it_is_right(reflection, told):
    assert texts(TASK, [WRONG, reflection, WRONG])[0].score.parts["told_answer"] == told


def test_what_a_reflection_rules_out_it_does_not_tell():
    sums = ReflectRetry("chain_arithmetic", {"num_terms": 2, "modulus": 5})
    problem = next(p for i in range(100) if (p := sums.problem("train", i)).answer == "0")
    a, b = problem.extra["terms"]
    said = {
        f"{a}+{b}=0": True,
        "#0": True,
        "it is 0": True,
        "not 0": False,
        "not 1": False,
        "1+1=2,2+2=0": False,
    }
    assert {text: sums.tells(problem, text) for text in said} == said


def test_of_calls_the_right_value_of_an_argument_tells():
    calls = ReflectRetry("function_calling", {"num_tools": 3, "max_calls": 1})
    problem = calls.problem("train", 0)
    name, value = next(iter(problem.extra["calls"][0]["arguments"].items()))
    assert calls.tells(problem, f"{name} is {json.dumps(value)}")
    assert not calls.tells(problem, f"{name} was {json.dumps(value)}")
    assert not calls.tells(problem, f"{name} is 999")


@pytest.mark.parametrize("task", ["chain_arithmetic", "countdown", "function_calling"])
def test_validation_with_hints_asks_for_a_retry_after_a_useful_reflection(task):
    gate = ReflectRetry(task, hints_in_validation=True)
    for index in range(20):
        problem = gate.problem("validation", index)
        said = problem.extra["said"]
        assert gate._judge(problem, said["assistant"]).reward == 0.0
        assert gate.tells(problem, said["reflection"])
        assert "said" not in gate.problem("train", index).extra
        assert "said" not in ReflectRetry(task).problem("validation", index).extra


def test_the_controls_ask_again_at_once_or_after_a_sentence_that_nobody_wrote():
    _, said = texts(replace(TASK, reflection="none"), [WRONG, RIGHT])
    assert said[2:] == [("user", "3 8 5=19"), ("retry", RIGHT)]
    rollout, said = texts(replace(TASK, reflection="constant"), [WRONG, RIGHT])
    assert said[2:] == [("user", "wrong"), ("reflection", CONSTANT), ("user", "3 8 5=19"), ("retry", RIGHT)]
    assert [turn.by_policy for turn in rollout.transcript] == [False, True, False, False, False, True]


def test_turns_that_a_problem_brings_along_have_the_tokens_that_the_policy_would_have_written():
    tokenizer = Tokenizer.characters(TASK.alphabet or "")

    def played(problem, *replies):
        dialogue = Dialogue(Script(tokenizer, replies, 200), tokenizer, problem, key=0)
        asyncio.run(TASK.play(problem, dialogue))
        return dialogue.rollout()

    written = played(PROBLEM, WRONG, "i was wrong", RIGHT)
    read = played(saying(PROBLEM, assistant=WRONG, reflection="i was wrong"), RIGHT)
    assert read.tokens_T.tolist() == written.tokens_T.tolist()
    assert read.role_T.tolist() == written.role_T.tolist()
    own = tokenizer.decode(read.tokens_T[read.policy_T])
    assert own == RIGHT
    assert TASK.verify(PROBLEM, read) == TASK.verify(PROBLEM, written)


def test_failures_are_the_training_problems_of_their_file(tmp_path):
    index = 7
    file = tmp_path / "failures.jsonl"
    file.write_text(json.dumps({"index": index, "attempt": WRONG, "pass_rate": 0.25}) + "\n")
    task = replace(TASK, failures=str(file))
    assert (task.num_problems("train"), task.num_problems("test")) == (1, None)
    problem = task.problem("train", 0)
    assert problem.prompt == TASK.problem("train", index).prompt
    assert problem.extra["said"] == {"assistant": WRONG}
    assert "said" not in task.problem("test", 0).extra
    assert make(spec_of(task)) == task


@pytest.mark.parametrize("text", ["", "no json", '{"index": 3}', '{"index": "3", "attempt": "x"}', "[1]"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "failures.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match="expected lines like"):
        replace(TASK, failures=str(file)).problem("train", 0)


def test_what_is_no_setting_of_its_own_goes_to_the_task():
    task = make("reflect_retry:countdown,max_number=9,reflection=none")
    assert isinstance(task, ReflectRetry)
    assert task.inner == Countdown(max_number=9)
    calls = make("reflect_retry:function_calling,num_tools=2,instructions=true")
    assert isinstance(calls, ReflectRetry)
    assert calls.inner == FunctionCalling(num_tools=2, instructions=True)
    with pytest.raises(ValueError, match="countdown has no setting 'max_nummer'"):
        make("reflect_retry:countdown,max_nummer=9")
    with pytest.raises(ValueError, match="a task of one turn"):
        make("reflect_retry:guess_number")


def test_demonstrated_retries_succeed_as_often_as_their_kind_says():
    rng = np.random.default_rng(0)
    tasks = (
        (chain_lesson, ChainArithmetic(num_terms=3)),
        (countdown_lesson, TASK.inner),
        (calls_lesson, FunctionCalling()),
    )
    for lesson_of, task in tasks:
        for kind, share in RIGHT_AFTER.items():
            rewards = []
            for index in range(200):
                problem = task.problem("train", index)
                lesson = lesson_of(problem, kind, rng)
                assert play_scripted(task, problem, [lesson.right]).reward == 1.0
                assert play_scripted(task, problem, [lesson.attempt]).reward == 0.0
                rewards.append(play_scripted(task, problem, [lesson.retry]).reward)
            # Three standard errors of 200 trials: at most 0.106.
            assert abs(np.mean(rewards) - share) <= 3 * np.sqrt(share * (1 - share) / 200)


def test_working_is_sound_hints_reach_the_target_and_diagnoses_are_true():
    rng = np.random.default_rng(0)
    for index in range(200):
        problem = TASK.problem("train", index)
        numbers, target = problem.extra["numbers"], problem.extra["target"]
        for kind in ("hint", "misleading"):
            steps = countdown_lesson(problem, kind, rng).reflection.removeprefix("try ").split(",")
            sides = [step.split("=") for step in steps]
            assert all(parse(left).value == int(right) for left, right in sides)
            assert (int(sides[-1][1]) == target) == (kind == "hint")
        lesson = countdown_lesson(problem, "diagnosis", rng)
        if lesson.reflection.endswith("twice"):
            twice = int(lesson.reflection.split()[0])
            assert parse(lesson.attempt).numbers.count(twice) > numbers.count(twice)
        else:
            assert lesson.reflection == f"{parse(lesson.attempt).value} not {target}"
            assert judge(lesson.attempt, numbers, target).kind == "value"


def test_working_of_a_sum_ends_in_its_digit_or_by_a_slip_in_another():
    task, rng = ChainArithmetic(num_terms=3), np.random.default_rng(0)
    for index in range(50):
        problem = task.problem("train", index)
        a, b, c = problem.extra["terms"]
        hint = f"{a}+{b}={(a + b) % 10},{(a + b) % 10}+{c}={problem.answer}"
        assert chain_lesson(problem, "hint", rng).reflection == hint
        lesson = chain_lesson(problem, "misleading", rng)
        assert lesson.retry == f"#{lesson.reflection[-1]}" != lesson.right
        assert ReflectRetry("chain_arithmetic", {"num_terms": 3}).tells(problem, hint)


def test_a_problem_whose_only_way_is_through_a_large_number_is_demonstrated():
    problem = Problem("p", "9 8 6=12", extra={"numbers": [9, 8, 6], "target": 12})
    lesson = countdown_lesson(problem, "hint", np.random.default_rng(0))
    assert lesson.reflection in ("try 9*8=72,72/6=12", "try 8*9=72,72/6=12")


def test_tasks_without_reflections_to_show_are_refused_when_they_are_to_be_shown():
    with pytest.raises(
        ValueError, match="demonstrated for chain_arithmetic, countdown, function_calling only"
    ):
        ReflectRetry("reverse_digits").traces(PROBLEM, np.random.default_rng(0))
