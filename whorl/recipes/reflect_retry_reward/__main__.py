"""Failed attempts of a run's policy, once, to a file."""

import sys
from collections.abc import Sequence
from pathlib import Path

from whorl.recipes.reflect_retry_reward.failures import collect_failures
from whorl.recipes.reflect_retry_reward.recipe import ReflectRetryReward
from whorl.run import open_run


def main(arguments: Sequence[str]) -> int:
    """`python -m whorl.recipes.reflect_retry_reward RUN FILE`."""
    if len(arguments) != 2:
        print("usage: python -m whorl.recipes.reflect_retry_reward RUN FILE", file=sys.stderr)
        return 2
    run = open_run(arguments[0], read_only=True)
    asked = run.settings if isinstance(run.settings, ReflectRetryReward) else ReflectRetryReward()
    found = collect_failures(run, Path(arguments[1]), asked.failed_queries, asked.answers_per_query)
    print(
        f"{found['failed']:.0f} of {asked.failed_queries} problems failed; {found['kept']:.0f} kept in {arguments[1]}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
