"""What a captioner learns: an objective turns batches of data into captions to be scored, and their scores into a loss.

This is all that the training loop knows of an objective:
    dataset: gives batches, see CaptionDataset.
    dropout: whether the captioner is in training mode while captions are scored.
    examples(batches, step): the captions to score in a step, a list of Examples that each fit in memory.
    loss(logprobs, example): the sum of its tokens' losses.
    metrics(): {name: number} of the step, for the log; the same in all processes.
    state(), load_state(state): what a resumed run needs besides the model, as plain data.

Axes: B captions, T tokens, D CLIP width.
"""

from dataclasses import dataclass

import torch


@dataclass
class Example:
    """Captions that are scored in one forward pass.

    Args:
        tokens: [B, T] token ids, padded on the right.
        clip_embedding: [B, D].
        lengths: [B] tokens without padding.
        counted: number of tokens that the mean loss is over.
    """

    tokens: torch.Tensor
    clip_embedding: torch.Tensor
    lengths: torch.Tensor
    counted: int


class CrossEntropy:
    """Cross-entropy on the dataset's captions (ClipCap paper, equation 2)."""

    dropout = True

    def __init__(self, dataset):
        """Learn the captions of a CaptionDataset."""
        self.dataset = dataset

    def examples(self, batches, step):
        """Return the dataset's batches, each as an Example in which every token counts."""
        return [Example(*batch, counted=int(batch[-1].sum())) for batch in batches]

    def loss(self, logprobs, example):
        """Return the summed cross-entropy of log-probabilities [sum(lengths)]."""
        return -logprobs.sum()

    def metrics(self):
        """Return nothing: the loss says all."""
        return {}

    def state(self):
        """Return nothing: the objective never changes."""
        return {}

    def load_state(self, state):
        """Go back to what `state` returned."""
