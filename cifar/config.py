"""Checks a composed configuration against the code it names, before anything is built from it.

A component's signature is its schema: the argument names, types and ranges (pydantic's annotations) that a YAML file or
the command line must fit. Together with the entry, `cifar.train`, this is the only module that sees `cfg`.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

_BESIDE_PACKAGE = Path(__file__).resolve().parent / "conf"  # in a wheel
_IN_REPOSITORY = Path(__file__).resolve().parent.parent / "conf"
CONF = str(_BESIDE_PACKAGE if _BESIDE_PACKAGE.is_dir() else _IN_REPOSITORY)

# Only what these modules themselves define can be built from a configuration. Nothing here runs a command, opens a
# connection of the caller's choosing or deletes a file. To build from a package of your own, name it (comma-separated) in
# the environment variable CIFAR_TARGETS: a choice of the machine's user, out of reach of a YAML file or a checkpoint.
ALLOWED = (
    "cifar.augment",
    "cifar.data",
    "cifar.logger",
    "cifar.loss",
    "cifar.models",
    "cifar.optimizer",
    "cifar.schedule",
    "cifar.trainer",
    "torch.nn.modules",
    "torch.optim",
)

RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")  # Hydra's words in a node
NOT_TRAINED = ("logger", "resume")  # settings without a part in what is trained
TOP_LEVEL = {"seed": NonNegativeInt, "resume": str | None}


class ConfigError(ValueError):
    """A setting that cannot work; the message names its key and what would be right."""


def check(cfg: DictConfig) -> None:
    """Raise ConfigError unless each `_target_` is allowed and each of its arguments fits the target's signature.

    `cfg` is the composed configuration without Hydra's own node.
    """
    if secret := re.search(r"\$\{oc\.env:[^}]*(KEY|TOKEN|SECRET|PASSW)[^}]*\}", OmegaConf.to_yaml(cfg), re.IGNORECASE):
        raise ConfigError(
            f"{secret[0]}: a setting may not hold a secret of the environment; settings are recorded and shared"
        )
    settings = to_container(cfg)
    for key, annotation in TOP_LEVEL.items():
        _fit(key, settings.get(key), annotation)
    for key, value in settings.items():
        if isinstance(value, dict) and "_target_" not in value:
            raise ConfigError(f"{key}: names nothing to build (it has no _target_); choose a file of conf/{key}")
    targets = [(key, node, locate(key, node["_target_"])) for key, node in _targets(settings)]
    for key, node, target in targets:
        parameters = inspect.signature(target).parameters
        for name, value in node.items():
            if name in RESERVED:
                continue
            if name not in parameters:
                raise ConfigError(
                    f"{key}.{name}: {node['_target_']} takes no such argument; it takes {', '.join(parameters)}"
                )
            annotation = parameters[name].annotation
            if annotation is not inspect.Parameter.empty and not _has_target(value):
                _fit(f"{key}.{name}", value, annotation)


def locate(key: str, target: Any) -> Callable[..., Any]:
    """Return the object a `_target_` names; ConfigError naming `key` if it is not on the allow list or not there.

    The object must have been defined, not only imported, in an allowed module: `cifar.data.archive.os.system` is refused
    at its module path, and a name that an allowed module merely imported is refused by where it comes from.
    """
    allowed = ALLOWED + tuple(name.strip() for name in os.environ.get("CIFAR_TARGETS", "").split(",") if name.strip())
    module_name, _, name = str(target).rpartition(".")
    refused = ConfigError(
        f"{key}._target_={target} is not allowed; it must be defined in one of {', '.join(allowed)} "
        "(the environment variable CIFAR_TARGETS=yourpackage adds your own)"
    )
    # torch.optim.SGD and torch.nn.Linear are the public names of classes that submodules define.
    if not _inside(module_name, (*allowed, "torch.nn")) or name.startswith("_"):
        raise refused
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}._target_={target} does not exist: {error}") from error
    defined_in = getattr(found, "__module__", None) or ""
    if not callable(found) or not _inside(defined_in, allowed) or defined_in.split(".")[0] != module_name.split(".")[0]:
        raise refused
    return found


def build(node: DictConfig) -> partial[Any]:
    """Return a node's target with its arguments bound, nested nodes instantiated; the caller gives what is known at run time.

    Hydra's own `_partial_` would look into the target's permission anew at each call, which costs as much as a small
    network's forward pass; ours was given by `check`, once.
    """
    from hydra.utils import instantiate

    arguments = {key: value for key, value in to_container(node).items() if key not in RESERVED}
    return partial(locate("", node._target_), **instantiate(arguments, _convert_="all"))


def to_container(cfg: DictConfig) -> dict[str, Any]:
    """Return `cfg` as plain dictionaries, interpolations resolved; raises on a missing (`???`) value."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"optimizer.lr": 0.1, ...}`: one dotted key a leaf."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def suggestion(key: str) -> str:
    """Return ", did you mean ...?" with the known settings and groups that look like `key`, or ";"."""
    groups = {path.name: [f"{path.name}.{key}" for key in _keys(path)] for path in _groups()}
    known = [*TOP_LEVEL, *groups, *(key for keys in groups.values() for key in keys)]
    near = difflib.get_close_matches(key, dict.fromkeys(known), n=3, cutoff=0.7)
    # A right name in the wrong place, `lr=0.1`, is closer in mind than in letters.
    near += [name for name in dict.fromkeys(known) if name.endswith(f".{key}") and name not in near]
    return f", did you mean {' or '.join(near[:2])}?" if near else ";"


def help_text(overrides: list[str]) -> str:
    """Return what `--help` prints: usage, every group with its choices, and the configuration that the overrides compose.

    Hydra's own help copies each of its configurations for each group that it lists, which takes longer than all else.
    """
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides)
    choices = [
        f"  {group.name}: {', '.join(sorted(file.stem for file in group.glob('*.yaml') if file.stem[0] != '_'))}"
        for group in _groups()
    ]
    return "\n".join(
        [
            "usage: python -m cifar.train [GROUP=CHOICE] [KEY=VALUE] ... [-m]",
            "\nTrains one network; with -m, one for each combination of comma-separated values.",
            "\nGroups and their choices:\n",
            *choices,
            "\nSettings, with the choices above as given (also: --cfg job):\n",
            OmegaConf.to_yaml(cfg).rstrip(),
            "\nFlags of Hydra: --hydra-help",
        ]
    )


def difference(recorded: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return "optimizer.lr was 0.1 and is 0.2, ...": the settings of what is trained that are not as recorded."""
    old, new = (
        {k: v for k, v in flatten(one).items() if k.split(".")[0] not in NOT_TRAINED} for one in (recorded, settings)
    )
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed)


def _groups() -> list[Path]:
    return sorted(path for path in Path(CONF).iterdir() if path.is_dir() and path.name not in ("__pycache__", "hydra"))


def _keys(group: Path) -> list[str]:
    choices = [OmegaConf.load(path) for path in sorted(group.glob("*.yaml"))]
    return [str(key) for choice in choices for key in choice if not str(key).startswith("_") and key != "defaults"]


def config_hash(settings: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that are equal for configurations that train the same run.

    How a run is recorded (`logger`) and whether it goes on from a checkpoint (`resume`) do not count.
    """
    relevant = {key: value for key, value in settings.items() if key not in NOT_TRAINED}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fit(key: str, value: Any, annotation: Any) -> None:
    try:
        # Strict JSON rules: "0.1" is no number and true is no integer, but a list fits a tuple and 1 fits a float.
        TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reasons = dict.fromkeys(_reason(item["msg"]) for item in error.errors())
        shown = "null" if value is None else value
        raise ConfigError(f"{key}={shown}: {' or '.join(reasons)}") from None


def _reason(message: str) -> str:
    return message.replace("Input should be", "must be").replace("None", "null")


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, child in node.items():
            yield from _targets(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _targets(child, f"{key}[{position}]")


def _has_target(value: Any) -> bool:
    return next(_targets(value), None) is not None
