"""Start weights that trials share: made once by a cold start, found again by what they were made of."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np

from whorl.cold_start import cold_start
from whorl.environments.base import Environment
from whorl.environments.catalog import make
from whorl.environments.several import Several
from whorl.experiments.plan import Arm, Budget, Experiment, changed
from whorl.experiments.trials import Tell, Watched
from whorl.faults import Stop
from whorl.model.config import is_preset, preset
from whorl.reporting.run_directory import write_atomically
from whorl.run import start_run
from whorl.settings import ColdStart, Settings

VERSION = 1
"""Of the way in which a start is made. Raised when the same settings come to mean other weights."""

ADDED_LATER = (
    "length_window", "collected_failures", "failed_queries", "answers_per_query", "train_texts", "question_steps",
)  # fmt: skip
"""Settings, some of a recipe's own, that there were not yet when results were kept: at their default they do not change
what a trial is."""

FILE_FIELDS = ("path", "test", "positions", "failures")
"""Fields of environments that name a file of problems: its bytes count, of which the probed problems see the first."""

NUM_PROBED = 16
"""Problems and demonstrations whose text stands for what an environment gives."""


@dataclass(frozen=True)
class Start:
    """What became of a start: its accuracy against its gate, and what it took."""

    accuracy: float
    wanted: float
    updates: int
    tokens: int
    seconds: float
    reason: str = ""
    """Why it cannot be used; empty if it passed its gate."""


def start_settings(experiment: Experiment, budget: Budget, arm: Arm, seed: int) -> Settings | None:
    """The run whose cold start makes the arm's start; None if the arm has no cold start.

    It has those of the arm's settings that decide the weights, and the sampling of the experiment, by which the gate
    is judged: arms that differ in nothing else get the same start.
    """
    settings = experiment.settings(budget, arm, seed)
    if not settings.cold_start.max_updates:
        return None
    base = experiment.settings(budget, Arm("", "start"), seed)
    names = ("environment", "model", "tokenizer", "max_context", "cold_start", "dtype", "device", "seed")
    plain = Settings(**{name: getattr(settings, name) for name in names}, sampling=base.sampling, cores=1)
    start = experiment.start_changes(budget)
    taught = changed(settings, start)
    changes = {name: getattr(taught, name) for name in names}
    sampling = changed(base, start).sampling
    return changed(plain, {**changes, "sampling": sampling})


def from_start(settings: Settings, start: Path) -> Settings:
    """The settings of a trial that begins with the start's weights."""
    return changed(settings, {"model": str(start / "run"), "tokenizer": None, "cold_start": ColdStart()})


def content_key(content: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity_of(settings: Settings) -> dict[str, Any]:
    """The settings by which a start or a trial is known."""
    unset = {
        f.name for f in fields(settings) if f.name in ADDED_LATER and getattr(settings, f.name) == _default(f)
    }
    return {name: value for name, value in settings.to_dict().items() if name not in unset}


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def start_key(settings: Settings) -> str:
    """The name of a start: the same if and only if the same weights would be made."""
    return content_key({"version": VERSION, "settings": identity_of(settings)} | contents_of(settings))


def contents_of(settings: Settings) -> dict[str, Any]:
    """What settings only name: the environment's problems, demonstrations and files, the model's shape or weights."""
    environment, model = make(settings.environment), Path(settings.model)
    digest = hashlib.sha256()
    parts = environment.parts if isinstance(environment, Several) else (environment,)
    for part in parts:
        size = part.num_problems("train")
        for index in range(NUM_PROBED if size is None else min(size, NUM_PROBED)):
            problem = part.problem("train", index)
            digest.update(f"{problem.content_key}\x1f{problem.answer}".encode())
            if settings.cold_start.max_updates:
                replies = part.traces(problem, np.random.default_rng(index))
                digest.update("\x1f".join(replies).encode())
        for file in files_of(part):
            digest.update(_digest_of(file).encode())
    contents: dict[str, Any] = {"environment": digest.hexdigest()}
    if is_preset(settings.model):
        contents["model"] = preset(settings.model, 256, settings.max_context).to_dict()
    elif model.is_dir():
        for file in sorted(model.glob("**/*.safetensors")):
            contents[f"model/{file.relative_to(model)}"] = _digest_of(file)
    return contents


def files_of(environment: Environment) -> list[Path]:
    """Files that the environment, or the one that it wraps, reads its problems from; none if they are generated."""
    named = [getattr(environment, f.name) for f in fields(cast(Any, environment)) if f.name in FILE_FIELDS]
    inner = getattr(environment, "inner", None)
    return [*(Path(name) for name in named if name), *(files_of(inner) if inner is not None else ())]


def _digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_start(settings: Settings, folder: Path, tell: Tell) -> Start:
    """Make the start in its folder, unless it is there. One that was killed on its way begins again."""
    if (found := read_start(folder)) is not None:
        return found
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    run = start_run("start", settings, folder / "run", Watched(tell, settings.cold_start.max_updates))
    reason = ""
    try:
        run.player.start()
        cold_start(run)
        run.warm = True
        run.save()
    except Stop as stop:
        reason = str(stop)
    rows = run.directory.supervised_history()
    row = rows[-1] if rows else {}  # stopped before the first look at the accuracy
    accuracy, updates = row.get("supervised_accuracy", 0.0), row.get("update", 0)
    wanted = settings.cold_start.until_accuracy
    if not reason and accuracy < wanted:
        reason = f"accuracy {accuracy:.3f} of {wanted:.2f} after {updates} updates"
    seconds = round(row.get("supervised_seconds", 0.0), 1)
    start = Start(accuracy, wanted, updates, row.get("supervised_tokens", 0), seconds, reason)
    write_atomically(folder / "start.json", (json.dumps(vars(start), indent=1) + "\n").encode())
    return start


def read_start(folder: Path) -> Start | None:
    """What became of the start in this folder; None if it is not finished."""
    file = folder / "start.json"
    return Start(**json.loads(file.read_text())) if file.is_file() else None
