"""The start of seed 0, the positions at which it is unsure, and the command that trains on them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from whorl.experiments.starts import start_settings
from whorl.recipes.reinforcement_pretraining.experiments import EXPERIMENTS, RPT
from whorl.recipes.reinforcement_pretraining.positions import prepare
from whorl.recipes.reinforcement_pretraining.recipe import ReinforcementPretraining


def main(arguments: Sequence[str]) -> int:
    """`python -m whorl.recipes.reinforcement_pretraining FOLDER`."""
    if len(arguments) != 1:
        print("usage: python -m whorl.recipes.reinforcement_pretraining FOLDER", file=sys.stderr)
        return 2
    folder, experiment = Path(arguments[0]), EXPERIMENTS[0]
    start = start_settings(experiment, "cpu", RPT, seed=0)
    assert start is not None, "the recipe has a cold start"
    found = prepare(folder, start, ReinforcementPretraining())
    print(f"{found['kept']:.0f} of {found['positions']:.0f} positions kept. To train on them:")
    print(command_for(folder))
    return 0


def command_for(folder: Path) -> str:
    """The command that trains on what `prepare` has written."""
    return (
        f"whorl train reinforcement_pretraining --model {folder}/start/run --cold-start.max-updates 0 "
        f"--environment next_token,positions={folder}/positions.jsonl"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
