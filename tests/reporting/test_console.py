import io
import os
import pty
import re
import subprocess
import sys

import pytest

from tests.reporting.made_up import rollout
from whorl.data import Score
from whorl.reporting.console import Console, Progress, Silent, duration, visible

EVIL = "\x1b]0;owned\x07\x1b[2J [red]x[/red] [/] \r\x9b31m \u202eabc"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def tell(progress: Progress) -> None:
    """What a loop tells about a run of three steps."""
    with progress:
        with progress.phase("supervised start", 400) as advance:
            advance(400, note="loss 0.5 [nats]\nsecond line")
        for step in range(4):
            with progress.phase("rollouts") as advance:
                advance()
            evaluated = {"eval_accuracy": 0.5, "eval_accuracy_low": 0.44, "eval_accuracy_high": 0.56}
            progress.log({"step": step, "reward": step / 10, "response_tokens": 12.5} | evaluated)
        progress.say(f"finished {EVIL}")
        progress.before_after(
            [("held-out accuracy", "0.50", "0.98"), (EVIL, "1", "2")],
            [("after", rollout("3+4=", f"3+4=7{EVIL}", Score(1.0, {}, "[b]right[/b]")))],
        )


def test_plain_output_is_one_line_per_step_without_control_characters():
    stream = io.StringIO()
    tell(Console(num_steps=3, file=stream))
    text = stream.getvalue()
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert steps[0] == "step 0/3  reward 0.000  held-out [95%] 0.500 [0.44, 0.56]  length 12.5"
    assert steps[3].startswith("step 3/3  reward 0.300")
    assert steps[3].endswith("left 0s")
    assert len(steps) == 4
    # The bars of four rollout phases are one line: a sign of life, not a flood.
    assert len([line for line in text.splitlines() if line.startswith("rollouts: 1 in ")]) == 1
    assert "supervised start: 400 of 400 in 0s" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_brackets_of_the_model_are_text_and_not_markup():
    for stream in (io.StringIO(), Terminal()):
        tell(Console(num_steps=3, file=stream, width=100))
        text = stream.getvalue()
        assert "[red]x[/red] [/]" in text
        assert "([b]right[/b])" in text
        assert "␛]0;owned␇␛[2J" in text


def test_a_terminal_receives_no_escape_sequence_of_the_model():
    stream = Terminal()
    tell(Console(num_steps=3, file=stream, width=100))
    assert "\x1b]" not in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
    assert "\u202e" not in stream.getvalue()


def test_without_cleaning_the_escape_sequence_would_get_through(monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(Console, "_clean", lambda self, text: text)
    stream = Terminal()
    console = Console(file=stream, width=100)
    console._live = False
    console.say(EVIL)
    assert "\x1b]0;owned" in stream.getvalue()


@pytest.mark.parametrize("width", [1, 2, 9, 20, 60, 500])
def test_no_width_is_too_odd_and_a_line_of_the_table_never_wraps(width: int):
    stream = Terminal()
    tell(Console(num_steps=3, file=stream, width=width))
    if width < 20:
        return
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    # The bars hold the same numbers, but only a line of the table begins with blanks and the step.
    lines = [line for line in re.split(r"[\r\n]", plain) if re.match(r"\s+[0-3]/3\s", line)]
    assert len(lines) == 4
    assert all(len(line.rstrip()) <= width for line in lines)


def test_columns_that_do_not_fit_are_left_out_from_the_right():
    headings = {}
    for width in (20, 40, 120):
        stream = Terminal()
        with Console(num_steps=3, file=stream, width=width) as console:
            console.log({"step": 1, "reward": 0.5})
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        headings[width] = next(line for line in plain.splitlines() if "step" in line and "reward" in line)
    assert headings[20].split() == ["step", "reward"]
    assert headings[40].split() == ["step", "reward", "accuracy"]
    assert headings[120].split()[-1] == "left"


def test_a_stream_of_ascii_gets_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    tell(Console(num_steps=3, file=stream))
    assert b"held-out accuracy" in raw.getvalue()


def test_an_exception_ends_the_bars_and_is_not_swallowed():
    console = Console(num_steps=3, file=Terminal(), width=80)

    def fail() -> None:
        with console, console.phase("rollouts", 3):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert console._bars is None


def test_silence_is_silent(capsys):
    tell(Silent())
    assert capsys.readouterr() == ("", "")


def test_time_left_is_the_mean_of_recent_steps_without_what_came_before_the_first(monkeypatch):
    clock = iter([100.0, 110.0, 130.0])  # 100 s of supervised start, then steps of 10 s and 20 s
    monkeypatch.setattr("whorl.reporting.console.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    console = Console(num_steps=12, file=stream)
    for step in (0, 1, 2):
        console.log({"step": step})
    lines = stream.getvalue().splitlines()
    # 11 steps of 10 s = 110 s, then 10 steps of (10 + 20) / 2 s = 150 s.
    assert lines == ["step 0/12", "step 1/12  left 1m50s", "step 2/12  left 2m30s"]


def test_durations_and_visible_text():
    assert [duration(s) for s in (0, 59.4, 60, 3599, 3600, 7500)] == [
        "0s",
        "59s",
        "1m00s",
        "59m59s",
        "1h00m",
        "2h05m",
    ]
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x00\x1b\x7f\x9b\u2066\ud800é漢") == "␀␛␡\ufffd\ufffd\ufffdé漢"


PSEUDO_TERMINAL = """
from whorl.reporting.console import Console
with Console(num_steps=2) as console:
    with console.phase("rollouts", 64) as advance:
        advance(64)
    console.log({"step": 1, "reward": 0.5})
"""


def test_a_real_pseudo_terminal_of_odd_size_works():
    leader, follower = pty.openpty()
    os.set_blocking(leader, False)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "0", "LINES": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", PSEUDO_TERMINAL],
        stdout=follower,
        stderr=subprocess.PIPE,
        env=environment,
        timeout=60,
    )
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert answer.returncode == 0, answer.stderr.decode()
    assert "1/2" in shown
