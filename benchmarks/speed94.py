"""`experiment=speed94` against airbench94_muon's own code on the same images and device, by airbench's rules.

    python -m benchmarks.speed94 IMAGES --rival DIR [--precision fp32] [--seeds 1]    # whole runs, alternating
    python -m benchmarks.speed94 IMAGES --rival DIR --steps 4 [--rounds 3]            # training rates only

DIR is a checkout of github.com/KellerJordan/cifar10-airbench. Its file is run as it is but for the names of device and precision,
its compilation, and its warm-up run, where the device is a CPU; validation between epochs, which its rules don't time, is left
out. It times whitening, augmentation, training and the final evaluation; ours is train plus eval of result.json, which are those.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cifar.data.imagefolder import ImageFolder

ON_A_CPU = {
    "@torch.compile\n": "",
    'torch.device("cuda")': 'torch.device("cpu")',
    ".cuda()": "",
    '    model.compile(mode="max-autotune")\n': "",
    '    main("warmup", model)\n': "",
}
DTYPES = {"fp32": "float", "bf16": "bfloat16"}
CLOCK = """
import time, torch
class Event:
    def __init__(self, enable_timing): pass
    def record(self): self.at = time.perf_counter()
    def elapsed_time(self, end): return 1000 * (end.at - self.at)
torch.cuda.Event, torch.cuda.synchronize = Event, lambda: None
"""
STEPS = """
stamps = [time.perf_counter()]
def stamped(step):
    def wrapper(*arguments):
        result = step(*arguments)
        stamps.append(time.perf_counter())
        if len(stamps) > {steps} + 1:
            print("STEP", sorted(b - a for a, b in zip(stamps[1:], stamps[2:]))[({steps} - 1) // 2], flush=True)
            raise SystemExit
        return result
    return wrapper
"""


def prepare_rival(images: Path, source: Path, folder: Path, precision: str, steps: int) -> None:
    """Write the rival's program and its data files into `folder`."""
    code = source.read_text()
    replaced = {
        "range(200)": "range(1)",
        "val_acc = evaluate(model, test_loader, tta_level=0)\n        print": "val_acc = 0.0\n        print",
    }
    if not torch.cuda.is_available():
        replaced |= ON_A_CPU | {".half()": f".{DTYPES[precision]}()", ".bfloat16()": f".{DTYPES[precision]}()"}
        code = CLOCK + code
    for old, new in replaced.items():
        if old not in code:
            raise SystemExit(f"{source}: has no {old.strip()!r}; it is not the version that this was written for")
        code = code.replace(old, new)
    if steps:
        code = code.replace(
            'if __name__ == "__main__":',
            "import time\n" + STEPS.format(steps=steps) + 'Muon.step = stamped(Muon.step)\nif __name__ == "__main__":',
        )
    (folder / "rival.py").write_text(code)
    data = ImageFolder(root=str(images), val_size=0).load()
    (folder / "cifar10").mkdir()
    for name, split in (("train", data.train), ("test", data.test)):
        content = {
            "images": split.images.permute(0, 2, 3, 1).contiguous(),
            "labels": split.labels,
            "classes": list(data.classes),
        }
        torch.save(content, folder / "cifar10" / f"{name}.pt")


def run_rival(folder: Path, seed: int) -> str:
    code = f"import runpy, sys, torch; torch.manual_seed({seed}); sys.argv = ['rival.py']; "
    code += "runpy.run_path('rival.py', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True).stdout


def rival(folder: Path, seed: int) -> tuple[float, float]:
    last = [line for line in run_rival(folder, seed).splitlines() if "eval" in line][-1]
    accuracy, seconds = re.findall(r"\d+\.\d+", last)[-2:]
    return float(seconds), float(accuracy)


def command(images: Path, folder: Path, precision: str, seed: int) -> list[str]:
    return [
        *(
            "experiment=speed94",
            "data=imagefolder",
            f"data.root={images}",
            f"trainer.precision={precision}",
            f"seed={seed}",
        ),
        *("logger=none", f"hydra.run.dir={folder}/{time.time_ns()}"),
    ]


def ours(arguments: list[str]) -> tuple[float, float]:
    subprocess.run([sys.executable, "-m", "cifar.train", *arguments], check=True, stdout=subprocess.DEVNULL)
    result = json.loads((Path(arguments[-1].partition("=")[2]) / "result.json").read_text())
    return result["seconds"]["train"] + result["seconds"]["eval"], result["metrics"]["test/accuracy"]


def our_step(arguments: list[str], steps: int) -> float:
    code = f"import sys, time\n{STEPS.format(steps=steps)}\n"
    code += "from cifar.trainer import Trainer\nTrainer.step = stamped(Trainer.step)\n"
    code += f"sys.argv[1:] = {arguments}\nfrom cifar.train import main\nmain()"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    return float(said.partition("STEP ")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--rival", type=Path, required=True)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    images = arguments.images.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_rival(images, arguments.rival / "airbench94_muon.py", folder, arguments.precision, arguments.steps)
        if arguments.steps:
            times = []
            for _ in range(arguments.rounds):
                theirs = float(run_rival(folder, 0).partition("STEP ")[2].split()[0])
                times.append(
                    (
                        2000 / theirs,
                        500 / our_step(command(images, folder, arguments.precision, 0), 4 * arguments.steps),
                    )
                )
                print(f"images/s: airbench94_muon {times[-1][0]:.0f}, ours {times[-1][1]:.0f}", file=sys.stderr)
            rates = [statistics.median(column) for column in zip(*times, strict=True)]
            print(
                f"images/s, medians of {len(times)}: airbench94_muon {rates[0]:.0f}, experiment=speed94 {rates[1]:.0f}"
            )
            return
        print("| | seconds | test accuracy | seed |\n|---|---|---|---|")
        for seed in range(arguments.seeds):
            for name, (seconds, accuracy) in (
                ("airbench94_muon", rival(folder, seed)),
                ("experiment=speed94", ours(command(images, folder, arguments.precision, seed))),
            ):
                print(f"| {name} | {seconds:.0f} | {100 * accuracy:.2f} % | {seed} |", flush=True)


if __name__ == "__main__":
    main()
