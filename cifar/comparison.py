"""Runs side by side: read, ranked, and grouped by what they share but for the seed.

Runs rank by the best accuracy on their validation split. Finished runs without one come after those, by test accuracy; if
no run has one, all rank by test accuracy, and the title says so. Failed and unfinished runs come last.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.config import flatten
from cifar.run import Run, find_runs
from cifar.search import searches
from cifar.significance import LEVEL, NO_SPREAD, Difference, Sample, differences_from_first, mean_interval

VAL, TEST = "val/accuracy", "test/accuracy"
NAMES = {VAL: "best validation accuracy", TEST: "test accuracy"}
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
    epochs: int | None
    commit: str | None  # of the code; with a + where it had been changed since
    name: str = ""  # the shortest end of `dir` that no other run's has

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
    """Finished runs that differ in nothing but the seed; `mean` and `std` (of the sample) are of their ranking metric.

    `interval` is the mean's 95 % confidence interval; `lost` counts the group's runs that did not finish.
    """

    runs: list[Entry]
    metric: str
    mean: float
    std: float | None
    interval: tuple[float, float] | None
    lost: int

    @property
    def values(self) -> list[float]:
        """The runs' results."""
        return [run.score[1] for run in self.runs if run.score]

    def setting(self, key: str) -> Any:
        """Return the value of a setting that the runs share; ABSENT where they have no such key."""
        return self.runs[0].setting(key)


@dataclass
class Versus:
    """The best group held against another one, in figures and in a sentence."""

    other: Group
    difference: Difference
    sentence: str


@dataclass
class Comparison:
    """Runs and groups, best first.

    `varying` are the dotted keys of the settings that are not the same in all runs; `columns` maps those that a reader
    needs to short names, `group_columns` those in which groups differ: what a component brings with it (`betas` where Adam
    meets SGD) is there only if it varies within it.
    `versus` holds the best group against each other one of its metric, where any group has more than one seed; `tests` is
    the number of tests that the p-values are corrected for.
    """

    runs: list[Entry]
    groups: list[Group]
    ranked_by: str | None
    varying: list[str]
    columns: dict[str, str]
    group_columns: dict[str, str]
    versus: list[Versus]
    tests: int
    searches: list[dict[str, Any]]  # what `cifar.search.read` says of each search among the folders

    @property
    def ranks(self) -> list[int | None]:
        """Each run's rank; None where it has none."""
        return [position if run.score else None for position, run in enumerate(self.runs, 1)]

    @property
    def title(self) -> str:
        """How many runs there are and what they are ranked by, in words."""
        count = f"{len(self.runs)} run{'s' * (len(self.runs) != 1)}"
        if self.ranked_by is None:
            return f"{count}, none finished with an accuracy to rank by"
        title = f"{count}, ranked by {NAMES[self.ranked_by]}"
        if self.ranked_by == TEST:
            return f"{title}: no finished run has a validation split"
        by_test = sum(run.score is not None and run.score[0] == TEST for run in self.runs)
        return f"{title}; {by_test} without a validation split after those, by test accuracy" if by_test else title

    @property
    def notes(self) -> dict[str, list[str]]:
        """What is to be said of runs that failed or did not finish, each with the names of the runs it is said of."""
        notes: dict[str, list[str]] = {}
        for run in self.runs:
            if run.error:
                notes.setdefault(f"{run.status}: {run.error}", []).append(run.name)
            elif run.status in ("running", "unfinished"):
                notes.setdefault("unfinished: still at work, or killed", []).append(run.name)
        return notes


def compare(paths: Iterable[str | Path]) -> Comparison:
    """Read and rank the runs at `paths`, which `cifar.run.find_runs` understands; RunError where one holds no run.

    A run of which a file can't be read is in the comparison all the same, with the reason as its `error`.
    """
    paths = list(paths)
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
    for run, name in zip(runs, _short([run.dir.resolve().parts for run in runs], "/"), strict=True):
        run.name = name
    told = [key for key in varying if not _implied(key, runs, components.intersection(varying))]
    columns = dict(zip(told, _short([key.split(".") for key in told], "."), strict=True))
    differing = [
        key
        for key in columns
        if any(group.setting(key) != groups[0].setting(key) for group in groups) and key != "seed"
    ]
    group_columns = {key: columns[key] for key in differing}
    versus, tests = _held_against_best(groups, group_columns)
    return Comparison(runs, groups, ranked_by, varying, columns, group_columns, versus, tests, searches(paths))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON's types. A group has the settings that vary, but for the seed.

    `differences` are of the best group's mean from each other group's (`from`), with Holm's correction for `tests` tests.
    """
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
                "interval": group.interval and [*group.interval],
                "lost": group.lost,
            }
            for group in comparison.groups
        ],
        "search": comparison.searches,
        "differences": [
            {
                "from": _settings(versus.other.runs[0], [key for key in varying if key != "seed"]),
                "difference": versus.difference.mean,
                "interval": versus.difference.interval and [*versus.difference.interval],
                "n": [*versus.difference.n],
                "test": versus.difference.test,
                "p": versus.difference.p,
                "p_holm": versus.difference.p_holm,
                "sentence": versus.sentence,
            }
            for versus in comparison.versus
        ],
        "tests": comparison.tests,
    }


def text(value: Any) -> str:
    """Return a setting's value as it is shown; nothing where the run has no such key."""
    if value is ABSENT:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def percent(fraction: float | None) -> str:
    """Return a fraction in percent, as it is shown; nothing for None."""
    return "" if fraction is None else f"{100 * fraction:.2f}%"


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation (of the sample); of one value there is no deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


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
    environment = result.get("environment") or {}
    commit = environment.get("git_commit")
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
        epochs=last.get("epoch", result.get("epochs")),
        commit=commit and f"{str(commit)[:8]}{'+' * bool(environment.get('git_dirty'))}",
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


def _groups(runs: list[Entry], varying: list[str]) -> list[Group]:
    keys = [key for key in varying if key != "seed"]
    together: list[tuple[list[Any], list[Entry]]] = []  # values may be lists, so no dictionary
    lost: list[list[Any]] = []
    for run in runs:
        values = [run.setting(key) for key in keys]
        if run.settings is None:
            continue
        if run.score is None:
            lost.append(values)
            continue
        members = next((members for other, members in together if other == [run.score[0], *values]), None)
        if members is None:
            together.append(([run.score[0], *values], [run]))
        else:
            members.append(run)
    groups = []
    for (metric, *values), members in together:
        results = [run.score[1] for run in members if run.score]
        interval = mean_interval(results) if len(results) > 1 else None
        groups.append(Group(members, metric, *mean_std(results), interval, lost.count(values)))
    return sorted(groups, key=lambda group: (group.metric == TEST, -group.mean))


def _held_against_best(groups: list[Group], columns: dict[str, str]) -> tuple[list[Versus], int]:
    """Return the best group against each other one of its metric, and the number of tests; none where no seed varies."""
    groups = [group for group in groups if group.metric == groups[0].metric]
    if len(groups) < 2 or all(len(group.runs) == 1 for group in groups):
        return [], 0
    samples = [Sample([run.seed for run in group.runs], group.values) for group in groups]
    differences, tests = differences_from_first(samples)
    return [
        Versus(other, difference, _sentence(groups[0], other, difference, tests, columns))
        for other, difference in zip(groups[1:], differences, strict=True)
    ], tests


def _sentence(best: Group, other: Group, difference: Difference, tests: int, columns: dict[str, str]) -> str:
    """Say "lr 0.03 beats 0.01 by 0.8 points, 95 % interval 0.3 to 1.3, n = 5 (...)", or why that can't be said."""
    differing = [key for key in columns if best.setting(key) != other.setting(key)]
    ours = [f"{columns[key]} {text(best.setting(key)) or 'none'}" for key in differing]
    # Where one setting differs its name is said once.
    theirs = [
        f"{columns[key] + ' ' if len(differing) > 1 else ''}{text(other.setting(key)) or 'none'}" for key in differing
    ]
    shared = ", ".join(
        f"{name} {text(best.setting(key)) or 'none'}" for key, name in columns.items() if key not in differing
    )
    sure = difference.p_holm is not None and difference.p_holm < 1 - LEVEL
    where = f"with {shared}, " if shared else ""
    verb = "beats" if sure else "is ahead of"
    said = f"{where}{', '.join(ours)} {verb} {', '.join(theirs)} by {100 * difference.mean:.1f} points"
    if difference.mean < NO_SPREAD:
        said = f"{where}{', '.join(ours)} is level with {', '.join(theirs)}"
        sure = True  # that there is nothing between them
    if difference.interval is None or difference.p_holm is None:
        return f"{said}: {difference.why}"
    low, high = (f"{100 * end:.1f}".replace("-", "−") for end in difference.interval)
    n = " and ".join(map(str, dict.fromkeys(difference.n)))
    counted = f"Holm's correction for {tests} test{'s' * (tests > 1)}"
    return (
        f"{said}{'' if sure else ', which may be luck'}, {100 * LEVEL:.0f} % interval {low} to {high}, n = {n} "
        f"({difference.test}, p = {difference.p_holm:.2g} after {counted})"
    )


def _settings(run: Entry, keys: list[str]) -> dict[str, Any]:
    return {key: None if (value := run.setting(key)) is ABSENT else value for key in keys}


def _implied(key: str, runs: list[Entry], components: set[str]) -> bool:
    """Whether a setting varies only in that some components, among those that vary, have it."""
    parts = key.split(".")
    above = {".".join(parts[:end]) for end in range(1, len(parts))}
    if not above & components:
        return False
    values = [value for run in runs if (value := run.setting(key)) is not ABSENT]
    return all(value == values[0] for value in values)


def _short(names: Iterable[Iterable[str]], separator: str) -> list[str]:
    """Return for each name, given in parts, the shortest end of it that is no other's."""
    split = [tuple(name) for name in names]
    ends = Counter(name[start:] for name in split for start in range(len(name)))
    return [
        separator.join(next((name[start:] for start in reversed(range(len(name))) if ends[name[start:]] == 1), name))
        for name in split
    ]
