"""A request in words and some tools: write the calls that fulfil it, name and arguments exact."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card, Environment, split_of
from whorl.environments.generated import first_draw, require
from whorl.verifiers import function_call

_CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Tokyo", "Paris", "Rome")
_PEOPLE = ("Ana", "Ben", "Chi", "Dev", "Eva", "Finn", "Gus", "Hana")
_ROOMS = ("kitchen", "hall", "bedroom", "office")
_TITLES = ("Blue Moon", "Rain", "Old Roads", "Fever", "Gold Dust", "Echo")
_CURRENCIES = ("EUR", "USD", "JPY", "INR")
_TEXTS = ("running late", "call me", "all done", "see you soon", "happy birthday")
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


class Tool(NamedTuple):
    name: str
    parameters: dict[str, Sequence[Any]]
    """For each parameter the values that requests draw from; their type is its type."""
    request: str
    """How a user asks for it, with every value as the call must have it and booleans as "on" and "off"."""

    def signature(self) -> str:
        described = (f"{name}: {_TYPES[type(values[0])]}" for name, values in self.parameters.items())
        return f"{self.name}({', '.join(described)})"


TOOLS = (
    Tool("get_weather", {"city": _CITIES, "days": range(1, 8)}, "get the {city} weather for {days} days"),
    Tool("get_time", {"city": _CITIES}, "look up the time in {city}"),
    Tool(
        "find_flight",
        {"origin": _CITIES[:4], "destination": _CITIES[4:]},
        "find a flight from {origin} to {destination}",
    ),
    Tool(
        "get_distance",
        {"start": _CITIES[:4], "end": _CITIES[4:]},
        "measure how far it is from {start} to {end}",
    ),
    Tool("book_table", {"name": _PEOPLE, "guests": range(2, 13)}, "book a table for {guests} under {name}"),
    Tool("send_message", {"to": _PEOPLE, "text": _TEXTS}, 'tell {to} "{text}"'),
    Tool(
        "set_alarm", {"hour": range(24), "minute": range(60)}, "set an alarm for hour {hour} minute {minute}"
    ),
    Tool("set_light", {"room": _ROOMS, "power": (True, False)}, "turn the {room} light {power}"),
    Tool("play_song", {"title": _TITLES, "repeat": (True, False)}, 'play "{title}" with repeat {repeat}'),
    Tool(
        "convert_money",
        {"amount": tuple(n + 0.5 for n in range(100)), "source": _CURRENCIES[:2], "target": _CURRENCIES[2:]},
        "convert {amount} {source} to {target}",
    ),
    Tool("add_note", {"text": _TEXTS, "pinned": (True, False)}, 'note "{text}" with pinning {pinned}'),
    Tool("set_heating", {"room": _ROOMS, "degrees": range(15, 26)}, "heat the {room} to {degrees} degrees"),
)
_BY_NAME = {tool.name: tool for tool in TOOLS}


@dataclass(frozen=True)
class FunctionCalling(Environment):
    """The gold calls are known because the request is written from them.

    Only the tools offered may be called, the others of them are distractors. Requests name every value as the
    call must have it, so the task is to choose the tools, to put the values under the right names and to
    write them in the right types.
    """

    num_tools: int = 3
    """How many tools are offered."""
    max_calls: int = 2
    """A request needs one to so many calls, of different tools. They may come in any order."""
    instructions: bool = False
    """Put the form of the reply into the prompt, for a model that has not learned it from demonstrations."""

    card = Card(
        prompt="the signatures of the tools, one a line, then the request",
        turn='one: a JSON list of calls, [{"name": "get_time", "arguments": {"city": "Oslo"}}]',
        ends="after the reply",
        reward="1 if names, arguments and types of all calls match exactly, else 0",
        # 956 of 200,000 guesses, one for each of the first training problems (95%: ± 0.0003).
        chance=0.005,
    )
    alphabet = "".join(map(chr, range(32, 127))) + "\n"

    def __post_init__(self) -> None:
        require(1 <= self.num_tools <= len(TOOLS), self, f"num_tools from 1 to {len(TOOLS)}")
        require(1 <= self.max_calls <= min(3, self.num_tools), self, "max_calls from 1 to 3 and to num_tools")

    @property
    def chance(self) -> float | None:
        return self.card.chance if (self.num_tools, self.max_calls) == (3, 2) else None

    def problem(self, split: str, index: int) -> Problem:
        def propose(rng: np.random.Generator) -> Problem | None:
            offered = [TOOLS[i] for i in rng.permutation(len(TOOLS))[: self.num_tools]]
            num_calls = int(rng.integers(1, self.max_calls + 1))
            chosen = [offered[i] for i in rng.permutation(self.num_tools)[:num_calls]]
            calls = [_random_call(tool, rng) for tool in chosen]
            if split_of(f"{self.name} {calls}") != split:
                return None
            lines = [tool.signature() for tool in offered]
            if self.instructions:
                lines.append('Reply with a JSON list of calls: [{"name": ..., "arguments": {...}}]')
            return Problem(
                f"{self.name}/{split}/{index}",
                "\n".join([*lines, _request(calls)]),
                json.dumps(calls),
                self.name,
                extra={"calls": calls, "offered": [tool.name for tool in offered]},
            )

        return first_draw(self, split, index, propose)

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        return function_call.compare(rollout.reply, problem.extra["calls"])

    def gold(self, problem: Problem) -> tuple[str, ...]:
        return (problem.answer or "",)

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        """One to `max_calls` of the offered tools, every argument any value of its parameter."""
        offered = [_BY_NAME[name] for name in problem.extra["offered"]]
        chosen = rng.permutation(len(offered))[: rng.integers(1, self.max_calls + 1)]
        return (json.dumps([_random_call(offered[i], rng) for i in chosen]),)


def _random_call(tool: Tool, rng: np.random.Generator) -> dict[str, Any]:
    arguments = {name: values[int(rng.integers(len(values)))] for name, values in tool.parameters.items()}
    return {"name": tool.name, "arguments": arguments}


def _request(calls: Sequence[dict[str, Any]]) -> str:
    """What the user says: each call in words, joined by "then"."""
    said = []
    for call in calls:
        words = {
            name: ("on" if value else "off") if isinstance(value, bool) else value
            for name, value in call["arguments"].items()
        }
        said.append(_BY_NAME[call["name"]].request.format(**words))
    return "Please " + ", then ".join(said) + "."
