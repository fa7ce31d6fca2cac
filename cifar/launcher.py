"""Hydra's launcher `fused`: trains the jobs of a sweep that differ only in what can be fused as one (`cifar.fused`)."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from cifar.config import flatten, to_container

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

    def __init__(self, max_jobs: int | None = None) -> None:
        """Take how many jobs a group may have at most; None: as many as fit the memory."""
        if max_jobs is not None and max_jobs < 1:
            raise ValueError(f"hydra.launcher.max_jobs={max_jobs}: must be at least 1")
        self.max_jobs = max_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives each launcher."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; return what Hydra's `run_job` said of each, in their order."""
        from cifar.fused import Group

        setup_globals()
        self._configure_log()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = {
            number: self._compose(number, list(given)) for number, given in enumerate(job_overrides, initial_job_idx)
        }
        groups = divide({number: _settings(config) for number, config in jobs.items()})
        log.info("Launching %d jobs, fused into %d group%s", len(jobs), len(groups), "s" * (len(groups) != 1))
        for number, given in enumerate(job_overrides, initial_job_idx):
            log.info("\t#%d : %s", number, " ".join(filter_overrides(given)))
        for line in explain(groups):
            log.info("%s", line)
        hydra_cfg, returns = HydraConfig.instance().cfg, {}
        for numbers in (list(group) for group in groups):
            if len(numbers) == 1:
                returns[numbers[0]] = self._run(jobs[numbers[0]])
            else:
                each = [partial(self._run, jobs[number]) for number in numbers]
                returns |= dict(zip(numbers, Group(each, self.max_jobs).run(), strict=True))
            HydraConfig.instance().cfg = hydra_cfg
            self._configure_log()
        return [returns[number] for number in jobs]

    def _compose(self, number: int, overrides: list[str]) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _run(self, config: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _configure_log(self) -> None:
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)


def register() -> None:
    """Make the launcher known to Hydra, which takes plugins from the package `hydra_plugins` alone.

    Files there would be found in an installed wheel only, not in an editable install or beside a checkout.
    """
    Plugins.instance().register(FusedLauncher)
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.cifar = sys.modules["hydra_plugins.cifar"] = sys.modules[__name__]  # type: ignore[attr-defined]


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
