import numpy as np
import pytest

from whorl.data import Problem
from whorl.environments.recall import Recall
from whorl.environments.scripted import play_scripted

TASK = Recall(num_pairs=4, num_queries=2)
PROBLEM = Problem("p", "a3k7c1d9:ca", "13")


def test_the_answer_is_the_digits_in_the_order_of_the_questions() -> None:
    rewards = [play_scripted(TASK, PROBLEM, [reply]).reward for reply in ("13", "13\n", "31", "1", "133", "")]
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    half = play_scripted(TASK, PROBLEM, ["19"])
    assert half.score is not None and half.score.parts == {"digits_right": 0.5}


def test_a_keyed_answer_has_each_letter_before_its_digit() -> None:
    keyed = Recall(num_pairs=4, num_queries=2, keyed=True)
    problem = keyed.problem("train", 0)
    pairs, _, asked = problem.prompt.partition(":")
    values = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert problem.answer == "".join(key + values[key] for key in asked)
    replies = ("c1a3", "c1a9", "a3c9", "13", "c1a", "c1a33", "")
    scores = [play_scripted(keyed, Problem("p", "a3k7c1d9:ca", "c1a3"), [reply]).score for reply in replies]
    found = [(score.reward, score.parts["digits_right"]) for score in scores if score]
    assert found == [(1.0, 1.0), (0.0, 0.5), (0.0, 0.0), (0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.0, 0.0)]


def test_every_key_stands_once_and_every_question_is_about_a_pair_that_is_there() -> None:
    for index in range(100):
        problem = TASK.problem("train", index)
        pairs, _, asked = problem.prompt.partition(":")
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(values) == 4 and len(set(asked)) == 2
        assert problem.answer == "".join(values[key] for key in asked)


def test_the_splits_share_no_prompt() -> None:
    tiny = Recall(num_pairs=2, num_queries=1)
    prompts = [
        {tiny.problem(split, i).prompt for i in range(200)} for split in ("train", "validation", "test")
    ]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


@pytest.mark.parametrize("keyed", [False, True])
def test_guessing_earns_what_the_chance_says(keyed: bool) -> None:
    one = Recall(num_pairs=4, num_queries=1, keyed=keyed)
    rng = np.random.default_rng(0)
    problems = [one.problem("test", i) for i in range(400)]
    earned = [play_scripted(one, p, one.guess(p, rng)).reward for p in problems]
    assert abs(np.mean(np.array(earned, dtype=float)) - one.chance) < 4 * (0.1 * 0.9 / 400) ** 0.5
