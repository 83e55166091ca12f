"""Does an environment keep what its card promises? Everything `whorl check NAME` measures."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from whorl.data import Problem, Score
from whorl.environments.base import SPLITS, Environment
from whorl.environments.scripted import play_scripted, speak

BABBLE: tuple[tuple[str, str], ...] = (
    ("nothing", ""),
    ("spaces", " \n\t "),
    ("letters", "xqzv jkw blorp"),
    ("symbols", "#=#{}[]()<>|\\\"'`~^&%$"),
    ("digits of other scripts", "#٣²Ⅷ"),
    ("control characters and a lone surrogate", "\x00\x1b[2J\ud800"),
    ("a power tower", "9**9**9**9**9"),
    ("Python", "__import__('os').getpid()"),
    ("deep brackets", "(" * 5_000 + ")" * 5_000),
    ("deep lists", "[" * 5_000 + "]" * 5_000),
    ("a huge number", "7" * 50_000),
    ("a million characters", "ab1+" * 250_000),
)
"""Replies that no environment may reward, raise on, or leave unjudged: what they are, and the text.

Put where the gold reply has its answer they may not earn full marks either; there a judge that would have to
evaluate them may say that it could not."""


class Check(NamedTuple):
    what: str
    measured: str
    expected: str
    ok: bool


def check_environment(environment: Environment, num_problems: int = 100) -> list[Check]:
    """Measure the promises on `num_problems` training problems, and the held-out splits beside them.

    Rows that do not apply (no gold replies, no documented chance level, no alphabet) are left out.
    """
    if num_problems < 1:
        raise ValueError(f"expected at least one problem to check; got num_problems={num_problems}")
    by_split = {split: _problems(environment, split, num_problems) for split in SPLITS}
    if not by_split["train"]:
        raise ValueError(f"{environment.name} has no training problems")
    checks = [
        _is_deterministic(environment, by_split),
        _splits_are_disjoint(by_split),
        _gold_is_best(environment, by_split["train"]),
        _alphabet_suffices(environment, by_split["train"]),
        _babble_is_worst(environment, _one_of_each_task(by_split["train"])),
        _declared_babble_is_not_right(environment, _one_of_each_task(by_split["train"])),
        _chance_holds(environment, by_split["train"]),
    ]
    return [check for check in checks if check is not None]


def _problems(environment: Environment, split: str, num_problems: int) -> list[Problem]:
    available = environment.num_problems(split)
    count = num_problems if available is None else min(num_problems, available)
    return [environment.problem(split, index) for index in range(count)]


def _is_deterministic(environment: Environment, by_split: dict[str, list[Problem]]) -> Check:
    different = sum(
        problem.content_key != again.content_key or problem.id != again.id or problem.answer != again.answer
        for split, problems in by_split.items()
        # From the last to the first, so that a hidden counter would show.
        for index, problem in reversed(list(enumerate(problems)))
        for again in [environment.problem(split, index)]
    )
    return Check("a problem asked for again is the same", f"{different} differ", "0 differ", different == 0)


def _splits_are_disjoint(by_split: dict[str, list[Problem]]) -> Check:
    keys = {split: {problem.content_key for problem in problems} for split, problems in by_split.items()}
    shared = sum(len(keys[a] & keys[b]) for a, b in itertools.combinations(SPLITS, 2))
    return Check("splits share no problem", f"{shared} shared", "0 shared", shared == 0)


def _gold_is_best(environment: Environment, problems: list[Problem]) -> Check | None:
    best = environment.reward_range[1]
    replies = [(problem, environment.gold(problem)) for problem in problems]
    played = [(problem, gold) for problem, gold in replies if gold is not None]
    if not played:
        return None
    fell_short = [
        score.why or "no reason given"
        for score in (_score_or_fault(environment, problem, gold) for problem, gold in played)
        if score.reward is None or abs(score.reward - best) > 1e-9
    ]
    measured = f"{len(played) - len(fell_short)} of {len(played)}"
    if fell_short:
        measured += f" (first failure: {fell_short[0]})"
    return Check(f"gold replies earn {best:g}", measured, f"{len(played)} of {len(played)}", not fell_short)


def _alphabet_suffices(environment: Environment, problems: list[Problem]) -> Check | None:
    if environment.alphabet is None:
        return None
    used: set[str] = set()
    for problem in problems:
        gold = environment.gold(problem)
        rollout = speak(environment, problem, gold or ())
        used.update(*(turn.text for turn in rollout.transcript))
    missing = "".join(sorted(used - set(environment.alphabet)))
    return Check(
        "prompts and gold replies stay in the alphabet",
        f"outside: {missing!r}" if missing else "all inside",
        "all inside",
        not missing,
    )


def _one_of_each_task(problems: list[Problem]) -> list[Problem]:
    """The first problem of each source: of each task of a mixture, which has a verifier of its own."""
    return list({problem.source: problem for problem in reversed(problems)}.values())[::-1]


def _babble_is_worst(environment: Environment, problems: list[Problem]) -> Check:
    """Every turn of the episode is the same babble; it must earn the lowest reward and be told why."""
    worst = environment.reward_range[0]
    faults = []
    for problem, (what, text) in itertools.product(problems, BABBLE):
        score = _score_or_fault(environment, problem, itertools.repeat(text))
        if score.reward is None or abs(score.reward - worst) > 1e-9:
            faults.append(f"{what}: {_outcome(score)}")
        elif not score.why:
            faults.append(f"{what}: no reason given")
    wanted = f"{len(BABBLE) * len(problems)} of {len(BABBLE) * len(problems)}"
    return Check(f"babble earns {worst:g} and is told why", "; ".join(faults) or wanted, wanted, not faults)


def _declared_babble_is_not_right(environment: Environment, problems: list[Problem]) -> Check | None:
    """The gold reply, with babble in place of the answer in it. None where the reply is nothing but the answer."""
    best = environment.reward_range[1]
    faults, num_tried = [], 0
    for problem, (what, text) in itertools.product(problems, BABBLE):
        gold = environment.gold(problem)
        if not gold or not problem.answer or problem.answer not in gold[-1] or problem.answer == gold[-1]:
            continue
        num_tried += 1
        replies = (*gold[:-1], gold[-1].replace(problem.answer, text))
        score = _score_or_fault(environment, problem, replies)
        if score.why.startswith(_FAULT) or (score.reward is not None and score.reward > best - 1e-9):
            faults.append(f"{what}: {_outcome(score)}")
        elif not score.why:
            faults.append(f"{what}: no reason given")
    if not num_tried:
        return None
    wanted = f"{num_tried} of {num_tried}"
    return Check(
        "babble declared as the answer is not right", "; ".join(faults) or wanted, wanted, not faults
    )


def _chance_holds(environment: Environment, problems: list[Problem]) -> Check | None:
    """The mean reward of `guess` lies within four standard errors of `chance` (a false alarm in 16,000).

    Guesses on one problem share its difficulty, so problems are the unit: the standard error is that of the
    means over problems, or the binomial one where it is larger (few successes say little of their variance).
    """
    chance = environment.chance
    num_guesses = 20
    rng = np.random.default_rng(0)
    means, low, high = [], *environment.reward_range
    for problem in problems:
        rewards = []
        for _ in range(num_guesses):
            replies = environment.guess(problem, rng)
            if replies is None or chance is None:
                return None
            rewards.append(_score_or_fault(environment, problem, replies).reward)
        if None in rewards:
            return Check("chance level", "a guess could not be judged", f"{chance:.4g}", False)
        means.append(float(np.mean(rewards)))
    assert chance is not None
    level = (chance - low) / (high - low)
    binomial = (high - low) * (level * (1 - level) / (num_guesses * len(means))) ** 0.5
    clustered = float(np.std(means)) / len(means) ** 0.5
    # Half a success more or less is the grain of the count.
    margin = 4 * max(binomial, clustered) + 0.5 * (high - low) / (num_guesses * len(means))
    measured = float(np.mean(means))
    return Check(
        "a guess in the right form earns the chance level",
        f"{measured:.4g} in {num_guesses * len(means)} guesses",
        f"{chance:.4g} ± {margin:.2g}",
        abs(measured - chance) <= margin,
    )


def _outcome(score: Score) -> str:
    reason = f" ({score.why})" if score.reward is None and score.why else ""
    return f"reward {score.reward}{reason}"


_FAULT = "it raised "


def _score_or_fault(environment: Environment, problem: Problem, replies: Iterable[str]) -> Score:
    """The verdict; None with the reason if there was an exception, which is a finding and not an end of the check."""
    try:
        score = play_scripted(environment, problem, replies).score
    except Exception as error:
        return Score(None, why=f"{_FAULT}{type(error).__name__}: {error}")
    assert score is not None, "play_scripted judges what it plays"
    return score
