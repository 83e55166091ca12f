import json

import pytest

from whorl.verifiers.function_call import compare, parse

OSLO = {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}
ALARM = {"name": "set_alarm", "arguments": {"hour": 7, "repeat": True, "label": "råd"}}


def test_the_gold_calls_are_right_in_any_order_of_calls_and_arguments() -> None:
    assert compare(json.dumps([OSLO, ALARM]), [OSLO, ALARM]).reward == 1.0
    swapped = {"arguments": {"days": 2, "city": "Oslo"}, "name": "get_weather"}
    score = compare(json.dumps([ALARM, swapped], ensure_ascii=False), [OSLO, ALARM])
    assert (score.reward, score.why) == (1.0, "all calls match")
    assert compare("[]", []).reward == 1.0


@pytest.mark.parametrize(
    ("reply", "names", "calls", "why"),
    [
        ([OSLO], 1 / 2, 1 / 2, "missing set_alarm"),
        ([OSLO, ALARM, ALARM], 1, 1, "not asked for set_alarm"),
        ([OSLO, OSLO], 1 / 2, 1 / 2, "missing set_alarm"),
        ([{**OSLO, "name": "get_time"}, ALARM], 1 / 2, 1 / 2, "missing get_weather"),
        (
            [{**OSLO, "arguments": {"city": "Oslo"}}, ALARM],
            1,
            1 / 2,
            'missing get_weather({"city": "Oslo", "days": 2})',
        ),
        ([{**OSLO, "arguments": {"city": "Oslo", "days": "2"}}, ALARM], 1, 1 / 2, '"days": "2"'),
        ([{**OSLO, "arguments": {"city": "Oslo", "days": 2.0}}, ALARM], 1, 1 / 2, '"days": 2.0'),
        ([OSLO, {**ALARM, "arguments": {**ALARM["arguments"], "repeat": 1}}], 1, 1 / 2, '"repeat": 1'),
        ([], 0, 0, "missing get_weather"),
    ],
)
def test_a_call_must_match_in_name_arguments_types_and_number(
    reply: list, names: float, calls: float, why: str
) -> None:
    score = compare(json.dumps(reply), [OSLO, ALARM])
    assert score.reward == 0.0
    assert score.parts == {"parsed": 1.0, "names_frac": names, "calls_frac": calls}
    assert why in score.why


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("I will call get_weather.", "not a JSON list"),
        ('Here: [{"name": "f", "arguments": {}}]', "not a JSON list"),
        ('[{"name": "f", "arguments": {}}] [{"name": "g", "arguments": {}}]', "not a JSON list"),
        ('{"name": "f", "arguments": {}}', "expected a JSON list of calls, got an object"),
        ("3", "got a number"),
        ('[{"name": "f"}]', "call 1: expected"),
        ('[{"name": "f", "arguments": [1]}]', "call 1: the name must be text"),
        ('[{"name": "f", "arguments": {"a": 1, "a": 2}}]', "repeats a key"),
        ('[{"name": "f", "arguments": {"a": NaN}}]', "NaN is not JSON"),
        ("[" * 50_000, "not a JSON list"),
        ("[" + "1" * 90_000 + "]", "not a JSON list"),
        (" " * 10 + "[" * 200_000, "200,000 characters"),
    ],
)
def test_what_is_not_a_list_of_calls_scores_0_and_says_why(reply: str, why: str) -> None:
    score = compare(reply, [OSLO])
    assert (score.reward, score.parts["parsed"]) == (0.0, 0.0)
    assert why in score.why


def test_thoughts_and_a_code_fence_around_the_list_are_allowed() -> None:
    assert parse(f"<think>[maybe]</think>\n```json\n{json.dumps([OSLO])}\n```") == [OSLO]


def test_a_deeply_nested_argument_is_no_crash() -> None:
    deep = '{"a":' * 900 + "1" + "}" * 900
    assert compare(f'[{{"name": "f", "arguments": {deep}}}]', [OSLO]).reward == 0.0
