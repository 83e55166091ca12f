import pytest

from whorl.data import Problem
from whorl.environments.reverse_digits import ReverseDigits
from whorl.environments.scripted import play_scripted

PROBLEM = Problem("p", "4821>", "1284")


@pytest.mark.parametrize(
    ("reply", "reward", "digits_right"),
    [
        ("1284", 1.0, 1.0),
        (" 1284\n", 1.0, 1.0),
        ("1285", 0.0, 3 / 4),
        ("4821", 0.0, 0.0),  # not reversed: no digit of 4821 stands where 1284 has it
        ("12844", 0.0, 1.0),
        ("1284" + " " * 500 + "4821", 0.0, 1.0),  # a far-away second answer is still part of the reply
        ("１２８４", 0.0, 0.0),  # full-width digits
        ("", 0.0, 0.0),
    ],
)
def test_only_all_digits_in_reverse_earn_the_reward(reply: str, reward: float, digits_right: float) -> None:
    score = play_scripted(ReverseDigits(), PROBLEM, [reply]).score
    assert score is not None
    assert (score.reward, score.parts["digits_right"]) == (reward, digits_right)


def test_the_answer_is_the_prompt_backwards() -> None:
    problem = ReverseDigits(num_digits=6).problem("train", 3)
    assert problem.prompt == (problem.answer or "")[::-1] + ">"
    assert len(problem.answer or "") == 6
