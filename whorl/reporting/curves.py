"""Curves of a run as inline SVG that takes its colours and its font from the page around it.

matplotlib draws with stand-in colours, which are then replaced by CSS variables (`--ink`, `--faint`,
`--line-1` ...), so that one drawing suits a light page and a dark one.
"""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from whorl.reporting.console import visible

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One drawing: metrics that are read together, on one axis.

    `band` names two metrics between which the first line's interval is shaded; `log` asks for a
    logarithmic axis where the values allow it. Metrics that a run has not logged are left out.
    """

    title: str
    names: tuple[str, ...]
    band: tuple[str, str] | None = None
    log: bool = False


PANELS: dict[str, tuple[Panel, ...]] = {
    "Does it learn?": (
        Panel("Reward", ("reward", "shaped_reward")),
        Panel("Held-out accuracy", ("eval_accuracy",), ("eval_accuracy_low", "eval_accuracy_high")),
        Panel("Training and held-out", ("accuracy", "eval_accuracy", "eval_pass_at_k")),
        Panel("Loss per token", ("supervised_loss", "eval_loss")),
        Panel("Groups", ("groups_with_signal_frac", "groups_all_right_frac", "groups_all_wrong_frac")),
    ),
    "What does it write?": (
        Panel("Response length", ("response_tokens", "response_tokens_p99", "eval_response_tokens")),
        Panel("Length, right and wrong", ("response_tokens_right", "response_tokens_wrong")),
        Panel("How answers end early", ("stopped_by_limit_frac", "stopped_by_repetition_frac")),
        Panel("Entropy", ("entropy_nats",)),
    ),
    "Is the update sound?": (
        Panel("Gradient norm", ("grad_norm", "grad_norm_max"), log=True),
        Panel("Distance to other policies", ("kl_ref_nats", "kl_old_nats"), log=True),
        Panel(
            "Outside the ratio bounds",
            (
                "above_max_positive_frac",
                "above_max_negative_frac",
                "below_min_positive_frac",
                "below_min_negative_frac",
                "dropped_frac",
            ),
        ),
        Panel(
            "Sampler against learner",
            ("sampler_gap_mean_nats", "sampler_gap_p99_nats", "sampler_gap_max_nats"),
            log=True,
        ),
        Panel("Expert load", ("expert_load_max", "expert_load_min")),
        Panel("Learning rate", ("learning_rate",)),
    ),
    "What does it cost?": (
        Panel("Speed", ("tokens_per_second",)),
        Panel("Time of a step", ("generate_seconds", "train_seconds", "verify_seconds", "load_seconds")),
        Panel("Memory", ("memory_gib",)),
    ),
}
SUPERVISED_PANELS = (
    Panel("Supervised loss", ("supervised_loss",)),
    Panel("Supervised accuracy", ("supervised_accuracy",)),
)

NUM_COLOURS = 5
INK, FAINT = "#010101", "#020202"
LINES = tuple(f"#0300{index:02x}" for index in range(1, NUM_COLOURS + 1))
STAND_INS = {INK: "var(--ink)", FAINT: "var(--faint)"} | {
    colour: f"var(--line-{index})" for index, colour in enumerate(LINES, start=1)
}
SMOOTH_FROM = 40
"""Number of points from which on a running mean is drawn over the faint single steps."""

NOT_NOISY = ("learning_rate", "memory_gib", "epoch")
"""Metrics whose every step is exact, so that a mean would only blur them."""


def series(rows: Rows, name: str, key: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the rows in which `name` was measured. Infinite values become NaN, which leaves a gap."""
    points = [(row[key], row[name]) for row in rows if row.get(name) is not None]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x, np.where(np.isfinite(y), y, math.nan)


def running_mean(y: np.ndarray) -> np.ndarray:
    """Mean over a twentieth of the points, centred on each (fewer at the ends), NaN left out."""
    window = np.ones(2 * max(2, len(y) // 40) + 1)
    known = np.isfinite(y)
    # A convolution and not differences of a cumulative sum: one spike of 1e20 would swallow all that follows.
    total = np.convolve(np.where(known, y, 0.0), window, "same")
    count = np.convolve(known, window, "same")
    return np.divide(total, count, out=np.full(len(y), math.nan), where=count > 0.5)


def draw(panel: Panel, rows: Rows, key: str = "step") -> str | None:
    """The panel as an `<svg>` element, or None if nothing in it was measured."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    lines = [(name, *series(rows, name, key)) for name in panel.names]
    lines = [(LINES[i % NUM_COLOURS], *line) for i, line in enumerate(lines) if np.isfinite(line[2]).any()]
    if not lines:
        return None
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        # Ids of clip paths are unique in the page because titles are.
        "svg.hashsalt": panel.title,
        "font.size": 9.0,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.9, 2.15), layout="constrained", frameon=False)
        axes = figure.add_subplot(frameon=True, facecolor="none")
        for colour, name, x, y in lines:
            _draw_line(axes, colour, name, x, y)
        if panel.band is not None:
            (x, low), (_, high) = series(rows, panel.band[0], key), series(rows, panel.band[1], key)
            if len(x) and len(low) == len(high):
                axes.fill_between(x, low, high, color=lines[0][0], alpha=0.2, linewidth=0)
        _dress(axes, panel, lines)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _inline(buffer.getvalue(), panel.title)


def _draw_line(axes: Any, colour: str, name: str, x: np.ndarray, y: np.ndarray) -> None:
    if name.startswith("eval") or len(x) <= 12:
        axes.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3.2)
    elif len(x) < SMOOTH_FROM or name in NOT_NOISY:
        axes.plot(x, y, color=colour, linewidth=1.6)
    else:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(x, running_mean(y), color=colour, linewidth=1.8)


def _dress(axes: Any, panel: Panel, lines: Sequence[tuple]) -> None:
    """Axes that stay in the background, and limits that do not exaggerate."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    values = np.concatenate([y[np.isfinite(y)] for _colour, _name, _x, y in lines])
    low, high = float(values.min()), float(values.max())
    if panel.log and low > 0 and high / low > 30:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif all(name.endswith("_frac") or "accuracy" in name or "pass_at" in name for _, name, _, _ in lines):
        # Fractions are read against the whole; small ones would vanish, so they get a scale of their own.
        top = 1.0 if high > 0.2 or high <= 0 else high
        axes.set_ylim(-0.03 * top, 1.05 * top)
    elif high - low < 1e-9 * max(1.0, abs(high)):
        axes.set_ylim(low - max(0.5, 0.1 * abs(low)), high + max(0.5, 0.1 * abs(high)))
    if len({step for _colour, _name, x, _y in lines for step in x}) == 1:
        axes.set_xlim(lines[0][2][0] - 1, lines[0][2][0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=4)


DISCARD = re.compile(
    r"<metadata>.*?</metadata>"
    r"|<defs>\s*<style.*?</style>\s*</defs>"
    r"|font-family: [^;\"]*;"
    r'| id="(?:figure|axes|patch|line2d|text|[xy]tick|matplotlib\.axis|\w+Collection)_\d+"',
    re.DOTALL,
)
"""Parts of matplotlib's file that have no place inside a page: its style sheet, fonts, ids that repeat."""


def _inline(svg: str, title: str) -> str:
    """The `<svg>` element alone, in the page's colours and font, sized by the page."""
    svg = DISCARD.sub("", svg[svg.index("<svg") :])
    start = f'<svg \\1 role="img" aria-label="{html.escape(visible(title))}">'
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', start, svg, count=1)
    for colour, variable in STAND_INS.items():
        svg = svg.replace(colour, variable)
    return svg
