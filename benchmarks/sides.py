"""What both sides of a benchmark beside TRL are told, how one is run, and what it reports."""

import json
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory import PeakMemory

HERE = Path(__file__).resolve().parent

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
"""Models, tokenizer and prompts are made on the spot, so nothing has to be looked up."""


@dataclass(frozen=True)
class Run:
    """What both sides are told, as JSON."""

    model: dict[str, Any]
    """Fields of `ModelConfig`."""
    num_cores: int = 1
    """What TRL gives torch as threads and Whorl uses for processes."""
    device: str = "cpu"
    """With "cuda" both sides compute in bf16, each in one process."""
    micro_batch: int = 0
    """Rollouts that TRL learns from at a time; 0: all of a step."""
    token_budget: int = 8192
    """The same for Whorl, in tokens."""
    computes_again: bool = False
    """Whether Whorl computes blocks again in its backward pass."""
    num_prompts: int = 8
    """Problems of a step, each a new one."""
    group_size: int = 8
    """Samples of a problem."""
    num_prompt_tokens: int = 16
    num_new_tokens: int = 64
    """Of every sample: nothing stops earlier."""
    ratio_max: float = 5.0
    """Absolute upper bound of CISPO's weight; there is no lower one."""
    learning_rate: float = 1e-4
    num_warmup_steps: int = 2
    """Taken and not timed."""
    num_steps: int = 5
    seed: int = 0

    @property
    def generated_tokens(self) -> int:
        return self.num_prompts * self.group_size * self.num_new_tokens


@dataclass
class Measured:
    """What one side reported, and the most memory that it held."""

    step_seconds: list[float]
    sampling_seconds: list[float]
    """With the scores."""
    scoring_seconds: list[float]
    cpu_seconds: list[float]
    num_parameters: int
    versions: dict[str, str]
    gpu_gib: float
    """The most that torch had allocated on the GPU at once."""
    memory_mib: float
    """Of all its processes at once."""


def measure(python: Path | str, script: str, run: Run) -> Measured:
    """Run one side in a process of its own; RuntimeError with its last words if it fails."""
    # Passive waiting: a thread that spins at a barrier beside a busy neighbour costs tens of times its work.
    environment = os.environ | {"OMP_NUM_THREADS": str(run.num_cores)}
    environment |= dict.fromkeys(OFFLINE, "1")
    command = [str(python), str(HERE / script), json.dumps(asdict(run))]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        with PeakMemory(process.pid) as memory:
            lines = process.stdout.read().splitlines()
        if process.wait() != 0:
            errors.seek(0)
            raise RuntimeError(f"{script} failed ({process.returncode}):\n{errors.read()[-3000:]}")
    return Measured(**json.loads(lines[-1]), memory_mib=memory.peak_mib)
