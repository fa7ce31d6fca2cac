"""W&B's saved workspace and its sweeps, without a key or a connection: what would be sent, and what its agent would run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir

from cifar import dashboard
from cifar.config import CONF, check
from tests.conftest import REPOSITORY

SWEEPS = sorted((REPOSITORY / "sweeps").glob("*.yaml"))


def panels(workspace: dict) -> list[dict]:
    return [
        panel for section in workspace["spec"]["section"]["panelBankConfig"]["sections"] for panel in section["panels"]
    ]


def test_the_workspace_has_what_a_sweep_is_read_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard.py", "--project", "p", "--entity", "e", "--group", "grid", "--json"])
    dashboard.cli()
    workspace = json.loads(capsys.readouterr().out)
    assert (workspace["entity"], workspace["project"]) == ("e", "p")
    found: dict[str, list[dict]] = {}
    for panel in panels(workspace):
        found.setdefault(panel["viewType"], []).append(panel["config"])
    (parallel,) = found["Parallel Coordinates Plot"]
    settings = ["config:optimizer.value.lr", "config:optimizer.value.momentum", "config:data.value.batch_size"]
    assert [column["accessor"] for column in parallel["columns"]] == [*settings, "summary:val/accuracy.max"]
    curves = [(plot["metrics"], plot["groupBy"]) for plot in found["Run History Line Plot"]]
    assert curves[:3] == [(["val/accuracy"], None), (["val/loss"], None), (["train/loss"], None)]
    assert [group for _, group in curves[3:]] == [
        "optimizer.value.lr",
        "optimizer.value.momentum",
        "data.value.batch_size",
    ]
    assert [plot["xAxis"] for plot in found["Scatter Plot"]] == settings
    assert [plot["targetKey"] for plot in found["Parameter Importance"]] == ["val/accuracy.max"]
    assert len(found["Run Comparer"]) == 1
    (runs,) = workspace["spec"]["section"]["runSets"]
    assert [(item["key"]["name"], item["value"]) for item in runs["filters"]["filters"]] == [("group", "grid")]


def test_saving_needs_a_key_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard.py", "--project", "p"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    with pytest.raises(SystemExit) as stopped:
        dashboard.cli()
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (1, "")
    assert (
        captured.err
        == "error: saving a dashboard needs W&B online with a key (`wandb login`); --json prints it without\n"
    )


def agents_command(sweep: dict, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of W&B's agent for the sweep's first values, made by its own code."""
    from wandb import wandb_agent

    started: list[tuple[list[str], dict[str, str]]] = []

    def start(command: list[str], env: dict[str, str], forward_signals: bool) -> SimpleNamespace:
        started.append((command, env))
        return SimpleNamespace()

    monkeypatch.setattr(wandb_agent, "AgentProcess", start)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_PROJECT", "agents-project")
    monkeypatch.setenv("WANDB_DIR", os.getcwd())
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    agent._sweep_command, agent._in_jupyter, agent._function = sweep["command"], False, None
    agent._forward_signals, agent._run_processes = False, {}
    values = {
        key: (space["values"][0] if "values" in space else space["min"]) for key, space in sweep["parameters"].items()
    }
    agent._command_run(
        {
            "run_id": "run45678",
            "program": sweep["program"],
            "args": {key: {"value": value} for key, value in values.items()},
        }
    )
    return started[0]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_the_agents_command_line_is_ours(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = yaml.safe_load(file.read_text())
    assert (REPOSITORY / sweep["program"]).exists()
    assert sweep["metric"] == {"name": "val/accuracy", "goal": "maximize"}  # logged at each epoch's end
    command, _ = agents_command(sweep, monkeypatch)
    assert command[:4] == ["/usr/bin/env", "python", "-m", "cifar.train"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides=command[4:])
    check(cfg)
    first = sweep["parameters"]["optimizer.lr"]
    assert cfg.optimizer.lr == (first["values"][0] if "values" in first else first["min"])


def test_an_agents_run_logs_into_the_sweeps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = yaml.safe_load((REPOSITORY / "sweeps" / "grid.yaml").read_text())
    command, environment = agents_command(sweep, monkeypatch)
    quick = [
        "data=digits",
        "model=mlp",
        "model.widths=[8]",
        "data.image_size=8",
        "trainer.epochs=1",
        "logger.mode=offline",
    ]
    tools = str(Path(sys.executable).parent)
    done = subprocess.run(
        [*command, *quick, "hydra.run.dir=run"], capture_output=True, text=True, timeout=200, check=False,
        env=environment | {"PYTHONPATH": str(REPOSITORY), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["wandb"]["id"] == "run45678"
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*-run45678")
    listed = subprocess.run(
        [f"{tools}/wandb", "leet", "inspect", "--json", str(folder)], capture_output=True, text=True, check=True, timeout=60,
        env=os.environ | {"WANDB_ERROR_REPORTING": "false"},
    )  # fmt: skip
    assert '"sweep123"' in listed.stdout
    assert '"agents-project"' in listed.stdout
    assert "optimizer.lr" in listed.stdout
