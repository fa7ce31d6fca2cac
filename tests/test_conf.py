"""Every file under conf/ is composed and what it names is built."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate

from cifar.config import CONF, check
from cifar.run import Job

GROUPS = (
    "model",
    "optimizer",
    "schedule",
    "loss",
    "augment",
    "trainer",
    "logger",
    "data",
    "experiment",
    "hparams_search",
)
FILES = sorted(path for path in Path(CONF).rglob("*.yaml") if not path.name.startswith("_"))


def composed(*overrides: str):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=["trainer.device=cpu", *overrides])


def of(group: str) -> list[str]:
    return [path.stem for path in FILES if path.parent.name == group]


def build(node, *arguments):
    return instantiate(node, _partial_=True, _convert_="all")(*arguments)


def test_every_file_belongs_to_a_known_group() -> None:
    assert {path.parent.name for path in FILES} == {*GROUPS, "conf", "launcher"}
    assert [path.name for path in FILES if path.parent.name == "conf"] == ["config.yaml"]


@pytest.mark.parametrize(
    "file",
    [path for path in FILES if path.parent.name not in ("conf", "launcher")],
    ids=lambda path: f"{path.parent.name}={path.stem}",
)
def test_every_file_composes_and_fits_its_target(file: Path) -> None:
    overrides = [f"{file.parent.name}={file.stem}"]
    if file.parent.name != "data":
        overrides.append("data=digits")
    elif file.stem == "imagefolder":
        overrides.append("data.root=somewhere")
    check(composed(*overrides))


@pytest.mark.parametrize("name", of("model"))
def test_models(name: str) -> None:
    network = build(composed(f"model={name}").model, (3, 32, 32), 7)
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", of("optimizer"))
@pytest.mark.parametrize("schedule", of("schedule"))
def test_optimizers_and_schedules_lower_a_loss(name: str, schedule: str) -> None:
    cfg = composed(f"optimizer={name}", f"schedule={schedule}", "optimizer.lr=0.01")
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 2)
    optimizer = build(cfg.optimizer, layer.parameters())
    factor = build(cfg.schedule, 50)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    losses = []
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor(step)
        loss = (layer(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", of("loss"))
def test_losses_prefer_the_right_class(name: str) -> None:
    loss = instantiate(composed(f"loss={name}").loss, _partial_=True)
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert loss(right, torch.tensor([0])) < loss(wrong, torch.tensor([0]))


@pytest.mark.parametrize("name", of("augment"))
def test_augmentations_keep_shape_and_range(name: str) -> None:
    augment = build(composed(f"augment={name}").augment, 10)
    images, labels = torch.rand(64, 3, 32, 32), torch.arange(64) % 10
    out, targets = augment(images, labels, torch.Generator().manual_seed(0), torch.arange(64))
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 1
    assert (name == "none") == torch.equal(out, images)
    assert targets.shape in ((64,), (64, 10))


@pytest.mark.parametrize("name", of("data"))
def test_data_sets(name: str) -> None:
    source = build(
        composed(f"data={name}", "data.batch_size=3", *(["data.root=x"] if name == "imagefolder" else [])).data
    )
    assert source.batch_size == 3
    if name == "digits":
        data = source.load()
        assert (len(data.train), len(data.val), len(data.test)) == (1258, 180, 359)
        assert data.image_shape == (3, 32, 32)


@pytest.mark.parametrize("name", of("trainer"))
def test_trainers(name: str) -> None:
    assert build(composed(f"trainer={name}").trainer).epochs > 0


@pytest.mark.parametrize("name", of("logger"))
def test_loggers(name: str, tmp_path: Path) -> None:
    cfg = composed(f"logger={name}")
    if name == "wandb":
        cfg.logger.mode = "disabled"
    with build(cfg.logger, Job(tmp_path), {"seed": 0}, None) as logger:
        logger.log({"step": 1, "val/accuracy": 0.5})


def test_the_tutorials_job_is_the_tutorials() -> None:
    cfg = composed("experiment=tutorial")
    assert cfg.model._target_ == "cifar.models.net.Net"
    assert dict(cfg.optimizer) | {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False} == dict(
        cfg.optimizer
    )
    assert (cfg.data.batch_size, cfg.data.val_size, cfg.data.fraction) == (4, 0, 1.0)
    assert list(cfg.data.mean) == list(cfg.data.std) == [0.5] * 3
    assert (cfg.trainer.epochs, cfg.trainer.log_every, cfg.trainer.precision) == (2, 2000, "fp32")
    assert cfg.loss._target_ == "cifar.loss.cross_entropy"
    assert build(cfg.schedule, 25_000)(0) == build(cfg.schedule, 25_000)(24_999) == 1
    assert build(cfg.augment, 10)(torch.ones(1, 3, 2, 2), torch.zeros(1), torch.Generator())[0].equal(
        torch.ones(1, 3, 2, 2)
    )


def test_the_grid_needs_no_multirun_flag() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides=["hparams_search=lr_momentum_batch", "data=digits"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    assert HydraConfig.get().mode == RunMode.MULTIRUN
    grid = HydraConfig.get().sweeper.params
    assert dict(grid) == {"optimizer.lr": "0.1,0.01", "optimizer.momentum": "0.8,0.9", "data.batch_size": "64,128"}
