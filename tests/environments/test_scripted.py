import asyncio
from dataclasses import dataclass

import pytest

from whorl.data import Message, Problem, Rollout, Score, role_code
from whorl.environments.base import Card, Environment, Policy
from whorl.environments.scripted import ScriptedPolicy, play_scripted


@dataclass(frozen=True)
class Dialogue(Environment):
    """Reads, writes as a reflection, reads, writes: to see what a rollout records."""

    card = Card("a word", "two", "after two", "length", 0.0)

    def problem(self, split: str, index: int) -> Problem:
        return Problem("d", "hi")

    async def play(self, problem: Problem, policy: Policy) -> None:
        policy.read(*problem.messages)
        await policy.write("reflection", stop_strings=["!"])
        policy.read(Message("tool", "go"))
        await policy.write(max_tokens=3)

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        return Score(float(len(rollout.reply)))


def test_a_rollout_records_who_wrote_each_character_and_in_which_role() -> None:
    rollout = play_scripted(Dialogue(), Problem("d", "hi"), ["ab!cd", "wxyz"], sample=3)
    assert "".join(map(chr, rollout.tokens_T)) == "hiabgowxy"
    assert rollout.policy_T.tolist() == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 3
    roles = ["user"] * 2 + ["reflection"] * 2 + ["tool"] * 2 + ["assistant"] * 3
    assert rollout.role_T.tolist() == [role_code(role) for role in roles]
    assert rollout.version_T.tolist() == [-1, -1, 0, 0, -1, -1, 0, 0, 0]
    assert [turn.stop for turn in rollout.transcript] == [None, "stop_string", None, "max_tokens"]
    assert (rollout.replies, rollout.sample, rollout.stop, rollout.reward) == (
        ("ab", "wxy"),
        3,
        "max_tokens",
        3.0,
    )


def test_after_the_script_a_write_says_nothing_and_adds_no_turn() -> None:
    policy = ScriptedPolicy(["only"])
    assert asyncio.run(policy.write()) == "only"
    assert policy.done
    assert asyncio.run(policy.write()) == ""
    assert policy.rollout(Problem("d", "hi")).replies == ("only",)


async def test_a_script_can_be_played_inside_an_event_loop() -> None:
    assert play_scripted(Dialogue(), Problem("d", "hi"), ["a", "b"]).reward == 1.0


def test_an_empty_script_makes_an_empty_answer() -> None:
    rollout = play_scripted(Dialogue(), Problem("d", "hi"), [])
    assert (rollout.reply, rollout.num_response_tokens, rollout.stop) == ("", 0, "environment")


def test_an_environment_that_waits_for_something_else_is_refused() -> None:
    class Slow(Dialogue):
        async def play(self, problem: Problem, policy: Policy) -> None:
            await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="awaits more than its policy"):
        play_scripted(Slow(), Problem("d", "hi"), ["a"])
