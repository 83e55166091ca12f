"""Curves of arms over seeds, with bands, as a picture."""

import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from whorl.evaluation.statistics import over_seeds
from whorl.experiments.judge import Result, results_of
from whorl.experiments.plan import Experiment
from whorl.reporting.glossary import describe

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
"""Okabe and Ito's, which readers with any colour vision can tell apart; the baseline is black."""

STROKES = ("-", "--", ":")
"""Of the first arms, and of those for which no colour is left."""


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
    others = itertools.cycle((colour, stroke) for stroke in STROKES for colour in COLOURS)
    lines = {arm.name: ("black", "-") if arm == experiment.baseline else next(others) for arm in arms}
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
                    colour, stroke = lines[arm.name]
                    marker = "o" if len(x_T) == 1 else None
                    panel.plot(
                        x_T, mean_T, stroke, color=colour, linewidth=1.5, marker=marker, label=arm.name
                    )
                    panel.fill_between(x_T, low_T, high_T, color=colour, alpha=0.13, linewidth=0)
            panel.set_title(name, loc="left", fontsize=9)
            panel.set_xlabel("generated tokens" if by_tokens else "step")
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if by_tokens:
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            _within_reason(panel, name)
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


def _within_reason(panel: Any, name: str) -> None:
    """Limits of a fraction: a wide band over few seeds may reach beyond what a fraction can be."""
    try:
        metric = describe(name)
    except ValueError:
        return
    low, high = panel.get_ylim()
    if metric.unit == "fraction":
        panel.set_ylim(max(low, -0.02), min(high, 1.02))
    elif metric.low == 0:
        panel.set_ylim(max(low, 0.0), high)


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
