"""A run's folder: the one place that knows its files. Reads and writes them; imports torch only to describe the machine.

.hydra/                  Hydra's record of configuration and overrides
train.log                what the run said
metrics.jsonl            one JSON object a logged event
checkpoints/last.pt      full training state; best.pt where there is a validation split
result.json              status, metrics, best, environment; written at the start and at the end, whole or not at all
"""

import json
import math
import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cifar.atomic import replacing
from cifar.signals import Interrupted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]


class RunError(ValueError):
    """A folder that is no run, or one that lacks what was asked of it; the message names the path."""


@dataclass(frozen=True)
class Job:
    """One run as the command line asked for it: its folder and, in a sweep, the sweep's folder and the job's number."""

    folder: Path
    overrides: list[str] = field(default_factory=list)
    hydra: str = ""  # what Hydra itself was told, as YAML
    sweep: Path | None = None
    number: int | None = None


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    dir: Path

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.dir / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch by the validation split, where there is one."""
        return self.dir / "checkpoints" / "best.pt"

    @property
    def checkpoint(self) -> Path:
        """The weights that stand for this run in test, evaluate and predict: the best where there is one, else the last."""
        for path in (self.best, self.last):
            if path.exists():
                return path
        raise RunError(f"{self.dir}: no checkpoint in it (looked for checkpoints/best.pt and checkpoints/last.pt)")

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints to go on from, newest first."""
        return sorted(self.last.parent.glob("step-*.pt"), reverse=True) or ([self.last] if self.last.exists() else [])

    def step_checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` steps."""
        return self.last.parent / f"step-{step:010d}.pt"

    def keep(self, newest: Path, is_best: bool, count: int) -> None:
        """Make `newest`, a checkpoint by step, the last and, if so, the best; remove all but the newest `count` by step."""
        with self.metrics.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())  # the events that the checkpoint has counted must be there when it is
        for alias in [*([self.best] if is_best else []), self.last]:
            with replacing(alias) as temporary:
                try:
                    os.link(newest, temporary)
                except OSError:  # a file system without hard links
                    shutil.copyfile(newest, temporary)
        for old in self.checkpoints()[count:]:
            old.unlink()

    @property
    def metrics(self) -> Path:
        """The file of logged events."""
        return self.dir / "metrics.jsonl"

    def log(self, row: Row) -> None:
        """Append one event to `metrics.jsonl`, at once on disk for whoever follows the run."""
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")

    def rows(self) -> list[Row]:
        """Return the logged events, oldest first; a last line cut off by a kill is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        try:
            return [json.loads(line) for line in lines[:-1] if line]
        except json.JSONDecodeError as error:
            raise RunError(f"{self.metrics}: not readable as JSON lines: {error}") from None

    def newest_rows(self, size: int = 16_384) -> list[Row]:
        """Return the newest logged events, those in the file's last `size` bytes: at little cost, for whoever watches a run."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                first, *lines = file.read().split(b"\n")
                complete = [*([first] if file.tell() <= size else []), *lines][:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in complete if line]

    def last_values(self) -> Row:
        """Return the newest value of each metric logged."""
        values: Row = {}
        for row in self.rows():
            values |= row
        return {key: value for key, value in values.items() if key not in ("epoch", "step", "seconds")}

    def keep_rows(self, count: int) -> None:
        """Drop the events after the first `count`: those logged later than the checkpoint from which a run goes on."""
        kept = self.rows()[:count]
        if len(kept) < count:
            raise RunError(
                f"{self.metrics}: has {len(kept)} events, and the checkpoint to go on from was saved after {count}"
            )
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def record_command(self, config: str, overrides: list[str], hydra: str) -> None:
        """Write `.hydra/`: the composed configuration, the overrides, and Hydra's own settings, as YAML without home paths."""
        folder = self.dir / ".hydra"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("config", config), ("overrides", yaml.safe_dump(overrides)), ("hydra", hydra)):
            with replacing(folder / f"{name}.yaml") as temporary:
                temporary.write_text(without_home(text), encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; RunError where another one is at work in it. The system frees it when we die."""
        self.dir.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        folder = os.open(self.dir, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.dir}: another process is at work in this folder") from None
            for leftover in self.dir.rglob(".*.tmp"):  # of a save that was killed
                leftover.unlink()
            yield
        finally:
            os.close(folder)

    def settings(self) -> dict[str, Any]:
        """Return the configuration the run was started with, interpolations unresolved, as nested dictionaries."""
        path = self.dir / ".hydra" / "config.yaml"
        try:
            loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except FileNotFoundError:
            raise RunError(f"{self.dir}: not a run's folder (no .hydra/config.yaml in it)") from None
        except yaml.YAMLError as error:
            raise RunError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
        return loaded or {}

    def overrides(self) -> list[str]:
        """Return the task overrides of the command line that started the run."""
        path = self.dir / ".hydra" / "overrides.yaml"
        try:
            return [str(item) for item in yaml.safe_load(path.read_text(encoding="utf-8")) or []]
        except FileNotFoundError:
            raise RunError(f"{self.dir}: not a run's folder (no .hydra/overrides.yaml in it)") from None

    def replayed(self) -> list[str]:
        """Return the overrides that say what is trained: not where, from which checkpoint or in which search.

        What Hydra itself is told (callbacks, logging, ...) is the user's to say, not a folder's that may come from elsewhere.
        """
        where = ("resume", "hparams_search")
        return [
            item
            for item in self.overrides()
            if not (key := override_key(item)).startswith("hydra") and key not in where
        ]

    def result(self) -> dict[str, Any] | None:
        """Return `result.json`, or None where there is none."""
        path = self.dir / "result.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise RunError(f"{path}: not readable as JSON: {error}") from None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`, whole or not at all."""
        self.dir.mkdir(parents=True, exist_ok=True)
        with replacing(self.dir / "result.json") as temporary:
            temporary.write_text(json.dumps(_finite(result), indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def recording(self, **known: Any) -> Iterator[dict[str, Any]]:
        """Write `result.json` as `running`, yield it to be filled, and write it as `finished` or, on any error, `failed`."""
        started = time.perf_counter()
        previous = self.result()
        result: dict[str, Any] = {
            "status": "running",
            "error": None,
            "overrides": [],
            "config_hash": None,
            "seed": None,
            "metrics": {},
            "best": None,
            "epochs": 0,
            "steps": 0,
            "seconds": {"total": 0.0, "train": 0.0, "eval": 0.0},
            "images_per_second": None,
            "environment": {},
            "wandb": None,
        } | known
        if previous is not None:  # the run goes on
            result["seconds"] = previous["seconds"]
        self.write_result(result)
        try:
            yield result
            result["status"] = "finished"
        except BaseException as error:
            result["status"] = "failed"
            result["error"] = str(error) if isinstance(error, Interrupted) else without_home(traceback.format_exc())
            with (self.dir / "train.log").open("a", encoding="utf-8") as file:
                file.write(result["error"].rstrip() + "\n")
            raise
        finally:
            result["seconds"]["total"] += time.perf_counter() - started
            self.write_result(result)


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Return the runs at `paths`: a path is a run's folder or one (a sweep's, `outputs/`) with runs at most two levels down.

    Jobs are in the order of their numbers. Raises RunError naming a path that is missing or holds no run.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunError(f"{path}: no such folder; give a run's folder, a sweep's, or several")
        found = (
            [path] if _is_run(path) else sorted((*_runs_below(path, "*"), *_runs_below(path, "*/*")), key=_by_number)
        )
        if not found:
            raise RunError(f"{path}: no run in it (a run's folder holds .hydra/ or result.json)")
        for folder in found:
            runs.setdefault(folder.resolve(), Run(folder))
    return list(runs.values())


def override_key(override: str) -> str:
    """Return what an override of the command line sets: `optimizer.lr` of `+optimizer.lr=0.1`."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def relative(folder: str | Path) -> Path:
    """Return `folder` relative to where the user stands, if it lies below: as it is said, recorded and copied from a line."""
    path, here = Path(folder).absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def without_home(text: str) -> str:
    """Return `text` with the home folder as `~`: a record that may be shared does not say who made it."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def environment(device: Any) -> dict[str, Any]:
    """Describe what a run ran on: device (a torch.device) and its name, versions, the code's git commit and whether dirty."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _processor() + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    commit, dirty = _git_commit()
    return {
        "device": device.type,
        "device_name": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "platform": platform.system(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def _is_run(folder: Path) -> bool:
    return (folder / "result.json").exists() or (folder / ".hydra").is_dir()


def _runs_below(folder: Path, pattern: str) -> list[Path]:
    return [child for child in folder.glob(pattern) if child.is_dir() and _is_run(child)]


def _by_number(folder: Path) -> tuple[str, int, str]:
    return str(folder.parent), int(folder.name) if folder.name.isdigit() else -1, folder.name


def _finite(value: Any) -> Any:
    """JSON knows no NaN or infinity: they are written as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> tuple[str | None, bool | None]:
    """Return the commit of this code and whether it has changed since; (None, None) where it isn't under git, as in a wheel."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
