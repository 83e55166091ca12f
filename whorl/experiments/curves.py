"""Curves of arms over seeds, with bands, as a picture."""

import io
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from whorl.evaluation.statistics import over_seeds
from whorl.experiments.judge import Result, results_of
from whorl.experiments.plan import Experiment
from whorl.reporting.glossary import describe

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
"""Okabe and Ito's, which readers with any colour vision can tell apart; the baseline is black."""

STROKES = ((0, ()), (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5)))
"""Dashes by turns, the more broken on top, so that of two curves that lie on each other both are seen."""

MOST_BANDS = 5
"""Bands of more arms lie on each other and cannot be told apart."""


def draw_curves(experiment: Experiment, results: Sequence[Result]) -> bytes | None:
    """One panel per metric, one line per arm: mean over seeds with Student's band. None if there is no curve."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
    from PIL import Image

    names = [name for name in experiment.curves if any(name in result.curves for result in results)]
    arms = [arm for arm in experiment.arms if any(r.curves for r in results if r.arm == arm.name)]
    if not names:
        return None
    by_tokens = experiment.budget == "generated_tokens"
    styles = styles_of([arm.name for arm in arms], experiment.baseline.name)
    banded = banded_arms(experiment, [arm.name for arm in arms])
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(4.6 * columns, 2.7 * rows + 0.5), layout="constrained", dpi=100)
        canvas = FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, name in zip(panels, names, strict=False):
            for arm in arms:
                own = [r for r in results_of(results, arm.name).values() if name in r.curves]
                if own:
                    x_T, mean_T, low_T, high_T = mean_curve(own, name, by_tokens=by_tokens)
                    colour, turn = styles[arm.name]
                    panel.plot(
                        x_T, mean_T, color=colour, linestyle=STROKES[turn], linewidth=1.5, zorder=2 + 0.1 * turn,
                        marker="o" if len(x_T) == 1 else None, label=arm.name,
                    )  # fmt: skip
                    if arm.name in banded:
                        low_T, high_T = within_bounds(name, mean_T, low_T, high_T)
                        panel.fill_between(x_T, low_T, high_T, color=colour, alpha=0.13, linewidth=0)
            panel.set_title(name, loc="left", fontsize=9)
            panel.set_xlabel("generated tokens" if by_tokens else experiment.rows_by)
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if panel.get_xlim()[1] >= 10_000:
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", alpha=0.3, linewidth=0.6)
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        handles = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
        columns = min(4, len(handles))
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
        )
        canvas.draw()
    buffer = io.BytesIO()
    # A palette, since the picture is kept in the repository: a third of the bytes of full colour. The method that
    # covers all colours: a median cut gives rare ones, such as a line's in the legend, to their neighbours.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, 2, dither=Image.Dither.NONE).save(
        buffer, format="png", optimize=True
    )
    return buffer.getvalue()


def styles_of(arms: Sequence[str], baseline: str) -> dict[str, tuple[str, int]]:
    """Colour and number of the stroke of each arm: neighbours differ in both, and the first 32 all differ."""
    others = itertools.count()
    styles = {}
    for arm in arms:
        if arm == baseline:
            styles[arm] = ("black", 0)
        else:
            number = next(others)
            turn = number + 1 + number // len(COLOURS)  # else colours and strokes would come round together
            styles[arm] = (COLOURS[number % len(COLOURS)], turn % len(STROKES))
    return styles


def banded_arms(experiment: Experiment, drawn: Iterable[str]) -> set[str]:
    """Arms whose bands are drawn: all if they are few, else those that claims name if these are, else none."""
    in_claims = {name for claim in experiment.claims for name in (claim.method, claim.baseline)}
    every = set(drawn)
    for chosen in (every, in_claims & every):
        if len(chosen) <= MOST_BANDS:
            return chosen
    return set()


def within_bounds(
    name: str, mean_T: np.ndarray, low_T: np.ndarray, high_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The band cut off at what the metric can be, beyond which it may reach over few seeds; never at the mean's wrong
    side.
    """
    try:
        metric = describe(name)
    except ValueError:
        return low_T, high_T
    if metric.unit in ("fraction", "tokens") or metric.low == 0:
        low_T = np.maximum(low_T, np.minimum(mean_T, 0.0))
    if metric.unit == "fraction":
        high_T = np.minimum(high_T, np.maximum(mean_T, 1.0))
    return low_T, high_T


def mean_curve(
    own: Sequence[Result], name: str, *, by_tokens: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, low and high of the seeds' curves, on the points that all of them reach.

    Between points a curve is a straight line. A single seed has a band of no width.
    """
    curves = []
    for result in own:
        x, y = (np.asarray(values, dtype=np.float64) for values in result.curves[name])
        if by_tokens:
            steps, tokens = result.curves["tokens_so_far"]
            x = np.interp(x, steps, tokens)
        curves.append((x, y))
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid_T = np.unique(np.concatenate([x for x, _ in curves]))
    grid_T = grid_T[(grid_T >= first) & (grid_T <= last)]
    values_CT = np.stack([np.interp(grid_T, x, y) for x, y in curves])
    if len(curves) == 1 or not np.isfinite(values_CT).all():
        mean_T = values_CT.mean(axis=0)
        return grid_T, mean_T, mean_T, mean_T
    bands = [over_seeds(values_CT[:, t].tolist()) for t in range(len(grid_T))]
    mean_T, low_T, high_T = (np.array([band[i] for band in bands]) for i in range(3))
    return grid_T, mean_T, low_T, high_T
