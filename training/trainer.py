"""The state of a training run and its step; knows no file."""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import get_linear_schedule_with_warmup

from features.dataset import batches_per_epoch, epoch_batches
from models.placement import is_sharded, laid_out_as, whole
from training.optimizers import WEIGHT_DECAY, make_optimizer
from utils.distributed import all_gather, all_sum, check_shares, rank, share, world_size

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainingConfig:
    """How a captioner is trained; all of it decides the weights that come out.

    Args:
        data: feature store.
        val_data: feature store that is scored after every epoch and decides which weights are kept as the best.
        init_from: checkpoint whose weights training starts from, or None.
        epochs: passes over the captions.
        bs: captions per batch, of all processes together.
        optimizer: key of WEIGHT_DECAY.
        lr: its peak learning rate.
        weight_decay: share of a weight, times the learning rate, that a step takes off; None: the optimiser's own.
        warmup_steps: optimiser steps of linear warm-up, before the linear decay to zero.
        gradient_accumulation_steps: batches per optimiser step.
        mixed_precision: key of DTYPES, the type that autocast uses.
        group_by_length: batches hold captions of similar length.
        seed: of initial weights, shuffling, dropout and noise.
        noise_angle: degrees that texts' embeddings are turned by in training; None: they are of images.
        match: feature store of images to where the texts are moved, or None.
    """

    data: str
    val_data: str | None = None
    init_from: str | None = None
    epochs: int = 10
    bs: int = 40
    optimizer: str = "adamw_hf"
    lr: float = 2e-5
    weight_decay: float | None = None
    warmup_steps: int = 5000
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    group_by_length: bool = False
    seed: int = 0
    noise_angle: float | None = None
    match: str | None = None

    def __post_init__(self):
        if self.weight_decay is None:
            self.weight_decay = WEIGHT_DECAY[self.optimizer]


class Trainer:
    """The state of a run: model, optimiser, schedule, random numbers, place in the data."""

    def __init__(self, model, dataset, config, device):
        """Set up optimiser and schedule.

        Args:
            model: ClipCaptionModel, on `device`.
            dataset: CaptionDataset.
            config: TrainingConfig.
        Raises: ValueError where the batches cannot be shared out over the processes.
        """
        check_shares(config.bs, len(dataset))
        self.model, self.dataset, self.config, self.device = model, dataset, config, device
        self.loss = data_parallel(model)
        if rank():  # process 0 goes on as one process would; the others draw other dropout
            torch.manual_seed(config.seed + rank())
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # one pass over the weights instead of a dozen; sharded ones it does not take
        self.optimizer = make_optimizer(
            config.optimizer, self.trained.values(), config.lr, config.weight_decay, fused=not is_sharded(model)
        )
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
        """Take one optimiser step on the mean loss over all caption tokens of all processes' `batches`.

        Args:
            batches: list of (tokens [B, T], clip_embedding [B, D], lengths [B]), this process' part.
        Returns: (loss, learning rate), the same in all processes.
        Raises: FloatingPointError where the loss is not finite; nothing has been changed then.
        """
        self.model.train()
        total = all_sum(sum(int(lengths.sum()) for _, _, lengths in batches))
        loss = torch.zeros((), device=self.device)
        for number, (tokens, embeddings, lengths) in enumerate(batches, 1):
            wait = number < len(batches) and isinstance(self.loss, DistributedDataParallel)
            with self.loss.no_sync() if wait else contextlib.nullcontext():
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    # from pinned memory: the copy does not wait for what the GPU is at
                    batch = (values.to(self.device, non_blocking=True) for values in (tokens, embeddings))
                    part = self.loss(*batch, lengths)
                part = part * (int(lengths.sum()) / total)
                # gradients are averaged over the processes, and their sum is wanted
                self.scaler.scale(part * world_size()).backward()
            loss += part.detach().to(self.device)
        loss = all_sum(loss.item())  # here the GPU is waited for, not in every batch
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
        """Yield what is left of this epoch, as lists of the batches of one optimiser step, this process' part."""
        lengths = self.dataset.text_lengths if self.config.group_by_length else None
        order = epoch_batches(len(self.dataset), self.config.bs, self.config.seed, self.epoch, lengths)
        own = [share(batch) for batch in order[self.batch :]]
        batches = self.dataset.batches(own, pin_memory=self.device.type == "cuda", epoch=self.epoch)
        group = []
        for done, batch in enumerate(batches, self.batch + 1):
            group.append(batch)
            if len(group) == self.config.gradient_accumulation_steps or done == self.batches:
                yield group
                group = []

    def cuda_devices(self):
        """Return the GPUs that random numbers are drawn on: all that one process may split a model over."""
        if self.device.type != "cuda":
            return []
        return list(range(torch.cuda.device_count())) if world_size() == 1 else [self.device]

    def state(self):
        """Return all that a continuation needs, in however many processes, as tensors and plain data.

        Every process must call it; process 0 gets all of it.
        """
        optimizer = self.optimizer.state_dict()
        cuda_states = [torch.cuda.get_rng_state(device) for device in self.cuda_devices()]
        return {
            "trained": whole({name: p.detach() for name, p in self.trained.items()}),
            "optimizer": optimizer | {"state": {i: whole(values) for i, values in optimizer["state"].items()}},
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": all_gather((torch.get_rng_state(), cuda_states)),
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
                parameter.copy_(laid_out_as(parameter, state["trained"][name]))
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # the run that was saved may have been sharded, or this one is
            group["fused"] = not is_sharded(self.model)
        for parameter, values in self.optimizer.state.items():
            values.update({k: laid_out_as(parameter, v) for k, v in values.items() if v.ndim})  # `step` has none
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == world_size():
            on_cpu, on_cuda = state["random"][rank()]
            torch.set_rng_state(on_cpu)
            before = [on_cuda] if isinstance(on_cuda, torch.Tensor) else on_cuda or []  # one: of earlier versions
            for device, values in zip(self.cuda_devices(), before, strict=False):
                torch.cuda.set_rng_state(values, device)
        self.epoch, self.step, self.batch = state["epoch"], state["step"], state["batch"]
        self.best = state.get("best")


class Loss(torch.nn.Module):
    """A captioner's loss as a module's `forward`, which is what DistributedDataParallel takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, clip_embedding, lengths):
        """See `ClipCaptionModel.loss`."""
        return self.model.loss(tokens, clip_embedding, lengths)


def data_parallel(model):
    """Return the captioner's loss; where there are several processes, its gradients are averaged over them."""
    if world_size() == 1 or is_sharded(model):
        return model.loss
    return DistributedDataParallel(Loss(model), broadcast_buffers=False)
