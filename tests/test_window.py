"""The length window of a run grows when both triggers say so, binds training answers alone, and survives a kill."""

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch

from tests.support import Tiny, tiny_run
from tests.test_replay import odd
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.experiments.starts import identity_of
from whorl.learning.optimizer import OptimizerSettings
from whorl.loop import train
from whorl.replay import replay
from whorl.reporting.glossary import describe
from whorl.run import Run, open_run
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, from_dict
from whorl.window import LengthWindow, Window

THREE = LengthWindow((20, 24, 28), near_limit_frac=0.95, converged_steps=2, converged_tolerance=0.02)


def reached(settings: LengthWindow, perplexities: list[float], lengths: list[float]) -> list[int]:
    """Index of the window in which each step is sampled, from the definition, without gates."""
    stages, stage, since = [], 0, 0
    for step in range(len(lengths)):
        stages.append(stage)
        n, seen = settings.converged_steps, perplexities[since : step + 1]
        converged = len(seen) >= 2 * n and (
            abs(fmean(seen[-n:]) - fmean(seen[-2 * n : -n])) <= settings.converged_tolerance
        )
        full = lengths[step] >= settings.near_limit_frac * settings.tokens[stage]
        if converged and full and stage + 1 < len(settings.tokens):
            stage, since = stage + 1, step + 1
    return stages


def followed(window: Window, perplexities: list[float], lengths: list[float]) -> list[int]:
    stages = []
    for perplexity, length in zip(perplexities, lengths, strict=True):
        stages.append(window.stage)
        window.observe({"perplexity": perplexity, "response_tokens_p99": length, "reward": 1.0})
    return stages


def test_a_relative_tolerance_is_a_share_of_what_perplexity_has_above_one() -> None:
    relative = replace(THREE, converged_relative=True, converged_tolerance=0.1)
    falling, steady = [1.020, 1.020, 1.017, 1.017], [1.020, 1.020, 1.019, 1.019]  # by 15%, by 5%
    for scale in (1, 10):  # the same curve, ten times as far from certainty
        for values, stage in ((falling, 0), (steady, 1)):
            window = Window(relative)
            followed(window, [1 + scale * (value - 1) for value in values], [20.0] * 4)
            assert window.stage == stage
    absolute = Window(THREE)  # within 0.02 both have converged
    followed(absolute, falling, [20.0] * 4)
    assert absolute.stage == 1


@pytest.mark.parametrize(
    ("perplexities", "length", "stages"),
    [
        ([1.5, 1.5, 1.5, 1.5, 1.5], 20.0, [0, 0, 0, 0, 1]),
        ([1.5, 1.5, 1.5, 1.5, 1.5], 18.9, [0, 0, 0, 0, 0]),  # converged, and room enough: 0.95 * 20 = 19
        ([1.9, 1.8, 1.7, 1.6, 1.5], 20.0, [0, 0, 0, 0, 0]),  # full, and still falling
        ([1.9, 1.5, 1.5, 1.5, 1.5, 1.5], 20.0, [0, 0, 0, 0, 0, 1]),  # the first has left the four that count
    ],
)
def test_both_triggers_are_needed(perplexities, length, stages) -> None:
    assert followed(Window(THREE), perplexities, [length] * len(perplexities)) == stages


@pytest.mark.parametrize("seed", range(20))
def test_the_window_is_the_definitions_on_random_steps_and_after_a_resume_anywhere(seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings = LengthWindow(tuple(range(20, 60, 4)), 0.9, int(rng.integers(1, 4)), 0.05)
    perplexities = (1.3 + 0.05 * rng.standard_normal(60)).tolist()
    lengths = rng.uniform(15, 60, 60).tolist()
    expected = reached(settings, perplexities, lengths)
    assert followed(Window(settings), perplexities, lengths) == expected and expected[-1] >= 1
    first, again, killed = Window(settings), Window(settings), int(rng.integers(1, 59))
    followed(first, perplexities[:killed], lengths[:killed])
    again.load_state_dict(first.state_dict())
    assert followed(again, perplexities[killed:], lengths[killed:]) == expected[killed:]


def test_a_step_without_training_has_no_perplexity_and_counts_for_its_length_alone() -> None:
    window = Window(THREE)
    followed(window, [1.5] * 3, [20.0] * 3)
    window.observe({"response_tokens_p99": 20.0})
    assert window.stage == 0
    followed(window, [1.5], [20.0])
    assert window.stage == 1 and window.history == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": (20, 20)}, "tokens must rise"),
        ({"tokens": (0, 20)}, "tokens must rise"),
        ({"near_limit_frac": 0.0}, "near_limit_frac"),
        ({"converged_steps": 0}, "converged_steps"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthWindow(**settings)


def test_a_window_beyond_the_limit_of_held_out_answers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beyond sampling\.max_tokens 8"):
        Tiny(length_window=LengthWindow((4, 9)))


def windowed(path, monkeypatch) -> Run:
    """A run whose window grows every two steps. The verdict is whether the reply is of odd length."""
    monkeypatch.setattr(ChainArithmetic, "verify", odd)
    return tiny_run(
        path, monkeypatch, cold_start=ColdStart(), num_steps=6, sampling=Sampling(max_tokens=12),
        length_window=LengthWindow((3, 5, 8, 12), 0.1, 1, 100.0), checkpoint_every_steps=2, keep_checkpoints=9,
        optimizer=OptimizerSettings(1e-2), algorithm="REMAX",
    )  # fmt: skip


def bits(run: Run) -> tuple[list[dict], torch.Tensor]:
    rows = [{k: v for k, v in row.items() if describe(k).group != "speed"} for row in run.directory.history()]
    return rows, torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_training_answers_end_with_the_window_and_held_out_ones_do_not(tmp_path, monkeypatch) -> None:
    run = windowed(tmp_path / "run", monkeypatch)
    assert train(run) is None
    rows = {row["step"]: row for row in run.directory.history()}
    assert [rows[step]["window_stage"] for step in range(1, 7)] == [1, 1, 2, 2, 3, 3]
    assert [rows[step]["window_tokens"] for step in range(1, 7)] == [3, 3, 5, 5, 8, 8]
    assert "window_stage" not in rows[0]
    for step in range(1, 7):
        lengths = [stored.rollout.num_response_tokens for stored in run.directory.read_rollouts(step)]
        assert max(lengths) == rows[step]["window_tokens"]
    held_out = [stored.rollout.num_response_tokens for stored in run.directory.read_evaluation(0)]
    assert max(held_out) > 3
    for step in (3, 6):  # the first step of a window, and the last of all
        assert replay(run.directory.path, step).is_equal


def test_a_run_that_is_killed_in_its_second_window_goes_on_with_the_same_bits(tmp_path, monkeypatch) -> None:
    whole = windowed(tmp_path / "whole", monkeypatch)
    assert train(whole) is None

    def kill(run: Run) -> None:
        if run.step == 5:
            raise KeyboardInterrupt

    run = windowed(tmp_path / "killed", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(run, kill)
    del run
    again = open_run(tmp_path / "killed")
    assert again.step == 4 and again.window.stage == 2
    assert train(again) is None
    (rows, weights), (same_rows, same_weights) = bits(whole), bits(again)
    assert rows == same_rows and torch.equal(weights, same_weights)


def test_settings_without_a_window_are_known_by_what_they_were_known_by_before_there_was_one() -> None:
    plain, windows = Tiny(), Tiny(length_window=LengthWindow((4, 8)))
    assert identity_of(plain) == {k: v for k, v in plain.to_dict().items() if k != "length_window"}
    assert identity_of(windows)["length_window"]["tokens"] == (4, 8)
    assert from_dict(Tiny, identity_of(plain)) == plain
