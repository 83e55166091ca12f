import json

import pytest

from whorl.data import Problem
from whorl.environments.function_calling import TOOLS, FunctionCalling
from whorl.environments.scripted import play_scripted

TASK = FunctionCalling()
CALLS = [
    {"name": "set_light", "arguments": {"room": "hall", "power": True}},
    {"name": "get_weather", "arguments": {"city": "Rome", "days": 5}},
]
PROBLEM = Problem(
    "p", "Please turn the hall light on, then get the Rome weather for 5 days.", extra={"calls": CALLS}
)


def changed(call: int, **arguments) -> str:
    calls = json.loads(json.dumps(CALLS))
    calls[call]["arguments"].update(arguments)
    return json.dumps(calls)


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        (json.dumps(CALLS), 1.0),
        (json.dumps(CALLS[::-1]), 1.0),  # calls of one turn have no order
        (json.dumps(CALLS, indent=2), 1.0),
        (json.dumps(CALLS[:1]), 0.0),
        (json.dumps([*CALLS, CALLS[0]]), 0.0),
        (changed(1, days=6), 0.0),
        (changed(1, days="5"), 0.0),
        (changed(1, days=5.0), 0.0),
        (changed(0, power=1), 0.0),
        (changed(0, power="on"), 0.0),
        (changed(0, colour="red"), 0.0),
        (changed(1, city="rome"), 0.0),
        ("I would call set_light and get_weather", 0.0),
    ],
)
def test_every_name_argument_and_type_must_match(reply: str, reward: float) -> None:
    rollout = play_scripted(TASK, PROBLEM, [reply])
    assert rollout.reward == reward
    assert rollout.score is not None
    assert rollout.score.why


def test_requests_name_every_value_and_only_offered_tools_are_needed() -> None:
    several = 0
    for index in range(200):
        problem = TASK.problem("train", index)
        assert isinstance(problem.prompt, str)
        *signatures, request = problem.prompt.split("\n")
        assert [signature.partition("(")[0] for signature in signatures] == problem.extra["offered"]
        several += len(problem.extra["calls"]) > 1
        for call in problem.extra["calls"]:
            assert call["name"] in problem.extra["offered"]
            for value in call["arguments"].values():
                said = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
                assert said in request
    assert 60 < several < 140  # one or two calls with equal probability


def test_every_tool_can_be_asked_for_in_its_types() -> None:
    seen = {call["name"] for i in range(300) for call in TASK.problem("train", i).extra["calls"]}
    assert seen == {tool.name for tool in TOOLS}
    signatures = "\n".join(tool.signature() for tool in TOOLS)
    assert "convert_money(amount: number, source: string, target: string)" in signatures
    assert "set_light(room: string, power: boolean)" in signatures


def test_the_form_of_the_reply_is_stated_on_request() -> None:
    plain, stated = TASK.problem("test", 0), FunctionCalling(instructions=True).problem("test", 0)
    assert isinstance(plain.prompt, str)
    assert isinstance(stated.prompt, str)
    assert "JSON" not in plain.prompt
    assert "JSON list of calls" in stated.prompt
    assert plain.extra == stated.extra


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tools": 0, "max_calls": 1}, "num_tools from 1 to 12"),
        ({"num_tools": 2, "max_calls": 3}, "max_calls from 1 to 3 and to num_tools"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionCalling(**settings)
