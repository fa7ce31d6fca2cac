import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from cifar.schedule import Schedule, constant, cosine, linear, one_cycle, step

LR = 0.3


def torch_factors(scheduler: Callable[..., Any], count: int, **arguments: Any) -> list[float]:
    """The rate of each optimizer step under torch's own scheduler, over the base rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = scheduler(optimizer, **arguments)
    factors = []
    for _ in range(count):
        factors.append(optimizer.param_groups[0]["lr"] / LR)
        optimizer.step()
        if len(factors) < count:  # OneCycleLR refuses one step more
            schedule.step()
    return factors


def factors(schedule: Schedule, total_steps: int) -> list[float]:
    return [schedule(i) for i in range(total_steps)]


@pytest.mark.parametrize("total", [3, 7, 100, 1000])
@pytest.mark.parametrize(("peak_at", "start", "final"), [(0.3, 0.04, 4e-6), (0.5, 0.1, 0.001), (0.23, 0.2, 0.2)])
def test_one_cycle_is_torchs(total: int, peak_at: float, start: float, final: float) -> None:
    expected = torch_factors(
        lr_scheduler.OneCycleLR,
        total,
        max_lr=LR,
        total_steps=total,
        pct_start=peak_at,
        div_factor=1 / start,
        final_div_factor=start / final,
        anneal_strategy="cos",
        cycle_momentum=False,
    )
    assert factors(one_cycle(total, peak_at, start, final), total) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_cycle_defaults_are_torchs() -> None:
    expected = torch_factors(lr_scheduler.OneCycleLR, 50, max_lr=LR, total_steps=50, cycle_momentum=False)
    assert factors(one_cycle(50), 50) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("total", [1, 9, 500])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_without_warmup_is_torchs(total: int, final: float) -> None:
    expected = torch_factors(lr_scheduler.CosineAnnealingLR, total, T_max=total, eta_min=final * LR)
    assert factors(cosine(total, warmup=0.0, final=final), total) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_linear_without_warmup_is_torchs(final: float) -> None:
    expected = torch_factors(lr_scheduler.LinearLR, 90, start_factor=1, end_factor=final, total_iters=90)
    assert factors(linear(90, final=final), 90) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("total", [100, 37, 2, 1])
@pytest.mark.parametrize(("milestones", "gamma"), [([0.5, 0.75], 0.1), ([0.07, 0.29, 0.58], 0.5), ([], 0.1)])
def test_step_is_torchs(total: int, milestones: list[float], gamma: float) -> None:
    whole = [math.ceil(round(milestone * total, 9)) for milestone in milestones]
    expected = torch_factors(lr_scheduler.MultiStepLR, total, milestones=whole, gamma=gamma)
    assert factors(step(total, milestones, gamma), total) == pytest.approx(expected)


@pytest.mark.parametrize("total", range(1, 201))
def test_step_falls_exactly_at_its_milestone(total: int) -> None:
    for k in range(1, total):
        schedule = step(total, [k / total], 0.5)
        assert (schedule(k - 1), schedule(k)) == (1.0, 0.5)


def test_points_by_hand() -> None:
    assert factors(step(8), 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert factors(constant(5, warmup=0.4), 5) == [0.5, 1, 1, 1, 1]
    # 10 steps, 2 of them warm-up, then 8 down: the last is an eighth of the way from the end.
    assert factors(linear(10, warmup=0.2, final=0.2), 10) == pytest.approx(
        [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    )
    half = cosine(10, warmup=0.2, final=0.1)
    assert [half(0), half(1), half(2), half(6), half(10)] == pytest.approx([0.5, 1, 1, 0.55, 0.1])
    assert half(4) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    up = one_cycle(10, peak_at=0.5, start=0.2, final=0.0)
    assert [up(0), up(2), up(4), up(9)] == pytest.approx([0.2, 0.6, 1, 0])


ALL = {
    "constant": lambda total: constant(total, warmup=0.5),
    "step": lambda total: step(total, [0, 0.5, 1], 0.1),
    "linear": lambda total: linear(total, warmup=0.5),
    "all warm-up": lambda total: linear(total, warmup=1.0, final=0.5),
    "cosine": lambda total: cosine(total, warmup=0.5, final=0.1),
    "one_cycle": lambda total: one_cycle(total),
    "one_cycle, no rise": lambda total: one_cycle(total, peak_at=0.0),
    "one_cycle, no fall": lambda total: one_cycle(total, peak_at=1.0),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_factors_stay_between_0_and_1_to_the_end_and_beyond(name: str, total: int) -> None:
    schedule = ALL[name](total)
    assert all(0 <= schedule(i) <= 1 for i in range(total + 3))
    assert schedule(total + 1) == schedule(total + 100)


def test_beyond_the_end_the_last_factor_stays() -> None:
    assert one_cycle(10)(25) == pytest.approx(4e-6)
    assert cosine(10, final=0.1)(25) == pytest.approx(0.1)
    assert linear(10)(25) == 0
    assert linear(4, warmup=1.0, final=0.5)(25) == 0.5
    assert step(10)(25) == pytest.approx(0.01)
    assert constant(10, warmup=0.3)(25) == 1


@pytest.mark.parametrize("schedule", [constant, linear, cosine])
def test_warmup_rises_evenly_from_above_0(schedule: Callable[..., Schedule]) -> None:
    warm = schedule(1000, warmup=0.05)
    assert factors(warm, 50) == pytest.approx([(i + 1) / 50 for i in range(50)])
    assert warm(0) > 0


@pytest.mark.parametrize("schedule", [constant, step, linear, cosine])
def test_shape_does_not_depend_on_the_number_of_steps(schedule: Callable[..., Schedule]) -> None:
    short, long = schedule(1000), schedule(20_000)
    # Both are read where their warm-up, if any, has ended.
    assert [short(i) for i in range(100, 1000, 10)] == pytest.approx([long(20 * i) for i in range(100, 1000, 10)])
