"""The same sweep five ways, in one go: seconds, seconds a job, peak memory, best accuracy.

    python -m benchmarks.fused IMAGES [--batch 4] [--fraction 0.2] [--rounds 3]      # 16 jobs: 8 learning rates x 2 momenta
    python -m benchmarks.fused IMAGES --growth [--png FILE]                           # 1, 2, 4, ... 256 jobs, fused

The job is the tutorial's network, for one epoch of a share of the images unless said otherwise. The ways: Hydra's basic launcher,
joblib's with two processes and the fused one, all with this project's trainer; ModelBatch (modelbatch on PyPI), where it is
installed, with its own optimizers in a plain loop over batches in memory; and the tutorial's loop over a DataLoader with two
workers and torch's own choice of threads, of which one job is run and counted for each. Ours are timed as whole commands, start,
data, evaluation, table and page included; the two loops from the first batch to the last test image.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.tutorial import tutorial
from cifar.data.imagefolder import ImageFolder

RATES = "0.0003,0.0005,0.0007,0.001,0.0013,0.0016,0.002,0.003"
MOMENTA = "0.8,0.9"
LAUNCHERS = {
    "basic": [],
    "joblib, 2 processes": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "fused": ["hydra/launcher=fused"],
}
MODELBATCH = """
import json, resource, sys, time, torch
from modelbatch import ModelBatch
from modelbatch.optimizer import OptimizerFactory
from cifar.data.batches import Batches, Normalize
from cifar.data.imagefolder import ImageFolder
from cifar.models.net import Net
root, batch, fraction, rates, momenta = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *map(json.loads, sys.argv[4:6])
data = ImageFolder(root=root, val_size=0, batch_size=batch, fraction=fraction).load()
normalize = Normalize((0.5,) * 3, (0.5,) * 3)
torch.manual_seed(0)
models = [Net((3, 32, 32), 10) for _ in range(len(rates) * len(momenta))]
batched = ModelBatch(models, shared_input=True)
configs = [{"lr": rate, "momentum": momentum} for rate in rates for momentum in momenta]
optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.001}).create_optimizer(batched, configs)
started = time.perf_counter()
for images, labels in Batches(data.train, normalize, batch).epoch(0):
    optimizer.zero_grad()
    batched.compute_loss(batched(images), labels, torch.nn.functional.cross_entropy).backward()
    optimizer.step()
correct = torch.zeros(len(models))
with torch.no_grad():
    for images, labels in zip(Batches(data.test, normalize, 500).in_order(), data.test.labels.split(500)):
        correct += (batched(images).argmax(2) == labels).sum(1)
seconds = time.perf_counter() - started
best = correct.max().item() / len(data.test)
print(json.dumps([seconds, best, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def memory(pid: int) -> float:
    """MB resident in a process and all below it."""
    total, left = 0.0, [pid]
    while left:
        one = left.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            left += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except (OSError, IndexError):
            pass
    return total


def ours(
    images: Path, batch: int, fraction: float, launcher: list[str], *more: str, epochs: int = 1
) -> tuple[float, float, float, list]:
    """Return the seconds of the whole command, the best test accuracy, the peak memory in MB, and each job's result."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "cifar.train",
            "-m",
            "experiment=tutorial",
            "data=imagefolder",
            f"data.root={images}",
        ]
        command += [
            f"data.batch_size={batch}",
            f"data.fraction={fraction}",
            f"trainer.epochs={epochs}",
            "logger=none",
            *launcher,
        ]
        # With two processes, or one step for all, there is no point in one thread each; at 64 images oneDNN is faster.
        command += ["trainer.device=cpu", f"trainer.onednn={batch > 16}", "hydra.sweep.dir=sweep", *more]
        started, peak = time.perf_counter(), [0.0]
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                peak[0] = max(peak[0], memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        if status:
            raise SystemExit(f"{' '.join(command)} ended with {status}")
        results = [json.loads(path.read_text()) for path in (Path(folder) / "sweep").glob("*/result.json")]
    return seconds, max(result["metrics"]["test/accuracy"] for result in results), peak[0], results


def model_batch(images: Path, batch: int, fraction: float) -> tuple[float, float, float] | None:
    lists = [f"[{values}]" for values in (RATES, MOMENTA)]
    command = [sys.executable, "-c", MODELBATCH, str(images), str(batch), str(fraction), *lists]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    if done.returncode:
        print("ModelBatch:", done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    seconds, best, peak = json.loads(done.stdout)
    return seconds, best, peak


def five_ways(images: Path, batch: int, fraction: float, rounds: int, epochs: int, names: list[str]) -> None:
    sweep = [f"optimizer.lr={RATES}", f"optimizer.momentum={MOMENTA}"]
    jobs = len(RATES.split(",")) * len(MOMENTA.split(","))
    data = ImageFolder(root=str(images), val_size=0, batch_size=batch, fraction=fraction).load()
    measured: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(rounds):
        for name, launcher in ((name, LAUNCHERS[name]) for name in LAUNCHERS if name in names):
            threads = "2" if name == "basic" and batch > 16 else "1"
            # Each way with the threads that suit it: two processes have a core each, a fused step has them all.
            own = [f"trainer.threads={'null' if name == 'fused' else threads}"]
            measured.setdefault(name, []).append(
                ours(images, batch, fraction, launcher, *sweep, *own, epochs=epochs)[:3]
            )
        if "ModelBatch" in names and (rival := model_batch(images, batch, fraction)) is not None:
            measured.setdefault("ModelBatch", []).append(rival)
        if batch == 4:
            seconds, accuracy = tutorial(data.train, data.test, 0, epochs)
            measured.setdefault("tutorial's loop", []).append((jobs * seconds, accuracy, float("nan")))
        print({name: [round(value, 3) for value in runs[-1]] for name, runs in measured.items()}, file=sys.stderr)
    steps = epochs * -(-len(data.train) // batch)
    print(f"\n{jobs} jobs of {steps:,} steps at batch {batch}, medians of {rounds}\n")
    print("| | seconds | seconds a job | peak memory, MB | best test accuracy |\n|---|---|---|---|---|")
    for name, runs in measured.items():
        seconds, best, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        shown = "" if peak != peak else f"{peak:,.0f}"
        print(f"| {name} | {seconds:.1f} | {seconds / jobs:.2f} | {shown} | {100 * best:.1f} % |")
    fused = [run[0] for run in measured["fused"]]
    for name, runs in measured.items():
        if name != "fused":
            ratios = [run[0] / own for run, own in zip(runs, fused, strict=True)]
            print(f"fused against {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def growth(images: Path, png: Path) -> None:
    """Milliseconds a step and a job's step of 1 to 256 jobs; all but the number of jobs fixed."""
    from matplotlib.figure import Figure

    counts = [2**power for power in range(9)]
    print("| jobs | ms a step | ms a job's step | peak memory, MB |\n|---|---|---|---|")
    steps = []
    for count in counts:
        rates = [0.0005 + 0.001 * k / count for k in range(count)]
        sweep = f"optimizer.lr={','.join(f'{rate:.6f}' for rate in rates)}" + ("," if count == 1 else "")
        launcher = LAUNCHERS["fused"] if count > 1 else []
        fraction = 0.05 if count <= 32 else 0.02
        _, _, peak, results = ours(images, 4, fraction, launcher, sweep.rstrip(","), "trainer.threads=null")
        # A job's clock runs while others of its group start: the last to start tells what a step takes.
        steps.append(1000 * min(result["seconds"]["train"] / result["steps"] for result in results))
        print(f"| {count} | {steps[-1]:.2f} | {steps[-1] / count:.3f} | {peak:,.0f} |", flush=True)
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(counts, [step / count for step, count in zip(steps, counts, strict=True)], "o-", base=2)
    axes.set(xlabel="jobs trained as one", ylabel="milliseconds a job's step", title="The tutorial's job at batch 4")
    axes.set_xticks(counts, map(str, counts))
    axes.grid(alpha=0.3)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[*LAUNCHERS, "ModelBatch"],
        help="of our launchers and ModelBatch, which trains one epoch",
    )
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--png", type=Path, default=Path("benchmarks/fused.png"))
    arguments = parser.parse_args()
    images = arguments.images.resolve()
    if arguments.growth:
        growth(images, arguments.png)
    else:
        five_ways(images, arguments.batch, arguments.fraction, arguments.rounds, arguments.epochs, arguments.only)


if __name__ == "__main__":
    main()
