"""What a run says while it works: bars and a table on a terminal, plain lines elsewhere.

The loop speaks to a `Progress`. `Console` shows it: on a terminal with live bars below a table that grows by
one line per step; elsewhere (a file, a pipe, CI) as one plain line per step without control characters.
`Silent` says nothing, for tests and for the ranks above 0.

Text from the model is untrusted. It reaches the terminal as `rich` text objects, never as markup, and its
control characters are replaced by visible ones first, so that it cannot colour, move or retitle anything.
"""

import io
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from whorl.data import Rollout

Advance = Callable[..., None]
"""`advance(count=1, note="")`: so many more are done; the note is shown beside the bar."""


@runtime_checkable
class Progress(Protocol):
    """What the loop tells about itself. Used as a context manager around the run."""

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *exception: object) -> None: ...

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """`with progress.phase("rollouts", 64) as advance: ... advance()`. `total` None: not known."""
        ...

    def log(self, metrics: Mapping[str, float | None]) -> None:
        """Show the row of a finished step (`metrics["step"]` is needed, the rest is shown if there)."""
        ...

    def say(self, text: str) -> None:
        """Show one message."""
        ...

    def before_after(
        self, rows: Sequence[tuple[str, str, str]], transcripts: Sequence[tuple[str, Rollout]] = ()
    ) -> None:
        """The summary at the end: (what, before, after) rows, and rollouts with a label each."""
        ...


class Silent:
    """A `Progress` that shows nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        yield lambda count=1, note="": None

    def log(self, metrics: Mapping[str, float | None]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def before_after(
        self, rows: Sequence[tuple[str, str, str]], transcripts: Sequence[tuple[str, Rollout]] = ()
    ) -> None:
        pass


HEADER_EVERY = 25
"""Lines on a terminal after which the names of the columns are repeated."""

COLUMNS: tuple[tuple[str, int, Callable[[Mapping[str, Any]], str]], ...] = (
    ("reward", 7, lambda m: _format(m.get("reward"), ".3f")),
    ("accuracy", 8, lambda m: _format(m.get("accuracy"), ".3f")),
    ("held-out [95%]", 18, lambda m: _interval(m)),
    ("length", 8, lambda m: _format(m.get("response_tokens"), ",.1f")),
    ("entropy", 7, lambda m: _format(m.get("entropy_nats"), ".3f")),
    ("tok/s", 9, lambda m: _format(m.get("tokens_per_second"), ",.0f")),
)
"""Columns of a step's line: heading, width, text. `step` stands before them and `left` after."""

SUPERVISED_COLUMNS: tuple[tuple[str, int, Callable[[Mapping[str, Any]], str]], ...] = (
    ("loss", 7, lambda m: _format(m.get("supervised_loss"), ".4f")),
    ("held-out loss", 13, lambda m: _format(m.get("eval_loss"), ".4f")),
    ("perplexity", 10, lambda m: _format(m.get("eval_perplexity"), ",.2f")),
    ("rate", 8, lambda m: _format(m.get("learning_rate"), ".2e")),
    ("tok/s", 9, lambda m: _format(m.get("train_tokens_per_second"), ",.0f")),
)
"""The same for supervised fine-tuning, whose steps are updates."""


class Console:
    """A `Progress` on a stream (stdout by default).

    Args:
        num_steps: steps of the whole run, for the bar and the time left; None if open.
        file: where to write. Live bars are used only if it is a terminal that can move its cursor.
        width: columns to use instead of the terminal's own.
        columns: what a step's line shows.
    """

    def __init__(
        self,
        num_steps: int | None = None,
        file: io.TextIOBase | None = None,
        width: int | None = None,
        columns: Sequence[tuple[str, int, Callable[[Mapping[str, Any]], str]]] = COLUMNS,
    ) -> None:
        self._columns = columns
        self._file: Any = sys.stdout if file is None else file
        self._num_steps = num_steps
        is_terminal = self._file.isatty()
        if not is_terminal and width is None:
            width = 100
        self._rich = rich.console.Console(
            file=self._file,
            force_terminal=is_terminal,
            highlight=False,
            markup=False,
            emoji=False,
            width=width,
        )
        if self._rich.width < 1 or self._rich.height < 1:
            # Some tools set COLUMNS=0; nothing would fit into that.
            self._rich.size = rich.console.ConsoleDimensions(self._rich.width or 80, self._rich.height or 25)
        self._live = is_terminal and not self._rich.is_dumb_terminal
        self._bars: Bars | None = None
        self._whole: Any = None
        self._num_lines = 0
        self._phases_said: set[str] = set()
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._last_log: float | None = None

    def __enter__(self) -> "Console":
        if self._live:
            bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._rich,
                transient=True,
                refresh_per_second=4,
            )
            bars.start()
            if self._num_steps:
                self._whole = bars.add_task("steps", total=self._num_steps, note="")
            self._bars = bars
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A bar on a terminal; elsewhere one line when the first phase of this name has ended."""
        done, started = 0, time.monotonic()
        task = None if self._bars is None else self._bars.add_task(self._clean(name), total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            done += count
            if self._bars is not None and task is not None:
                self._bars.update(task, advance=count, note=self._clean(note).replace("\n", " "))

        try:
            yield advance
        finally:
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)
            elif not self._live and name not in self._phases_said:
                self._phases_said.add(name)
                of = "" if total is None else f" of {total:,}"
                self.say(f"{name}: {done:,}{of} in {duration(time.monotonic() - started)}")

    def log(self, metrics: Mapping[str, float | None]) -> None:
        now = time.monotonic()
        # What came before the first line (a supervised start, say) tells nothing about steps.
        if self._last_log is not None:
            self._step_seconds.append(now - self._last_log)
        self._last_log = now
        step = int(metrics["step"] or 0)
        if self._bars is not None and self._whole is not None:
            self._bars.update(self._whole, completed=step)
        left = self._time_left(step)
        label = f"{step}/{self._num_steps}" if self._num_steps else f"{step}"
        if not self._live:
            shown = [(heading, text(metrics)) for heading, _width, text in self._columns]
            parts = [f"{heading} {text}" for heading, text in shown if text]
            self._plain("  ".join([f"step {label}", *parts, *([f"left {left}"] if left else [])]))
            return
        # What does not fit is left out from the right; the step always stands.
        cells = [("step", label, 9), *((name, text(metrics), width) for name, width, text in self._columns)]
        cells.append(("left", left, 7))
        ends = accumulate(width + 2 for _name, _text, width in cells)
        cells = cells[: max(1, sum(end - 2 <= self._rich.width for end in ends))]
        if self._num_lines % HEADER_EVERY == 0:
            self._print(Text("  ".join(name.rjust(width) for name, _text, width in cells), style="bold"))
        self._print(Text("  ".join(text.rjust(width) for _name, text, width in cells)))
        self._num_lines += 1

    def say(self, text: str) -> None:
        if self._live:
            self._rich.print(Text(self._clean(text)))
        else:
            self._plain(self._clean(text))

    def before_after(
        self, rows: Sequence[tuple[str, str, str]], transcripts: Sequence[tuple[str, Rollout]] = ()
    ) -> None:
        table = Table(title="Before and after", title_justify="left", safe_box=True)
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if heading == "" else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(self._clean(cell)) for cell in row))
        self._rich.print(table)
        for label, rollout in transcripts:
            self._rich.print(self._transcript(label, rollout))

    def _transcript(self, label: str, rollout: Rollout) -> Text:
        verdict = "not judged" if rollout.reward is None else f"reward {rollout.reward:g}"
        why = rollout.score.why if rollout.score is not None else rollout.error or ""
        head = f"\n{label}: {verdict}{f' ({why})' if why else ''}, {rollout.num_response_tokens} tokens, "
        text = Text(self._clean(f"{head}{rollout.stop}"), style="bold")
        for turn in rollout.transcript:
            who = turn.role if turn.by_policy else f"{turn.role} (given)"
            said = turn.text if len(turn.text) <= 2000 else f"{turn.text[:1500]} […] {turn.text[-400:]}"
            text.append(f"\n  {who}: ", style="not bold dim")
            text.append(self._clean(said).replace("\n", "\n    "), style="not bold")
        return text

    def _time_left(self, step: int) -> str:
        if not self._num_steps or not self._step_seconds:
            return ""
        return duration((self._num_steps - step) * sum(self._step_seconds) / len(self._step_seconds))

    def _print(self, text: Text) -> None:
        self._rich.print(text, no_wrap=True, overflow="crop", crop=True)

    def _plain(self, line: str) -> None:
        print(line, file=self._file, flush=True)

    def _clean(self, text: str) -> str:
        """`text` in characters that the stream can show and that do nothing but be shown."""
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        return visible(text).encode(encoding, "replace").decode(encoding)


ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except newline and tab, overrides of the direction of text, lone surrogates."""


def visible(text: str) -> str:
    """`text` with characters that would act on a terminal replaced by pictures of them."""

    def picture(match: re.Match) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    return ACTIVE.sub(picture, text)


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _interval(metrics: Mapping[str, float | None]) -> str:
    value, low, high = (metrics.get(f"eval_accuracy{end}") for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def duration(seconds: float) -> str:
    """`43s`, `3m12s`, `2h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
