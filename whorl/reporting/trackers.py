"""Experiment trackers: each is a few lines that hand a row of metrics on.

The run directory is the record; a tracker is a view of it for those who already look elsewhere. All three
write files and, unless the environment tells the package otherwise, open no connection: `tensorboard
--logdir`, `wandb sync` and `trackio show` read what was
written. They are extras: `pip install "whorl[track]"`.
"""

import contextlib
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Where metrics go besides the run directory."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Hand on the metrics of one step; None means "not measured in this step"."""
        ...

    def finish(self) -> None:
        """Write out what is held back. Nothing is logged afterwards."""
        ...


class TensorBoard:
    """Event files below `directory`. On resume, `first_step` hides what was logged from that step on."""

    def __init__(self, directory: Path | str, first_step: int | None = None) -> None:
        _need("tensorboard")
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in _measured(metrics).items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class WandB:
    """An offline Weights & Biases run below `directory`; `wandb sync` uploads it if you wish.

    A run of the same `name` continues that run when it is synced.
    """

    def __init__(self, directory: Path | str, project: str, name: str, config: Mapping[str, Any]) -> None:
        wandb = _need("wandb")
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            dir=str(directory),
            project=project,
            name=name,
            id=name,
            config=dict(config),
            mode="offline",
            # The environment of the process, its command line and its output are none of its business.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, x_disable_meta=True, x_disable_stats=True
            ),
        )

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._run.log(_measured(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


class Trackio:
    """A local run in Trackio's own directory (TRACKIO_DIR). A run of the same name is continued.

    Trackio has one run per process: a second tracker would end the first.
    """

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._trackio = _need("trackio")
        # Trackio prints instructions when it starts; the console belongs to the run.
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.init(
                project=project,
                name=name,
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._trackio.log(_measured(metrics), step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


def _measured(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def _need(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f'tracking with {package} needs the package {package}: pip install "whorl[track]"'
        ) from error
