"""The training loop: steps, stops, saves and what an epoch ends with."""

import time

import torch

from training.run_files import DivergedError, StopRequest, saved_on_error
from training.validation import show_samples
from utils.cli import note, progress_bar
from utils.processes import is_main, world_size


def fit(trainer, files, log, tokenizer, save_every, save_steps, validation=None):
    """Run the epochs that are left.

    Args:
        save_every: epochs between checkpoints.
        save_steps: optimiser steps between saves to resume from.
        validation: Validation to run after every epoch.
    Raises: KeyboardInterrupt once a requested stop has saved the state; ValueError where the loss is not finite.
    """
    epochs = trainer.config.epochs
    with StopRequest() as stop, saved_on_error(trainer, files, log):
        while trainer.epoch < epochs:
            description = f"epoch {trainer.epoch + 1}/{epochs}"
            with progress_bar(trainer.batches, description, "batch", initial=trainer.batch) as bar:
                for group in trainer.epoch_batches():
                    step_and_log(trainer, group, log, files)
                    bar.set_postfix(loss=f"{log.last_loss:.3f}", refresh=False)
                    bar.update(len(group))
                    stopping = stop.asked()
                    if stopping or trainer.step % save_steps == 0:
                        files.save_step(trainer, log)
                    if stopping:
                        raise KeyboardInterrupt(f"step {trainer.step} is saved; the same command with --resume goes on")
            finish_epoch(trainer, files, log, tokenizer, save_every, validation)


def step_and_log(trainer, group, log, files):
    """Take one step, count it and log it.

    Raises: DivergedError naming step and last checkpoint where the loss is not finite or the captions collapse.
    """
    started = time.perf_counter()
    try:
        loss, rate = trainer.train_step(group)
    except ArithmeticError as error:
        last = files.last_checkpoint()
        remedy = (
            "lower --lr or use --mixed_precision bf16 or no"
            if isinstance(error, FloatingPointError)
            else "lower --lr, raise --kl, or use --reward cider+clip"
        )
        raise DivergedError(
            f"{error} at step {trainer.step + 1}, epoch {trainer.epoch}; "
            f"{f'the last good weights are {last}' if last else 'no checkpoint was written yet'}: {remedy}"
        ) from None
    trainer.step += 1
    trainer.batch += len(group)
    examples = sum(len(batch[0]) for batch in group) * world_size()
    log.add(
        trainer.step, trainer.epoch, loss, rate, examples / (time.perf_counter() - started), trainer.objective.metrics()
    )


def finish_epoch(trainer, files, log, tokenizer, save_every, validation):
    """End an epoch: validate, show samples, save, and count it."""
    epoch = trainer.epoch
    random = torch.get_rng_state()  # samples must not change what training draws next
    if validation:
        log.flush()
        files.save_state(trainer)  # a stop while validating loses no step
        validation.run(trainer, tokenizer, files, log)
    # in all processes: a sharded model needs each of them
    show_samples(trainer.model, tokenizer, trainer.dataset, epoch, files.decoding)
    torch.set_rng_state(random)
    log.flush()
    if is_main():
        log.plot(files.plot)
    trainer.epoch, trainer.batch = epoch + 1, 0
    if epoch % save_every == 0 or trainer.epoch == trainer.config.epochs:
        files.save_weights(trainer.model, epoch)
    files.save_state(trainer)
    note(f"epoch {epoch} done: step {trainer.step}, mean loss {log.mean_loss(epoch):.4f}")
