"""Searches by Optuna (`hparams_search=optuna_tpe`): what makes one go on where it stopped, and what it has found.

Hydra's Optuna sweeper asks for trials and tells their values; the study lies in `study.db` in the sweep's folder, and
trial n is job n. Optuna is an extra, imported only where a search is.
"""

import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from cifar.config import ConfigError, difference, to_container

SWEEPER = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
STUDY = "study.db"  # as conf/hparams_search/optuna_tpe.yaml has it


class ChangedSearchError(ConfigError):
    """A search was started again in its folder with other settings; the message names the difference."""


def prepare(config: DictConfig) -> int:
    """Make the Optuna sweeper go on with the study in the sweep's folder, where there is one, by changing `config.hydra`.

    The sweeper as released (1.3.0) would at each start ask for all `n_trials` again, number the jobs from 0 and leave the
    trials that were under way when it was killed as running for ever. Here those are asked for first: they go on in their
    folders, from their checkpoints. Trials end in the order of their numbers, so the ended ones are the first.

    Returns how many have ended.
    Raises ConfigError where the search could not be one: nothing held out to judge a trial by, a measure to be minimised,
    or another search's settings in the folder.
    """
    sweeper = config.hydra.sweeper
    settings = to_container(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    if settings["data"].get("val_size") == 0:
        raise ConfigError(
            "data.val_size=0: a search needs images held out for validation; it may not choose by the test split"
        )
    direction = getattr(sweeper.direction, "name", sweeper.direction)
    if direction != "maximize":
        raise ConfigError(f"hydra.sweeper.direction={direction}: must be maximize; a trial's value is an accuracy")
    if sweeper.n_jobs < 1:  # joblib's word for all cores; the sweeper would ask for no trial at all, for ever
        sweeper.n_jobs = os.cpu_count() or 1
    if not sweeper.storage:
        return 0

    logging.getLogger("alembic").setLevel(logging.WARNING)  # it speaks when imported, so before that
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=sweeper.study_name, storage=sweeper.storage, direction=direction, load_if_exists=True
    )
    asked = {"settings": settings, "space": _space(config)}
    recorded = study.user_attrs.get("asked")
    # As JSON it was recorded, so a tuple is a list there.
    if recorded and (changed := _changed(recorded, json.loads(json.dumps(asked, default=str)))):
        raise ChangedSearchError(
            f"{config.hydra.sweep.dir} holds another search: {changed}; choose another hydra.sweep.dir"
        )
    study.set_user_attr("asked", json.loads(json.dumps(asked, default=str)))
    ended = 0
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            ended += 1
        else:
            study._storage.set_trial_state(trial._trial_id, optuna.trial.TrialState.WAITING)

    sweeper.n_trials = max(0, sweeper.n_trials - ended)
    if sweeper.sampler.get("seed") is not None:
        sweeper.sampler.seed += ended  # or the sampler would draw its first trials again
    if sweeper.n_jobs > 1 and sweeper.sampler._target_ == "optuna.samplers.TPESampler":
        with flag_override(sweeper.sampler, "struct", False):
            sweeper.sampler.constant_liar = True  # or trials that run side by side would be much alike
    _number_jobs_from(ended)
    return ended


def searches(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return what each search among the folders `paths` has found, as JSON's types; see `read`."""
    return [read(path) for path in map(Path, paths) if (path / STUDY).is_file()]


def read(folder: Path) -> dict[str, Any]:
    """Return a search's history and importances.

    {dir, trials: [{number, state, value, best (so far), params, seconds}], best: {number, value, params} or null,
    importances: {setting: share, most important first}, error: null or why they are missing}. Shares add up to 1: how much
    a random forest that predicts the value owes to each setting (Breiman 2001); empty with fewer than two different values.
    """
    found: dict[str, Any] = {"dir": str(folder), "trials": [], "best": None, "importances": {}, "error": None}
    try:
        import optuna
    except ImportError:
        return found | {"error": f"{folder / STUDY}: to read it, pip install 'cifar[optuna]'"}
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}")
    try:
        if not (summaries := storage.get_all_study_summaries()):  # killed before it began
            return found
        study = optuna.load_study(study_name=summaries[0].study_name, storage=storage)
        best: dict[str, Any] | None = None
        for trial in study.get_trials(deepcopy=False):
            if trial.state == optuna.trial.TrialState.COMPLETE and (best is None or trial.value > best["value"]):
                best = {"number": trial.number, "value": trial.value, "params": trial.params}
            found["trials"].append(
                {
                    "number": trial.number,
                    "state": trial.state.name.lower(),
                    "value": trial.value,
                    "best": best and best["value"],
                    "params": trial.params,
                    "seconds": trial.duration.total_seconds() if trial.duration else None,
                }
            )
        values = {trial["value"] for trial in found["trials"] if trial["state"] == "complete"}
        if len(values) > 1:
            # Not Optuna's default, fANOVA: that of the releases before 3 fails with NumPy 2.
            evaluator = optuna.importance.MeanDecreaseImpurityImportanceEvaluator(seed=0)
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
            found["importances"] = {name: float(share) for name, share in shares.items()}
        return found | {"best": best}
    finally:
        storage.remove_session()
        storage.engine.dispose()


def describe(search: dict[str, Any]) -> str:
    """Return a few lines for people: how many trials, the best one, how the best rose, and what mattered."""
    if search["error"]:
        return search["error"]
    states = Counter(trial["state"] for trial in search["trials"])
    lines = [f"Search: {len(search['trials'])} trials ({', '.join(f'{n} {state}' for state, n in states.items())})"]
    if best := search["best"]:
        settings = " ".join(f"{name}={_short(value)}" for name, value in best["params"].items())
        lines[0] += f", best {100 * best['value']:.2f}% in trial {best['number']}: {settings}"
        rises = [
            f"{100 * trial['value']:.2f}% ({trial['number']})"
            for before, trial in zip([{"best": None}, *search["trials"]], search["trials"], strict=False)
            if trial["best"] != before["best"]
        ]
        lines.append(f"Best so far (trial): {', '.join(rises)}")
    if shares := search["importances"]:
        lines.append(f"Importance: {', '.join(f'{name} {share:.2f}' for name, share in shares.items())}")
    return "\n".join(lines)


def _number_jobs_from(first: int) -> None:
    """Let the sweeper number its jobs from `first` on, for which it has no setting; Hydra takes no sweeper but a plugin's."""
    from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

    def sweep(self: OptunaSweeper, arguments: list[str]) -> None:
        self.sweeper.job_idx = first
        self.sweeper.sweep(arguments)

    OptunaSweeper.sweep = sweep  # type: ignore[method-assign]


def _space(config: DictConfig) -> dict[str, str]:
    """Return what is searched, as it was written; the command line wins over the file, as in the sweeper."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    written = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    space: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides([*written, *config.hydra.overrides.task]):
        key = override.get_key_element()
        space.pop(key, None)
        if override.is_sweep_override():
            space[key] = str(override.input_line).partition("=")[2]
    return space


def _changed(recorded: dict[str, Any], asked: dict[str, Any]) -> str:
    settings = difference(recorded["settings"], asked["settings"])
    old, new = recorded["space"], asked["space"]
    space = [
        f"{key} was searched in {old.get(key, 'nothing')} and is in {new.get(key, 'nothing')}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    return ", ".join([*space, *([settings] if settings else [])])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
