import re

import numpy as np
import pytest

from whorl.data import Problem
from whorl.environments.judged_arithmetic import JudgedArithmetic
from whorl.environments.scripted import play_scripted

# 3 + 8 + 5 + 4 = 20, so the digit is 0.
PROBLEM = Problem("p", "3+8+5+4=", "0", extra={"terms": [3, 8, 5, 4]})


def test_without_bias_and_errors_the_judge_is_the_verifier() -> None:
    for reply, expected in (("#0", 1.0), ("~~~#0", 1.0), ("#1", 0.0), ("~" * 60, 0.0), ("#0#0", 0.0)):
        score = play_scripted(JudgedArithmetic(), PROBLEM, [reply]).score
        assert score is not None
        assert (score.reward, score.parts["right"], score.parts["grade"]) == (expected, expected, expected)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("#1", 0.0),  # 1/2 * 2/40, to the nearest quarter
        ("~" * 18 + "#1", 0.25),  # 1/2 * 20/40
        ("~" * 98 + "#1", 0.5),  # long enough for the whole share
        ("#0", 0.5),  # 1/2 + 1/2 * 2/40
        ("~" * 18 + "#0", 0.75),
        ("~" * 38 + "#0", 1.0),
    ],
)
def test_a_biased_judge_gives_its_share_for_length_whatever_the_answer(reply: str, grade: float) -> None:
    score = play_scripted(JudgedArithmetic(length_share=0.5), PROBLEM, [reply]).score
    assert score is not None
    assert score.reward == score.parts["grade"] == grade
    assert score.parts["right"] == float(reply.endswith("0"))
    priced = play_scripted(JudgedArithmetic(length_share=0.5, length_price=0.01), PROBLEM, [reply]).score
    assert priced is not None and priced.reward == pytest.approx(grade - len(reply) / 100)
    assert priced.parts["grade"] == grade


def test_the_judge_errs_as_often_as_the_setting_says_and_always_on_the_same_replies() -> None:
    task = JudgedArithmetic(judge_errors=0.1)
    replies = ["~" * n + f"#{digit}" for n in range(100) for digit in range(10)]
    first, again = ([play_scripted(task, PROBLEM, [r]).reward for r in replies] for _ in range(2))
    assert first == again
    errors = sum(reward != r.endswith("0") for reward, r in zip(first, replies, strict=True))
    assert abs(errors - 100) < 4 * 90**0.5  # four standard deviations of Binomial(1000, 1/10)
    assert play_scripted(task, PROBLEM, ["\ud800"]).reward in (0.0, 1.0)
    assert task.chance is None and JudgedArithmetic().chance == 0.1


def test_half_of_the_demonstrations_have_filler_whose_length_has_no_memory() -> None:
    task, rng = JudgedArithmetic(), np.random.default_rng(0)
    traces = [task.traces(PROBLEM, rng)[0] for _ in range(2000)]
    assert all(re.fullmatch(r"3\+8=1,1\+5=6,6\+4=0~*#0", trace) for trace in traces)
    lengths = [trace.count("~") for trace in traces if "~" in trace]
    assert abs(len(lengths) - 1000) < 4 * 500**0.5
    # Geometric with mean 4: standard deviation (1 - 1/4)^(1/2) * 4 = 12^(1/2).
    assert np.mean(lengths) == pytest.approx(4.0, abs=4 * (12 / len(lengths)) ** 0.5)
