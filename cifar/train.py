"""Train one network, or a sweep of them: `python -m cifar.train [GROUP=CHOICE] [KEY=VALUE] ... [-m]`.

Compose, build, fit, write the result. Torch is imported only once a run starts, so `--help` and `--cfg job` answer at once.
"""

import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cifar import distributed, launcher
from cifar.config import CONF, build, check, config_hash, help_text, to_container
from cifar.errors import one_line, reported
from cifar.run import Job, Run, environment, relative
from cifar.signals import Interrupted, Stop, stop_on_signals
from cifar.sweep import (
    ChangedSweepError,
    already_finished,
    arguments_of_resumed_run,
    refuse_targets_for_hydra,
    summarize,
)

log = logging.getLogger(__name__)


def train(cfg: DictConfig, job: Job) -> float | None:
    """Train and test the run that `cfg` describes, in the job's folder, and leave its record there, however it ends.

    Returns the best validation accuracy, which a search goes by; None where nothing is held out.
    """
    run, world = Run(job.folder), distributed.world()
    with run.locked(), stop_on_signals() as signals, world.agreed(signals) as stop:
        if not (job.sweep and already_finished(run, cfg)):
            run.record_command(OmegaConf.to_yaml(cfg), job.overrides, job.hydra)
            with run.recording(overrides=job.overrides, seed=cfg.seed) as result:
                check(cfg)
                settings = to_container(cfg)
                result["config_hash"] = config_hash(settings)
                run.write_result(result)
                world.send(settings)
                with world.watching():
                    fit_and_test(cfg, settings, job, run, result, stop)
        best = (run.result() or {})["best"]
        return best and best["value"]


def fit_and_test(
    cfg: DictConfig, settings: dict[str, Any], job: Job, run: Run, result: dict[str, Any], stop: Stop
) -> None:
    """Build every component of `cfg`, go on from the run's checkpoint where there is one, train, test; fill in `result`.

    Of several processes, the first alone reads and writes the run's folder.
    """
    import torch

    from cifar import checkpoint, fused
    from cifar import logger as loggers
    from cifar.data.batches import Batches, Normalize
    from cifar.logger import warm_up
    from cifar.models import check_sizes

    world = distributed.world()
    if world.leads:
        warm_up(cfg.logger._target_)
    torch.manual_seed(cfg.seed)
    trainer = build(cfg.trainer)()
    if job.sweep and trainer.progress is None:
        trainer.progress = False  # the sweep shows its jobs, see cifar.live
    device = trainer.torch_device
    result["environment"] = environment(device) | {"processes": world.size}

    group = fused.group()
    if group:
        group.join(trainer)
    source, data_key = build(cfg.data)(), repr((settings["data"], device))
    with world.in_turn():
        data = fused.once(data_key, lambda: source.load().to(device))
    normalize = Normalize(data.mean, data.std, device)
    augment = build(cfg.augment)(len(data.classes))
    batches = partial(
        Batches,
        normalize=normalize,
        memory_format=trainer.memory_format,
        rank=world.rank,
        size=world.size,
        shared=group is not None,
    )
    training = fused.once(
        (data_key, repr(settings["augment"]), cfg.seed),
        lambda: batches(
            data.train,
            batch_size=source.batch_size,
            first_sizes=source.first_sizes,
            augment=augment,
            drop_last=source.drop_last,
            seed=cfg.seed,
        ),
    )
    validation = data.val and batches(data.val, batch_size=trainer.eval_batch_size)
    test = batches(data.test, batch_size=trainer.eval_batch_size)

    model = world.synchronized(build(cfg.model)(data.image_shape, len(data.classes)), device)
    model.to(device, memory_format=trainer.memory_format)
    if hasattr(model, "initialize"):  # what a model's first weights take from the data
        model.initialize(normalize(data.train.images[:5000]))
    check_sizes(model, data.image_shape[0], source.first_sizes)
    loss = build(cfg.loss)
    optimizer = build(cfg.optimizer)(model.parameters())
    schedule = build(cfg.schedule)(trainer.epochs * len(training))

    state = trainer.start(model, optimizer, data.describe() | {"steps": len(training)}, settings)
    if world.leads:
        checkpoint.resume(state, run.checkpoints())
        run.keep_rows(state.rows)
    world.share(state)
    world.reseed(cfg.seed, state.step)

    def save(state: checkpoint.State, is_best: bool) -> None:
        world.reseed(cfg.seed, state.step)
        if not world.leads:
            return
        newest = run.step_checkpoint(state.step)
        checkpoint.save(state.state_dict(), newest)
        run.keep(newest, is_best, trainer.keep_last)

    with (build(cfg.logger) if world.leads else loggers.none)(job, settings, state.wandb_id) as logger:
        result["wandb"] = logger.info
        state.wandb_id = logger.info and logger.info["id"]

        def record(row: dict[str, Any]) -> None:
            if world.leads:
                run.log(row)
                logger.log(row)

        log.info("%s: %s on %s", run.dir, training, result["environment"]["device_name"])
        if world.size > 1:
            log.info("%d processes, each with its part of every batch", world.size)
        try:
            trainer.fit(state, loss, schedule, training, validation, record, save, stop)
            if world.leads and run.best.exists():
                checkpoint.load_evaluated(state.evaluated, run.best)
            world.share(state.evaluated)
            trainer.test(state, loss, test, record)
        finally:
            result |= {"metrics": run.last_values(), "best": state.best, "epochs": state.epoch, "steps": state.step}
            result["seconds"] |= state.seconds
            result["images_per_second"] = state.images / state.seconds["train"] if state.seconds["train"] else None


def follow() -> None:
    """Take this process's part in the run that the first one leads: build the same, train the same, write nothing."""
    world = distributed.world()
    logging.getLogger().setLevel(logging.ERROR)
    settings = world.receive()
    if settings is None:
        return
    with stop_on_signals() as signals, world.agreed(signals) as stop:
        try:
            with world.watching():
                fit_and_test(OmegaConf.create(settings), settings, Job(Path()), Run(Path()), {"seconds": {}}, stop)
        except Interrupted as interrupted:
            sys.exit(interrupted.status)
        except Exception as error:
            if not world.is_told(error):
                print(f"process {world.rank}: error: {one_line(error)}", file=sys.stderr)
            sys.exit(1)


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run one job: the only one, or one of a sweep, where a failure is said (its value is None) and the others go on."""
    hydra_cfg = HydraConfig.get()
    job = Job(
        relative(hydra_cfg.runtime.output_dir), list(hydra_cfg.overrides.task), OmegaConf.to_yaml({"hydra": hydra_cfg})
    )
    if hydra_cfg.mode == RunMode.MULTIRUN:
        job = replace(job, sweep=relative(hydra_cfg.sweep.dir), number=hydra_cfg.job.num)
    try:
        return train(cfg, job)
    except Interrupted as interrupted:
        interrupted.hand_on()
        raise
    except (Exception, SystemExit) as error:
        # Hydra would print its own words over ours and, in a sweep, stop at the end without a table.
        failures.append(error)
        if job.sweep:
            print(f"job {job.number} failed: {one_line(error)}", file=sys.stderr, flush=True)
        if isinstance(error, ChangedSweepError):
            sys.exit(1)  # the jobs to come would be of another sweep than those in the folder
        return None


failures: list[BaseException] = []  # of the jobs that ran in this process


def cli() -> None:
    """The command: exits 0 only when every job finished."""
    with distributed.leaving(), reported():
        if not distributed.world().leads:
            follow()
            return
        # -m may stand anywhere; argparse, which reads the line for Hydra, would have it before or after all overrides.
        arguments = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
        refuse_targets_for_hydra(arguments)
        if {"-h", "--help"} & {*arguments}:
            print(help_text([argument for argument in arguments if not argument.startswith("-")]))
            return
        sys.argv[1:] = arguments_of_resumed_run(arguments)
        launcher.register()
        try:
            main()
        finally:
            distributed.world().send(None)  # unless they had theirs, there is nothing for the other processes to do
            sweep_finished = summarize()
        if sweep_finished is None and failures:
            raise failures[0]
        if sweep_finished is False or failures:
            sys.exit(1)


if __name__ == "__main__":
    cli()
