"""Hydra's launcher `fused`: trains the jobs of a sweep that differ only in what can be fused as one (`cifar.fused`)."""

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import (
    JobReturn,
    JobRuntime,
    JobStatus,
    configure_log,
    env_override,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from cifar.config import ConfigError, flatten, to_container
from cifar.signals import Interrupted, stop_on_signals

log = logging.getLogger(__name__)

# Settings in which jobs of one group may differ: each job has its own optimizer, schedule, loss, data order and random numbers.
FUSABLE = (
    "seed",
    "optimizer.lr",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.betas",
    "loss.label_smoothing",
    "schedule",
    "model.dropout",
    "data.fraction",
)


class FusedLauncher(Launcher):
    """Launches a sweep's jobs in groups, each trained as one network; a group of one runs as usual."""

    __module__ = "hydra_plugins.cifar"  # see `register`

    def __init__(self, max_jobs: int | None = None, processes: int | None = None) -> None:
        """Take how many jobs train at a time, and how many processes share a group; see conf/hydra/launcher/fused.yaml."""
        for name, value in (("max_jobs", max_jobs), ("processes", processes)):
            if value is not None and value < 1:
                raise ConfigError(f"hydra.launcher.{name}={value}: must be at least 1, or null")
        self.max_jobs, self.processes = max_jobs, processes

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives each launcher."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; return what Hydra's `run_job` said of each, in their order."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = {number: self._compose(number, given) for number, given in enumerate(job_overrides, initial_job_idx)}
        groups = divide({number: _settings(config) for number, config in jobs.items()})
        log.info("Launching %d jobs, fused into %d group%s", len(jobs), len(groups), "s" * (len(groups) != 1))
        for number, given in enumerate(job_overrides, initial_job_idx):
            log.info("\t#%d : %s", number, " ".join(filter_overrides(given)))
        for line in explain(groups):
            log.info("%s", line)
        returns: dict[int, JobReturn] = {}
        for group in groups:
            parts = [{number: jobs[number] for number in part} for part in share(group, self._share(group))]
            if len(parts) == 1:
                returns |= run(parts[0], self.max_jobs, self.hydra_context, self.task_function)
            else:
                log.info("in %d processes: %s", len(parts), "; ".join(_ranges(list(part)) for part in parts))
                task = self.task_function.__module__, self.task_function.__name__
                returns |= run_in_processes(parts, self.max_jobs, task)
        return [returns[number] for number in jobs]

    def _compose(self, number: int, overrides: Sequence[str]) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _share(self, group: dict[int, dict[str, Any]]) -> int:
        """Return how many processes train a group: on a CPU one a core, each with two jobs or more, elsewhere one."""
        if self.processes is not None:
            return min(self.processes, len(group))
        device = next(iter(group.values())).get("trainer", {}).get("device", "auto")
        # Without torch, whose import the processes would wait for.
        accelerated = sys.platform == "darwin" or Path("/dev/nvidia0").exists()
        if device in ("cuda", "mps") or (device == "auto" and accelerated):
            return 1
        return max(1, min(_threads(), len(group) // 2))


def register() -> None:
    """Make the launcher known to Hydra, which takes plugins from the package `hydra_plugins` alone.

    Files there would be found in an installed wheel only, not in an editable install or beside a checkout.
    """
    Plugins.instance().register(FusedLauncher)
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.cifar = sys.modules["hydra_plugins.cifar"] = sys.modules[__name__]  # type: ignore[attr-defined]


def run(
    jobs: dict[int, DictConfig], max_jobs: int | None, context: HydraContext, task: TaskFunction
) -> dict[int, JobReturn]:
    """Train jobs, by number, as one in this process; return what `run_job` said of each."""
    each = [
        partial(
            run_job,
            hydra_context=context,
            task_function=task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        for config in jobs.values()
    ]
    if len(jobs) == 1:
        ran = [each[0]()]
    else:
        from cifar.fused import Group

        ran = Group(each, max_jobs).run()
    hydra = next(iter(jobs.values())).hydra
    configure_log(hydra.hydra_logging, hydra.verbose)  # a job has its own
    return dict(zip(jobs, ran, strict=True))


def run_in_processes(
    parts: Sequence[dict[int, DictConfig]], max_jobs: int | None, task: tuple[str, str]
) -> dict[int, JobReturn]:
    """Train each part as one in a process of its own, with its share of the threads. Raises Interrupted once all have saved.

    `task` is the module and the name of what runs a job.
    """
    spawn = multiprocessing.get_context("spawn")
    threads = {"OMP_NUM_THREADS": str(max(1, _threads() // len(parts)))}
    most = None if max_jobs is None else -(-max_jobs // len(parts))
    returns = {number: _lost(config) for part in parts for number, config in part.items()}
    with stop_on_signals() as stop, stop.deferred(), env_override(threads):
        children = []
        for part in parts:
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=_child, args=(part, most, task, theirs))
            child.start()
            theirs.close()
            children.append((child, ours))
        told = False
        for child, ours in children:
            while not ours.poll(0.1):
                if stop and not told:
                    told = True
                    for other, _ in children:
                        if other.is_alive():
                            os.kill(other.pid, signal.SIGTERM)  # type: ignore[arg-type]
            with suppress(EOFError):  # it was stopped, or died: its jobs' folders tell
                returns |= ours.recv()
            child.join()
        if stop:
            raise stop.interrupted("along with the jobs of the sweep")
    if failed := [child.exitcode for child, _ in children if child.exitcode and child.exitcode > 0]:
        sys.exit(failed[0])  # it has said why
    return returns


def _child(jobs: dict[int, DictConfig], max_jobs: int | None, task: tuple[str, str], results: Connection) -> None:
    """In a process of its own: train jobs as one, and send what `run_job` said of each."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # a sweep that was killed must not go on: it will be started again

    threading.Thread(target=follow, daemon=True).start()
    module, name = task
    decorated = getattr(importlib.import_module("__mp_main__" if module == "__main__" else module), name)
    config = next(iter(jobs.values()))
    setup_globals()
    Singleton.instance(JobRuntime).set("name", config.hydra.job.name)
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    try:
        context = HydraContext(None, Callbacks(config))  # type: ignore[arg-type]  # all is composed already
        results.send(run(jobs, max_jobs, context, getattr(decorated, "__wrapped__", decorated)))
    except Interrupted as interrupted:
        sys.exit(interrupted.status)


def _lost(config: DictConfig) -> JobReturn:
    """Return what is said of a job whose process said nothing."""
    lost = JobReturn(overrides=list(config.hydra.overrides.task), status=JobStatus.FAILED)
    lost.return_value = RuntimeError("its process ended without a word")
    return lost


def _threads() -> int:
    """Return how many threads this command may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else os.cpu_count() or 1


def divide(jobs: dict[int, dict[str, Any]]) -> list[dict[int, dict[str, Any]]]:
    """Divide jobs, by number, into groups whose settings differ only in what can be fused."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for number, settings in jobs.items():
        groups.setdefault(repr(sorted(fixed(settings).items())), {})[number] = settings
    return list(groups.values())


def fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, flat, that all jobs of a group have in common."""
    flat = flatten(settings)
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{name}.") for name in FUSABLE)}


def share(group: dict[int, dict[str, Any]], processes: int) -> list[list[int]]:
    """Divide the jobs of a group among processes, about evenly, those that train on the same batches together."""
    by_batches = sorted(group, key=lambda number: (str(group[number].get("seed")), repr(group[number].get("data"))))
    cuts = [len(group) * part // processes for part in range(processes + 1)]
    return [sorted(by_batches[first:last]) for first, last in pairwise(cuts)]


def explain(groups: list[dict[int, dict[str, Any]]]) -> list[str]:
    """Return, for people, what is fused and, of each further group, what sets it apart from the first."""
    lines = []
    for group in groups:
        told = f"{len(group)} jobs as one" if len(group) > 1 else "on its own"
        flat = [flatten(settings) for settings in group.values()]
        varies = [key for key in flat[0] if len({repr(one.get(key)) for one in flat}) > 1]
        line = f"{_ranges(list(group))}: {told}" + (f", varying {', '.join(varies)}" if varies else "")
        if group is not groups[0]:
            own, first = (fixed(next(iter(some.values()))) for some in (group, groups[0]))
            apart = [f"{key}={own.get(key)}" for key in {**own, **first} if own.get(key) != first.get(key)]
            line += f"; not with #{next(iter(groups[0]))}: {', '.join(apart)}"
        lines.append(line)
    return lines


def _ranges(numbers: list[int]) -> str:
    """Return job numbers as people write them: #0-3, #5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"#{first}" if first == last else f"#{first}-{last}" for first, last in runs)


def _settings(config: DictConfig) -> dict[str, Any]:
    """Return a job's settings; what can't be resolved stays as it is written, for the job itself to refuse."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        return to_container(own)
    except Exception:
        return {str(key): value for key, value in OmegaConf.to_container(own, resolve=False).items()}  # type: ignore[union-attr]
