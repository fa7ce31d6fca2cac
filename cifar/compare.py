"""`python -m cifar.compare PATH...`: one ranked table of runs, with only the settings in which they differ.

Runs rank by the best accuracy on their validation split. Finished runs without one come after those, by test accuracy; if
no run has one, all rank by test accuracy, and the table says so. Failed and unfinished runs come last.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cifar.config import flatten
from cifar.errors import reported
from cifar.run import Run, find_runs
from cifar.search import describe, searches

VAL, TEST = "val/accuracy", "test/accuracy"
NAMES = {VAL: "best validation accuracy", TEST: "test accuracy"}
ENDLESS = 10_000  # characters in a line
ABSENT = object()  # as the value of a setting: this run has no such key, which is not the same as null


@dataclass
class Entry:
    """One run, as it is compared. `settings` holds every key of its configuration; None: it could not be read."""

    dir: Path
    status: str
    error: str | None
    settings: dict[str, Any] | None
    metrics: dict[str, Any]
    best: dict[str, Any] | None
    seconds: float | None
    seed: int | None

    @property
    def best_val(self) -> float | None:
        """The best validation accuracy; None without a validation split."""
        return self.best["value"] if self.best else None

    @property
    def score(self) -> tuple[str, float] | None:
        """What a finished run ranks by: the metric and its value."""
        if self.status != "finished":
            return None
        scores = ((VAL, self.best_val), (TEST, self.metrics.get(TEST)))
        return next(((metric, value) for metric, value in scores if value is not None), None)

    def setting(self, key: str) -> Any:
        """Return the value of a setting; ABSENT where this run has no such key."""
        return (self.settings or {}).get(key, ABSENT)


@dataclass
class Group:
    """Finished runs that differ in nothing but the seed; `mean` and `std` (of the sample) are of their ranking metric."""

    runs: list[Entry]
    metric: str
    mean: float
    std: float | None


@dataclass
class Comparison:
    """Runs and groups, best first.

    `varying` are the dotted keys of the settings that are not the same in all runs; `components` those that name what is
    built (`model`), their `_target_` left out.
    """

    runs: list[Entry]
    groups: list[Group]
    ranked_by: str | None
    varying: list[str]
    components: set[str]


def compare(paths: Iterable[str | Path]) -> Comparison:
    """Read and rank the runs at `paths`, which `cifar.run.find_runs` understands; RunError where one holds no run.

    A run of which a file can't be read is in the comparison all the same, with the reason as its `error`.
    """
    runs = [_read(folder) for folder in find_runs(paths)]
    components: set[str] = set()
    for run in runs:
        if run.settings is not None:
            targets = [key for key in run.settings if key.endswith("._target_")]
            components.update(key.removesuffix("._target_") for key in targets)
            run.settings = {key.removesuffix("._target_"): value for key, value in run.settings.items()}
    known = [run for run in runs if run.settings is not None]
    keys = dict.fromkeys(key for run in known for key in run.settings or {})
    varying = [key for key in keys if any(run.setting(key) != known[0].setting(key) for run in known)]
    for component in components.intersection(varying):
        _shorten(component, known)
    groups = _groups(runs, varying)
    runs.sort(key=_order)  # stable: equal runs stay in the order of their folders
    scores = {score[0] for run in runs if (score := run.score)}
    ranked_by = next((metric for metric in (VAL, TEST) if metric in scores), None)
    return Comparison(runs, groups, ranked_by, varying, components)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON's types. A group has the settings that vary, but for the seed."""
    varying = comparison.varying
    return {
        "ranked_by": comparison.ranked_by,
        "runs": [
            {
                "dir": str(run.dir),
                "status": run.status,
                "settings": _settings(run, varying),
                "metrics": run.metrics,
                "best": run.best,
                "seconds": run.seconds,
                "seed": run.seed,
            }
            for run in comparison.runs
        ],
        "groups": [
            {
                "settings": _settings(group.runs[0], [key for key in varying if key != "seed"]),
                "n": len(group.runs),
                "dirs": [str(run.dir) for run in group.runs],
                "seeds": [run.seed for run in group.runs],
                "metric": group.metric,
                "mean": group.mean,
                "std": group.std,
            }
            for group in comparison.groups
        ],
    }


def print_csv(comparison: Comparison, file: IO[str] | None = None) -> None:
    """Print the runs as comma-separated values: full folders and dotted keys, fractions from 0 to 1."""
    columns: dict[str, list[Any]] = {
        "rank": _ranks(comparison),
        "dir": [run.dir for run in comparison.runs],
        **{key: [_text(run.setting(key)) for run in comparison.runs] for key in comparison.varying},
        f"best/{VAL}": [run.best_val for run in comparison.runs],
        "best/epoch": [run.best and run.best["epoch"] for run in comparison.runs],
        VAL: [run.metrics.get(VAL) for run in comparison.runs],
        TEST: [run.metrics.get(TEST) for run in comparison.runs],
        "seconds": [run.seconds for run in comparison.runs],
        "status": [run.status for run in comparison.runs],
        "error": [run.error for run in comparison.runs],
    }
    columns = {name: cells for name, cells in columns.items() if any(cell not in (None, "") for cell in cells)}
    writer = csv.writer(file or sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def print_table(comparison: Comparison, file: IO[str] | None = None) -> None:
    """Print the comparison for people: the runs, why some have no rank, and, where seeds vary, mean and deviation.

    A setting that a component brings with it (`betas` in a table where Adam meets SGD) has a column only if it varies
    among the runs of that component.
    """
    console = Console(file=file, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = ENDLESS  # a file or a pipe has no width to fit into
    runs, groups = comparison.runs, comparison.groups
    jobs = dict(zip(map(id, runs), _short([run.dir.resolve().parts for run in runs], "/"), strict=True))
    keys = [key for key in comparison.varying if not _implied(key, comparison)]
    shown = dict(zip(keys, _short([key.split(".") for key in keys], "."), strict=True))

    console.print(_title(comparison), style="bold", soft_wrap=True)
    settings = [(shown[key], [_text(run.setting(key)) for run in runs]) for key in keys]
    best = [f"{_percent(run.best_val)} ({run.best['epoch']})" if run.best else "" for run in runs]
    columns = [
        ("rank", [str(rank or "-") for rank in _ranks(comparison)]),
        ("job", [jobs[id(run)] for run in runs]),
        *settings,
        ("best val acc (epoch)", best),
        ("last val acc", [_percent(run.metrics.get(VAL)) for run in runs]),
        ("test acc", [_percent(run.metrics.get(TEST)) for run in runs]),
        ("seconds", ["" if run.seconds is None else f"{run.seconds:.1f}" for run in runs]),
        ("status", [run.status for run in runs]),
    ]
    _print_columns(console, columns, left={"job", *shown.values(), "status"})
    for note, names in _notes(runs, jobs).items():
        console.print(f"{', '.join(names)} {note}", soft_wrap=True)

    if "seed" in comparison.varying and any(len(group.runs) > 1 for group in groups):
        console.print("\nMean ± standard deviation over seeds", style="bold", soft_wrap=True)
        settings = [
            (shown[key], [_text(group.runs[0].setting(key)) for group in groups]) for key in keys if key != "seed"
        ]
        columns = [
            *settings,
            ("best val acc", [_spread([run.best_val for run in group.runs]) for group in groups]),
            ("test acc", [_spread([run.metrics.get(TEST) for run in group.runs]) for group in groups]),
            ("n", [str(len(group.runs)) for group in groups]),
        ]
        _print_columns(console, columns, left=set(shown.values()))


def cli() -> None:
    """Compare runs from the command line."""
    parser = argparse.ArgumentParser("cifar-compare", description=__doc__.partition("\n\n")[2] if __doc__ else None)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a run's folder, a sweep's, or one that holds runs")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print JSON")
    formats.add_argument("--csv", action="store_true", help="print comma-separated values")
    arguments = parser.parse_args()
    with reported():
        comparison = compare(arguments.paths)
        if arguments.json:
            print(json.dumps(to_json(comparison) | {"search": searches(arguments.paths)}, indent=2, default=str))
        elif arguments.csv:
            print_csv(comparison)
        else:
            print_table(comparison)
            for search in searches(arguments.paths):
                print(f"\n{describe(search)}")
        sys.stdout.flush()  # so that a reader who has gone is noticed here


def _read(run: Run) -> Entry:
    result: dict[str, Any] = {"status": "unfinished", "error": None, "seed": None, "metrics": {}, "best": None}
    try:
        result |= run.result() or {}
    except ValueError as error:
        result |= {"status": "unreadable", "error": str(error)}
    lines = (result["error"] or "").strip().splitlines()
    reason = lines[-1].strip() if lines else None
    settings, rows = None, []
    try:
        settings = {key: _finite(value) for key, value in flatten(run.settings()).items() if _counts(key)}
    except ValueError as error:
        reason = reason or f"settings unknown: {error}"
    try:
        # A finished run's result says it all; that of any other was written before its last rows.
        rows = run.rows() if result["status"] != "finished" else []
    except ValueError as error:
        reason = reason or f"metrics unknown: {run.metrics}: {error}"
    last = {key: value for row in rows for key, value in row.items()}
    seconds = (result.get("seconds") or {}).get("total")
    if result["status"] != "failed" and "seconds" in last:
        seconds = last["seconds"]
    validated = [row for row in rows if row.get(VAL) is not None]
    if validated and not result["best"]:
        top = max(validated, key=lambda row: row[VAL])
        result["best"] = {"metric": VAL, "value": top[VAL], "epoch": top["epoch"]}
    return Entry(
        dir=run.dir,
        status=result["status"],
        error=reason,
        settings=settings,
        metrics=result["metrics"] | {key: last[key] for key in last if key not in ("epoch", "step", "seconds")},
        best=result["best"],
        seconds=seconds,
        seed=result["seed"] if result["seed"] is not None else (settings or {}).get("seed"),
    )


def _counts(key: str) -> bool:
    """Whether a setting has a part in what is trained; the same leave-outs as `cifar.config.config_hash`."""
    return key.partition(".")[0] not in ("logger", "resume")


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity


def _shorten(component: str, runs: list[Entry]) -> None:
    """Name the classes a group is built from without their modules, unless that leaves two of them with one name."""
    targets = {str(value) for run in runs if (value := run.setting(component)) not in (ABSENT, None)}
    short = {target: target.rpartition(".")[2] for target in targets}
    if len(set(short.values())) == len(short):
        for run in runs:
            if run.settings and run.settings.get(component) is not None:
                run.settings[component] = short[str(run.settings[component])]


def _order(run: Entry) -> tuple[int, float]:
    if run.status != "finished":
        return 3, 0.0
    if run.score is None:
        return 2, 0.0
    metric, value = run.score
    return int(metric == TEST), -value


def _ranks(comparison: Comparison) -> list[int | None]:
    return [position if run.score else None for position, run in enumerate(comparison.runs, 1)]


def _groups(runs: list[Entry], varying: list[str]) -> list[Group]:
    keys = [key for key in varying if key != "seed"]
    together: list[tuple[list[Any], list[Entry]]] = []  # values may be lists, so no dictionary
    for run in runs:
        if run.score is None or run.settings is None:
            continue
        values = [run.score[0], *map(run.setting, keys)]
        members = next((members for other, members in together if other == values), None)
        if members is None:
            together.append((values, [run]))
        else:
            members.append(run)
    groups = [
        Group(members, values[0], *_mean_std([run.score[1] for run in members if run.score]))
        for values, members in together
    ]
    return sorted(groups, key=lambda group: (group.metric == TEST, -group.mean))


def _mean_std(values: list[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _settings(run: Entry, keys: list[str]) -> dict[str, Any]:
    return {key: None if (value := run.setting(key)) is ABSENT else value for key in keys}


def _implied(key: str, comparison: Comparison) -> bool:
    """Whether a setting varies only in that some components have it."""
    parts = key.split(".")
    above = {".".join(parts[:end]) for end in range(1, len(parts))}
    if not above & comparison.components & set(comparison.varying):
        return False
    values = [value for run in comparison.runs if (value := run.setting(key)) is not ABSENT]
    return all(value == values[0] for value in values)


def _short(names: Iterable[Iterable[str]], separator: str) -> list[str]:
    """Return for each name, given in parts, the shortest end of it that is no other's."""
    split = [tuple(name) for name in names]
    ends = Counter(name[start:] for name in split for start in range(len(name)))
    return [
        separator.join(next((name[start:] for start in reversed(range(len(name))) if ends[name[start:]] == 1), name))
        for name in split
    ]


def _title(comparison: Comparison) -> str:
    runs = comparison.runs
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    if comparison.ranked_by is None:
        return f"{count}, none finished with an accuracy to rank by"
    title = f"{count}, ranked by {NAMES[comparison.ranked_by]}"
    if comparison.ranked_by == TEST:
        return f"{title}: no finished run has a validation split"
    by_test = sum(run.score is not None and run.score[0] == TEST for run in runs)
    return f"{title}; {by_test} without a validation split after those, by test accuracy" if by_test else title


def _text(value: Any) -> str:
    if value is ABSENT:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}%"


def _spread(values: list[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ""
    mean, std = _mean_std(present)
    return _percent(mean) if std is None else f"{100 * mean:.2f} ± {_percent(std)}"


def _notes(runs: list[Entry], jobs: dict[int, str]) -> dict[str, list[str]]:
    """Return what is to be said below the table of runs that failed or did not finish, each with the jobs it is said of."""
    notes: dict[str, list[str]] = {}
    for run in runs:
        if run.error:
            notes.setdefault(f"{run.status}: {run.error}", []).append(jobs[id(run)])
        elif run.status in ("running", "unfinished"):
            notes.setdefault("unfinished: still at work, or killed", []).append(jobs[id(run)])
    return notes


def _print_columns(console: Console, columns: list[tuple[str, list[str]]], left: set[str]) -> None:
    """Print the columns that hold anything. Headers may wrap and settings may fold, but no figure is ever cut."""
    columns = [(name, cells) for name, cells in columns if any(cells)]
    table = _table(columns, left, narrow=False)
    if Measurement.get(console, console.options.update(max_width=ENDLESS), table).minimum > console.width:
        table = _table(columns, left, narrow=True)
    console.print(table, crop=False)


def _table(columns: list[tuple[str, list[str]]], left: set[str], narrow: bool) -> Table:
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 0) if narrow else (0, 1, 0, 0))
    for name, cells in columns:
        header = name.replace("_", "_\n") if narrow else name
        least = max(min(24, max(map(len, cells))), *map(len, header.split()))
        justify: Literal["left", "right"] = "left" if name in left else "right"
        table.add_column(header, justify=justify, overflow="fold", min_width=least)
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


if __name__ == "__main__":
    cli()
