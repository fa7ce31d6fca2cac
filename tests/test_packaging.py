"""The project as a wheel: its YAML files travel along, and both ways to start it work from any folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import REPOSITORY

QUICK = ["data=digits", "model=mlp", "data.image_size=8", "trainer.epochs=1", "logger=none", "trainer.device=cpu"]


def test_a_wheel_installs_and_runs_from_another_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("cifar", "conf"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)], check=True, timeout=200
    )
    (wheel,) = tmp_path.glob("cifar-*.whl")
    packed = {name.removeprefix("cifar/") for name in zipfile.ZipFile(wheel).namelist()}
    assert {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "conf").rglob("*.yaml")} <= packed
    assert {f"templates/{path.name}" for path in (REPOSITORY / "cifar" / "templates").iterdir()} <= packed

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=200)
    shutil.rmtree(source)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for command in ([sys.executable, "-m", "cifar.train"], [sys.executable, str(site / "bin" / "cifar-train")]):
        done = subprocess.run(
            [*command, *QUICK], cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in elsewhere.glob("outputs/*/result.json")]
    assert [result["status"] for result in results] == ["finished", "finished"]
    assert results[0]["environment"]["git_commit"] is None
