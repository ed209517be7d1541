"""The optimisers of the two predecessors, which share a name and little else."""

import math

import torch

from training.settings import WEIGHT_DECAY

EPS = 1e-6  # of adamw_hf
# of runs whose json does not say
BEFORE_THE_OPTION = {"optimizer": "adamw_torch", "weight_decay": WEIGHT_DECAY["adamw_torch"]}


class TransformersAdamW(torch.optim.AdamW):
    """The AdamW that transformers had up to 4.46: no weight decay unless asked for, eps before the bias correction.

    Its update, lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + eps), is torch's with eps / √(1 − β₂ᵗ) at step t, so that
    torch's fused kernel takes it.

    Source: transformers 4.46 optimization.py `AdamW`, which rmokady train.py imports. Weight decay comes before the
    update, as in torch; there it comes after.
    """

    def step(self, closure=None):
        """Take a step; one that the loss scaler skips does not count in t."""
        for group in self.param_groups:
            states = (self.state[p] for p in group["params"] if self.state.get(p))
            taken = next((int(state["step"]) for state in states), 0)
            group["eps"] = EPS / math.sqrt(1 - group["betas"][1] ** (taken + 1))
        return super().step(closure)


def make_optimizer(name, parameters, lr, weight_decay, fused):
    """Return the optimiser that --optimizer names.

    Args:
        name: key of WEIGHT_DECAY.
        parameters: those that learn.
        lr: peak learning rate.
        weight_decay: share of a weight, times the learning rate, that a step takes off.
        fused: update all weights in one pass.
    """
    optimizer = {"adamw_hf": TransformersAdamW, "adamw_torch": torch.optim.AdamW}[name]
    return optimizer(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
