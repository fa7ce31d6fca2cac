"""What happens around a run or a sweep: refusals before anything is written, one job at a time, the table at the end."""

import contextlib
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cifar import distributed, search
from cifar.config import ConfigError, check, config_hash, difference, to_container
from cifar.errors import one_line
from cifar.run import Run, RunError, find_runs, override_key, relative, without_home

if TYPE_CHECKING:
    from cifar.live import View

log = logging.getLogger(__name__)


class ChangedSweepError(ConfigError):
    """A sweep was started again in its folder with another configuration; the message names the difference."""


class Callbacks(Callback):
    """Hydra calls these before it makes a folder."""

    sweep: Path | None = None  # the folder of the sweep under way in this process
    view: "View | None" = None
    jobs_are_children = False

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a single run that cannot work, or that would overwrite another, while there is nothing to clean up."""
        with _refusing():
            check(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
            _check_names(config)
            folder = relative(config.hydra.run.dir)
            if config.resume is None and Run(folder).result() is not None:
                raise RunError(f"hydra.run.dir={folder} holds a run already; resume=auto goes on with it")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember the sweep's folder for `summarize`, and whether its jobs are children that may outlive a failed one."""
        with _refusing():
            _check_names(config)
            if distributed.started_by_torchrun():
                raise ConfigError(
                    "torchrun starts one run over several processes, and this is a sweep: leave one of them out"
                )
            ended = search.prepare(config) if config.hydra.sweeper._target_ == search.SWEEPER else None
        Callbacks.sweep = relative(config.hydra.sweep.dir)
        launcher = config.hydra.launcher
        Callbacks.jobs_are_children = "submitit" in launcher._target_
        if "ray" in launcher._target_:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if launcher.ray.init.address == "local":
                # On Linux Ray would listen at the machine's outer address, and leave a key in the home folder.
                os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        from cifar.live import View, plan

        with _refusing():
            Callbacks.view = View(Callbacks.sweep, *plan(config), ended)
            Callbacks.view.start()

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """In a sweep, leave the screen to its view: a job says only what is wrong; the rest is in its train.log."""
        if config.hydra.mode == RunMode.MULTIRUN:
            for handler in logging.getLogger().handlers:
                if type(handler) is logging.StreamHandler:
                    handler.addFilter(lambda record: record.levelno >= logging.WARNING)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Hydra turns an exception in a callback into a warning and goes on; only SystemExit stops it.
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _check_names(config: DictConfig) -> None:
    """Refuse names with which a run's files or a sweep's jobs would lie outside their folder."""
    if Path(config.hydra.job.name).name != config.hydra.job.name:
        raise ConfigError(
            f"hydra.job.name={config.hydra.job.name}: must be a plain name; it names a file in the run's folder"
        )
    # As it is written: it holds ${hydra.job.num}, which is known only in a job.
    subdir = str(OmegaConf.to_container(config.hydra.sweep)["subdir"])  # type: ignore[call-overload, index]
    if Path(subdir).is_absolute() or ".." in Path(subdir).parts:
        raise ConfigError(f"hydra.sweep.subdir={subdir}: must lie inside hydra.sweep.dir")


def refuse_targets_for_hydra(arguments: list[str]) -> None:
    """ConfigError where an override names code for Hydra itself to build: callbacks and log handlers know no allow list.

    Launchers and sweepers are chosen as a group, `hydra/launcher=joblib`, among those installed.
    """
    for argument in arguments:
        key = override_key(argument)
        if re.match(r"hydra[./]", key) and (
            key.startswith("hydra.callbacks")
            or re.search(r"_target_|\.class$|\(\)|logging\.(handlers|formatters|filters)", argument)
        ):
            raise ConfigError(f"{key}: what Hydra itself builds can't be set on the command line")


def arguments_of_resumed_run(arguments: list[str]) -> list[str]:
    """Return the command line with `resume=FOLDER` replaced by what started that run, later overrides winning.

    The run's recorded overrides are replayed, its folder becomes this run's folder; `resume=null|auto` is left alone.
    """
    asked = [argument for argument in arguments if argument.startswith("resume=")]
    folder = asked[-1].removeprefix("resume=").strip("'\"") if asked else ""
    if folder in ("", "null", "auto"):
        return arguments
    run = Run(Path(folder))
    if not run.checkpoints():
        raise RunError(f"resume={folder}: no checkpoint in it (looked in {run.last.parent})")
    given = [argument for argument in arguments if argument not in asked]
    if "-m" in given or "--multirun" in given:
        raise RunError(
            f"resume={folder} goes on with one run; to go on with a sweep, repeat it with hydra.sweep.dir=<its folder>"
        )
    replaced = {override_key(argument) for argument in given}
    recorded = [item for item in run.replayed() if override_key(item) not in replaced]
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    return [*recorded, *given, "resume=auto", f"hydra.run.dir='{quoted}'", "hydra.mode=RUN"]


def already_finished(run: Run, cfg: DictConfig) -> bool:
    """Whether this job of a sweep was finished by an earlier start of the sweep.

    ChangedSweepError where the folder holds a run of another configuration, finished or not.
    """
    result = run.result()
    if result is None or result["config_hash"] is None:
        return False
    settings = to_container(cfg)
    if result["config_hash"] != config_hash(settings):
        from cifar import checkpoint

        found = [checkpoint.load(path)["settings"] for path in run.checkpoints()[:1]]
        changed = difference(found[0], settings) if found else f"it was started with {' '.join(result['overrides'])}"
        raise ChangedSweepError(
            f"{run.dir} holds a run of another configuration: {changed}; choose another hydra.sweep.dir"
        )
    if result["status"] == "finished":
        log.info("%s: finished already", run.dir)
    return result["status"] == "finished"


def summarize() -> bool | None:
    """After a sweep, print its table and what failed; return whether every job finished. None where there was no sweep."""
    folder = Callbacks.sweep
    if Callbacks.view:
        Callbacks.view.stop()
    if folder is None or not folder.is_dir():
        return None
    from cifar.compare import compare, print_table
    from cifar.report import write_report

    if Callbacks.jobs_are_children:
        # submitit's launcher gives up at the first job that was killed, while others are still at work.
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
    if (composed := folder / "multirun.yaml").exists():
        composed.write_text(without_home(composed.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        runs = find_runs([folder])
    except RunError:  # stopped before the first job began
        return False
    comparison = compare([folder])
    print_table(comparison)
    try:
        print(f"report: {write_report(comparison, folder / 'report.html')}")
    except OSError as error:  # a full disk, say: the runs are there all the same
        print(f"no report: {one_line(error)}", file=sys.stderr)
    failed = []
    offline = False
    for run in runs:
        result = run.result() or {"status": "never started", "error": None, "wandb": None}
        if result["status"] != "finished":
            failed.append((run, result))
        offline |= (result["wandb"] or {}).get("mode") == "offline"
    for run, result in failed:
        print(
            f"\n{run.dir}: {result['status']}\n{(result['error'] or 'no word from it: killed?').rstrip()}",
            file=sys.stderr,
        )
    if offline:
        from cifar.logger import sync_command

        print(f"W&B: offline; to upload the whole sweep: {sync_command(folder)}")
    return not failed
