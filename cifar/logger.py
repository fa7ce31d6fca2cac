"""Weights & Biases; the only module that imports it, and only when a run logs there."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Where a run's events go besides its own `metrics.jsonl`."""

    info: dict[str, Any] | None  # for result.json: {id, mode, dir}

    def log(self, row: dict[str, Any]) -> None:
        """Take one event: `epoch`, `step`, `seconds` and metrics."""


@dataclass(frozen=True)
class Experiment:
    """What a logger is told of a run when it starts."""

    folder: Path  # the run's folder
    shared: Path  # the sweep's folder where there is one, else the run's
    sweep: str | None  # the sweep's name
    job: int | None  # its number in the sweep
    overrides: list[str]
    settings: dict[str, Any]  # the whole configuration, resolved
    resume: str | None  # the W&B id of the run that goes on


class _Silent:
    info = None

    def log(self, row: dict[str, Any]) -> None:
        pass


@contextmanager
def none(experiment: Experiment) -> Iterator[Logger]:
    """Log nowhere else: `metrics.jsonl` and `result.json` are written all the same."""
    yield _Silent()


class _Wandb:
    def __init__(self, run: Any, mode: str) -> None:
        self.run = run
        # Relative to the current folder where it can be, so that no home path is recorded.
        self.info = {"id": run.id, "mode": mode, "dir": os.path.relpath(Path(run.dir).parent)}

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(row)


@contextmanager
def wandb(
    experiment: Experiment,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    project: str = "cifar",
    group: str | None = None,
    tags: list[str] | None = None,
) -> Iterator[Logger]:
    """One W&B run for this run, finished on leaving; `group` defaults to the sweep's name.

    `auto` logs online where an API key is configured and offline otherwise, saying how to upload later. The environment's
    WANDB_MODE, where set, decides for `auto`.
    """
    import wandb as client

    chosen = _mode(client) if mode == "auto" else mode
    home = str(Path.home())
    config = {
        **experiment.settings,
        "job": experiment.job,
        "overrides": dict(item.lstrip("+~").partition("=")[::2] for item in experiment.overrides),
        "sweep": experiment.sweep,
    }
    with client.init(
        project=project,
        group=group or experiment.sweep,
        name=f"{experiment.sweep}/{experiment.job}" if experiment.sweep else experiment.folder.name,
        tags=tags,
        id=experiment.resume,
        resume="allow" if experiment.resume else None,
        mode=chosen,
        dir=str(experiment.shared),
        config=_without(home, config),
        # The run's folder holds code version, machine and console output already; W&B's own collectors would add the
        # home path, the full command line and the list of installed packages.
        settings=client.Settings(console="off", silent=True, x_disable_meta=True, save_code=False, x_save_requirements=False),
    ) as run:
        run.define_metric("step")
        run.define_metric("*", step_metric="step", summary="max,last")
        for name in ("train/loss", "val/loss", "test/loss"):
            run.define_metric(name, step_metric="step", summary="min,last")
        logger = _Wandb(run, chosen)
        if chosen == "online":
            log.info("W&B: %s", run.url)
        elif chosen == "offline" and not experiment.sweep:  # a sweep says it once, at its end
            log.info("W&B: offline; to upload: %s", sync_command(experiment.shared))
        yield logger


def sync_command(shared: Path) -> str:
    """Return the command that uploads all offline runs recorded under a run's or a sweep's folder."""
    return f"wandb sync {shared / 'wandb'}/offline-run-*"


def _mode(client: Any) -> str:
    """Online where a key is configured, else offline; asks nobody and opens no connection."""
    if asked := os.environ.get("WANDB_MODE"):
        return asked
    return "online" if client.login(prompt=False, verify=False) else "offline"


def _without(home: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(home, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(home, item) for item in value]
    return value.replace(home, "~") if isinstance(value, str) and len(home) > 1 else value
