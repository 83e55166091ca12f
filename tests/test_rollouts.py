"""Episodes and verdicts that do not end: they fail alone, and everything else goes on."""

import asyncio
import threading
import time

import numpy as np
import pytest

from tests.episodes import Forgetful, Parity
from tests.support import tiny_run
from tests.test_player_processes import make_player, play, problems, rollouts_of
from whorl.data import Score
from whorl.loop import train
from whorl.reporting.rollout_table import from_table, to_table
from whorl.rollouts import _Clock, failed_rollout, measure
from whorl.sampling.draw import Sampling
from whorl.sampling.engine import Engine
from whorl.settings import Settings
from whorl.verdicts import NUM_VERIFIERS, Verdicts


@pytest.fixture
def forgetful():
    Forgetful.released.clear()
    yield Forgetful()
    Forgetful.released.set()


def test_an_episode_and_a_verdict_that_never_end_fail_and_the_others_are_as_ever(forgetful):
    player = make_player(forgetful, 1)
    player.rollout_timeout_seconds = 0.5
    groups, expected = play(player), play(make_player(Parity(), 1))
    for group, alone in zip(groups, expected, strict=True):
        lost, unjudged, *fine = group.rollouts
        assert lost.error == "environment: the episode took more than 0.5 s (rollout_timeout_seconds)"
        assert (lost.stop, lost.score) == ("error", None)
        assert lost.num_response_tokens > 0  # what was written is kept
        assert unjudged.error == "verifier: no verdict after 0.5 s (rollout_timeout_seconds)"
        assert unjudged.score == Score(None, why=unjudged.error)
        for rollout, other in zip(fine, alone.rollouts[2:], strict=True):
            assert rollout.error is None
            assert rollout.tokens_T.tolist() == other.tokens_T.tolist()
            assert rollout.score == other.score
    metrics = measure(groups, 1.0)
    assert metrics["failed_rollouts"] == 10
    assert not player.sampler.busy


def test_waiting_for_the_sampler_does_not_count(monkeypatch):
    player = make_player(Parity(), 1, stop_tokens=[])
    player.rollout_timeout_seconds = 0.25
    step = Engine.step

    def slow(self):
        time.sleep(0.05)
        step(self)

    monkeypatch.setattr(Engine, "step", slow)  # 12 tokens take 0.6 s
    assert measure(play(player), 1.0)["failed_rollouts"] == 0

    async def counting(self, request):
        return await self._sampler.complete(request)

    monkeypatch.setattr(_Clock, "complete", counting)  # the control: a clock that does not stand still
    assert measure(play(player), 1.0)["failed_rollouts"] == 20


def test_the_time_of_all_turns_of_an_episode_is_added_up():
    class Slow(Parity):
        async def play(self, problem, policy) -> None:
            policy.read(*problem.messages)
            for _ in range(4):
                await asyncio.sleep(0.2)
                await policy.write(max_tokens=1)

    player = make_player(Slow(), 1)
    player.rollout_timeout_seconds = 0.5
    groups, _ = player.play(problems(1), 1, Sampling(max_tokens=3), ("test",))
    (rollout,) = groups[0].rollouts
    assert rollout.stop == "error"
    assert 1 <= len(rollout.replies) <= 2


def test_an_environment_s_own_timeout_is_its_own_error_and_no_limit_is_no_limit():
    class Impatient(Parity):
        async def play(self, problem, policy) -> None:
            await super().play(problem, policy)
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()

    for seconds in (0.0, 30.0):
        player = make_player(Impatient(), 1)
        player.rollout_timeout_seconds = seconds
        errors = {rollout.error for rollout in rollouts_of(play(player, 2, 2))}
        assert errors == {"environment: TimeoutError: "}


def test_hanging_verifiers_leave_room_for_the_others_and_their_late_verdicts_are_not_used():
    release = threading.Event()

    def verify(problem, rollout):
        if rollout.sample < NUM_VERIFIERS + 1:  # more than there are threads
            release.wait()
        return Score(float(rollout.sample))

    rollouts = [failed_rollout(problems(1)[0], 0, sample, "") for sample in range(NUM_VERIFIERS + 4)]

    async def judge_all():
        verdicts = Verdicts(verify, 0.3)
        outcomes = await asyncio.gather(*(verdicts.judge(r.problem, r) for r in rollouts))
        release.set()
        verdicts.close()
        return outcomes

    outcomes = asyncio.run(judge_all())
    assert [score.reward for score, _ in outcomes] == [None] * 5 + [5.0, 6.0, 7.0]
    assert [error is None for _, error in outcomes] == [False] * 5 + [True] * 3
    deadline = time.monotonic() + 20
    while any(thread.name == "verify" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "verify" for thread in threading.enumerate())


def test_a_verifier_that_leaves_could_not_judge():
    def verify(problem, rollout):
        raise SystemExit(3)

    async def judge():
        verdicts = Verdicts(verify, 0.0)
        outcome = await verdicts.judge(problems(1)[0], failed_rollout(problems(1)[0], 0, 0, ""))
        verdicts.close()
        return outcome

    assert asyncio.run(judge()) == (Score(None, why="verifier: SystemExit: 3"), "verifier: SystemExit: 3")


def test_a_run_goes_on_with_the_rollouts_that_ended(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "run", monkeypatch, rollout_timeout_seconds=0.5, num_steps=1)
    run.warm = True

    async def play(problem, policy):
        policy.read(*problem.messages)
        await policy.write()
        if policy.sample == 0:
            await asyncio.Event().wait()

    object.__setattr__(run.environment, "play", play)
    train(run)
    assert run.directory.history()[-1]["failed_rollouts"] == 4
    errors = [one.rollout.error for one in run.directory.read_rollouts(1) if one.rollout.error]
    assert errors == ["environment: the episode took more than 0.5 s (rollout_timeout_seconds)"] * 4


def test_rollouts_of_which_nothing_is_left_are_stored_beside_others():
    groups = play(make_player(Parity(), 1), 2, 2)
    groups[1].rollouts[0] = failed_rollout(groups[1].problem, 1, 0, "environment: gone")
    stored = [one.rollout for one in from_table(to_table(groups))]
    assert [len(rollout) for rollout in stored] == [len(rollout) for rollout in rollouts_of(groups)]
    assert stored[2].error == "environment: gone"
    assert stored[2].logp_T.dtype == np.float32


def test_a_negative_time_is_refused():
    with pytest.raises(ValueError, match=r"rollout_timeout_seconds must be 0 \(no limit\) or more; got -1"):
        Settings(rollout_timeout_seconds=-1)
