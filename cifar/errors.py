"""What a person sees when a command fails: one line on stderr, and an exit status that is not 0."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf.errors import MissingMandatoryValue

from cifar.config import suggestion
from cifar.signals import Interrupted


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, with its type where the message alone wouldn't say what went wrong."""
    message = " ".join(str(error).split())
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give it as {error.full_key}=VALUE"
    if isinstance(error, MissingConfigException) and "/" in (missing := error.missing_cfg_file or ""):
        group, _, choice = missing.rpartition("/")
        said = f"{group}={choice}: no such choice"
        if error.options:  # none are known where another file asked for it, as launcher/ray_local does
            said += f"; {group} can be {', '.join(sorted(error.options))}"
        extra = choice.partition("_")[0]
        adds = extra in ("joblib", "submitit", "optuna", "ray")
        return f"{said}; pip install 'cifar[{extra}]' adds {choice}" if adds else said
    if isinstance(error, ConfigCompositionException) and (override := re.match(r"Could not override '(.+?)'", message)):
        return (
            f"{override[1]}: no such setting{suggestion(override[1])} `python -m cifar.train --cfg job` lists them all"
        )
    # These carry sentences written for a person; of others (KeyError: 'x') the type is half of the message.
    if message and isinstance(error, ValueError | OSError | RuntimeError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def reported() -> Iterator[None]:
    """Run a command's body: any exception becomes one line on stderr and exit status 1 (an interruption: its own).

    With HYDRA_FULL_ERROR=1 the exception goes through, traceback and all. A run's folder keeps it in any case, in
    `train.log` and `result.json`.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") not in (None, "", "0")
    # Hydra itself would print its own several lines and exit; with this set it lets the exception through to here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output (`| head`) has gone; closing stdout quietly is what other commands do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if full:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
