"""The optimisers of the two predecessors, which share a name and little else."""

import math

import torch

from training.settings import WEIGHT_DECAY

EPS = 1e-6  # of adamw_hf
# of runs whose json does not record them
BEFORE_THE_OPTION = {"optimizer": "adamw_torch", "weight_decay": WEIGHT_DECAY["adamw_torch"]}


class TransformersAdamW(torch.optim.AdamW):
    """The AdamW that transformers had up to 4.46: no weight decay unless asked for, eps before the bias correction.

    Its update, lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + eps), is torch's with eps / √(1 − β₂ᵗ) at step t, so
    torch's fused kernel can compute it.

    Source: transformers 4.46 optimization.py `AdamW`, which rmokady train.py imports. Weight decay comes before the
    update, as in torch; in transformers it came after.
    """

    def step(self, closure=None):
        """Take a step; steps that the loss scaler skips do not count in t."""
        for group in self.param_groups:
            states = (self.state[p] for p in group["params"] if self.state.get(p))
            taken = next((int(state["step"]) for state in states), 0)
            group["eps"] = EPS / math.sqrt(1 - group["betas"][1] ** (taken + 1))
        return super().step(closure)


def make_optimizer(name, parameters, lr, weight_decay, fused):
    """Return the optimiser that --optimizer names.

    Args:
        name: key of WEIGHT_DECAY.
        parameters: the trainable ones.
        lr: peak learning rate.
        weight_decay: decoupled weight decay; a step multiplies the weights by 1 - lr * weight_decay.
        fused: update all weights in one pass.
    """
    optimizer = {"adamw_hf": TransformersAdamW, "adamw_torch": torch.optim.AdamW}[name]
    return optimizer(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
