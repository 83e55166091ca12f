import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.reporting.made_up import groups, rollout, token_text
from whorl.data import Group, Score
from whorl.reporting.curves import PANELS, Panel, draw, running_mean
from whorl.reporting.glossary import check_names
from whorl.reporting.report import HEADLINES, alarms, before_after, build_report, flatten, number
from whorl.reporting.rollout_table import StoredRollout
from whorl.reporting.run_directory import RunDirectory
from whorl.reporting.transcripts import choose, largest_advantage, prepare

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m\u202e{{ 7*7 }}</style>"


class Page(HTMLParser):
    """Tags, attributes and script texts of a page, as a browser would find them."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text = file.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A short run with evaluations, rollouts and one NaN."""
    config = {"recipe": "demo", "settings": {"num_steps": 4}, "algorithm": {"ratio_max": 5.0}}
    run = RunDirectory.create(config, tmp_path / "run")
    run.log({"step": 0, "eval_accuracy": 0.4, "eval_accuracy_low": 0.3, "eval_accuracy_high": 0.5})
    made, advantages = groups()
    for step in range(1, 5):
        run.log(
            {
                "step": step,
                "reward": 0.2 * step,
                "grad_norm": math.nan if step == 2 else 1.0,
                "clipped_low_frac": 0,
            }
        )
        run.write_rollouts(step, made, advantages, token_text)
    run.log_supervised({"update": 1, "supervised_loss": 2.0})
    run.truncate_after(3)
    run.log(
        {"step": 4, "reward": 0.8, "eval_accuracy": 0.9, "eval_accuracy_low": 0.8, "eval_accuracy_high": 1.0}
    )
    return run


def test_the_page_is_well_formed_and_needs_nothing_from_outside(run: RunDirectory):
    page = Page(build_report(run))
    assert page.open == []
    assert "link" not in page.tags
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "data", "action", "background"), (name, value)
        assert not name.startswith("on"), f"event handler {name}"
        if name.endswith("href"):
            assert value is not None
            assert value.startswith("#"), value
    assert not re.search(r"url\((?!#)|@import", page.text)


def test_the_page_tells_the_story_of_the_run(run: RunDirectory):
    page = Page(build_report(run.path))
    for told in (
        "<h1>demo</h1>",
        "finished after step\n4 of 4",
        "95%: 0.30 to 0.50, then 0.80 to 1.00",
        "algorithm.ratio_max",
        "ends in 7",
        "ended by stop_token",
        "not judged",
        "timed out",
        "Supervised loss",
        "Held-out accuracy",
        "clipped_low_frac",
        "Outside the healthy range",
    ):
        assert told in page.text, told
    assert page.tags.count("svg") == 6
    # Token 0 of the reply has logp 0 and advantage 1, the largest of the step; the sixth has logp -5/4.
    assert re.search(
        r'--s:0.00;--g:1.00" title="token 5 “3” \(id 51\): log-prob -?0.000, probability 100.0%, adv',
        page.text,
    )
    assert re.search(
        r'--s:0.31;--g:1.00" title="token 10 “#” \(id 35\): log-prob -1.250, probability 28.7%', page.text
    )


def attacked(path: Path) -> RunDirectory:
    run = RunDirectory.create({"recipe": "demo", "note": ATTACK, ATTACK: {"a": [ATTACK]}}, path)
    name = f"eval/{ATTACK.replace('/', '')}/accuracy"
    run.log({"step": 1, "reward": 0.5, name: 0.5, f"{name}_low": 0.4})
    one = rollout(ATTACK, ATTACK, Score(0.0, {ATTACK: 1.0}, ATTACK))
    one.error = ATTACK
    one.problem = one.problem.__class__(ATTACK, ATTACK, answer=ATTACK)
    run.write_rollouts(1, [Group(one.problem, [one])], None, token_text=lambda _token: ATTACK)
    run.write_rollouts(2, [Group(one.problem, [one])])
    return run


def test_text_of_the_model_cannot_become_part_of_the_page(tmp_path: Path):
    page = Page(build_report(attacked(tmp_path / "run")))
    assert page.open == []
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _value in page.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_without_escaping_the_attack_would_succeed(tmp_path: Path, monkeypatch):
    """Negative control of the test above."""
    import jinja2

    real = jinja2.Environment
    monkeypatch.setattr(
        "whorl.reporting.report.jinja2.Environment",
        lambda **settings: real(**settings | {"autoescape": False}),
    )
    text = build_report(attacked(tmp_path / "run")).read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in text


def test_the_security_policy_admits_the_script_of_the_page_and_no_other(run: RunDirectory):
    page = Page(build_report(run))
    [script] = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page.text


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "reward": math.nan}],
        [{"step": 3, "reward": 0.5, "eval_accuracy": None}],
    ],
)
def test_a_run_with_almost_nothing_in_it_has_a_page(tmp_path: Path, rows: list[dict]):
    run = RunDirectory.create({}, tmp_path / "run")
    for row in rows:
        run.log(row)
    page = Page(build_report(run))
    assert page.open == []
    assert ("has not finished a step yet" in page.text) == (not rows)


def test_a_run_of_another_version_with_a_metric_unknown_here_has_a_page(run: RunDirectory):
    file = run.path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "charm": 1.0}\n')
    assert "not defined in this version of whorl" in build_report(run).read_text()


def test_the_same_run_gives_the_same_page(run: RunDirectory):
    assert build_report(run).read_bytes() == build_report(run).read_bytes()


def test_a_directory_that_is_not_a_run_has_no_report(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a run directory"):
        build_report(tmp_path)


def test_names_in_panels_and_headlines_are_defined():
    panels = [panel for panels in PANELS.values() for panel in panels]
    check_names([*HEADLINES, *(name for panel in panels for name in (*panel.names, *(panel.band or ())))])
    titles = [panel.title for panel in panels]
    assert len(titles) == len(set(titles))


def test_before_and_after_are_tenths_of_training_and_single_evaluations():
    rows = [{"step": step, "reward": float(step)} for step in range(20)]
    rows[0]["eval_accuracy"], rows[10]["eval_accuracy"] = 0.25, 0.75
    evaluation, training = before_after(rows)
    assert (evaluation.name, evaluation.before, evaluation.after) == ("eval_accuracy", 0.25, 0.75)
    # (0 + 1) / 2 and (18 + 19) / 2
    assert (training.name, training.before, training.after) == ("reward", 0.5, 18.5)
    assert before_after(rows[:1])[0].after is None


def test_alarms_count_the_steps_outside_and_show_the_furthest():
    values = [0.5, 0.05, 0.01, 0.2]
    rows = [{"step": step, "groups_with_signal_frac": value} for step, value in enumerate(values)]
    rows[3]["loss"] = math.inf
    loss, signal = alarms(rows)
    assert (signal.num_outside, signal.num_measured, signal.worst, signal.last_step) == (2, 4, 0.01, 2)
    assert (loss.name, loss.worst) == ("loss", math.inf)


def test_a_curve_takes_its_colours_from_the_page_and_skips_what_is_not_finite():
    rows = [
        {"step": step, "reward": value}
        for step, value in enumerate([0.0, math.nan, 1.0, math.inf, None, 2.0])
    ]
    svg = draw(Panel("Reward", ("reward",)), rows)
    assert svg is not None
    assert "var(--line-1)" in svg
    assert "#0300" not in svg
    assert "<style" not in svg
    assert "font-family" not in svg
    assert draw(Panel("Reward", ("loss",)), rows) is None


def test_a_running_mean_is_centred_and_is_not_spoiled_by_a_spike():
    y = np.arange(40.0)
    assert running_mean(y)[20] == 20.0
    assert running_mean(y)[0] == (0 + 1 + 2) / 3
    y[10] = math.nan
    assert running_mean(y)[10] == (8 + 9 + 11 + 12) / 4
    y[10] = 1e20
    assert running_mean(y)[30] == 30.0


def stored(reward: float | None, sample: int) -> StoredRollout:
    return StoredRollout(rollout("3+4=", "#7", Score(reward), sample=sample), None, None)


def test_best_worst_and_random_are_three_different_rollouts():
    four = [stored(reward, sample) for sample, reward in enumerate([0.5, None, 1.0, 0.0])]
    picks = {label: pick.rollout.sample for label, pick in choose(four, step=1)}
    assert picks["best"] == 2
    assert picks["worst"] == 3
    assert picks["random"] in (0, 1)
    assert picks == {label: pick.rollout.sample for label, pick in choose(four, step=1)}
    assert [label for label, _pick in choose(four[:1], step=1)] == ["best"]
    assert [label for label, _pick in choose(four[1:2], step=1)] == ["random"]
    assert choose([], step=1) == []


def test_a_long_rollout_is_shown_from_both_ends():
    long = rollout("3+4=", "x" * 5000, Score(1.0))
    for pieces in (tuple(map(token_text, long.tokens_T.tolist())), None):
        one = StoredRollout(long, np.where(long.policy_T, 0.5, 0.0), pieces)
        assert largest_advantage([one]) == 0.5
        sample = prepare("best", one, full_shade=0.5)
        said = "".join(token.text for token in sample.parts[-1].tokens)
        assert "1,000 characters left out" in said if pieces is None else "4,000 tokens left out" in said
        assert len(said) < 4100


def test_numbers_and_settings_are_readable():
    values = [None, 0.0, 12, 1234567, 0.123456, 12.3456, 1234.5, 1.2e-7, math.nan]
    assert [number(v) for v in values] == [
        "–",
        "0",
        "12",
        "1,234,567",
        "0.123",
        "12.3",
        "1,234",
        "1.2e-07",
        "nan",
    ]
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": {}}
    assert flatten(nested) == [("a.b", "1"), ("a.c.d", "–"), ("e", "1, 2"), ("f", "{}")]
