"""The state of a training run and its step, without any files."""

import contextlib
import math

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import get_linear_schedule_with_warmup

from features.dataset import batches_per_epoch, epoch_batches
from models.placement import get_optimizer_state, get_weights, is_sharded, set_optimizer_state, set_weights
from models.products import multiply_by_onednn
from training.optimizers import make_optimizer
from training.settings import MIXED_PRECISION
from utils.devices import keep_freed_memory
from utils.distributed import all_gather, all_sum
from utils.processes import check_shares, rank, share, world_size


class Trainer:
    """The state of a run: model, optimiser, schedule, random numbers, place in the data."""

    def __init__(self, model, objective, config, device):
        """Set up optimiser and schedule.

        Args:
            model: ClipCaptionModel, on `device`.
            objective: what the captioner learns and from which data, such as CrossEntropy.
            config: TrainingConfig.
        Raises: ValueError where the batches cannot be shared out over the processes.
        """
        dataset = objective.dataset
        check_shares(config.bs, len(dataset))
        self.model, self.objective, self.dataset, self.config, self.device = model, objective, dataset, config, device
        if device.type == "cpu":
            keep_freed_memory()
            if not is_sharded(model):
                multiply_by_onednn(model)
        self.token_logprobs = data_parallel(model)
        if rank():  # process 0 draws the dropout of a single-process run; the others draw their own
            torch.manual_seed(config.seed + rank())
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # fused: one pass over the weights instead of a dozen; it does not take sharded ones
        self.optimizer = make_optimizer(
            config.optimizer, self.trained.values(), config.lr, config.weight_decay, fused=not is_sharded(model)
        )
        self.batches = batches_per_epoch(len(dataset), config.bs)
        self.steps_per_epoch = math.ceil(self.batches / config.gradient_accumulation_steps)
        self.scheduler = get_linear_schedule_with_warmup(
            self.optimizer, config.warmup_steps, config.epochs * self.steps_per_epoch
        )
        name = MIXED_PRECISION[config.mixed_precision]
        self.dtype = name and getattr(torch, name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.epoch = self.step = self.batch = 0  # batch: batches done in this epoch
        self.best = None  # the highest validation CIDEr so far

    def train_step(self, batches):
        """Take one optimiser step on the mean loss over all counted tokens of all processes' `batches`.

        Args:
            batches: list of the dataset's batches, this process' part.
        Returns: (loss, learning rate), the same in all processes.
        Raises: FloatingPointError where the loss is not finite; weights and optimiser are unchanged then.
        """
        with self.autocast():
            examples = self.objective.examples(batches, self.step)
        self.model.train(self.objective.dropout)
        total = all_sum(sum(example.counted for example in examples))
        loss = torch.zeros((), device=self.device)
        for number, example in enumerate(examples, 1):
            wait = number < len(examples) and isinstance(self.token_logprobs, DistributedDataParallel)
            with self.token_logprobs.no_sync() if wait else contextlib.nullcontext():
                with self.autocast():
                    # from pinned memory: the copy does not wait for the GPU's current work
                    inputs = (v.to(self.device, non_blocking=True) for v in (example.tokens, example.clip_embedding))
                    logprobs = self.token_logprobs(*inputs, example.lengths)
                    part = self.objective.loss(logprobs, example) / total
                # gradients are averaged over the processes, but their sum is wanted
                self.scaler.scale(part * world_size()).backward()
            loss += part.detach().to(self.device)
        loss = all_sum(loss.item())  # waits for the GPU once, not in every batch
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            raise FloatingPointError(f"the loss is {loss}")
        rate = self.scheduler.get_last_lr()[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss, rate

    def autocast(self):
        """Return the context in which the captioner computes, with the dtype of --mixed_precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def epoch_batches(self):
        """Yield this process' part of the rest of the epoch, a list of batches per optimiser step."""
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
        """Return the GPUs whose random state is saved: all of them for a single process, which may split a model."""
        if self.device.type != "cuda":
            return []
        return list(range(torch.cuda.device_count())) if world_size() == 1 else [self.device]

    def state(self):
        """Return all that resuming needs, with any number of processes, as tensors and plain data.

        Every process must call this; process 0 gets the whole state.
        """
        weights = get_weights(self.model, trained_only=True)
        cuda_states = [torch.cuda.get_rng_state(device) for device in self.cuda_devices()]
        return {
            "trained": {name: weights[name] for name in self.trained if name in weights},
            "optimizer": get_optimizer_state(self.model, self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": all_gather((torch.get_rng_state(), cuda_states)),
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
            "best": self.best,
            "objective": self.objective.state(),
            "captions": len(self.dataset),
        }

    def load_state(self, state):
        """Go back to what `state` returned.

        Raises: ValueError where it belongs to other data or another model.
        """
        if state["captions"] != len(self.dataset):
            raise ValueError(
                f"the run to resume had {state['captions']:,} {self.dataset.unit} and --data has "
                f"{len(self.dataset):,}; pass the same --data, or begin anew without --resume"
            )
        shapes = {name: value.shape for name, value in state["trained"].items()}
        if shapes != {name: p.shape for name, p in self.trained.items()}:
            raise ValueError(
                "the run to resume trained other weights; pass the same options, or begin anew without --resume"
            )
        optimizer = by_name(state["optimizer"], list(shapes))
        for group in optimizer["param_groups"]:  # sharding may differ between the saved run and this one
            group["fused"] = not is_sharded(self.model)
        set_optimizer_state(self.model, self.optimizer, optimizer)
        set_weights(self.model, state["trained"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == world_size():
            on_cpu, on_cuda = state["random"][rank()]
            torch.set_rng_state(on_cpu)
            before = [on_cuda] if isinstance(on_cuda, torch.Tensor) else on_cuda or []  # one: earlier versions
            for device, values in zip(self.cuda_devices(), before, strict=False):
                torch.cuda.set_rng_state(values, device)
        self.epoch, self.step, self.batch = state["epoch"], state["step"], state["batch"]
        self.best = state.get("best")
        if "objective" in state:  # absent from states of earlier versions
            self.objective.load_state(state["objective"])


def by_name(state, names):
    """Return an optimiser's state keyed by weight names; files of earlier versions number the weights.

    Args:
        state: as torch or `get_optimizer_state` returns it.
        names: of the weights, in the optimiser's order.
    """
    name = lambda key: names[key] if isinstance(key, int) else key  # noqa: E731
    return {
        "state": {name(key): values for key, values in state["state"].items()},
        "param_groups": [group | {"params": [*map(name, group["params"])]} for group in state["param_groups"]],
    }


class TokenLogprobs(torch.nn.Module):
    """A captioner's log-probabilities as a module's `forward`, which is what DistributedDataParallel takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, clip_embedding, lengths):
        """See `ClipCaptionModel.token_logprobs`."""
        return self.model.token_logprobs(tokens, clip_embedding, lengths)


def data_parallel(model):
    """Return `model.token_logprobs`; where there are several processes, gradients are averaged over them."""
    if world_size() == 1 or is_sharded(model):
        return model.token_logprobs
    return DistributedDataParallel(TokenLogprobs(model), broadcast_buffers=False)
