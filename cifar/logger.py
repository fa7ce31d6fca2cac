"""Weights & Biases; the only module that imports it, and only when a run logs there."""

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, Literal, Protocol

from cifar.run import Job, without_home

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Where a run's events go besides its own `metrics.jsonl`."""

    @property
    def info(self) -> dict[str, Any] | None:
        """What `result.json` says of it: {id, mode, dir}."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one event: `epoch`, `step`, `seconds` and metrics."""


def warm_up(target: str) -> None:
    """Import W&B's client in the background, where the logger `target` is to use it: a second that the data's reading hides."""

    def work() -> None:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(0.0002)  # at the usual 5 ms, whoever lists a folder would wait so long at each file
        try:
            import wandb.sdk.launch  # which `init` imports

            wandb.setup()
        finally:
            sys.setswitchinterval(interval)

    if target == "cifar.logger.wandb":
        Thread(target=work, daemon=True).start()


class _Silent:
    info = None

    def log(self, row: dict[str, Any]) -> None:
        pass


@contextmanager
def none(job: Job, settings: dict[str, Any], resume: str | None) -> Iterator[Logger]:
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
    job: Job,
    settings: dict[str, Any],
    resume: str | None,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    project: str = "cifar",
    group: str | None = None,
    tags: list[str] | None = None,
) -> Iterator[Logger]:
    """One W&B run for this run, finished on leaving; `group` defaults to the sweep's name.

    `settings` is the whole configuration, resolved; `resume` the W&B id of the run that goes on, or None.

    `auto` logs online where an API key is configured and offline otherwise, saying how to upload later. The environment's
    WANDB_MODE, where set, decides for `auto`.
    """
    import wandb as client

    chosen = _mode(client) if mode == "auto" else mode
    sweep = job.sweep.name if job.sweep else None
    shared = job.sweep or job.folder
    config = {
        **settings,
        "sweep": sweep,
        "job": job.number,
        "overrides": dict(item.lstrip("+~").partition("=")[::2] for item in job.overrides),
    }
    run = client.init(
        project=project,
        group=group or sweep,
        name=f"{sweep}/{job.number}" if sweep else job.folder.name,
        tags=tags,
        id=resume,
        resume="allow" if resume else None,
        mode=chosen,
        dir=str(shared),
        config=_without_home(config),
        # The run's folder holds code version, machine and console output already; W&B's own collectors would add the
        # home path, the full command line and the list of installed packages.
        settings=client.Settings(
            reinit="create_new",  # jobs that train as one have their runs side by side
            console="off",
            silent=True,
            x_disable_meta=True,
            save_code=False,
            x_save_requirements=False,
        ),
    )
    failed = True
    try:
        run.define_metric("step")
        run.define_metric("*", step_metric="step", summary="max,last")
        for name in ("train/loss", "val/loss", "test/loss"):
            run.define_metric(name, step_metric="step", summary="min,last")
        logger = _Wandb(run, chosen)
        if chosen == "online":
            log.info("W&B: %s", run.url)
        elif chosen == "offline" and not sweep:  # a sweep says it once, at its end
            log.info("W&B: offline; to upload: %s", sync_command(shared))
        yield logger
        failed = False
    finally:
        # Not `with run`: on its way out it would print the traceback of what the command tells in a line.
        run.finish(exit_code=int(failed))


def sync_command(shared: Path) -> str:
    """Return the command that uploads all offline runs recorded under a run's or a sweep's folder."""
    return f"wandb sync {shlex.quote(str(shared / 'wandb'))}/offline-run-*"


def _mode(client: Any) -> Any:
    """Online where a key is configured, else offline; asks nobody and opens no connection."""
    if asked := os.environ.get("WANDB_MODE"):
        return asked
    return "online" if client.login(prompt=False, verify=False) else "offline"


def _without_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    return without_home(value) if isinstance(value, str) else value
