import ast
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cifar import checkpoint
from cifar.checkpoint import CheckpointError, State
from cifar.models.mlp import MLP
from cifar.trainer import Trainer

DATA = {"classes": ["a", "b"], "mean": [0.5] * 3, "std": [0.5] * 3, "image_shape": [3, 4, 4], "steps": 7}


def state(widths: tuple[int, ...] = (5,), data: dict | None = None, lr: float = 0.1, **trainer) -> State:
    model = MLP((3, 4, 4), 2, list(widths))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Trainer(device="cpu", **trainer).start(model, optimizer, data or DATA)


def trained(**settings) -> State:
    one = state(**settings)
    for _ in range(3):
        images, labels = torch.randn(6, 3, 4, 4), torch.randint(0, 2, (6,))
        Trainer(device="cpu").step(one, one.model, nn.functional.cross_entropy, images, labels)
        one.step += 1
        one.batch += 1
        one.images += 6
    one.epoch, one.rows, one.wandb_id, one.skipped = 2, 5, "abc", 4
    one.best = {"metric": "val/accuracy", "value": 0.5, "epoch": 1}
    one.seconds = {"train": 1.5, "eval": 0.5}
    return one


def test_round_trip_restores_everything(tmp_path: Path) -> None:
    original = trained(ema_decay=0.9)
    original.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    original.scaler.scale(torch.ones(()))  # its scale exists from the first use on
    checkpoint.save(original.state_dict(), tmp_path / "last.pt")
    draws = torch.rand(3)
    restored = state(ema_decay=0.9)
    restored.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    checkpoint.resume(restored, [tmp_path / "last.pt"])
    assert torch.equal(torch.rand(3), draws)
    expected, found = original.state_dict(), restored.state_dict()
    expected.pop("rng")
    found.pop("rng")
    assert checkpoint.digest(found) == checkpoint.digest(expected)
    assert restored.window.take() == original.window.take()


@pytest.mark.parametrize("key", list(state().state_dict()))
def test_each_key_is_missed(key: str, tmp_path: Path) -> None:
    content = trained().state_dict()
    del content[key]
    checkpoint.save(content, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=rf"last\.pt: .*\b({key}|no `model`)"):
        checkpoint.resume(state(), [tmp_path / "last.pt"])


def test_settings_of_the_optimizer_are_the_configurations(tmp_path: Path) -> None:
    checkpoint.save(trained(lr=0.1).state_dict(), tmp_path / "last.pt")
    restored = state(lr=0.02)
    checkpoint.resume(restored, [tmp_path / "last.pt"])
    group = restored.optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["momentum"]) == (0.02, 0.02, 0.9)
    assert all("momentum_buffer" in entry for entry in restored.optimizer.state.values())


def test_another_models_checkpoint_lists_what_differs(tmp_path: Path) -> None:
    checkpoint.save(trained(widths=(5,)).state_dict(), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"another model's weights: .*is missing.*\(5, 48\), not \(6, 48\)"):
        checkpoint.resume(state(widths=(6, 5)), [tmp_path / "last.pt"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": ["a", "c"]}, r"classes \['a', 'b'\], not \['a', 'c'\]"),
        ({"image_shape": [3, 8, 8]}, r"image_shape \[3, 4, 4\], not \[3, 8, 8\]"),
        ({"steps": 8}, r"within an epoch of 7 steps, and this run's has 8"),
    ],
)
def test_other_data_is_refused(changed: dict, message: str, tmp_path: Path) -> None:
    checkpoint.save(trained().state_dict(), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.resume(state(data=DATA | changed), [tmp_path / "last.pt"])


def test_ema_on_and_off_differ(tmp_path: Path) -> None:
    checkpoint.save(trained().state_dict(), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"trainer\.ema_decay off"):
        checkpoint.resume(state(ema_decay=0.9), [tmp_path / "last.pt"])


def test_evaluated_weights_are_the_averaged_ones(tmp_path: Path) -> None:
    original = trained(ema_decay=0.5)
    checkpoint.save(original.state_dict(), tmp_path / "best.pt")
    other = MLP((3, 4, 4), 2, [5])
    checkpoint.load_evaluated(other, tmp_path / "best.pt")
    for ours, averaged in zip(other.parameters(), original.ema.module.parameters(), strict=True):
        assert torch.equal(ours, averaged)


@pytest.mark.parametrize("damage", ["truncate", "zero", "empty"])
def test_damage_is_found(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(trained().state_dict(), path)
    content = path.read_bytes()
    damaged = {"truncate": content[: len(content) // 2], "zero": bytes(len(content)), "empty": b""}[damage]
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"last\.pt: not a readable checkpoint"):
        checkpoint.load(path)


def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    original = trained()
    checkpoint.save(original.state_dict(), path)
    content = bytearray(path.read_bytes())
    position = content.find(next(iter(original.model.parameters())).detach().numpy().tobytes())
    assert position > 0
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt: (damaged|not a readable)"):
        checkpoint.load(path)


def test_reading_never_runs_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Bite:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"model": Bite()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Bite()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not marker.exists()


def test_a_failed_save_keeps_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(trained().state_dict(), path)
    before = path.read_bytes()

    def full(content: dict, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"last\.pt: the checkpoint could not be written .*No space left"):
        checkpoint.save(trained().state_dict(), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["last.pt"]


def restoring_lines() -> list[tuple[int, int]]:
    """The first and last line of each statement that puts a saved value back."""
    tree = ast.parse(Path(checkpoint.__file__).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    restoring = [node for node in functions if node.name in ("load_state_dict", "restore_generators", "load_weights")]
    assert len(restoring) == 3
    statements = [
        node for function in restoring for node in ast.walk(function) if isinstance(node, ast.Expr | ast.Assign)
    ]
    kept = [
        node
        for node in statements
        if re.search(r"saved|states\[\"cpu\"\]|load_state_dict\(weights|group\.update", ast.unparse(node))
    ]
    return [
        (node.lineno, node.end_lineno or node.lineno)
        for node in kept
        if not isinstance(node.value, ast.Constant) and "missing =" not in ast.unparse(node)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), restoring_lines())
def test_deleting_a_line_that_restores_is_noticed(first: int, last: int, tmp_path: Path) -> None:
    repository = Path(__file__).parent.parent
    for name in ("cifar", "conf", "tests"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "pyproject.toml", tmp_path)
    module = tmp_path / "cifar" / "checkpoint.py"
    lines = module.read_text().splitlines(keepends=True)
    indent = lines[first - 1][: len(lines[first - 1]) - len(lines[first - 1].lstrip())]
    module.write_text("".join([*lines[: first - 1], f"{indent}pass\n", *lines[last:]]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-x", "tests/test_checkpoint.py"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 1, f"nothing notices that this is gone: {''.join(lines[first - 1 : last])}"
