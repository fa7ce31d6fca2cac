"""`python -m cifar.compare PATH...`: one ranked table of runs, with only the settings in which they differ.

Runs rank by the best accuracy on their validation split. Finished runs without one come after those, by test accuracy; if
no run has one, all rank by test accuracy, and the table says so. Failed and unfinished runs come last.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import IO, Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cifar.comparison import TEST, VAL, Comparison, compare, mean_std, percent, text, to_json
from cifar.errors import reported
from cifar.search import describe

ENDLESS = 10_000  # characters in a line
SENTENCES = 3  # said below the table of groups, about those next to the best; --json and the page have all


def print_csv(comparison: Comparison, file: IO[str] | None = None) -> None:
    """Print the runs as comma-separated values: full folders and dotted keys, fractions from 0 to 1."""
    columns: dict[str, list[Any]] = {
        "rank": comparison.ranks,
        "dir": [run.dir for run in comparison.runs],
        **{key: [text(run.setting(key)) for run in comparison.runs] for key in comparison.varying},
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
    """Print the comparison for people: the runs, why some have no rank, and, where seeds vary, whether it is luck.

    `p` there is that of the test against the best group, corrected for the number of tests.
    """
    console = Console(file=file, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = ENDLESS  # a file or a pipe has no width to fit into
    runs, groups, shown = comparison.runs, comparison.groups, comparison.columns
    console.print(comparison.title, style="bold", soft_wrap=True)
    settings = [(shown[key], [text(run.setting(key)) for run in runs]) for key in shown]
    best = [f"{percent(run.best_val)} ({run.best['epoch']})" if run.best else "" for run in runs]
    columns = [
        ("rank", [str(rank or "-") for rank in comparison.ranks]),
        ("job", [run.name for run in runs]),
        *settings,
        ("best val acc (epoch)", best),
        ("last val acc", [percent(run.metrics.get(VAL)) for run in runs]),
        ("test acc", [percent(run.metrics.get(TEST)) for run in runs]),
        ("seconds", ["" if run.seconds is None else f"{run.seconds:.1f}" for run in runs]),
        ("status", [run.status for run in runs]),
    ]
    _print_columns(console, columns, left={"job", *shown.values(), "status"})
    for note, names in comparison.notes.items():
        console.print(f"{', '.join(names)} {note}", soft_wrap=True)

    if "seed" in comparison.varying and any(len(group.runs) > 1 for group in groups):
        console.print("\nMean ± standard deviation over seeds", style="bold", soft_wrap=True)
        settings = [
            (name, [text(group.setting(key)) for group in groups]) for key, name in comparison.group_columns.items()
        ]
        columns = [
            *settings,
            ("best val acc", [_spread([run.best_val for run in group.runs]) for group in groups]),
            ("95 % interval", [_interval(group.interval) for group in groups]),
            ("test acc", [_spread([run.metrics.get(TEST) for run in group.runs]) for group in groups]),
            ("n", [str(len(group.runs)) for group in groups]),
            ("lost", [str(group.lost or "") for group in groups]),
            ("p", ["", *(_p_value(versus.difference.p_holm) for versus in comparison.versus)]),
        ]
        columns[-1][1].extend([""] * (len(groups) - len(columns[-1][1])))  # groups of the other metric are not tested
        _print_columns(console, columns, left=set(shown.values()))
        for versus in comparison.versus[:SENTENCES]:
            console.print(versus.sentence, soft_wrap=True)
    for search in comparison.searches:
        console.print(f"\n{describe(search)}", soft_wrap=True)


def cli() -> None:
    """Compare runs from the command line."""
    parser = argparse.ArgumentParser("cifar-compare", description=__doc__.partition("\n\n")[2] if __doc__ else None)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a run's folder, a sweep's, or one that holds runs")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print JSON")
    formats.add_argument("--csv", action="store_true", help="print comma-separated values")
    formats.add_argument("--html", metavar="FILE", type=Path, help="write a page with plots to open in a browser")
    arguments = parser.parse_args()
    with reported():
        comparison = compare(arguments.paths)
        if arguments.json:
            print(json.dumps(to_json(comparison), indent=2, default=str))
        elif arguments.csv:
            print_csv(comparison)
        elif arguments.html:
            from cifar.report import write_report

            print(write_report(comparison, arguments.html))
        else:
            print_table(comparison)
        sys.stdout.flush()  # so that a reader who has gone is noticed here


def _spread(values: list[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ""
    mean, std = mean_std(present)
    return percent(mean) if std is None else f"{100 * mean:.2f} ± {percent(std)}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.2f} to {percent(interval[1])}"


def _p_value(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


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
