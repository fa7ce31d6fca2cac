"""Train, being SIGKILLed again and again, until the run is finished: `python kill_loop.py SEED KILLS OVERRIDES...`.

Each attempt is a forked child that starts the command line with `resume=auto`. It is killed at a random step, at a random
point inside a save (half a file written, before or after a sync, a rename, a link, a removal), or by this process after a
random time. Once KILLS were survived, an attempt is left alone. Prints how many kills of each kind there were.
"""

import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401 - imported before forking, as torch below, so that an attempt takes a moment
import torch

import cifar.trainer
from cifar.train import cli


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(generator: random.Random) -> None:
    left, step = generator.randint(2, 20), cifar.trainer.Trainer.step

    def counted(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            die()
        return step(*arguments)

    cifar.trainer.Trainer.step = counted  # type: ignore[method-assign]


def kill_inside_a_save(generator: random.Random) -> None:
    left = generator.randint(1, 40)

    def deadly(original: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if original is save:
                    save(*arguments, **keywords)
                    path = Path(arguments[1])
                    path.write_bytes(path.read_bytes()[: generator.randint(0, path.stat().st_size)])
                elif generator.random() < 0.5:
                    with contextlib.suppress(OSError):  # unlink of what is not there
                        original(*arguments, **keywords)
                die()
            return original(*arguments, **keywords)

        return call

    save = torch.save
    torch.save = deadly(save)
    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def attempt(arguments: list[str], seed: int, kind: str) -> int:
    """Return the child's status as `waitpid` tells it."""
    generator = random.Random(seed)
    child = os.fork()
    if child == 0:
        sys.argv = ["train.py", *arguments]
        if kind == "step":
            kill_at_step(generator)
        elif kind == "save":
            kill_inside_a_save(generator)
        cli()
        os._exit(0)
    if kind == "time":
        time.sleep(generator.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    seed, kills, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    survived: Counter[str] = Counter()
    for number in range(10 * kills + 1):
        kind = ("step", "save", "time")[number % 3] if survived.total() < kills else "none"
        status = attempt(arguments, 1000 * seed + number, kind)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            survived[kind] += 1
            continue
        if status != 0:
            sys.exit(f"attempt {number} ({kind}) ended with status {status}")
        break
    print(dict(survived))


if __name__ == "__main__":
    main()
