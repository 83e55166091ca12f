"""Which problems next: coverage, proportions, feedback, and the same picks after a reload."""

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from whorl.curricula.base import Curriculum, Pick
from whorl.curricula.difficulty_band import DifficultyBand
from whorl.curricula.gates import Above, After
from whorl.curricula.mixture import Mixture
from whorl.curricula.staged import Stage, Staged
from whorl.curricula.uniform import Uniform
from whorl.data import Group, Problem, Rollout, Score


def group(rewards: list[float | None], length: int = 1) -> Group:
    """Rollouts of `length` policy tokens with these rewards."""

    def rollout(sample: int, reward: float | None) -> Rollout:
        zeros = np.zeros(length)
        return Rollout(
            PROBLEM, 0, sample, zeros, np.ones(length, bool), zeros, zeros, zeros, zeros, score=Score(reward)
        )

    return Group(PROBLEM, [rollout(sample, reward) for sample, reward in enumerate(rewards)])


PROBLEM = Problem("p", "?")
SOLVED, HALF, HOPELESS = group([1, 1, 1, 1]), group([1, 0, 1, 0]), group([0, 0, 0, 0])


def indices(picks: list[Pick]) -> list[int]:
    return [pick.index for pick in picks]


def test_uniform_gives_every_problem_once_an_epoch_in_an_order_of_its_own() -> None:
    curriculum = Uniform(10, seed=1)
    flat = [index for _ in range(5) for index in indices(curriculum.choose(4))]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert flat[:10] != indices(Uniform(10, seed=2).choose(10))


def test_uniform_over_endless_problems_counts_up() -> None:
    curriculum = Uniform()
    assert indices(curriculum.choose(3)) + indices(curriculum.choose(2)) == [0, 1, 2, 3, 4]


def test_the_band_drops_what_is_solved_and_what_is_hopeless() -> None:
    curriculum = DifficultyBand(6, low=0.1, high=0.9, retry_frac=0.0)
    picks = curriculum.choose(6)
    assert sorted(indices(picks)) == list(range(6))
    results = [SOLVED, HALF, HOPELESS]
    curriculum.update(picks, [results[pick.index % 3] for pick in picks])
    # Problems 1 and 4 passed half of the time; they are all that the next epochs hold.
    assert sorted(indices(curriculum.choose(4))) == [1, 1, 4, 4]


def test_a_pass_rate_runs_and_ignores_what_could_not_be_judged() -> None:
    curriculum = DifficultyBand(1, smoothing=0.25)
    curriculum.update([Pick(0, 0)], [HOPELESS])
    assert curriculum.pass_rate == {0: 0.0}
    curriculum.update([Pick(0, 0)], [group([1, None, 1])])
    assert curriculum.pass_rate == {0: 0.25}  # 0 + 0.25 (1 - 0)
    curriculum.update([Pick(0, 0)], [group([None, None])])
    assert curriculum.pass_rate == {0: 0.25}
    assert curriculum.in_band(0)


def test_a_tenth_of_the_dropped_problems_is_tried_again() -> None:
    curriculum = DifficultyBand(2_000, retry_frac=0.1)
    for index in range(1_000, 2_000):
        curriculum.pass_rate[index] = 0.0
    first_epoch = []
    while curriculum.position < 2_000:
        first_epoch += indices(curriculum.choose(1))
    retried = [index for index in first_epoch if index >= 1_000]
    assert len(first_epoch) - len(retried) == 1_000
    assert abs(len(retried) - 100) < 4 * 90**0.5  # four standard deviations of Binomial(1000, 0.1)


def test_a_band_that_holds_nothing_still_fills_the_step() -> None:
    curriculum = DifficultyBand(5, retry_frac=0.0)
    for index in range(5):
        curriculum.pass_rate[index] = 1.0
    assert len(curriculum.choose(3)) == 3


def test_a_mixture_keeps_exact_proportions_and_routes_results_home() -> None:
    band = DifficultyBand(4)
    curriculum = Mixture([Uniform(), band, Uniform()], [3, 1, 0])
    picks = curriculum.choose(8)
    assert Counter(pick.environment for pick in picks) == {0: 6, 1: 2}
    assert [pick.index for pick in picks if pick.environment == 0] == list(range(6))
    curriculum.update(picks, [SOLVED] * 8)
    assert sorted(band.pass_rate) == sorted(pick.index for pick in picks if pick.environment == 1)


def test_no_source_of_a_mixture_is_ever_a_whole_pick_ahead_of_its_share() -> None:
    weights = [0.5, 0.3, 0.13, 0.07]
    curriculum = Mixture([Uniform() for _ in weights], weights)
    given = np.zeros(4)
    for count in range(1, 500):
        [pick] = curriculum.choose(1)
        given[pick.environment] += 1
        assert (given - count * np.array(weights) < 1).all()
    assert np.abs(given - 499 * np.array(weights)).max() < 1.5


def test_new_weights_hold_from_the_next_pick() -> None:
    curriculum = Mixture([Uniform(), Uniform()], [1, 1])
    curriculum.choose(3)
    curriculum.set_weights([0, 2])
    assert {pick.environment for pick in curriculum.choose(50)} == {1}
    curriculum.set_weights([1, 1])
    assert Counter(p.environment for p in curriculum.choose(50)) == {0: 25, 1: 25}  # no debt is paid


def staged() -> Staged:
    return Staged(
        [
            Stage("warm", Uniform(), Above("reward_mean", 0.5, times=2)),
            Stage("long", DifficultyBand(8), After("evaluation", 1)),
            Stage("last", Uniform(3)),
        ]
    )


def test_stages_follow_each_other_when_their_gates_open_on_their_own_history() -> None:
    curriculum = staged()
    for result, stage in [(HALF, "warm"), (HOPELESS, "warm"), (HALF, "warm"), (SOLVED, "long")]:
        curriculum.update(curriculum.choose(1), [result])
        assert curriculum.stage.name == stage
    assert curriculum.history == {}
    curriculum.update(curriculum.choose(2), [HALF, group([1, 0], length=7)])
    assert curriculum.history["signal_frac"] == [1.0]
    # Lengths 1, 1, 1, 1, 7, 7: the 99th percentile is 7.
    assert curriculum.history["length_p99"] == [7.0]
    curriculum.observe({"evaluation": 0.9})
    assert curriculum.stage.name == "last"
    curriculum.update(curriculum.choose(1), [group([None])])
    assert curriculum.history == {}


MAKERS: list[Callable[[], Curriculum]] = [
    lambda: Uniform(10, seed=3),
    lambda: Uniform(),
    lambda: DifficultyBand(12, seed=3),
    lambda: Mixture([Uniform(5), DifficultyBand(12), Uniform()], [0.5, 0.3, 0.2]),
    staged,
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_reloaded_curriculum_goes_on_with_the_same_picks(make: Callable[[], Curriculum]) -> None:
    rng = np.random.default_rng(0)
    outcomes = [[SOLVED, HALF, HOPELESS][i] for i in rng.integers(0, 3, 200)]

    def steps(curriculum: Curriculum, begin: int, end: int) -> list[list[Pick]]:
        chosen = []
        for step in range(begin, end):
            picks = curriculum.choose(5)
            chosen.append(picks)
            curriculum.update(picks, outcomes[5 * step : 5 * step + 5])
        return chosen

    undisturbed = make()
    steps(undisturbed, 0, 7)
    saved = json.dumps(undisturbed.state_dict())
    rest = steps(undisturbed, 7, 30)
    reloaded = make()
    reloaded.load_state_dict(json.loads(saved))
    assert steps(reloaded, 7, 30) == rest
    assert steps(make(), 7, 30) != rest  # without the state it would be another run


def test_a_saved_state_does_not_change_with_the_curriculum() -> None:
    curriculum = Mixture([DifficultyBand(4), Uniform()], [1, 1])
    saved = curriculum.state_dict()
    before = json.dumps(saved)
    curriculum.update(curriculum.choose(4), [HALF] * 4)
    assert json.dumps(saved) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Uniform(0), "at least one problem"),
        (lambda: DifficultyBand(5, low=0.9, high=0.1), "low=0.9, high=0.1"),
        (lambda: DifficultyBand(5, smoothing=0.0), "smoothing=0.0"),
        (lambda: Mixture([Uniform()], [1, 1]), "expected 1 weights"),
        (lambda: Mixture([Uniform()], [0]), "not all 0"),
        (lambda: Mixture([Uniform(), Uniform()], [2, -1]), "at least 0"),
        (lambda: Staged([]), "at least one stage"),
        (lambda: Staged([Stage("a", Uniform()), Stage("b", Uniform())]), "stage 'a' has no gate"),
        (lambda: Staged([Stage("a", Uniform(), After("x", 1))]), "nothing to go on to"),
        (lambda: DifficultyBand(5).update([Pick(0, 1)], []), "got 1 picks and 0 groups"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
