"""A comparison as one HTML page that opens anywhere, without a network: table, curves, plots, and whether it is luck.

`templates/report.html` holds the page and, as a macro, the markup of each section; `templates/report.js` sorts, filters and
draws with plotly.js, which is written into the page. To add a section, write a function that takes the comparison and
returns a Section (or None where it has nothing to say), and name it in SECTIONS. Whatever is put into HTML by hand must be
escaped: a run may come from a stranger. `figure` makes a plot of what plotly calls data and layout.

A page depends on nothing but its runs: it holds no date, and no time but how long each run took.
"""

import base64
import hashlib
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cifar.atomic import replacing
from cifar.comparison import NAMES, TEST, VAL, Comparison, Entry, percent, text, to_json
from cifar.run import Run

TEMPLATES = Path(__file__).parent / "templates"
POINTS = 40_000  # of one metric's curves together; of longer ones, some evenly spaced
NOISE = ("images_per_second",)  # metrics of the machine, not of what was trained
MEANS = 30  # groups in the plot of means


@dataclass(frozen=True)
class Section:
    """One part of the page; `html` is escaped already."""

    title: str
    html: Markup


def write_report(comparison: Comparison, path: Path) -> Path:
    """Write the page to `path`, whole or not at all, and return `path`; OSError where that can't be."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder to write it to")
    page = render(comparison)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render(comparison: Comparison) -> str:
    """Return the page as HTML."""
    import plotly

    folders = [os.fspath(run.dir) for run in comparison.runs]
    sections = [section for make in SECTIONS if (section := make(comparison))]
    # Scripts are few and known: the browser is to run these and nothing that came in with a run.
    library = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    scripts = [library.replace("</script", "<\\/script"), (TEMPLATES / "report.js").read_text(encoding="utf-8")]
    return (
        _environment()
        .get_template("report.html")
        .render(
            heading=os.path.commonpath(folders) if len({*map(os.path.isabs, folders)}) == 1 else "",
            title=comparison.title,
            sections=sections,
            data={"comparison": _document(comparison), "page": _page(comparison)},
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            scripts=[Markup(script) for script in scripts],
            hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
        )
    )


def figure(data: list[dict[str, Any]], layout: dict[str, Any], height: int = 400, label: int = 0) -> Markup:
    """Return a plot, given as plotly.js takes it (plotly.com/javascript/reference); the page adds its colours and fonts.

    `label` is the length in characters of the longest label beside it: a plot too wide for a phone scrolls sideways.
    """
    return _macro("figure")({"data": data, "layout": layout}, height, 12 + 0.4 * label)


def best(comparison: Comparison) -> Section | None:
    """The best run, and the command that trains it again."""
    run = comparison.runs[0]
    if run.score is None:
        return None
    try:
        command = shlex.join(["python", "-m", "cifar.train", *Run(run.dir).replayed()])
    except (ValueError, OSError):  # its record of overrides is gone or damaged
        command = None
    metric, value = run.score
    settings = [(name, text(run.setting(key))) for key, name in comparison.columns.items()]
    return Section("Best run", _macro("best")(run, NAMES[metric], percent(value), settings, command))


def runs(comparison: Comparison) -> Section:
    """Every run in one table to sort and filter, and what is to be said of those that did not finish."""
    table = [
        _Column("rank", "rank", [_number(rank) for rank in comparison.ranks], numeric=True),
        _Column("job", "job", [_number(run.name) for run in comparison.runs]),
        *(
            _Column(name, name, [_number(text(run.setting(key))) for run in comparison.runs], title=key)
            for key, name in comparison.columns.items()
        ),
        _accuracy("best val acc", "val", [(run.best_val, run.best and run.best["epoch"]) for run in comparison.runs]),
        _accuracy("last val acc", "last", [(run.metrics.get(VAL), run.epochs) for run in comparison.runs]),
        _accuracy("test acc", "test", [(run.metrics.get(TEST), None) for run in comparison.runs]),
        _Column(
            "train loss", "loss", [_rounded(run.metrics.get("train/loss"), 4) for run in comparison.runs], numeric=True
        ),
        _Column("seconds", "seconds", [_rounded(run.seconds, 1) for run in comparison.runs], numeric=True),
        _Column("status", "status", [_number(run.status) for run in comparison.runs]),
        _Column("commit", "commit", [(run.commit or "", run.commit or "") for run in comparison.runs]),
    ]
    shown = [column for column in table if any(cell for cell, _ in column.cells)]
    return Section("Runs", _macro("runs")(shown, [run.status for run in comparison.runs], comparison.notes))


def luck(comparison: Comparison) -> Section | None:
    """Means over seeds with their intervals, and the best group held against the others."""
    groups = comparison.groups
    if not groups:
        return None
    columns = comparison.group_columns
    labels = [
        ", ".join(f"{name} {value}" for key, name in columns.items() if (value := text(group.setting(key))))
        or "all runs"
        for group in groups
    ]
    plot = Markup("")
    if any(group.interval for group in groups):
        top = slice(0, MEANS)
        half = [100 * (group.mean - group.interval[0]) if group.interval else 0 for group in groups[top]]
        means = {
            "type": "scatter",
            "mode": "markers",
            "x": [100 * group.mean for group in groups[top]],
            "y": [plain(label) for label in labels[top]],
            "error_x": {"type": "data", "array": half},
        }
        layout = {
            "xaxis": {"title": {"text": "mean and its 95 % interval, %" + f" (best {MEANS})" * (len(groups) > MEANS)}},
            "yaxis": {"autorange": "reversed", "type": "category", "automargin": True},
        }
        plot = figure([means], layout, height=90 + 28 * len(groups[top]), label=max(map(len, labels[top])))
    p_values = [None, *(versus.difference.p_holm for versus in comparison.versus)]
    rows = [
        (
            [text(group.setting(key)) for key in columns],
            f"{100 * group.mean:.2f}" + ("" if group.std is None else f" ± {100 * group.std:.2f}") + "%",
            group.interval and f"{100 * group.interval[0]:.2f} to {100 * group.interval[1]:.2f}%",
            group,
            f"{p_values[position]:.2g}" if position < len(p_values) and p_values[position] is not None else "",
        )
        for position, group in enumerate(groups)
    ]
    alone = all(len(group.runs) == 1 for group in groups)
    return Section("Is it luck?", _macro("luck")([*columns.values()], rows, comparison, alone, plot))


def curves(comparison: Comparison) -> Section | None:
    """What was logged along the way, overlaid."""
    return Section("Learning curves", _macro("curves")()) if any(run.epochs for run in comparison.runs) else None


def parallel(comparison: Comparison) -> Section | None:
    """One line a run through its settings and result."""
    return Section("Settings and result", _macro("parallel")()) if _settings_and_results(comparison) else None


def plane(comparison: Comparison) -> Section | None:
    """Any two settings against each other."""
    return Section("Two settings", _macro("plane")()) if _settings_and_results(comparison) else None


def search(comparison: Comparison) -> Section | None:
    """How a search's values went, and which settings they hang on; one plot of each for every search."""
    html = Markup("")
    for found in comparison.searches:
        done = [trial for trial in found["trials"] if trial["value"] is not None]
        if not done:
            continue
        number = [trial["number"] for trial in done]
        value = {
            "type": "scatter",
            "mode": "markers",
            "name": "trial",
            "x": number,
            "y": [100 * trial["value"] for trial in done],
            "text": [plain(", ".join(f"{name} {item}" for name, item in trial["params"].items())) for trial in done],
        }
        best_so_far = {
            "type": "scatter",
            "mode": "lines",
            "line": {"shape": "hv"},
            "name": "best so far",
            "x": number,
            "y": [100 * trial["best"] for trial in done],
        }
        axes = {
            "xaxis": {"title": {"text": "trial"}},
            "yaxis": {"title": {"text": "best val acc, %"}, "automargin": True},
        }
        html += figure([value, best_so_far], axes)
        if shares := found["importances"]:
            bars = {"type": "bar", "orientation": "h", "x": [*shares.values()], "y": [plain(name) for name in shares]}
            axes = {
                "xaxis": {"title": {"text": "importance: a random forest's<br>share of the variance"}},
                "yaxis": {"autorange": "reversed", "type": "category", "automargin": True},
            }
            html += figure([bars], axes, height=120 + 30 * len(shares), label=max(map(len, shares)))
    return Section("Search", html) if html else None


SECTIONS: tuple[Callable[[Comparison], Section | None], ...] = (best, runs, luck, search, curves, parallel, plane)


def plain(label: str) -> str:
    """Return text that plotly shows as it is: it takes some tags for formatting."""
    return label.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True)
class _Column:
    """A column: its header, its name in a filter, and (what is shown, what it sorts and filters by) for each run."""

    header: str
    name: str
    cells: list[tuple[str, str]]
    numeric: bool = False
    title: str = ""


def _accuracy(header: str, name: str, values: list[tuple[Any, Any]]) -> _Column:
    cells = [
        (
            percent(value) + ("" if value is None or epoch is None else f" ({epoch})"),
            "" if value is None else f"{100 * value:.6g}",
        )
        for value, epoch in values
    ]
    return _Column(header, name, cells, numeric=True)


def _rounded(value: float | None, digits: int) -> tuple[str, str]:
    return ("", "") if value is None else (f"{value:.{digits}f}", f"{value:.8g}")


def _number(value: Any) -> tuple[str, str]:
    return ("", "") if value is None else (str(value), str(value))


def _settings_and_results(comparison: Comparison) -> bool:
    return bool(comparison.columns) and sum(run.score is not None for run in comparison.runs) > 1


def _document(comparison: Comparison) -> Any:
    """Return what `--json` prints, but for the metrics of the machine."""
    document = to_json(comparison)
    for run in document["runs"]:
        run["metrics"] = {key: value for key, value in run["metrics"].items() if key not in NOISE}
    return _finite(document)


def _page(comparison: Comparison) -> Any:
    """Return what else the plots need: names, each run's group, and the curves."""
    positions = {id(run): position for position, group in enumerate(comparison.groups) for run in group.runs}
    points = min(max(POINTS // len(comparison.runs), 50), 400)
    logged = [_curves(run, points) for run in comparison.runs]
    return _finite(
        {
            "columns": comparison.columns,
            "group_columns": [*comparison.group_columns],
            "result": NAMES.get(comparison.ranked_by or "", ""),
            "names": [run.name for run in comparison.runs],
            "results": [run.score and 100 * run.score[1] for run in comparison.runs],
            "groups": [positions.get(id(run), -1) for run in comparison.runs],
            "steps_per_epoch": [per_epoch for per_epoch, _ in logged],
            "curves": [found for _, found in logged],
        }
    )


def _curves(run: Entry, limit: int) -> tuple[float, dict[str, list[list[float]]]]:
    """Return the steps of an epoch, and {metric: [steps, values]} of what was logged, at most `limit` points of each."""
    try:
        rows = [row for row in Run(run.dir).rows() if isinstance(row.get("step"), int)]
    except ValueError:
        return 1.0, {}  # damaged; the table says so
    per_epoch = max((row["step"] / row["epoch"] for row in rows if row.get("epoch")), default=1.0)
    metrics = dict.fromkeys(key for row in rows for key in row if not key.startswith("test/"))
    found = {}
    for metric in metrics:
        if metric in ("epoch", "step", "seconds", *NOISE):
            continue
        points = [(row["step"], value) for row in rows if isinstance(value := row.get(metric), int | float)]
        kept = [
            points[i] for i in np.unique(np.linspace(0, len(points) - 1, min(len(points), limit)).round().astype(int))
        ]
        if kept:
            found[metric] = [[step for step, _ in kept], [float(f"{value:.5g}") for _, value in kept]]
    return per_epoch, found


def _finite(value: Any) -> Any:
    """Return plain JSON: no infinity or NaN, nothing of another type."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    return environment


def _macro(name: str) -> Callable[..., Markup]:
    return getattr(_environment().get_template("sections.html").module, name)
