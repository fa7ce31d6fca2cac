"""What a sweep shows while it runs: a line a running job (epoch, accuracy, time left) and one of the whole sweep.

The process that launches the jobs reads their folders, so it is the same wherever they run: in this process, in others, on
a cluster. On a terminal the lines are drawn in place; in a log file a job has a line when it ends and, between, at most
one in `PERIOD` seconds.
"""

import logging
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cifar.run import Run, RunError, find_runs

PERIOD = 30.0  # seconds between two lines of a job in a log file


def plan(config: DictConfig) -> tuple[int, list[str]]:
    """Return how many jobs are to come (of a search: trials), and the settings that vary; `config` holds Hydra's node."""
    written = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*written, *config.hydra.overrides.task])
    keys = list(dict.fromkeys(item.get_key_element() for item in overrides if item.is_sweep_override()))
    if "n_trials" in config.hydra.sweeper:
        return config.hydra.sweeper.n_trials, keys
    return len(BasicSweeper.split_arguments(overrides, None)[0]), keys


@dataclass
class Progress:
    """How far one job is, by its folder; times are seconds."""

    run: Run
    seen: float  # when the job was first seen
    changed: float  # when its newest event was
    status: str = "running"
    overrides: list[str] = field(default_factory=list)
    epochs: int | None = None
    epoch: int = 0
    step: int = 0
    steps_per_epoch: float | None = None
    seconds: float = 0.0
    accuracy: float | None = None

    def look(self, now: float) -> None:
        """Read what is new. A file that is just being written or is damaged is left for the next look, and for `compare`."""
        try:
            result = self.run.result() or {}
            if self.epochs is None:
                self.epochs = self.run.settings()["trainer"]["epochs"]
            rows = self.run.newest_rows()
        except (ValueError, KeyError):
            return
        self.overrides = result.get("overrides", [])
        for row in rows:
            if (row["step"], row["epoch"]) > (self.step, self.epoch):
                self.changed = now
            self.epoch, self.step, self.seconds = row["epoch"], row["step"], row["seconds"]
            if "images_per_second" in row:  # the event of an epoch's end
                self.steps_per_epoch = self.step / self.epoch
            self.accuracy = row.get(
                "val/accuracy", row.get("train/accuracy") if self.accuracy is None else self.accuracy
            )
        self.status = result.get("status", "running")
        if self.status != "running":
            self.seconds = result["seconds"]["total"]
            self.accuracy = (result["best"] or {}).get("value", self.accuracy)

    def left(self, now: float) -> float | None:
        """Return the estimated time to its end; None before its first epoch's."""
        if self.status != "running":
            return 0.0
        if not (self.steps_per_epoch and self.epochs and self.step):
            return None
        whole = self.seconds * self.steps_per_epoch * self.epochs / self.step
        return max(0.0, whole - self.seconds - (now - self.changed))


class View:
    """Draws a sweep's progress from a thread of its own, between `start` and `stop`."""

    def __init__(self, folder: Path, jobs: int, keys: list[str], ended: int | None = None) -> None:
        """`jobs` are to come in `folder`; `keys` are the settings that vary in them.

        `ended` is how many ended earlier and are not among `jobs`; None: `jobs` is all, of which the finished are not run again.
        """
        self.folder, self.keys = folder, keys
        found = {run.dir: run for run in self._runs()}
        self.known = {path: _written(path) for path in found}  # what an earlier start of the sweep left
        finished = sum(_finished(run) for run in found.values())
        self.before = finished if ended is None else ended
        self.jobs = jobs if ended is None else jobs + ended
        self.progress: dict[Path, Progress] = {}
        self.started = time.monotonic()
        self.said: dict[Path, tuple[float, int]] = {}  # when a job last had a line, and of which epoch (-1: its last)
        self.live: Live | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin to draw, where standard output is a terminal, or to print lines."""
        if sys.stdout.isatty():
            out = sys.stdout
            self.live = Live(console=Console(), auto_refresh=False, transient=True)
            self.live.start()
            # What is logged is to go above the drawing, through the stream that it has put in place.
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is out:
                    handler.setStream(sys.stdout)
        elif self.before:
            print(f"{self.before} of {self.jobs} jobs done already", flush=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the drawing away, or print what is left to say."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.live:
            self.live.stop()
        else:
            self.say(time.monotonic())

    def look(self, now: float) -> None:
        """Read the folders of the jobs that had not ended when last looked at."""
        for run in self._runs():
            if self.known.get(run.dir) != _written(run.dir):
                progress = self.progress.setdefault(run.dir, Progress(run, now, now))
                if progress.status == "running":
                    progress.look(now)

    def say(self, now: float) -> None:
        """Print a line for each job that has ended, or got to another epoch, since its last line."""
        self.look(now)
        for path, job in self.progress.items():
            when, epoch = self.said.get(path, (job.seen, 0))
            ended = job.status != "running"
            if epoch == -1 or not (ended or (job.epoch > epoch and now - when >= PERIOD)):
                continue
            self.said[path] = now, -1 if ended else job.epoch
            print(f"{', '.join(filter(None, self.line(job, now)))}; {self.footer(now)}", flush=True)

    def table(self, now: float) -> Table:
        """Return what is drawn: a row a running job, and the sweep's line."""
        table = Table.grid(padding=(0, 2))
        table.caption, table.caption_justify, table.caption_style = self.footer(now), "left", ""
        for job in self.progress.values():
            if job.status == "running":
                table.add_row(*self.line(job, now))
        return table

    def line(self, job: Progress, now: float) -> list[str]:
        """Return one job's line in its parts: which it is, epoch, accuracy, time left or, when it has ended, how."""
        varying = " ".join(item for item in job.overrides if item.partition("=")[0] in self.keys)
        accuracy = "" if job.accuracy is None else f"accuracy {100 * job.accuracy:.2f}%"
        if job.status != "running":
            how = [job.status, accuracy, f"in {clock(job.seconds)}"]
        else:
            left = job.left(now)
            how = [
                f"epoch {job.epoch}/{job.epochs or '?'}",
                accuracy,
                f"{clock(left)} left" if left is not None else "",
            ]
        return [f"job {job.run.dir.relative_to(self.folder)}", varying, *how]

    def footer(self, now: float) -> str:
        """Return the whole sweep's line."""
        ended = [job for job in self.progress.values() if job.status != "running"]
        failed = sum(job.status == "failed" for job in ended)
        line = f"{self.before + len(ended)} of {self.jobs} jobs done{f', {failed} failed' if failed else ''}"
        line += f", {clock(now - self.started)} gone"
        left = self.left(now)
        return f"{line}, about {clock(left)} left" if left else line

    def left(self, now: float) -> float | None:
        """Return the estimated time to the sweep's end, as many jobs side by side as now; None where nothing is known yet."""
        jobs = [job for job in self.progress.values() if job.status != "failed"]
        known = [(job.seconds, job.left(now)) for job in jobs]
        whole = [seconds + left for seconds, left in known if left is not None]
        if not whole:
            return None
        mean = sum(whole) / len(whole)
        running = [mean if job.left(now) is None else job.left(now) or 0.0 for job in jobs if job.status == "running"]
        to_come = max(0, self.jobs - self.before - len(self.progress))
        return max([(sum(running) + to_come * mean) / max(1, len(running)), *running])

    def _runs(self) -> list[Run]:
        try:
            return find_runs([self.folder])
        except RunError:  # no job has begun
            return []

    def _watch(self) -> None:
        while not self._done.wait(0.5 if self.live else 2.0):
            now = time.monotonic()
            if self.live:
                self.look(now)
                self.live.update(self.table(now), refresh=True)
            else:
                self.say(now)


def _finished(run: Run) -> bool:
    try:
        return (run.result() or {}).get("status") == "finished"
    except RunError:  # damaged
        return False


def _written(folder: Path) -> int | None:
    """Return when a run's result was last written; None where there is none."""
    try:
        return (folder / "result.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def clock(seconds: float) -> str:
    """Return a time for people: 7 s, 1:05, 2:03:04."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
