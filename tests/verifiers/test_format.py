import pytest

from whorl.verifiers.format import matches, tags

GOOD = "<think>so</think>\n<answer>4</answer>\n"


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("4", "expected <think>...</think> once, got 0 <think>, 0 </think>"),
        ("<think>so</think>", "expected <answer>...</answer> once"),
        ("<think>so</think> <answer>4", "got 1 <answer>, 0 </answer>"),
        (GOOD + "or 5", "there is text after </answer>: 'or 5'"),
        ("Well. " + GOOD, "there is text before <think>: 'Well.'"),
        ("<think>so</think> hence <answer>4</answer>", "there is text before <answer>: 'hence'"),
        ("<answer>4</answer><think>so</think>", "there is text before <think>"),
        ("<think><answer>4</answer></think>", "<answer> stands before the end"),
        ("<think> </think><answer>4</answer>", "<think>...</think> is empty"),
        (GOOD + "<answer>5</answer>", "got 2 <answer>"),
        ("</think>so<think><answer>4</answer>", "in the wrong order"),
    ],
)
def test_every_departure_from_the_form_scores_0_and_says_which(reply: str, why: str) -> None:
    score = tags(reply)
    assert score.reward == 0.0
    assert why in score.why


def test_the_form_itself_scores_1_whatever_the_answer() -> None:
    assert tags(GOOD).reward == 1.0
    assert tags("<plan>x</plan>", ("plan",)).reward == 1.0
    assert tags("<think>so</think>").parts == {"think": 1.0, "answer": 0.0}


def test_the_whole_reply_must_match_a_pattern() -> None:
    assert matches("a\nb", "a.b", deadline_seconds=60).reward == 1.0
    score = matches("a\nb!", "a.b", deadline_seconds=60)
    assert (score.reward, score.why) == (0.0, "the reply does not match 'a.b'")


def test_a_pattern_that_backtracks_for_ever_is_none_and_not_0() -> None:
    score = matches("a" * 40 + "!", "(a+)+", deadline_seconds=0.5)
    assert score.reward is None
    assert "timed out" in score.why


def test_a_wrong_pattern_is_an_error_of_whoever_wrote_it() -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        matches("a", "(")
