"""Curricula by name, as a command line gives them: `uniform`, `difficulty_band,low=0.1,high=0.9`."""

import ast
import inspect
from collections.abc import Sequence

from whorl.curricula.base import Curriculum
from whorl.curricula.difficulty_band import DifficultyBand
from whorl.curricula.mixture import Mixture
from whorl.curricula.uniform import Uniform

POOL = 1000
"""Problems of a generated task among which difficulty_band chooses."""


def make_curriculum(spec: str, sizes: Sequence[int | None], seed: int) -> Curriculum:
    """The curriculum that a spec describes, over environments with so many training problems (None: endless).

    Several environments are mixed in equal shares, each with a curriculum of its own.
    """
    name, *assignments = (part.strip() for part in spec.split(","))
    kinds = {"uniform": Uniform, "difficulty_band": DifficultyBand}
    if name not in kinds:
        raise ValueError(f"unknown curriculum {name!r}; expected one of {', '.join(kinds)}")
    valid = set(inspect.signature(kinds[name]).parameters) - {"num_problems", "seed"}
    settings = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        if key.strip() not in valid:
            raise ValueError(
                f"curriculum {name} has no setting {key.strip()!r}; it has {', '.join(sorted(valid)) or 'none'}"
            )
        try:
            settings[key.strip()] = float(ast.literal_eval(text.strip()))
        except (ValueError, SyntaxError, TypeError):
            raise ValueError(
                f"curriculum {name}: {key.strip()} expects a number; got {text.strip()!r}"
            ) from None
    parts: list[Curriculum] = []
    for number, size in enumerate(sizes):
        if size == 0:
            raise ValueError("there are no training problems")
        if name == "uniform":
            parts.append(Uniform(size, seed + number))
        else:
            parts.append(DifficultyBand(size or POOL, seed=seed + number, **settings))
    return parts[0] if len(parts) == 1 else Mixture(parts, [1.0] * len(parts))
