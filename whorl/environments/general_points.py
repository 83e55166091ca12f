"""Four cards that make 24, under two rules for the face cards, with revision over several turns.

The card game of "SFT Memorizes, RL Generalizes" (arXiv:2501.17161), in its text form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from whorl.data import Message, Problem, Rollout, Score
from whorl.environments.base import Card, Environment, Policy, split_of
from whorl.environments.expression import Verdict, judge, random_expression, solve
from whorl.environments.generated import answer_part, first_draw, require

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")

MAX_JSON_CHARS = 1_000

PAPER_REWARDS: Mapping[str, float] = {"right": 5.0, "value": -1.0, "numbers": -2.0, "illegal": -3.0}
"""Reward of one turn, arXiv:2501.17161: right; legal but another value; numbers that are not the cards'
(foreign, repeated or left out); anything else."""

PAPER_OUT_OF_TURNS = -1.0
"""Added to the last turn when the episode ends without success (same source)."""


@dataclass(frozen=True)
class GeneralPoints(Environment):
    """Cards `3 J 5 2`, and the rule says what J, Q and K count: 10 each, or 11, 12, 13.

    One rule trains, the other tests whether the task was learned or the training deals. A deal belongs to the
    same split under both rules. Deals are drawn card by card with replacement, as in the authors' code, and
    only solvable ones are kept. Solvable deals are not equally frequent under the two rules, so compare
    rules with `force_face` on both sides.

    Each failed reply is followed by the verifier's message and another try with the whole conversation in
    view. The message tells right from wrong and no more; with `hint` it names the fault (the value reached,
    the numbers misused). The authors' code also reveals how much of a formula begins some solution; ours
    never reveals anything of a solution.
    """

    num_cards: int = 4
    target: int = 24
    rule: Literal["ten", "rank"] = "ten"
    """What J, Q, K count: "ten" is 10, 10, 10 and "rank" is 11, 12, 13."""
    force_face: bool = False
    """Keep only deals with a J, Q or K."""
    form: Literal["json", "formula"] = "json"
    """The reply: {"cards", "number", "formula"} as in the paper, or the formula alone with a short prompt."""
    max_turns: int = 5
    hint: bool = False
    rewards: Literal["binary", "paper"] = "binary"
    """ "binary": 1 if any turn is right, else 0. "paper": the sum over turns of `PAPER_REWARDS`, and
    `PAPER_OUT_OF_TURNS` if none was right. (The authors' code adds up several penalties in one turn.)"""

    multi_turn = True
    card = Card(
        prompt="the cards, what the face cards count, the target, and the form of the reply",
        turn="up to max_turns: a formula, in JSON or alone, at the end; the verifier answers a failure",
        ends="when a formula is right, or after max_turns replies",
        reward="1 if any turn is right, else 0 (default); or the paper's, summed over turns: 5, -1, -2, -3 "
        "by kind and -1 when the turns are used up",
        # 1,390 of 40,000 games of five random formulas, one for each of the first training problems
        # (95%: ± 0.002), the cards read correctly.
        chance=0.035,
    )
    alphabet = "".join(map(chr, range(32, 127))) + "\n"

    def __post_init__(self) -> None:
        require(2 <= self.num_cards <= 5, self, "num_cards from 2 to 5")
        require(1 <= self.target <= 999, self, "target from 1 to 999")
        require(1 <= self.max_turns <= 20, self, "max_turns from 1 to 20")
        require(self.rule in ("ten", "rank"), self, 'rule "ten" or "rank"')
        require(self.form in ("json", "formula"), self, 'form "json" or "formula"')
        require(self.rewards in ("binary", "paper"), self, 'rewards "binary" or "paper"')

    @property
    def chance(self) -> float | None:
        measured = (self.num_cards, self.target, self.rule, self.force_face, self.max_turns, self.rewards)
        return self.card.chance if measured == (4, 24, "ten", False, 5, "binary") else None

    @property
    def reward_range(self) -> tuple[float, float]:
        if self.rewards == "binary":
            return (0.0, 1.0)
        return (self.max_turns * min(PAPER_REWARDS.values()) + PAPER_OUT_OF_TURNS, PAPER_REWARDS["right"])

    def count(self, card: str) -> int:
        """What a card counts under the rule."""
        rank = RANKS.index(card) + 1
        return min(rank, 10) if self.rule == "ten" else rank

    def problem(self, split: str, index: int) -> Problem:
        def propose(rng: np.random.Generator) -> Problem | None:
            cards = [RANKS[i] for i in rng.integers(0, 13, self.num_cards)]
            if self.force_face and not set(cards) & {"J", "Q", "K"}:
                return None
            if split_of(f"{self.name} {sorted(cards)} {self.target}") != split:
                return None
            numbers = [self.count(card) for card in cards]
            solution = solve(tuple(sorted(numbers)), self.target)
            if solution is None:
                return None
            return Problem(
                f"{self.name}/{split}/{index}",
                self._prompt(cards),
                source=self.name,
                extra={"cards": cards, "numbers": numbers, "solution": solution},
            )

        return first_draw(self, split, index, propose)

    def _prompt(self, cards: Sequence[str]) -> str:
        faces = ("J", "Q", "K")
        if self.form == "formula":
            counts = ", ".join(f"{face}={self.count(face)}" for face in ("A", *faces))
            return f"{counts}\n{' '.join(cards)} -> {self.target}"
        counts = ", ".join(f"{face} as {self.count(face)}" for face in faces)
        return (
            f"Cards: {', '.join(cards)}. A counts as 1, {counts}.\n"
            f"Make {self.target} with + - * / and brackets, using every card exactly once.\n"
            'End with {"cards": [the cards], "number": [what each counts], "formula": "the formula alone"}'
        )

    async def play(self, problem: Problem, policy: Policy) -> None:
        policy.read(*problem.messages)
        for turn in range(self.max_turns):
            _, verdict = self.judge_turn(problem, await policy.write())
            if verdict.kind == "right" or policy.done or turn == self.max_turns - 1:
                return
            message = f"Wrong: {verdict.why}. Try again." if self.hint else "Wrong. Try again."
            policy.read(Message("user", message))

    def judge_turn(self, problem: Problem, reply: str) -> tuple[bool, Verdict]:
        """Whether the cards were read correctly (always so where the form does not ask), and the verdict."""
        cards, numbers = problem.extra["cards"], problem.extra["numbers"]
        if self.form == "formula":
            try:
                return True, judge(answer_part(reply), numbers, self.target)
            except ValueError as error:
                return True, Verdict("illegal", str(error))
        answer = _last_object(reply)
        if answer is None:
            return False, Verdict("illegal", "the reply does not end with the JSON object asked for")
        if answer["cards"] != cards:
            return False, Verdict("numbers", "cards is not the list of the cards as they were dealt")
        # Not `!=` on the lists: True == 1 and 3.0 == 3 in Python, but neither is what the card counts.
        if [repr(n) for n in answer["number"]] != [repr(n) for n in numbers]:
            return False, Verdict("numbers", "number is not the list of what the cards count")
        return True, judge(answer["formula"], numbers, self.target)

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        """`parts` holds, beside the reward of every turn (`turn_0`, ...), what the paper reports separately:
        success in the first turn and whether the cards were read correctly in the last."""
        turns = [self.judge_turn(problem, reply) for reply in rollout.replies[: self.max_turns]]
        kinds = [verdict.kind for _, verdict in turns]
        solved = "right" in kinds
        if self.rewards == "paper":
            rewards = [PAPER_REWARDS[kind] for kind in kinds]
            if rewards and not solved:
                rewards[-1] += PAPER_OUT_OF_TURNS
            total = float(sum(rewards))
        else:
            rewards = [float(kind == "right") for kind in kinds]
            total = float(solved)
        parts = {
            "turns": float(len(turns)),
            "first_turn": float(kinds[:1] == ["right"]),
            "cards_read": float(bool(turns) and turns[-1][0]),
            **{f"turn_{i}": reward for i, reward in enumerate(rewards)},
        }
        return Score(total, parts, turns[-1][1].why if turns else "no reply")

    def gold(self, problem: Problem) -> tuple[str, ...]:
        return (self.reply(problem, problem.extra["solution"]),)

    def reply(self, problem: Problem, formula: str) -> str:
        """A reply in the form asked for, with the cards read correctly."""
        if self.form == "formula":
            return formula
        cards, numbers = problem.extra["cards"], problem.extra["numbers"]
        return json.dumps({"cards": cards, "number": numbers, "formula": formula})

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        return tuple(
            self.reply(problem, random_expression(problem.extra["numbers"], rng))
            for _ in range(self.max_turns)
        )


def _last_object(reply: str) -> dict | None:
    """The JSON object at the end of the reply, if it has the three keys with values of the right kind."""
    text = reply[max(0, reply.rfind("{")) :]
    if len(text) > MAX_JSON_CHARS:
        return None
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or set(answer) != {"cards", "number", "formula"}:
        return None
    lists = isinstance(answer["cards"], list) and isinstance(answer["number"], list)
    return answer if lists and isinstance(answer["formula"], str) else None
