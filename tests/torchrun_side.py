"""Small runs on the ranks of a `torchrun`, or in one process: started by test_torchrun.py.

torchrun --nproc-per-node 2 -m tests.torchrun_side FOLDER start NAME ... resume NAME ...
"""

import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from whorl.data import Score
from whorl.environments.reverse_digits import ReverseDigits
from whorl.loop import train
from whorl.model.adapter import Lora
from whorl.recipes.quickstart import Quickstart
from whorl.recipes.sft import Sft
from whorl.run import open_run, start_run
from whorl.settings import ColdStart, Evaluation
from whorl.supervised_run import fine_tune, start_supervised

BASE = replace(
    Quickstart(), environment="reverse_digits,num_digits=3", cold_start=ColdStart(), num_steps=4,
    problems_per_step=3, rollouts_per_problem=4, evaluation=Evaluation(every_steps=0, num_problems=2),
    checkpoint_every_steps=1, keep_checkpoints=9, rollouts_every_steps=1, token_budget=60, cores=1,
)  # fmt: skip
SETTINGS = {
    "plain": replace(BASE, cold_start=ColdStart(max_updates=2, check_every_updates=2, check_problems=4)),
    "bf16": replace(BASE, dtype="bfloat16", num_steps=2),
    "reference": replace(BASE, algorithm="GRPO", num_steps=2),
    "adapters": replace(BASE, algorithm="GRPO", lora=Lora(rank=2), num_steps=2),
    "critic": replace(BASE, algorithm="PPO", updates_per_batch=2, num_steps=2),
}
CHATS = "chats"


@contextmanager
def every_second_reply_is_right() -> Iterator[None]:
    """So that a policy that has learned nothing has something to learn from."""

    def verify(self, problem, rollout) -> Score:
        return Score(float(sum(rollout.tokens_T.tolist()) % 2), why="the parity of its tokens")

    with mock.patch.object(ReverseDigits, "verify", verify), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def play(folder: Path, words: Sequence[str]) -> None:
    """Do what the words say, one run after the other."""
    verb = ""
    for word in words:
        if word in ("start", "resume"):
            verb = word
        elif word == CHATS:
            chats = Sft(data=str(folder / "chats.jsonl"), num_epochs=1, max_context=64, cores=1)
            fine_tune(start_supervised("sft", chats, folder / word))
        elif verb == "start":
            assert train(start_run("quickstart", SETTINGS[word], folder / word)) is None
        else:
            assert train(open_run(folder / word)) is None


def main(folder: Path, words: Sequence[str]) -> None:
    with every_second_reply_is_right():
        if "WORLD_SIZE" not in os.environ:
            play(folder, words)
            return
        from whorl.torchrun import WATCH, introduced

        with introduced():
            play(folder, words)
        assert WATCH not in {thread.name for thread in threading.enumerate()}, "it could abort Python's end"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
