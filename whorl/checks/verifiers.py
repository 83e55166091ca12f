"""Promise 7: text that a model wrote is never evaluated in our process, and a verifier that could not judge says so."""

import time

from whorl.checks.table import Row
from whorl.verifiers.answer import math_answer
from whorl.verifiers.sandbox import protections

HANGING = (
    r"\boxed{9^{9^{9^{9^9}}}}",
    r"\boxed{(10^{10})!}",
    r"\boxed{" + r"\frac{1}{" * 2_000 + "x" + "}" * 2_000 + "}",
)
"""Answers that symbolic mathematics does not come back from."""

LIMIT_SECONDS = 30.0
"""For all of them together, with the start of the judging processes."""


def check_verifiers() -> list[Row]:
    """What programs are refused on this machine, and how answers end that cannot be judged."""
    return [_programs(), _answers()]


def _programs() -> Row:
    refused = protections()
    let_through = [action for action, held in refused.items() if not held]
    measured = f"{sum(refused.values())} of {len(refused)} things tried are refused"
    if let_through:
        measured += f", but not {', '.join(let_through)}"
    return Row(
        "programs of the model are refused what does harm",
        measured,
        f"{len(refused)} of {len(refused)}",
        not let_through,
    )


def _answers() -> Row:
    started = time.monotonic()
    scores = [math_answer(answer, "2") for answer in HANGING]
    seconds = time.monotonic() - started
    right = sum(score.reward == 1.0 for score in scores)
    unexplained = sum(score.reward is None and not score.why for score in scores)
    return Row(
        "answers that hang symbolic mathematics earn nothing and hold nothing up",
        f"{right} of {len(scores)} right, {unexplained} without a reason, {seconds:.1f} s",
        f"0 right, all with a reason, {LIMIT_SECONDS:.0f} s",
        right == 0 and unexplained == 0 and seconds <= LIMIT_SECONDS,
    )
