"""The page: its figures against those recomputed from what the runs logged, what it must not do, and Chromium's word."""

import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml

from cifar.compare import cli, compare
from cifar.report import SECTIONS, Section, figure, plain, render, write_report
from tests.conftest import REPOSITORY, read_rows
from tests.test_compare import make, settings

HOSTILE = '</script><script>window.hurt=1</script><img src=x onerror="window.hurt=1">&'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page holds: the JSON it embeds, by id, and each table's rows as text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.data: dict[str, Any] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.tags: list[str] = []
        self.open: dict[str, str | None] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open = dict(attrs) | {"": tag}
        self.tags.append(tag)
        if tag == "table":
            self.tables[str(self.open["id"])] = []
        elif tag == "tr":
            [*self.tables.values()][-1].append([])
        elif tag in ("td", "th"):
            [*self.tables.values()][-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = {}

    def handle_data(self, data: str) -> None:
        if self.open.get("") == "script":
            if "id" in self.open:
                self.data[str(self.open["id"])] = json.loads(data)
            return
        self.text += data
        if self.open.get("") in ("td", "th", "button") and self.tables and [*self.tables.values()][-1]:
            [*self.tables.values()][-1][-1][-1] += data


def sweep(folder: Path, slower: float = 1.0) -> Path:
    """Twenty-four finished runs, of 4 learning rates x 2 momenta x 3 seeds, and a failed one with a hostile error."""
    job = 0
    for lr in (0.003, 0.01, 0.03, 0.1):
        for momentum in (0.8, 0.9):
            for seed in range(3):
                top = 0.7 + lr - 5 * lr**2 + 0.05 * momentum + 0.003 * ((7 * job) % 5)
                rows = tuple(
                    {"epoch": epoch, "step": 20 * epoch, "seconds": slower * epoch}
                    | {
                        "train/loss": 2 / epoch,
                        "val/accuracy": top - 0.05 * abs(epoch - 3),
                        "images_per_second": 9 / slower,
                    }
                    for epoch in range(1, 5)
                )
                run = make(
                    folder / str(job), settings(seed=seed, optimizer__lr=lr, optimizer__momentum=momentum), val=top, test=top - 0.01,
                    rows=(*rows, {"epoch": 4, "step": 80, "seconds": slower * 4, "test/accuracy": top - 0.01}), seconds=slower * 4.5,
                    best={"metric": "val/accuracy", "value": top, "epoch": 3},
                    metrics={"train/loss": 0.5, "val/accuracy": top - 0.05, "test/accuracy": top - 0.01, "images_per_second": 9 / slower},
                    environment={"git_commit": "0123456789abcdef", "git_dirty": False},
                )  # fmt: skip
                overrides = ["model=mlp", f"optimizer.lr={lr}", f"optimizer.momentum={momentum}", f"seed={seed}"]
                overrides += ["logger.group=it's $(here)", "hparams_search=grid", "hydra.callbacks.x=1"]
                (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
                job += 1
    config = settings(seed=0, optimizer__lr=1.0, data__root=HOSTILE)
    make(folder / str(job), config, status="failed", error=f"Traceback\nRuntimeError: {HOSTILE}", metrics={})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("page") / "grid")


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return render(compare([folder]))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def masked(html: str) -> str:
    """The page without how long anything took."""
    html = re.sub(r'<td data-value="[\d.]*" class="number duration">[\d.]*</td>', "", html)
    return re.sub(r'"seconds":[\d.]+', "", html)


def check_figures(page: Page, sweep: Path) -> None:
    """Recompute the best row, the means and the tests of a sweep over lr, momentum and seed from `metrics.jsonl`."""
    top: dict[tuple[float, float], dict[int, float]] = {}
    best: dict[str, tuple[float, int]] = {}
    for run in sweep.iterdir():
        if not (run / "metrics.jsonl").exists():
            continue
        config = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
        rows = [row for row in read_rows(run) if row.get("val/accuracy") is not None]
        if rows:
            value, epoch = max((row["val/accuracy"], -row["epoch"]) for row in rows)
            best[run.name] = (value, -epoch)
            setting = (config["optimizer"]["lr"], config["optimizer"]["momentum"])
            top.setdefault(setting, {})[config["seed"]] = value
    assert len(best) == 24
    document = page.data["comparison"]
    header, first, *_ = page.tables["runs"]
    row = dict(zip(header, first, strict=True))
    value, epoch = best[row["job"]]
    assert value == max(value for value, _ in best.values())
    assert row["best val acc"] == f"{100 * value:.2f}% ({epoch})"
    assert document["runs"][0]["best"] == {"metric": "val/accuracy", "value": value, "epoch": epoch}

    def setting_of(settings: dict[str, Any]) -> tuple[float, float]:
        return settings["optimizer.lr"], settings["optimizer.momentum"]

    means = {setting: statistics.fmean(by_seed.values()) for setting, by_seed in top.items()}
    assert len(document["groups"]) == 8
    shown = page.tables["groups"][1:]
    for group, cells in zip(document["groups"], shown, strict=True):
        setting = setting_of(group["settings"])
        values = [*top[setting].values()]
        assert group["n"] == 3
        assert group["mean"] == pytest.approx(means[setting])
        assert group["std"] == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert cells[2] == f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f}%"
    assert [group["mean"] for group in document["groups"]] == sorted(means.values(), reverse=True)

    first_setting, *others = (setting_of(group["settings"]) for group in document["groups"])
    pairs = [(one, two) for i, one in enumerate([first_setting, *others]) for two in [first_setting, *others][i + 1 :]]
    p_values = {}
    for one, two in pairs:
        gaps = [top[one][seed] - top[two][seed] for seed in range(3)]
        if max(gaps) - min(gaps) > 1e-9:
            p_values[one, two] = scipy.stats.ttest_1samp(gaps, 0)
    assert document["tests"] == len(p_values)
    by_p = sorted(p_values, key=lambda pair: p_values[pair].pvalue)
    for other, difference in zip(others, document["differences"], strict=True):
        assert setting_of(difference["from"]) == other
        assert difference["difference"] == pytest.approx(means[first_setting] - means[other], abs=1e-12)
        if (result := p_values.get((first_setting, other))) is None:
            assert (difference["test"], difference["p"]) == (None, None)
            continue
        assert difference["test"] == "paired t-test"
        assert difference["p"] == pytest.approx(result.pvalue)
        assert difference["interval"] == pytest.approx([*result.confidence_interval(0.95)], abs=1e-12)
        place = by_p.index((first_setting, other))
        steps = [(len(by_p) - i) * p_values[by_p[i]].pvalue for i in range(place + 1)]
        assert difference["p_holm"] == pytest.approx(min(1, max(steps)))
        assert difference["sentence"] in page.text


def test_figures_agree_with_what_the_runs_logged(page: Page, folder: Path) -> None:
    check_figures(page, folder)
    assert page.data["page"]["curves"][0]["train/loss"] == [[20, 40, 60, 80], [2.0, 1.0, 0.66667, 0.5]]
    assert page.data["page"]["steps_per_epoch"][0] == 20


def test_what_the_table_shows(page: Page) -> None:
    header, *rows = page.tables["runs"]
    assert header[:6] == ["rank", "job", "seed", "lr", "momentum", "root"]
    assert header[6:] == ["best val acc", "last val acc", "test acc", "train loss", "seconds", "status", "commit"]
    assert rows[0][:5] == ["1", "22", "1", "0.1", "0.9"]
    assert rows[0][6:] == ["80.70% (3)", "75.70% (5)", "79.70%", "0.5000", "4.5", "finished", "01234567"]
    assert len(rows) == 25
    assert rows[-1][0] == ""
    assert rows[-1][-2] == "failed"
    assert f"24 failed: RuntimeError: {HOSTILE}" in " ".join(page.text.split())


def test_the_command_of_the_best_run(page: Page) -> None:
    found = re.search(r"python -m cifar\.train model=mlp .*", page.text)
    assert found is not None
    lr, momentum, seed = (page.data["comparison"]["runs"][0]["settings"][key] for key in ("optimizer.lr", "optimizer.momentum", "seed"))  # fmt: skip
    assert shlex.split(found[0].removesuffix("Copy")) == [
        *("python", "-m", "cifar.train", "model=mlp", f"optimizer.lr={lr}", f"optimizer.momentum={momentum}"),
        *(f"seed={seed}", "logger.group=it's $(here)"),
    ]


def test_a_page_depends_on_nothing_but_its_runs(tmp_path: Path, html: str, folder: Path) -> None:
    slower = render(compare([sweep(tmp_path / "grid", slower=1.7)]))
    assert slower != html.replace(str(folder), str(tmp_path / "grid"))
    assert masked(slower) == masked(html).replace(str(folder), str(tmp_path / "grid"))
    assert render(compare([folder])) == html


def test_nothing_of_a_stranger_is_markup_and_nothing_is_fetched(html: str, page: Page) -> None:
    assert HOSTILE not in html
    assert not {"img", "link", "iframe", "a"} & {*page.tags}
    assert page.tags.count("script") == html.count("</script>") == 5  # a figure, two of data, plotly, our own
    assert "default-src 'none'" in html
    assert plain("<b>&") == "&lt;b&gt;&amp;"


def test_few_seeds_are_said_to_be_few(tmp_path: Path) -> None:
    for job in range(2):
        make(tmp_path / str(job), settings(optimizer__lr=0.1 * (job + 1)), val=0.5)
    page = Page(render(compare([tmp_path])))
    assert "n = 1 is too few for an interval or a test" in page.text
    assert [*page.tables] == ["runs"]


@pytest.mark.parametrize("status", ["failed", "running", "finished"])
def test_a_lone_run_whatever_became_of_it(tmp_path: Path, status: str) -> None:
    make(tmp_path / "0", settings(), status=status, error=None, metrics={"val/accuracy": float("nan")})
    page = Page(render(compare([tmp_path])))
    row = dict(zip(*page.tables["runs"], strict=True))
    assert (row["job"], row["seconds"], row["status"]) == ("0", "12.5", status)
    assert page.data["comparison"]["runs"][0]["metrics"] == {"val/accuracy": None}


def test_adding_a_section(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def importance(comparison: Any) -> Section:
        return Section("Importance <of>", figure([{"type": "bar", "x": [1], "y": ["</script>"]}], {"title": "T"}))

    monkeypatch.setattr("cifar.report.SECTIONS", (*SECTIONS, importance))
    html = render(compare([folder]))
    assert "<h2>Importance &lt;of&gt;</h2>" in html
    assert r'"\u003c/script\u003e"' in html


def test_command_line(tmp_path: Path, folder: Path, html: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["cifar-compare", str(folder), "--html", str(tmp_path / "report.html")])
    cli()
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text() == html
    monkeypatch.delenv("HYDRA_FULL_ERROR")  # which the first call has set
    monkeypatch.setattr(sys, "argv", ["cifar-compare", str(folder), "--html", str(tmp_path / "no" / "report.html")])
    with pytest.raises(SystemExit) as stopped:
        cli()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/no/report.html: there is no such folder to write it to\n"


def test_training_does_not_pay_for_the_page() -> None:
    code = "import cifar.train, sys; assert not {'plotly', 'scipy', 'jinja2', 'rich'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    offline = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-sync", *offline]
        )
        yield browser
        browser.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_in_chromium(browser: Any, tmp_path: Path, folder: Path, scheme: str, width: int) -> None:
    path = write_report(compare([folder]), tmp_path / "report.html")
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-drawn]")
    assert tab.evaluate("document.querySelectorAll('.plot svg.main-svg').length") >= 4
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll sideways
    widest = "Math.max(...[...document.querySelectorAll('.plot')].map(plot => plot.getBoundingClientRect().right))"
    assert tab.evaluate(widest) <= width  # no plot's figures lie beyond the edge
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 380) == (scheme == "light")

    def column(name: str) -> list[str]:
        cells = "rows => rows.map(row => row.cells[document.querySelector('th[data-name=%s]').cellIndex].textContent)"
        return tab.eval_on_selector_all("#runs tbody tr:not([hidden])", cells % name)

    tab.click("th[data-name=lr] button")
    assert column("lr") == sorted(column("lr"), key=float)
    assert tab.get_attribute("th[data-name=lr]", "aria-sort") == "ascending"
    tab.click("th[data-name=lr] button")
    assert column("lr") == sorted(column("lr"), key=float, reverse=True)
    tab.click("th[data-name=test] button")
    assert column("test")[-1] == ""  # what there is no figure for comes last either way
    tab.fill("#filter", "lr=0.03 momentum=0.9")
    assert len(column("lr")) == 3
    assert {*zip(column("lr"), column("momentum"), strict=True)} == {("0.03", "0.9")}
    assert tab.inner_text("#shown") == "3 of 25 runs"
    tab.fill("#filter", "val>=78")
    assert column("val")
    assert all(float(cell.partition("%")[0]) >= 78 for cell in column("val"))
    tab.fill("#filter", "failed")
    assert column("job") == ["24"]
    tab.fill("#filter", "")
    tab.check("#average")
    assert tab.input_value("#kind") == "heatmap"
    tab.select_option("#kind", "scatter")
    tab.select_option("#across", "seed")
    tab.fill("#smoothing", "0.6")
    tab.wait_for_timeout(400)
    assert tab.evaluate("window.hurt") is None
    assert said == []
    assert asked == [path.as_uri()]
    tab.close()


def test_a_searchs_settings_are_points_of_a_plane(browser: Any, tmp_path: Path) -> None:
    for job in range(6):
        config = settings(optimizer__lr=0.01 * 1.3**job, optimizer__momentum=0.8 + 0.03 * job)
        make(tmp_path / "search" / str(job), config, val=0.5 + job / 100)
    path = write_report(compare([tmp_path / "search"]), tmp_path / "report.html")
    tab = browser.new_page()
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-drawn]")
    assert tab.input_value("#kind") == "scatter"
    tab.close()


GRID = [
    "data=digits",
    "model=mlp",
    "model.widths=[8]",
    "data.image_size=8",
    "trainer.device=cpu",
    "trainer.epochs=3",
    "logger=none",
]
GRID += [
    "optimizer.lr=0.003,0.01,0.03,0.1",
    "optimizer.momentum=0.8,0.9",
    "seed=range(3)",
    "hydra.sweep.dir=sweeps/grid",
]


@pytest.mark.slow
def test_a_killed_sweep_has_the_page_of_one_that_was_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cifar.train", "-m", *GRID]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pages = []
    for name in ("whole", "killed"):
        here = tmp_path / name
        here.mkdir()
        if name == "killed":
            process = subprocess.Popen(
                command, cwd=here, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while not (here / "sweeps" / "grid" / "12" / "metrics.jsonl").exists():
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (here / "sweeps" / "grid" / "report.html").exists()
        subprocess.run(command, cwd=here, env=environment, check=True, capture_output=True)
        pages.append((here / "sweeps" / "grid" / "report.html").read_text())
        check_figures(Page(pages[-1]), here / "sweeps" / "grid")
    assert masked(pages[0]) == masked(pages[1])
