import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from cifar.config import CONF, ConfigError, check, config_hash, flatten, locate, suggestion, to_container


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=["data=digits", *overrides])


def test_defaults_fit() -> None:
    check(composed())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=abc", "optimizer.lr=abc: must be a valid number"),
        ("optimizer.lr='0.1'", "optimizer.lr=0.1: must be a valid number"),
        ("optimizer.lr=-1", "optimizer.lr=-1: must be greater than or equal to 0"),
        ("optimizer.momentum=1", "optimizer.momentum=1: must be less than 1"),
        ("optimizer.nesterov=1", "optimizer.nesterov=1: must be a valid boolean"),
        ("trainer.epochs=two", "trainer.epochs=two: must be a valid integer"),
        ("trainer.epochs=1.5", "trainer.epochs=1.5: must be a valid integer"),
        ("trainer.epochs=true", "trainer.epochs=True: must be a valid integer"),
        ("trainer.epochs=null", "trainer.epochs=null: must be a valid integer"),
        ("trainer.device=tpu", "trainer.device=tpu: must be 'auto', 'cpu', 'cuda' or 'mps'"),
        ("data.batch_size=0", "data.batch_size=0: must be greater than 0"),
        ("data.fraction=1.5", "data.fraction=1.5: must be less than or equal to 1"),
        ("data.val_size=-1", "data.val_size=-1: must be greater than or equal to 0"),
        ("loss.label_smoothing=1", "loss.label_smoothing=1: must be less than 1"),
        ("seed=-1", "seed=-1: must be greater than or equal to 0"),
        ("+optimizer.lrr=1", "optimizer.lrr: cifar.optimizer.sgd takes no such argument; it takes params, lr, "),
        ("data=_base", "data: names nothing to build"),
        ("resume=3", "resume=3: must be a valid string"),
    ],
)
def test_what_does_not_fit_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(composed(override))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "shutil.rmtree",
        "pathlib.Path.touch",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "torch.nn.modules.module.torch.hub.load",
        "cifar.run.Run",
        "cifar.config.locate",
        "cifar.data.archive.os.system",
        "cifar.data.imagefolder.os.system",
        "cifar.data.dataset.Tensor",
        "cifar.data.dataset.replace",
        "cifar.trainer.Path",
        "cifar.trainer.get_ema_multi_avg_fn",
        "cifar.data.batches.hashlib",
        "cifar.models.net.Net.__init__",
        "cifar.models.net",
        "cifar.datas.Anything",
        "",
        None,
        7,
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_targets_outside_the_allow_list_are_refused(target: object, nested: bool) -> None:
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    if nested:
        cfg.augment.mixup = {"inner": [{"_target_": target}]}
    else:
        cfg.model = {"_target_": target}
    with pytest.raises(ConfigError, match=r"_target_=.*(is not allowed|does not exist)"):
        check(cfg)


@pytest.mark.parametrize(
    "target", ["torch.optim.SGD", "torch.nn.Linear", "cifar.models.net.Net", "cifar.optimizer.sgd"]
)
def test_targets_on_the_allow_list(target: str) -> None:
    assert callable(locate("model", target))


def test_a_user_can_allow_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="CIFAR_TARGETS"):
        locate("model", "fractions.Fraction")
    monkeypatch.setenv("CIFAR_TARGETS", "other, fractions")
    assert locate("model", "fractions.Fraction")(1, 2) == 0.5
    with pytest.raises(ConfigError):
        locate("model", "fractions.math.factorial")


def test_hash_is_of_what_is_trained() -> None:
    settings = to_container(composed())
    assert config_hash(settings) == config_hash(to_container(composed("logger=none", "resume=auto")))
    others = [composed("seed=1"), composed("optimizer.lr=0.02"), composed("model=mlp")]
    assert len({config_hash(to_container(other)) for other in others} | {config_hash(settings)}) == 4


def test_flatten() -> None:
    nested = {"seed": 0, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "data": {"a": {"b": None}, "c": {}}}
    assert flatten(nested) == {
        "seed": 0,
        "optimizer.lr": 0.1,
        "optimizer.betas": [0.9, 0.99],
        "data.a.b": None,
        "data.c": {},
    }


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("batch_size", "data.batch_size"),
        ("modle", "model"),
        ("trainer.epoch", "trainer.epochs"),
    ],
)
def test_suggestion(typed: str, meant: str) -> None:
    assert suggestion(typed).startswith(f", did you mean {meant}")


def test_no_suggestion_for_nonsense() -> None:
    assert suggestion("qqqqqqq") == ";"
