"""The settings of a training run, under the names of flags and json files."""

from dataclasses import dataclass

# --optimizer -> weight decay unless --weight_decay says otherwise; names as in transformers' `--optim`
WEIGHT_DECAY = {"adamw_hf": 0.0, "adamw_torch": 0.01}
MIXED_PRECISION = {"no": None, "bf16": "bfloat16", "fp16": "float16"}  # --mixed_precision -> torch's dtype
CIDER, CLIP = "cider", "clip"
REWARDS = (CIDER, CLIP, f"{CIDER}+{CLIP}")
# flags of train.py whose values train_scst.py takes from the checkpoint's CaptionConfig
OF_THE_CHECKPOINT = (
    "mapping_type", "prefix_length", "prefix_length_clip", "num_layers", "num_heads", "normalize_prefix",
)  # fmt: skip


@dataclass
class TrainingConfig:
    """How a captioner is trained; every field affects the resulting weights.

    Args:
        data: feature store.
        val_data: feature store that is scored after every epoch and decides which weights are kept as the best.
        init_from: checkpoint whose weights training starts from, or None.
        epochs: passes over the captions.
        bs: captions per batch, of all processes together.
        optimizer: key of WEIGHT_DECAY.
        lr: its peak learning rate.
        weight_decay: decoupled weight decay; None: the optimiser's default.
        warmup_steps: optimiser steps of linear warm-up, before the linear decay to zero.
        gradient_accumulation_steps: batches per optimiser step.
        mixed_precision: key of MIXED_PRECISION, autocast's dtype.
        group_by_length: batches hold captions of similar length.
        seed: of initial weights, shuffling, dropout and noise.
        noise_angle: degrees that text embeddings are turned by in training; None: the store is of images.
        match: feature store of images that text embeddings are matched to, or None.
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


@dataclass
class RewardConfig(TrainingConfig):
    """How a captioner is trained on a reward.

    Args:
        reward: one of REWARDS.
        samples: captions sampled per image.
        kl: weight of the divergence from the captioner at the start.
    """

    reward: str = CIDER
    samples: int = 5
    kl: float = 0.0
