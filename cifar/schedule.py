"""Learning-rate schedules as pure functions of the step.

Each function here takes the run's number of optimizer steps and returns `factor(step)`: what every parameter group's
base learning rate is multiplied by at the 0-based optimizer step `step` (step 0 makes the first update). Nothing else
is kept, so a resumed run needs only its step. Positions are shares of all steps, so that a schedule keeps its shape
when the number of epochs changes. Steps past the end get the last factor.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]
Schedule = Callable[[int], float]


def constant(total_steps: int, warmup: Share = 0.0) -> Schedule:
    """The base rate throughout, after a linear rise over the share `warmup` of the steps."""
    return _after_warmup(total_steps, warmup, lambda progress: 1.0)


def step(total_steps: int, milestones: Sequence[Share] = (0.5, 0.75), gamma: Share = 0.1) -> Schedule:
    """The base rate times `gamma` for each milestone, a share of all steps, that has been reached.

    Equals `torch.optim.lr_scheduler.MultiStepLR` whose milestones are these shares times `total_steps`, rounded up.
    """

    def factor(step: int) -> float:
        # The quotient, not milestone * total_steps: it is exact where the two sides are equal (0.07 * 100 exceeds 7).
        return gamma ** sum(step / total_steps >= milestone for milestone in milestones)

    return factor


def linear(total_steps: int, warmup: Share = 0.0, final: Share = 0.0) -> Schedule:
    """Linear rise over the share `warmup`, then a straight line to `final` times the base rate.

    Without warm-up it equals `torch.optim.lr_scheduler.LinearLR(start_factor=1, end_factor=final,
    total_iters=total_steps)`.
    """
    return _after_warmup(total_steps, warmup, lambda progress: 1 + (final - 1) * progress)


def cosine(total_steps: int, warmup: Share = 0.05, final: Share = 0.0) -> Schedule:
    """Linear rise over the share `warmup`, then half a cosine down to `final` times the base rate.

    Without warm-up it equals `torch.optim.lr_scheduler.CosineAnnealingLR(T_max=total_steps, eta_min=final * lr)`
    (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, without restarts).
    """
    return _after_warmup(total_steps, warmup, lambda progress: _half_cosine(1.0, final, progress))


def one_cycle(total_steps: int, peak_at: Share = 0.3, start: Share = 0.04, final: Share = 4e-6) -> Schedule:
    """Half a cosine up from `start` to 1 until the share `peak_at`, then half a cosine down to `final`.

    `lr` is the peak. Equals `torch.optim.lr_scheduler.OneCycleLR(max_lr=lr, pct_start=peak_at, div_factor=1 / start,
    final_div_factor=start / final, anneal_strategy="cos", cycle_momentum=False)`, whose defaults these are (Smith &
    Topin 2019, https://arxiv.org/abs/1708.07120).
    """
    last = total_steps - 1
    peak = peak_at * total_steps - 1  # as torch counts: the step that ends the rise, not always a whole number

    def factor(step: int) -> float:
        step = min(step, last)
        if step <= peak:
            return _half_cosine(start, 1.0, step / peak if peak > 0 else 1.0)
        return _half_cosine(1.0, final, (step - peak) / (last - peak))

    return factor


def _after_warmup(total_steps: int, warmup: float, decay: Callable[[float], float]) -> Schedule:
    """Rise to 1 over the share `warmup`, from above 0 so that no update is lost; then `decay(progress from 0 to 1)`."""
    warmup_steps = round(warmup * total_steps)
    decay_steps = max(1, total_steps - warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return decay(min(1.0, (step - warmup_steps) / decay_steps))

    return factor


def _half_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * progress)) / 2
