import numpy as np
import pytest

from whorl.data import Problem
from whorl.environments.guess_number import GuessNumber
from whorl.environments.scripted import play_scripted

TASK = GuessNumber()
PROBLEM = Problem("p", "417-447", "425", extra={"low": 417, "high": 447})


def test_an_episode_gives_feedback_until_the_number_is_found() -> None:
    rollout = play_scripted(TASK, PROBLEM, ["432", "420", "five", "425", "418"])
    assert [turn.text for turn in rollout.transcript] == [
        "417-447",
        "432",
        "lower",
        "420",
        "higher",
        "five",
        "no number in range",
        "425",
    ]
    assert rollout.score is not None
    assert rollout.reward == 1.0
    assert rollout.score.parts == {"turns": 4.0, "valid_frac": 3 / 4}


def test_the_last_turn_ends_the_episode_without_feedback() -> None:
    rollout = play_scripted(TASK, PROBLEM, ["417", "418", "419", "420", "421", "425"])
    assert len(rollout.replies) == 5
    assert rollout.transcript[-1].by_policy
    assert rollout.reward == 0.0


@pytest.mark.parametrize("reply", ["416", "448", "425 426", "4e2", "-425", "٤٢٥", "4²5", "", "9" * 5_000])
def test_a_reply_that_is_no_number_in_range_costs_a_turn(reply: str) -> None:
    assert TASK.feedback(PROBLEM, reply) == "no number in range"


def test_asking_for_the_middle_always_wins_and_deaf_guessing_wins_5_in_31() -> None:
    wins, deaf, demonstrated = [], [], []
    rng = np.random.default_rng(0)
    for index in range(200):
        problem = TASK.problem("train", index)
        low, high = problem.extra["low"], problem.extra["high"]
        replies = []
        for _ in range(5):
            replies.append(str((low + high) // 2))
            feedback = TASK.feedback(problem, replies[-1])
            low, high = (int(replies[-1]) + 1, high) if feedback == "higher" else (low, int(replies[-1]) - 1)
            if feedback == "found":
                break
        wins.append(play_scripted(TASK, problem, replies).reward)
        deaf.append(play_scripted(TASK, problem, TASK.guess(problem, rng)).reward)
        demonstrated.append(play_scripted(TASK, problem, TASK.traces(problem, rng)).reward)
    assert set(wins) == {1.0}
    # Deaf: 5/31 = 0.16. Demonstrations heed the feedback, so they lie between the two: room to improve.
    assert np.mean(deaf) < 0.27 < np.mean(demonstrated) < 0.9


def test_demonstrations_never_ask_for_what_is_already_excluded() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        low, high = 417, 447
        for reply in map(int, TASK.traces(PROBLEM, rng)):
            assert low <= reply <= high
            low, high = (reply + 1, high) if reply < 425 else (low, reply - 1)


def test_the_secret_is_in_the_range_and_not_in_the_prompt() -> None:
    problem = TASK.problem("validation", 0)
    assert problem.prompt == f"{problem.extra['low']}-{problem.extra['high']}"
    assert problem.extra["low"] <= int(problem.answer or "") <= problem.extra["high"]
    assert problem.extra["high"] - problem.extra["low"] + 1 == 31


def test_a_single_possible_range_cannot_be_split() -> None:
    narrow = GuessNumber(width=4, max_number=5)  # ranges 1-4 and 2-5: some split stays empty
    with pytest.raises(ValueError, match="too small to be divided into three"):
        _ = [narrow.problem(split, 0) for split in ("train", "validation", "test")]
