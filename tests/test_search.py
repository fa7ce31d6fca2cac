"""Searches by Optuna: on disk, going on where they stopped, with failures, side by side."""

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException

from cifar import compare, report, search
from cifar.comparison import Comparison
from cifar.errors import one_line
from cifar.run import Run
from cifar.sweep import Callbacks
from cifar.train import cli
from tests.conftest import Command

QUICK = ["data=digits", "model=mlp", "model.widths=[8]", "data.image_size=8", "trainer.device=cpu", "logger=none"]
SPACE = ["optimizer.lr=tag(log,interval(0.001,0.5))", "data.batch_size=choice(64,5000)"]  # 5000: more than there are
LINE = [
    *QUICK,
    "hparams_search=optuna_tpe",
    "hydra.sweep.dir=sweep",
    "optimizer.momentum=0.9",
    "hydra.sweeper.sampler.seed=2",
]

Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Run `python -m cifar.train ARGUMENTS...` in this process, in a folder of its own; returns the exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")
        monkeypatch.setattr("cifar.train.failures", [])
        monkeypatch.setattr(Callbacks, "sweep", None)
        handlers = logging.getLogger().handlers[:]
        GlobalHydra.instance().clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of Optuna 2 and its sweeper
                cli()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        finally:
            for handler in set(logging.getLogger().handlers) - set(handlers):
                handler.close()
            logging.getLogger().handlers[:] = handlers
        return 0

    return run


def test_a_search_goes_on_where_it_stopped(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    line = [*LINE, *SPACE, "trainer.epochs=2"]
    log = Run.log

    def stop_in_trial_2(run: Run, row: dict) -> None:
        if run.dir.name == "2" and row["epoch"] == 2:
            raise KeyboardInterrupt
        log(run, row)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop_in_trial_2)
        assert start(*line, "hydra.sweeper.n_trials=5") == 130
    before = search.read(tmp_path / "sweep")["trials"]
    assert [trial["number"] for trial in before] == [0, 1, 2]
    assert before[2]["state"] == "running"
    finished = {trial["number"]: (tmp_path / "sweep" / str(trial["number"]) / "result.json").read_bytes()
                for trial in before if trial["state"] == "complete"}  # fmt: skip

    # Trial 2 goes on from its checkpoint after epoch 1; five in all, the failed ones counted.
    capfd.readouterr()
    assert start(*line, "hydra.sweeper.n_trials=5") == int(any(trial["state"] == "fail" for trial in before))
    shown = capfd.readouterr()
    found = search.read(tmp_path / "sweep")
    trials = found["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3, 4]
    assert [trial["params"] for trial in trials[:3]] == [trial["params"] for trial in before]
    assert {trial["state"] for trial in trials} <= {"complete", "fail"}
    assert trials[2]["state"] == "complete"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == ["0", "1", "2", "3", "4"]
    assert [row["epoch"] for row in Run(tmp_path / "sweep" / "2").rows()] == [1, 2, 2]
    for number, content in finished.items():
        assert (tmp_path / "sweep" / str(number) / "result.json").read_bytes() == content
    assert len({trial["params"]["optimizer.lr"] for trial in trials}) == 5  # the sampler did not begin anew

    for trial in trials:
        result = Run(tmp_path / "sweep" / str(trial["number"])).result()
        assert f"optimizer.lr={trial['params']['optimizer.lr']}" in result["overrides"]
        assert (
            (trial["state"] == "complete")
            == (result["status"] == "finished")
            == (trial["params"]["data.batch_size"] == 64)
        )
        assert trial["value"] == (result["best"]["value"] if result["best"] else None)
    values = [trial["value"] for trial in trials if trial["value"] is not None]
    assert found["best"]["value"] == max(values)
    assert trials[-1]["best"] == max(values)
    assert sum(found["importances"].values()) == pytest.approx(1)
    assert search.describe(found) in shown.out
    assert f"best {100 * max(values):.2f}% in trial {found['best']['number']}" in shown.out

    # A finished search has nothing to do; with other settings it is refused, untouched.
    database = (tmp_path / "sweep" / "study.db").read_bytes()
    for changed, said in (
        (["optimizer.nesterov=true"], "optimizer.nesterov was False and is True"),
        (["seed=choice(1,2)"], "seed was searched in nothing and is in choice(1,2)"),
    ):
        assert start(*line, *changed) == 1
        assert capfd.readouterr().err == f"error: sweep holds another search: {said}; choose another hydra.sweep.dir\n"
    assert (tmp_path / "sweep" / "study.db").read_bytes() == database

    monkeypatch.setattr(sys, "argv", ["compare.py", "sweep", "--json"])
    compare.cli()
    assert json.loads(capfd.readouterr().out)["search"] == [found | {"dir": "sweep"}]


def test_failed_trials_do_not_end_a_search(start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(*LINE, "optimizer.lr=choice(0.1,-1)", "trainer.epochs=1", "hydra.sweeper.n_trials=4") == 1
    trials = search.read(tmp_path / "sweep")["trials"]
    wanted = ["complete" if trial["params"]["optimizer.lr"] == 0.1 else "fail" for trial in trials]
    assert [trial["state"] for trial in trials] == wanted
    assert set(wanted) == {"complete", "fail"}
    shown = capfd.readouterr()
    assert "optimizer.lr=-1: must be greater than or equal to 0" in shown.err
    assert "4 runs, ranked by best validation accuracy" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.val_size=0"], "data.val_size=0: a search needs images held out for validation"),
        (["hydra.sweeper.direction=minimize"], "hydra.sweeper.direction=minimize: must be maximize"),
    ],
)
def test_what_is_no_search_is_refused(
    arguments: list[str], said: str, start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(*LINE, *arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_trials_side_by_side(command: Command, tmp_path: Path) -> None:
    done = command(
        "train", *LINE, "trainer.epochs=1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "hydra.sweeper.n_trials=2", "optimizer.lr=interval(0.01,0.1)", "data.batch_size=choice(64,5000)", timeout=200,
    )  # fmt: skip
    trials = search.read(tmp_path / "sweep")["trials"]
    states = ["complete" if trial["params"]["data.batch_size"] == 64 else "fail" for trial in trials]
    assert [trial["state"] for trial in trials] == states
    assert len(states) == 2
    assert done.returncode == int("fail" in states)
    assert "is launching 2 jobs" in done.stdout
    assert "alembic" not in done.stdout


def test_history_and_importances_are_the_studys(tmp_path: Path) -> None:
    """A made-up study: the value is one setting's alone, so that all importance is its."""
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db", direction="maximize")
    for number in range(12):
        trial = study.ask()
        rate = trial.suggest_float("optimizer.lr", 0, 1)
        trial.suggest_float("optimizer.momentum", 0, 1)
        if number == 3:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, rate)
    study._storage.remove_session()
    (found,) = search.searches([tmp_path, tmp_path / "nothing"])
    values = [trial.value for trial in study.trials]
    assert [trial["value"] for trial in found["trials"]] == values
    best = [max(value for value in values[: end + 1] if value is not None) for end in range(12)]
    assert [trial["best"] for trial in found["trials"]] == best
    assert found["best"] == {"number": values.index(best[-1]), "value": best[-1], "params": study.best_params}
    assert list(found["importances"]) == ["optimizer.lr", "optimizer.momentum"]
    assert found["importances"]["optimizer.lr"] > 0.7
    first, *_ = search.describe(found).splitlines()
    assert first.startswith("Search: 12 trials (11 complete, 1 fail), best ")

    section = report.search(Comparison([], [], None, [], {}, {}, [], 0, [found]))
    assert section.title == "Search"
    history, importances = map(json.loads, re.findall(r">(\{.*?\})</script>", section.html))
    done = [number for number, value in enumerate(values) if value is not None]
    assert history["data"][0]["x"] == done
    assert history["data"][0]["y"] == [100 * values[number] for number in done]
    assert history["data"][1]["y"] == [100 * best[number] for number in done]
    assert importances["data"][0]["y"] == ["optimizer.lr", "optimizer.momentum"]


def test_without_the_extra_the_line_names_it() -> None:
    missing = MissingConfigException("Could not find", "hydra/sweeper/optuna", ["basic"])
    said = "hydra/sweeper=optuna: no such choice; hydra/sweeper can be basic; pip install 'cifar[optuna]' adds optuna"
    assert one_line(missing) == said
    missing = MissingConfigException("In 'hydra/launcher/ray_local': Could not load", "hydra/launcher/ray", None)
    assert one_line(missing) == "hydra/launcher=ray: no such choice; pip install 'cifar[ray]' adds ray"
