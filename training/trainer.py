"""The state of a training run and its step; knows no file."""

import math
from dataclasses import dataclass

import torch
from transformers import get_linear_schedule_with_warmup

from features.dataset import batches_per_epoch, epoch_batches

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainingConfig:
    """How a captioner is trained; all of it decides the weights that come out.

    Args:
        data: feature store.
        val_data: feature store that is scored after every epoch and decides which weights are kept as the best.
        init_from: checkpoint whose weights training starts from, or None.
        epochs: passes over the captions.
        bs: captions per batch.
        lr: peak learning rate of AdamW.
        warmup_steps: optimiser steps of linear warm-up, before the linear decay to zero.
        gradient_accumulation_steps: batches per optimiser step.
        mixed_precision: key of DTYPES, the type that autocast uses.
        group_by_length: batches hold captions of similar length.
        seed: of initial weights, shuffling and dropout.
    """

    data: str
    val_data: str | None = None
    init_from: str | None = None
    epochs: int = 10
    bs: int = 40
    lr: float = 2e-5
    warmup_steps: int = 5000
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    group_by_length: bool = False
    seed: int = 0


class Trainer:
    """The state of a run: model, optimiser, schedule, random numbers, place in the data."""

    def __init__(self, model, dataset, config, device):
        """Set up optimiser and schedule.

        Args:
            model: ClipCaptionModel, on `device`.
            dataset: CaptionDataset.
            config: TrainingConfig.
        """
        self.model, self.dataset, self.config, self.device = model, dataset, config, device
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=config.lr)
        self.batches = batches_per_epoch(len(dataset), config.bs)
        self.steps_per_epoch = math.ceil(self.batches / config.gradient_accumulation_steps)
        self.scheduler = get_linear_schedule_with_warmup(
            self.optimizer, config.warmup_steps, config.epochs * self.steps_per_epoch
        )
        self.dtype = DTYPES[config.mixed_precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.epoch = self.step = self.batch = 0  # batch: batches done in this epoch
        self.best = None  # the highest validation CIDEr so far

    def train_step(self, batches):
        """Take one optimiser step on the mean loss over all caption tokens of `batches`.

        Args:
            batches: list of (tokens [B, T], clip_embedding [B, D], lengths [B]).
        Returns: (loss, learning rate).
        Raises: FloatingPointError where the loss is not finite; nothing has been changed then.
        """
        self.model.train()
        total = sum(int(lengths.sum()) for _, _, lengths in batches)
        loss = 0.0
        for tokens, embeddings, lengths in batches:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                part = self.model.loss(tokens.to(self.device), embeddings.to(self.device), lengths)
            part = part * (int(lengths.sum()) / total)
            self.scaler.scale(part).backward()
            loss += part.item()
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            raise FloatingPointError(f"the loss is {loss}")
        rate = self.scheduler.get_last_lr()[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss, rate

    def epoch_batches(self):
        """Yield what is left of this epoch, as lists of the batches of one optimiser step."""
        lengths = self.dataset.text_lengths if self.config.group_by_length else None
        order = epoch_batches(len(self.dataset), self.config.bs, self.config.seed, self.epoch, lengths)
        group = []
        for done, batch in enumerate(self.dataset.batches(order[self.batch :]), self.batch + 1):
            group.append(batch)
            if len(group) == self.config.gradient_accumulation_steps or done == self.batches:
                yield group
                group = []

    def state(self):
        """Return all that a continuation needs, as tensors and plain data."""
        return {
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
            "best": self.best,
            "captions": len(self.dataset),
        }

    def load_state(self, state):
        """Go back to what `state` returned.

        Raises: ValueError where it belongs to other data or another model.
        """
        if state["captions"] != len(self.dataset):
            raise ValueError(
                f"the run to resume had {state['captions']:,} captions and --data has {len(self.dataset):,}; "
                f"pass the same --data, or begin anew without --resume"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.epoch, self.step, self.batch = state["epoch"], state["step"], state["batch"]
        self.best = state.get("best")
