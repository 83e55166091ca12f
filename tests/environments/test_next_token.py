import json
from dataclasses import replace

import numpy as np
import pytest

from whorl.environments.catalog import make, spec_of
from whorl.environments.next_token import NextToken, thought_at
from whorl.environments.scripted import play_scripted
from whorl.environments.texts import LONGEST_TOKEN, NUMBER_TOKENS, draw_text, tokens_of
from whorl.model.tokenizer import Tokenizer

TASK = NextToken()
TEXT = draw_text("train", 0)
(SUM, *_) = TEXT.computed
"""The place of the sum of four."""


def test_a_text_is_its_tokens_and_its_sums_are_right():
    for index in range(50):
        text = draw_text("train", index)
        assert tokens_of("".join(text.tokens)) == text.tokens
        assert max(map(len, text.tokens)) == LONGEST_TOKEN
        assert [len(terms) for terms in text.computed.values()] == [4, 3]
        for place, terms in text.computed.items():
            assert text.tokens[place] == str(sum(terms) % 6)
        # The second sum goes on from the first, and the larger of them ends the text.
        first, second = (text.tokens[place] for place in text.computed)
        assert text.computed[max(text.computed)][0] == int(first)
        assert text.tokens[-2] == max(first, second)


def test_splits_share_neither_a_list_of_digits_nor_a_page_number():
    def lists(split):
        return {next(iter(draw_text(split, i).computed.values())) for i in range(300)}

    def pages(split):
        return {draw_text(split, i).tokens[:NUMBER_TOKENS] for i in range(300)}

    for what in (lists, pages):
        train, validation, test = map(what, ("train", "validation", "test"))
        assert not train & test and not train & validation and not validation & test


@pytest.mark.parametrize("way", ["think", "answer", "continue"])
def test_nothing_from_the_position_on_is_in_what_the_model_reads(way):
    """The context ends at the position: for every position of some texts, by tokens of the model."""
    task, tokenizer = replace(TASK, way=way), Tokenizer.characters(TASK.alphabet or "")
    for index in range(5):
        text = draw_text("test", index)
        for token in range(NUMBER_TOKENS, len(text.tokens)):
            problem = task.at("test", index, token)
            segments = tokenizer.render(problem.messages, generation=True)
            read = tokenizer.decode([i for _, ids in segments for i in ids])
            assert read == way + "".join(text.tokens[:token])
            rest = "".join(text.tokens[token:])
            assert problem.answer == rest  # for the verifier alone
    # What follows changes nothing of what is read.
    assert task.at("test", 0, 9).messages[1].text == "".join(draw_text("test", 0).tokens[:9])


def test_a_prediction_is_judged_at_the_byte_and_at_the_boundary():
    problem = TASK.at("train", 0, 16)
    one, two = TEXT.tokens[16], "".join(TEXT.tokens[16:18])

    def reward(box, task=TASK):
        return play_scripted(task, problem, [f"<think>x</think>\\boxed{{{box}}}"]).reward

    assert (one, two) == (". ", ". Sue ")
    assert [reward(box) for box in (one, two, ".", ". S", two + "x", "", "Sue ")] == [1, 1, 0, 0, 0, 0, 0]
    first = replace(TASK, reward="first_token")
    assert [reward(box, first) for box in (one, two)] == [1, 0]


def test_a_box_in_the_thought_is_no_prediction():
    problem = TASK.at("train", 0, SUM)
    gold = f"\\boxed{{{TEXT.tokens[SUM]}}}"
    assert play_scripted(TASK, problem, [f"<think>{gold}</think>"]).reward == 0
    assert play_scripted(TASK, problem, [gold]).reward == 0
    assert play_scripted(replace(TASK, way="answer"), problem, [gold]).reward == 1


def test_plain_prediction_is_right_where_its_first_token_is():
    task = replace(TASK, way="continue")
    problem = task.at("train", 0, 6)  # after the name: "has "
    replies = {"has 1 2": 1, "has ": 1, "has": 0, "had ": 0, "": 0, " has ": 0}
    assert {r: play_scripted(task, problem, [r]).reward for r in replies} == replies


def test_the_control_rewards_what_another_text_goes_on_with():
    task = replace(TASK, reward="another_text")
    problem = task.at("train", 0, SUM)
    other = draw_text("train", 1).tokens[SUM]
    assert play_scripted(task, problem, [f"<think></think>\\boxed{{{other}}}"]).reward == 1.0
    # Over many texts the true sum earns no more than chance: 1/6.
    own = []
    for index in range(400):
        problem, text = task.at("train", index, SUM), draw_text("train", index)
        own.append(play_scripted(task, problem, [f"<think></think>\\boxed{{{text.tokens[SUM]}}}"]).reward)
    assert abs(np.mean(own) - 1 / 6) < 3 * np.sqrt(1 / 6 * 5 / 6 / 400)


def test_thoughts_work_sums_out_and_wrong_demonstrations_box_another_token_of_the_text():
    rng = np.random.default_rng(0)
    right = {thought_at(TEXT, SUM, rng, 0.0) for _ in range(3)}
    a, b, c, d = TEXT.computed[SUM]
    x, y, total = (a + b) % 6, (a + b + c) % 6, (a + b + c + d) % 6
    assert right == {(f"{a}+{b}={x},{x}+{c}={y},{y}+{d}={total}", str(total))}
    assert thought_at(TEXT, 6, rng, 0.0) == ("has ", "has ")
    wrong = [thought_at(TEXT, SUM, rng, 1.0) for _ in range(50)]
    assert {thought for thought, _ in wrong} == {thought for thought, _ in right}
    assert all(token in TEXT.tokens and token != str(total) for _, token in wrong)
    earned = []
    task = replace(TASK, wrong_frac=0.8)
    for index in range(400):
        problem = task.problem("train", index)
        earned.append(play_scripted(task, problem, task.traces(problem, rng)).reward)
    assert abs(np.mean(earned) - 0.2) < 3 * np.sqrt(0.2 * 0.8 / 400)


def test_a_small_set_of_demonstrations_has_a_sum_at_every_other_position():
    task = replace(TASK, demonstrated_texts=20)
    assert task.num_problems("train") == 20
    places = [task.problem("train", index).extra["token"] for index in range(20)]
    assert all(place in draw_text("train", index).computed for index, place in enumerate(places) if index % 2)
    assert task.problem("test", 21).extra["token"] in draw_text("test", 21).computed


def test_positions_of_a_file_are_the_training_problems(tmp_path):
    file = tmp_path / "positions.jsonl"
    file.write_text(
        "".join(json.dumps({"text": t, "token": k, "entropy": 1.0}) + "\n" for t, k in ((3, 9), (4, 5)))
    )
    task = replace(TASK, positions=str(file))
    assert (task.num_problems("train"), task.num_problems("test")) == (2, None)
    assert task.problem("train", 1) == TASK.at("train", 4, 5)
    assert make(spec_of(task)) == task
    file.write_text("nonsense")
    with pytest.raises(ValueError, match="expected lines like"):
        replace(task).problem("train", 0)


def test_a_position_outside_the_text_is_refused():
    with pytest.raises(ValueError, match="tokens 5 to 30"):
        TASK.at("train", 0, 31)
    with pytest.raises(ValueError, match="tokens 5 to 30"):
        TASK.at("train", 0, 4)
