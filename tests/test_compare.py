import csv
import io
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml
from rich.console import Console

from cifar import compare as module
from cifar.compare import cli, compare, print_csv, print_table, to_json


def settings(**changes: Any) -> dict[str, Any]:
    """A configuration as Hydra records it; `optimizer__lr=0.1` changes one key, a dictionary replaces a group."""
    config: dict[str, Any] = {
        "seed": 0,
        "resume": None,
        "model": {"_target_": "cifar.models.net.Net"},
        "optimizer": {"_target_": "cifar.optimizer.sgd", "lr": 0.01, "momentum": 0.9},
        "data": {"_target_": "cifar.data.archive.CIFAR10", "root": '${oc.env:CIFAR_ROOT,"~/.cache"}', "batch_size": 64},
        "logger": {"_target_": "cifar.logger.wandb", "group": None, "tags": None},
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            config[group][name] = value
        else:
            config[group] = value
    return config


def make(
    folder: Path,
    config: dict[str, Any],
    *,
    val: float | None = None,
    test: float | None = None,
    seconds: float = 12.5,
    rows: tuple[dict[str, Any], ...] = (),
    **changes: Any,
) -> Path:
    """Write a finished run's folder: `val` is its best validation accuracy, of epoch 4; its last is 0.01 lower."""
    last = {"train/loss": 1.5} | ({} if val is None else {"val/accuracy": val - 0.01})
    result = {
        "status": "finished",
        "error": None,
        "overrides": [],
        "config_hash": "0" * 16,
        "seed": config["seed"],
        "metrics": last | ({} if test is None else {"test/accuracy": test}),
        "best": None if val is None else {"metric": "val/accuracy", "value": val, "epoch": 4},
        "epochs": 5,
        "steps": 100,
        "seconds": {"total": seconds, "train": 10.0, "eval": 1.0},
        "images_per_second": 1000.0,
        "environment": {},
        "wandb": None,
    } | changes
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def table(*paths: Path) -> list[list[str]]:
    """The printed lines, each split where columns are."""
    file = io.StringIO()
    print_table(compare(paths), file)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in file.getvalue().splitlines()]


def order(*paths: Path) -> list[str]:
    return [run.dir.name for run in compare(paths).runs]


def test_json(tmp_path: Path) -> None:
    make(tmp_path / "0", settings(optimizer__lr=0.1, data__batch_size=128), val=0.5, test=0.48)
    make(tmp_path / "1", settings(resume="auto", logger={"group": "b"}), val=0.75, test=0.7, seconds=20.25)
    assert to_json(compare([tmp_path])) == {
        "ranked_by": "val/accuracy",
        "runs": [
            {
                "dir": str(tmp_path / "1"),
                "status": "finished",
                "settings": {"optimizer.lr": 0.01, "data.batch_size": 64},
                "metrics": {"train/loss": 1.5, "val/accuracy": 0.74, "test/accuracy": 0.7},
                "best": {"metric": "val/accuracy", "value": 0.75, "epoch": 4},
                "seconds": 20.25,
                "seed": 0,
            },
            {
                "dir": str(tmp_path / "0"),
                "status": "finished",
                "settings": {"optimizer.lr": 0.1, "data.batch_size": 128},
                "metrics": {"train/loss": 1.5, "val/accuracy": 0.49, "test/accuracy": 0.48},
                "best": {"metric": "val/accuracy", "value": 0.5, "epoch": 4},
                "seconds": 12.5,
                "seed": 0,
            },
        ],
        "groups": [
            {
                "settings": {"optimizer.lr": 0.01, "data.batch_size": 64},
                "n": 1,
                "dirs": [str(tmp_path / "1")],
                "seeds": [0],
                "metric": "val/accuracy",
                "mean": 0.75,
                "std": None,
                "interval": None,
                "lost": 0,
            },
            {
                "settings": {"optimizer.lr": 0.1, "data.batch_size": 128},
                "n": 1,
                "dirs": [str(tmp_path / "0")],
                "seeds": [0],
                "metric": "val/accuracy",
                "mean": 0.5,
                "std": None,
                "interval": None,
                "lost": 0,
            },
        ],
        "search": [],
        "differences": [],
        "tests": 0,
    }


def test_json_on_stdout_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make(tmp_path / name, settings(), test=0.5, config_hash=name) for name in ("a", "b")]
    monkeypatch.setattr(sys, "argv", ["cifar-compare", *map(str, runs), "--json"])
    cli()
    captured = capsys.readouterr()
    assert json.loads(captured.out) == to_json(compare(runs))
    assert captured.err == ""


def test_components_and_absent_keys(tmp_path: Path) -> None:
    adam = {"_target_": "cifar.optimizer.adam", "lr": 0.01, "betas": [0.9, 0.999]}
    mlp = {"_target_": "cifar.models.mlp.MLP", "widths": [64, 64]}
    make(tmp_path / "0", settings(), val=0.3)
    make(tmp_path / "1", settings(model=mlp), val=0.2)
    make(tmp_path / "2", settings(model=mlp, optimizer=adam), val=0.1)
    assert [run["settings"] for run in to_json(compare([tmp_path]))["runs"]] == [
        {"model": "Net", "optimizer": "sgd", "optimizer.momentum": 0.9, "model.widths": None, "optimizer.betas": None},
        {
            "model": "MLP",
            "optimizer": "sgd",
            "optimizer.momentum": 0.9,
            "model.widths": [64, 64],
            "optimizer.betas": None,
        },
        {
            "model": "MLP",
            "optimizer": "adam",
            "optimizer.momentum": None,
            "model.widths": [64, 64],
            "optimizer.betas": [0.9, 0.999],
        },
    ]
    # What a component brings with it says nothing that its name doesn't ...
    assert table(tmp_path)[1][:5] == ["rank", "job", "model", "optimizer", "best val acc (epoch)"]
    # ... until it varies within the component.
    make(tmp_path / "3", settings(model=mlp | {"widths": [8]}), val=0.05)
    lines = table(tmp_path)
    assert lines[1][:6] == ["rank", "job", "model", "optimizer", "widths", "best val acc (epoch)"]
    assert lines[3][:5] == ["1", "0", "Net", "sgd", "30.00% (4)"]
    assert lines[6][:6] == ["4", "3", "MLP", "sgd", "[8]", "5.00% (4)"]


def test_same_class_name_in_two_modules_stays_apart(tmp_path: Path) -> None:
    make(tmp_path / "0", settings(), val=0.3)
    make(tmp_path / "1", settings(model={"_target_": "mine.Net"}), val=0.2)
    runs = to_json(compare([tmp_path]))["runs"]
    assert [run["settings"] for run in runs] == [{"model": "cifar.models.net.Net"}, {"model": "mine.Net"}]


def test_equal_numbers_do_not_vary_and_infinity_is_json(tmp_path: Path) -> None:
    make(tmp_path / "0", settings(optimizer__momentum=0, optimizer__lr=float("inf")), val=0.3)
    make(tmp_path / "1", settings(optimizer__momentum=0.0), val=0.2)
    document = to_json(compare([tmp_path]))
    assert [run["settings"] for run in document["runs"]] == [{"optimizer.lr": "inf"}, {"optimizer.lr": 0.01}]
    json.dumps(document, allow_nan=False)


def test_ranks_by_best_validation_whatever_the_test_accuracy(tmp_path: Path) -> None:
    for job, (val, test) in enumerate([(0.5, 0.9), (0.6, 0.1), (0.5, 0.95), (0.7, 0.2)]):
        make(tmp_path / str(job), settings(optimizer__lr=job / 10), val=val, test=test)
    assert order(tmp_path) == ["3", "1", "0", "2"]  # 0 and 2 are equal: in their order
    assert table(tmp_path)[0] == ["4 runs, ranked by best validation accuracy"]


def test_says_that_it_ranks_by_test_accuracy(tmp_path: Path) -> None:
    for job, test in enumerate([0.5, 0.25, 0.625]):
        make(tmp_path / str(job), settings(optimizer__lr=job / 10), test=test)
    comparison = compare([tmp_path])
    assert order(tmp_path) == ["2", "0", "1"]
    assert comparison.ranked_by == "test/accuracy"
    assert [(group.metric, group.mean) for group in comparison.groups] == [
        ("test/accuracy", 0.625),
        ("test/accuracy", 0.5),
        ("test/accuracy", 0.25),
    ]
    lines = table(tmp_path)
    assert lines[0] == ["3 runs, ranked by test accuracy: no finished run has a validation split"]
    assert lines[1] == ["rank", "job", "lr", "test acc", "seconds", "status"]
    assert lines[3] == ["1", "2", "0.2", "62.50%", "12.5", "finished"]


def test_runs_without_validation_follow_those_with_it(tmp_path: Path) -> None:
    make(tmp_path / "-", settings(data__batch_size=0), status="failed", error="E", metrics={})
    make(tmp_path / "0", settings(data__batch_size=1), test=0.9)
    make(tmp_path / "1", settings(data__batch_size=2), val=0.2, test=0.2)
    make(tmp_path / "2", settings(data__batch_size=3), test=0.95)
    make(tmp_path / "3", settings(data__batch_size=4))
    comparison = compare([tmp_path])
    assert order(tmp_path) == ["1", "2", "0", "3", "-"]
    assert comparison.ranked_by == "val/accuracy"
    assert [(group.metric, group.mean) for group in comparison.groups] == [
        ("val/accuracy", 0.2),
        ("test/accuracy", 0.95),
        ("test/accuracy", 0.9),
    ]
    lines = table(tmp_path)
    expected = "5 runs, ranked by best validation accuracy; 2 without a validation split after those, by test accuracy"
    assert lines[0] == [expected]
    assert [line[0] for line in lines[3:]] == ["1", "2", "3", "-", "-", "- failed: E"]


def test_failed_and_unfinished_runs_come_last(tmp_path: Path) -> None:
    trace = "Traceback (most recent call last):\n  File x\nRuntimeError: loss is nan at step 7\n"
    row = {"epoch": 1, "step": 10, "seconds": 2.0, "train/loss": 2.0, "val/accuracy": 0.9}
    rows = (row, row | {"epoch": 2, "step": 20, "seconds": 4.5, "val/accuracy": 0.8}, {"seconds": 5.25, "lr": 0.1})
    make(tmp_path / "0", settings(optimizer__lr=0.1), status="failed", error=trace, metrics={})
    make(tmp_path / "1", settings(optimizer__lr=0.2), status="failed", error=trace, metrics={})
    make(tmp_path / "2", settings(optimizer__lr=0.3), status="running", metrics={}, seconds=0.0, rows=rows)
    with (tmp_path / "2" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "val/acc')  # what a kill leaves
    (make(tmp_path / "3", settings(optimizer__lr=0.4)) / "result.json").unlink()
    make(tmp_path / "4", settings(optimizer__lr=0.5), val=0.25, test=0.125)
    document = to_json(compare([tmp_path]))
    assert [(Path(run["dir"]).name, run["status"]) for run in document["runs"]] == [
        ("4", "finished"),
        ("0", "failed"),
        ("1", "failed"),
        ("2", "running"),
        ("3", "unfinished"),
    ]
    # All that is known of a run that did not finish is what it logged.
    assert document["runs"][3] == {
        "dir": str(tmp_path / "2"),
        "status": "running",
        "settings": {"optimizer.lr": 0.3},
        "metrics": {"train/loss": 2.0, "val/accuracy": 0.8, "lr": 0.1},
        "best": {"metric": "val/accuracy", "value": 0.9, "epoch": 1},
        "seconds": 5.25,
        "seed": 0,
    }
    assert [document["runs"][4][key] for key in ("metrics", "best", "seconds", "seed")] == [{}, None, None, 0]
    assert [group["dirs"] for group in document["groups"]] == [[str(tmp_path / "4")]]
    assert table(tmp_path)[3:] == [
        ["1", "4", "0.5", "25.00% (4)", "24.00%", "12.50%", "12.5", "finished"],
        ["-", "0", "0.1", "12.5", "failed"],
        ["-", "1", "0.2", "12.5", "failed"],
        ["-", "2", "0.3", "90.00% (1)", "80.00%", "5.2", "running"],
        ["-", "3", "0.4", "unfinished"],
        ["0, 1 failed: RuntimeError: loss is nan at step 7"],
        ["2, 3 unfinished: still at work, or killed"],
    ]


def test_nothing_finished(tmp_path: Path) -> None:
    make(tmp_path / "0", settings(), status="failed", error="stopped by SIGINT at step 3", metrics={})
    comparison = compare([tmp_path])
    assert (comparison.ranked_by, comparison.groups) == (None, [])
    assert table(tmp_path) == [
        ["1 run, none finished with an accuracy to rank by"],
        ["rank", "job", "seconds", "status"],
        ["─" * 26],
        ["-", "0", "12.5", "failed"],
        ["0 failed: stopped by SIGINT at step 3"],
    ]


def test_groups_over_seeds(tmp_path: Path) -> None:
    vals = {0.1: [0.5, 0.6, 0.55], 0.01: [0.7, 0.4, 0.9]}
    tests = {0.1: [0.45, 0.5, 0.52], 0.01: [0.6, 0.3, 0.8]}
    job = 0
    for lr in vals:
        for seed in range(3):
            config = settings(seed=seed, optimizer__lr=lr)
            make(tmp_path / str(job), config, val=vals[lr][seed], test=tests[lr][seed])
            job += 1
    make(tmp_path / "6", settings(seed=3, optimizer__lr=0.01), status="failed", error="E", metrics={})
    make(tmp_path / "7", settings(seed=0, optimizer__lr=1.0), val=0.1, test=0.1)

    def interval(values: list[float]) -> tuple[float, float]:
        half = 4.302652729749464 * statistics.stdev(values) / 3**0.5  # Student's t, two degrees of freedom, 97.5 %
        return statistics.mean(values) - half, statistics.mean(values) + half

    groups = to_json(compare([tmp_path]))["groups"]
    assert groups == [
        {
            "settings": {"optimizer.lr": lr},
            "n": 3,
            "dirs": [str(tmp_path / str(job)) for job in jobs],
            "seeds": [0, 1, 2],
            "metric": "val/accuracy",
            "mean": pytest.approx(statistics.mean(vals[lr]), abs=1e-15),
            "std": pytest.approx(statistics.stdev(vals[lr]), abs=1e-15),
            "interval": pytest.approx([*interval(vals[lr])], abs=1e-12),
            "lost": lost,
        }
        for lr, jobs, lost in ((0.01, (3, 4, 5), 1), (0.1, (0, 1, 2), 0))
    ] + [
        {
            "settings": {"optimizer.lr": 1.0},
            "n": 1,
            "dirs": [str(tmp_path / "7")],
            "seeds": [0],
            "metric": "val/accuracy",
            "mean": 0.1,
            "std": None,
            "interval": None,
            "lost": 0,
        }
    ]

    def spread(values: list[float]) -> str:
        return f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}%"

    lines = table(tmp_path)
    assert lines[1][:4] == ["rank", "job", "seed", "lr"]
    assert lines[3][:4] == ["1", "5", "2", "0.01"]
    low, high = (f"{100 * end:.2f}" for end in interval(vals[0.01]))
    low_2, high_2 = (f"{100 * end:.2f}" for end in interval(vals[0.1]))
    assert lines[-8:] == [
        ["Mean ± standard deviation over seeds"],
        ["lr", "best val acc", "95 % interval", "test acc", "n", "lost", "p"],
        lines[-6],
        ["0.01", spread(vals[0.01]), f"{low} to {high}%", spread(tests[0.01]), "3", "1"],
        ["0.1", spread(vals[0.1]), f"{low_2} to {high_2}%", spread(tests[0.1]), "3", "0.55"],
        ["1.0", "10.00%", "10.00%", "1"],
        # By seed: 0.2, -0.2, 0.35. Mean 0.11667, standard deviation 0.28431; t = 0.71076 with 2 degrees of freedom.
        [
            "lr 0.01 is ahead of 0.1 by 11.7 points, which may be luck, 95 % interval −59.0 to 82.3, n = 3 "
            "(paired t-test, p = 0.55 after Holm's correction for 1 test)"
        ],
        ["lr 0.01 is ahead of 1.0 by 56.7 points: n = 1 is too few for an interval"],
    ]


def test_a_difference_beyond_luck_is_told_and_others_are_not(tmp_path: Path) -> None:
    # 0.03 is 0.8 points above 0.01 on average, by seed; 0.1 lacks a seed, so it is not paired.
    vals = {0.01: [0.70, 0.72, 0.71, 0.69, 0.73], 0.03: [0.709, 0.728, 0.717, 0.698, 0.738], 0.1: [0.5, 0.6, 0.55, 0.4]}
    for lr, values in vals.items():
        for seed, val in reversed([*enumerate(values)]):  # in whatever order they were run
            make(tmp_path / f"{lr}-{seed}", settings(seed=seed, optimizer__lr=lr), val=val)
    document = to_json(compare([tmp_path]))
    paired = scipy.stats.ttest_rel(vals[0.03], vals[0.01])
    welch = [scipy.stats.ttest_ind(vals[lr], vals[0.1], equal_var=False) for lr in (0.03, 0.01)]
    assert paired.pvalue < welch[0].pvalue < welch[1].pvalue
    assert document["tests"] == 3
    assert document["differences"] == [
        {
            "from": {"optimizer.lr": lr},
            "difference": pytest.approx(statistics.mean(vals[0.03]) - statistics.mean(vals[lr])),
            "interval": pytest.approx([*result.confidence_interval(0.95)]),
            "n": [5, len(vals[lr])],
            "test": test,
            "p": pytest.approx(result.pvalue),
            "p_holm": pytest.approx(p_holm),
            "sentence": sentence,
        }
        for lr, test, result, p_holm, sentence in [
            (
                0.01,
                "paired t-test",
                paired,
                3 * paired.pvalue,
                "lr 0.03 beats 0.01 by 0.8 points, 95 % interval 0.7 to 0.9, n = 5 "
                "(paired t-test, p = 4.3e-05 after Holm's correction for 3 tests)",
            ),
            (
                0.1,
                "Welch's t-test",
                welch[0],
                2 * welch[0].pvalue,
                "lr 0.03 beats 0.1 by 20.5 points, 95 % interval 7.2 to 33.9, n = 5 and 4 "
                "(Welch's t-test, p = 0.031 after Holm's correction for 3 tests)",
            ),
        ]
    ]


def test_csv_reads_back(tmp_path: Path) -> None:
    third = 1 / 3
    make(tmp_path / "0", settings(data__batch_size=128, optimizer__lr=1e-05), val=third, test=0.3, seconds=3.14159)
    make(tmp_path / "1", settings(data__root="a,b [red]"), val=0.6, test=None)
    make(tmp_path / "2", settings(seed=None), status="failed", error='one\nE: "x", y', metrics={}, seed=7)
    file = io.StringIO()
    print_csv(compare([tmp_path]), file)
    root = '${oc.env:CIFAR_ROOT,"~/.cache"}'
    assert list(csv.DictReader(io.StringIO(file.getvalue()))) == [
        {
            "rank": rank,
            "dir": str(tmp_path / job),
            "seed": seed,
            "optimizer.lr": lr,
            "data.root": folder,
            "data.batch_size": batch_size,
            "best/val/accuracy": best,
            "best/epoch": epoch,
            "val/accuracy": val,
            "test/accuracy": test,
            "seconds": seconds,
            "status": status,
            "error": error,
        }
        for rank, job, seed, lr, folder, batch_size, best, epoch, val, test, seconds, status, error in [
            ("1", "1", "0", "0.01", "a,b [red]", "64", "0.6", "4", "0.59", "", "12.5", "finished", ""),
            ("2", "0", "0", "1e-05", root, "128", str(third), "4", str(third - 0.01), "0.3", "3.14159", "finished", ""),
            ("", "2", "null", "0.01", root, "64", "", "", "", "", "12.5", "failed", 'E: "x", y'),
        ]
    ]


def test_short_names_stay_unambiguous(tmp_path: Path) -> None:
    schedule = {"_target_": "cifar.schedule.step", "momentum": 1}
    make(tmp_path / "a" / "0", settings(schedule=schedule), val=0.3)
    make(tmp_path / "b" / "0", settings(schedule=schedule | {"momentum": 2}, optimizer__momentum=0.8), val=0.2)
    make(tmp_path / "b" / "1", settings(schedule=schedule, optimizer__lr=0.5), val=0.1)
    lines = table(tmp_path / "a", tmp_path / "b")
    assert lines[1][:5] == ["rank", "job", "lr", "optimizer.momentum", "schedule.momentum"]
    assert [line[1] for line in lines[3:]] == ["a/0", "b/0", "1"]


def test_a_setting_with_the_name_of_a_column_and_markup_for_a_value(tmp_path: Path) -> None:
    for job in range(2):
        make(tmp_path / str(job), settings(model={"_target_": "m.N", "seconds": f"[red]:dog:{job}"}), val=0.5)
    lines = table(tmp_path)
    assert lines[1] == ["rank", "job", "seconds", "best val acc (epoch)", "last val acc", "seconds", "status"]
    assert lines[4] == ["2", "1", "[red]:dog:1", "50.00% (4)", "49.00%", "12.5", "finished"]


def test_unreadable_files_do_not_stop_the_comparison(tmp_path: Path) -> None:
    make(tmp_path / "0", settings(optimizer__lr=0.1), val=0.3)
    (make(tmp_path / "1", settings(optimizer__lr=0.2), val=0.5) / ".hydra" / "config.yaml").unlink()
    (make(tmp_path / "2", settings(optimizer__lr=0.3), val=0.6) / "result.json").write_text('{"status')
    damaged = make(tmp_path / "3", settings(optimizer__lr=0.4), status="running", metrics={})
    (damaged / "metrics.jsonl").write_text('{"epoch": 1}\n\0\0\n')
    runs = to_json(compare([tmp_path]))["runs"]
    assert [(Path(run["dir"]).name, run["status"], run["settings"]["optimizer.lr"]) for run in runs] == [
        ("1", "finished", None),
        ("0", "finished", 0.1),
        ("2", "unreadable", 0.3),
        ("3", "running", 0.4),
    ]
    assert [group.runs[0].dir.name for group in compare([tmp_path]).groups] == ["0"]  # what 1 belongs with is unknown
    notes = [" ".join(line) for line in table(tmp_path)[-3:]]
    assert notes[0].startswith(f"1 finished: settings unknown: {tmp_path / '1'}: not a run's folder")
    assert notes[1].startswith(f"2 unreadable: {tmp_path / '2' / 'result.json'}: not readable as JSON")
    assert notes[2].startswith(f"3 running: metrics unknown: {tmp_path / '3' / 'metrics.jsonl'}: ")


@pytest.mark.parametrize("width", [20, 60, 80])
def test_no_figure_is_cut_on_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    for job in range(12):
        path = "/a/long/path/" + "x" * 70 + str(job)
        config = settings(data__root=path, data__batch_size=job, optimizer__lr=(job + 1) * 1.2345e-07)
        make(tmp_path / str(job), config, val=0.5 + job / 1000, test=0.4 + job / 1000, seconds=98765.4 + job)

    monkeypatch.setattr(module, "Console", partial(Console, width=width, force_terminal=True, color_system=None))
    file = io.StringIO()
    print_table(compare([tmp_path]), file)
    text = file.getvalue()
    assert "…" not in text
    for job in range(12):
        line = next(line for line in text.splitlines() if f"{50 + job / 10:.2f}% (4)" in line).split()
        for figure in (f"{49 + job / 10:.2f}%", f"{40 + job / 10:.2f}%", f"{98765.4 + job:.1f}", "finished"):
            assert figure in line
        assert {str(12 - job), str(job), str((job + 1) * 1.2345e-07)} <= set(line)


def test_the_three_setting_grid_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for job, (lr, momentum, batch_size) in enumerate([(0.1, 0.8, 64), (0.01, 0.9, 128)]):
        config = settings(optimizer__lr=lr, optimizer__momentum=momentum, data__batch_size=batch_size)
        make(tmp_path / str(job), config, val=0.5, test=0.5, seconds=123.4)
    terminal = partial(Console, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(module, "Console", terminal)
    file = io.StringIO()
    print_table(compare([tmp_path]), file)
    lines = file.getvalue().splitlines()
    assert lines[2].split()[:5] == ["rank", "job", "lr", "momentum", "size"]
    assert max(map(len, lines)) <= 80


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "cifar.compare", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


def test_unknown_folder_is_one_line(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "0", settings(), val=0.5)
    done = command(tmp_path / "runs", tmp_path / "nowhere", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such folder; give a run's folder, a sweep's, or several\n"


def test_failed_runs_do_not_fail_the_comparison(tmp_path: Path) -> None:
    make(tmp_path / "0", settings(), status="failed", error="E", metrics={})
    done = command(tmp_path, "--csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"dir,seconds,status,error\n{tmp_path / '0'},12.5,failed,E\n"


def test_does_not_import_torch() -> None:
    code = "import cifar.compare, sys; assert not {'torch', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
