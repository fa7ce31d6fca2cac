"""What several tests share: a quiet W&B, a cache of their own, and the command line run as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the user's W&B key or writes to the user's cache."""
    # WANDB_SERVICE is set by a W&B run of the tests' own process: a command would write through that process's service.
    for name in (
        *("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE"),
        *("HYDRA_FULL_ERROR", "CIFAR_TARGETS", "CIFAR_ROOT"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tests run side by side, each with a core of its own
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _own_generator() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run `python -m cifar.NAME ARGUMENTS...` in a folder of its own; returns the finished process."""

    def run(name: str, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"cifar.{name}", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
