import itertools
import json

import pytest

from whorl.data import Problem
from whorl.environments.expression import solve
from whorl.environments.general_points import RANKS, GeneralPoints
from whorl.environments.scripted import play_scripted

CARDS = ["8", "3", "8", "3"]
PROBLEM = Problem("p", "", extra={"cards": CARDS, "numbers": [8, 3, 8, 3], "solution": "8/(3-8/3)"})
PLAIN = GeneralPoints(form="formula", max_turns=1)


def answer(formula: str, cards=CARDS, number=(8, 3, 8, 3)) -> str:
    return json.dumps({"cards": list(cards), "number": list(number), "formula": formula})


def test_the_hand_that_floating_point_gets_wrong_is_right() -> None:
    assert 8 / (3 - 8 / 3) != 24  # what a checker that evaluates in floats would compare
    assert play_scripted(PLAIN, PROBLEM, ["8/(3-8/3)"]).reward == 1.0
    assert play_scripted(GeneralPoints(), PROBLEM, [answer("8/(3-8/3)")]).reward == 1.0


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (answer("8/(3-8/3)"), "right"),
        ("First the cards. " + answer("8/(3-8/3)"), "right"),
        (answer("8+8+3+3"), "value"),
        (answer("8*3"), "numbers"),
        (answer("24"), "numbers"),
        (answer("8/(3-8/3)", cards=["8", "8", "3", "3"]), "numbers"),
        (answer("8/(3-8/3)", number=(8, 8, 3, 3)), "numbers"),
        (answer("8/(3-8/3)", number=(8.0, 3, 8, 3)), "numbers"),
        (answer("8/(3-8/3)=24"), "illegal"),
        (answer("8/(3-8/3)") + " done", "illegal"),
        ('{"formula": "8/(3-8/3)"}', "illegal"),
        ("8/(3-8/3)", "illegal"),
        ('{"cards": "8383", "number": [8, 3, 8, 3], "formula": "8/(3-8/3)"}', "illegal"),
        (answer("8/(3-8/3)", number=[[]] * 100), "numbers"),
        ("{" + "[" * 900, "illegal"),
        (answer(" " * 2_000), "illegal"),
    ],
)
def test_each_reply_falls_into_one_kind(reply: str, kind: str) -> None:
    assert GeneralPoints().judge_turn(PROBLEM, reply)[1].kind == kind


def test_the_rewards_of_the_paper_add_up_over_turns() -> None:
    task = GeneralPoints(rewards="paper", form="formula", max_turns=3)
    illegal, numbers, value, right = "?", "8*3", "8+8+3+3", "8/(3-8/3)"

    def played(*replies: str) -> tuple[float | None, dict]:
        rollout = play_scripted(task, PROBLEM, replies)
        assert rollout.score is not None
        return rollout.reward, dict(rollout.score.parts)

    assert played(right)[0] == 5.0
    assert played(illegal, right)[0] == -3 + 5
    assert played(numbers, value, right)[0] == -2 - 1 + 5
    reward, parts = played(value, numbers, illegal)
    assert reward == -1 - 2 - 3 - 1  # the last -1: three turns and no success
    assert (parts["turn_0"], parts["turn_1"], parts["turn_2"]) == (-1.0, -2.0, -4.0)
    assert task.reward_range == (3 * -3 - 1, 5)


def test_a_second_turn_counts_as_success_and_the_first_is_reported_apart() -> None:
    task = GeneralPoints(form="formula", max_turns=2)
    first = play_scripted(task, PROBLEM, ["8/(3-8/3)", "never said"])
    second = play_scripted(task, PROBLEM, ["8+8+3+3", "8/(3-8/3)"])
    assert first.score is not None
    assert second.score is not None
    assert (first.reward, first.score.parts["first_turn"], first.score.parts["turns"]) == (1.0, 1.0, 1.0)
    assert (second.reward, second.score.parts["first_turn"], second.score.parts["turns"]) == (1.0, 0.0, 2.0)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (False, "Wrong. Try again."),
        (True, "Wrong: the expression is worth 22, not 24. Try again."),
    ],
)
def test_the_verifier_says_no_more_than_its_setting_declares(hint: bool, message: str) -> None:
    task = GeneralPoints(form="formula", hint=hint)
    rollout = play_scripted(task, PROBLEM, ["8+8+3+3", "8*3", "x"])
    assert rollout.transcript[2].text == message
    solution = PROBLEM.extra["solution"]
    assert not any(solution in turn.text for turn in rollout.transcript if not turn.by_policy)


@pytest.mark.parametrize(("rule", "counts"), [("ten", (10, 10, 10)), ("rank", (11, 12, 13))])
@pytest.mark.parametrize("form", ["json", "formula"])
def test_the_prompt_states_its_own_rule_and_not_the_other(rule, counts, form) -> None:
    task = GeneralPoints(rule=rule, form=form)
    problem = task.problem("train", 0)
    assert isinstance(problem.prompt, str)
    assert tuple(task.count(face) for face in "JQK") == counts
    said = "J={}, Q={}, K={}" if form == "formula" else "J as {}, Q as {}, K as {}"
    assert said.format(*counts) in problem.prompt
    for other in {"10", "11", "12", "13"} - set(map(str, counts)):
        assert f"J={other}" not in problem.prompt
        assert f"K as {other}" not in problem.prompt


def test_a_deal_is_in_the_same_split_under_both_rules() -> None:
    def deals(rule, split: str) -> set[tuple[str, ...]]:
        task = GeneralPoints(rule=rule, num_cards=3, target=12)
        return {tuple(sorted(task.problem(split, i).extra["cards"])) for i in range(50)}

    assert not deals("ten", "train") & deals("rank", "test")
    assert not deals("rank", "train") & deals("ten", "test")


def test_forced_deals_hold_a_face_card_and_all_deals_are_solvable() -> None:
    task = GeneralPoints(force_face=True, rule="rank", num_cards=3, target=12)
    for index in range(30):
        extra = task.problem("test", index).extra
        assert set(extra["cards"]) & {"J", "Q", "K"}
        assert extra["numbers"] == [RANKS.index(card) + 1 for card in extra["cards"]]
        assert solve(tuple(sorted(extra["numbers"])), 12)


def test_782_of_2197_three_card_deals_make_12_and_face_cards_change_the_share() -> None:
    """Why rules are compared with `force_face`. The counts come from a brute-force enumeration of its own."""
    counts = {}
    for rule in ("ten", "rank"):
        task = GeneralPoints(rule=rule, num_cards=3, target=12)
        solvable = {}
        for hand in itertools.product(RANKS, repeat=3):
            numbers = tuple(sorted(task.count(card) for card in hand))
            solvable[hand] = solve(numbers, 12) is not None
        faces = [ok for hand, ok in solvable.items() if set(hand) & {"J", "Q", "K"}]
        counts[rule] = (sum(solvable.values()), sum(faces), len(faces))
    assert counts == {"ten": (782, 351, 1197), "rank": (818, 387, 1197)}


@pytest.mark.parametrize("settings", [{"num_cards": 6}, {"target": 0}, {"max_turns": 0}])
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GeneralPoints(**settings)


def test_a_target_that_no_deal_reaches_is_an_error() -> None:
    with pytest.raises(ValueError, match="no problem for the train split"):
        GeneralPoints(num_cards=2, target=997).problem("train", 0)
