"""`python -m cifar.dashboard --project P`: a saved W&B workspace with the views in which a sweep is read.

`--json` prints its specification instead, with no key and no connection. Needs `pip install 'cifar[dashboard]'`.
"""

import argparse
import json
import os
import sys
from typing import Any

from cifar.errors import reported

# As `cifar.logger` records them: the configuration as W&B's config, of each metric the best and the last value as summary.
SETTINGS = ("optimizer.lr", "optimizer.momentum", "data.batch_size")
LOGGED = ("optimizer.lr", "data.batch_size")  # drawn on a logarithmic axis
BEST, LAST_LOSS = "val/accuracy.max", "val/loss.last"
CURVES = ("val/accuracy", "val/loss", "train/loss")


def specification(project: str, entity: str = "", group: str | None = None) -> Any:
    """Return the workspace, a `wandb_workspaces.workspaces.Workspace`, not yet saved; opens no connection.

    `group`, a sweep's name, leaves all other runs out.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError:
        raise RuntimeError("a dashboard needs wandb-workspaces: pip install 'cifar[dashboard]'") from None

    names = {key: key.rpartition(".")[2] for key in SETTINGS}
    best = wr.SummaryMetric(BEST)
    columns: list[Any] = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(key), display_name=names[key], log=True if key in LOGGED else None)
        for key in SETTINGS
    ]
    columns.append(wr.ParallelCoordinatesPlotColumn(best, display_name="best val accuracy"))
    by_run: list[Any] = [wr.LinePlot(title=metric, x="step", y=[metric], max_runs_to_show=100) for metric in CURVES]
    by_setting: list[Any] = [
        wr.LinePlot(
            title=f"val/accuracy by {names[key]}",
            x="step",
            y=["val/accuracy"],
            groupby=wr.Config(key),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            aggregate=True,
        )
        for key in SETTINGS
    ]
    scatter: list[Any] = [
        wr.ScatterPlot(
            title=f"best val accuracy against {names[key]}",
            x=wr.Config(key),
            y=best,
            log_x=True if key in LOGGED else None,
        )
        for key in SETTINGS
    ]
    sections = [
        ws.Section("Settings and accuracy", [wr.ParallelCoordinatesPlot(columns, title="Sweep")], is_open=True),
        ws.Section("What matters", [wr.ParameterImportancePlot(with_respect_to=BEST)], is_open=True),
        ws.Section("Curves by run", by_run, is_open=True),
        ws.Section("Curves by setting", by_setting, is_open=True),
        ws.Section("Scatter", scatter, is_open=True),
        ws.Section("Runs side by side", [wr.RunComparer(diff_only="split")], is_open=True),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"cifar sweep {group}" if group else "cifar sweeps",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == group) if group else "",
            order=[expr.Ordering(expr.Summary(BEST), ascending=False)],
            pinned_columns=[f"summary:{BEST}", f"summary:{LAST_LOSS}"],
        ),
    )


def save(project: str, entity: str | None, group: str | None) -> str:
    """Save the workspace to W&B and return its address; RuntimeError, in a line, without a key or a connection."""
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or not wandb.login(prompt=False, verify=False):
        raise RuntimeError("saving a dashboard needs W&B online with a key (`wandb login`); --json prints it without")
    workspace = specification(project, entity or wandb.Api().default_entity or "", group)
    try:
        workspace.save()
    except Exception as error:  # whatever its client raises for a refused key or a lost connection
        raise RuntimeError(f"W&B did not take the dashboard: {' '.join(str(error).split())}") from error
    return workspace.url


def cli() -> None:
    """Build the dashboard from the command line."""
    parser = argparse.ArgumentParser("cifar-dashboard", description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--project", required=True, help="the W&B project, as logger.project")
    parser.add_argument("--entity", help="its user or team; default: yours")
    parser.add_argument("--group", help="a sweep's name: show its runs alone")
    parser.add_argument("--json", action="store_true", help="print the specification; needs no key")
    arguments = parser.parse_args()
    with reported():
        if arguments.json:
            workspace = specification(arguments.project, arguments.entity or "", arguments.group)
            print(json.dumps(workspace._to_model().model_dump(mode="json", by_alias=True), indent=2))
        else:
            print(save(arguments.project, arguments.entity, arguments.group))
        sys.stdout.flush()


if __name__ == "__main__":
    cli()
