"""Every metric is defined once: what is computed, its unit, and what a healthy value looks like.

The definitions are rows of `metric_table.py`. The loop checks each row it logs against them
(`check_names`), the report explains its curves with them, and docs/metrics.md is rendered from them
(`python -m whorl.reporting.glossary` rewrites that page).

Families: a name may have several parts, divided by slashes. A part that the table writes in angle brackets
stands for any text, so `eval/<environment>/accuracy` defines `eval/countdown/accuracy`. An exact name wins.
"""

import difflib
import functools
import re
from collections.abc import Iterable
from pathlib import Path

from whorl.reporting.metric_table import GROUPS, METRICS, Metric

PREAMBLE = """# Metrics

Every number that a run can log, from the table in `whorl/reporting/metric_table.py`.
This page is generated: `python -m whorl.reporting.glossary` rewrites it.

Names end in their unit (`_frac`, `_seconds`, `_tokens`, `_gib`, `_nats`). A part in angle brackets
stands for any text: `eval/<environment>/accuracy` defines `eval/countdown/accuracy`.
The healthy range helps to find trouble; leaving it stops nothing.

A rollout is judged if its verifier gave a reward. Trained tokens are those the policy wrote in a role
that the algorithm trains on. pi is the policy that is being updated, pi_old the one at the start of the
step, pi_ref the reference policy, mu the sampler's number for the policy that drew the token, and
r = pi / pi_old. Means are over the whole global batch."""
PLACEHOLDER = re.compile(r"<\w+>")


@functools.cache
def _tables() -> tuple[dict[str, Metric], list[tuple[re.Pattern, Metric]]]:
    """Metrics with exact names, and families as patterns."""
    exact, families = {}, []
    for metric in METRICS:
        assert metric.group in GROUPS, f"metric {metric.name!r} is in the unknown group {metric.group!r}"
        assert metric.name not in exact, f"metric {metric.name!r} is defined twice"
        exact[metric.name] = metric
        if PLACEHOLDER.search(metric.name):
            literal = PLACEHOLDER.split(metric.name)
            families.append((re.compile("[^/]+".join(map(re.escape, literal))), metric))
    return exact, families


@functools.lru_cache(maxsize=4096)
def describe(name: str) -> Metric:
    """The definition of a metric, or of the family it belongs to (ValueError if there is none)."""
    exact, families = _tables()
    if name in exact:
        return exact[name]
    for pattern, metric in families:
        if pattern.fullmatch(name):
            return metric
    near = difflib.get_close_matches(name, exact, n=3, cutoff=0.6)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"metric {name!r} is not defined.{hint} A new metric needs a row in whorl/reporting/metric_table.py"
    )


def check_names(metrics: Iterable[str]) -> None:
    """Raise a ValueError unless every name (every key of a row) is defined."""
    for name in metrics:
        describe(name)


def render_markdown() -> str:
    """The text of docs/metrics.md."""
    lines = [PREAMBLE]
    for group, heading in GROUPS.items():
        lines += ["", f"## {heading}", "", "| metric | unit | what is computed | healthy | how to read it |"]
        lines += ["|---|---|---|---|---|"]
        for m in METRICS:
            if m.group == group:
                # A bar would end the cell.
                cells = [f"`{m.name}`", m.unit, m.formula, m.healthy_range, m.reading]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite docs/metrics.md of a source checkout."""
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(render_markdown(), encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
