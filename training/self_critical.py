"""Self-critical sequence training: sampled captions with more reward than their image's others become likelier.

Axes: B images, N samples an image, R = B·N captions, T tokens, D CLIP width.
Source: Rennie et al. (arXiv 1612.00563). The baseline, the mean of an image's other samples, is from ruotianluo/
self-critical.pytorch; the estimate of the divergence from the captioner at the start is "k3" of Schulman, Approximating
KL Divergence (2020).
"""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch

from models.decoding import context_room, generate_captions
from models.placement import is_sharded
from models.settings import GREEDY, SAMPLE, DecodingConfig
from models.slots import step_for
from models.stopping import end_tokens, opening_tokens
from training.objectives import Example
from utils.distributed import all_gather, all_sum, all_union
from utils.processes import rank

WINDOW = 20  # newest steps, compared with as many first steps
COLLAPSED = 0.5  # fraction of the first steps' share of distinct, or ended, captions below which training stops
CHECKED = 40  # images captioned before the start


class CollapsedError(ArithmeticError):
    """The captions no longer tell images apart, or no longer end."""


@dataclass
class SampledExample(Example):
    """Sampled captions.

    Args:
        advantage: [sum(lengths)] of each token's caption; 0 for tokens not sampled, such as a prompt's.
        sampled: [sum(lengths)] 1 for sampled tokens, else 0.
    """

    advantage: torch.Tensor = None
    sampled: torch.Tensor = None


class SelfCritical:
    """Maximise the expected reward, whose gradient is estimated from N samples per image."""

    dropout = False  # the captions are scored by the very captioner that drew them

    def __init__(self, model, tokenizer, dataset, rewards, samples, decoding, seed=0, kl=0.0, reference=None):
        """Set up sampling.

        Args:
            model: ClipCaptionModel that learns, where it runs.
            tokenizer: of its language model.
            dataset: ImageDataset.
            rewards: list of rewards (training/rewards.py); their advantages are added, each divided by its deviation.
            samples: N, at least 2.
            decoding: DecodingConfig of the captioner: its prompt, stop text and length.
            seed: of sampling.
            kl: weight of the divergence from `reference`, per token.
            reference: ClipCaptionModel as it was at the start; None where `kl` is 0.
        """
        self.model, self.tokenizer, self.dataset, self.rewards = model, tokenizer, dataset, rewards
        self.samples, self.kl, self.reference = samples, kl, reference
        self.before, self.ends = opening_tokens(tokenizer, decoding.prompt), end_tokens(tokenizer, model.gpt)
        room = context_room(model.gpt.config, model.config.prefix_length + len(self.before))
        self.decoding = DecodingConfig(
            SAMPLE, entry_length=min(decoding.entry_length, room), stop_token=decoding.stop_token,
            prompt=decoding.prompt, top_p=1.0, num_captions=samples, seed=seed,
        )  # fmt: skip
        self.logged, self.divergence, self.counted = {}, 0.0, 0
        self.at_first, self.lately = [], deque(maxlen=WINDOW)  # (share distinct, share that ended) of a step

    def check_trained(self):
        """Refuse a captioner that does not caption yet: its own samples cannot teach it.

        Raises: ValueError.
        """
        _, embeddings = self.dataset.batch(range(min(CHECKED, len(self.dataset))))
        greedy = replace(self.decoding, method=GREEDY, num_captions=1)
        captions = [group[0] for group in self._caption(embeddings, greedy, None)]
        unlike = len({embedding.numpy().tobytes() for embedding in embeddings}) > 1
        if unlike and len({caption.text for caption in captions}) == 1:
            raise ValueError(
                f"--init_from: the captioner says {captions[0].text!r} of {len(captions)} different images: a reward "
                "cannot teach what it never says; train it by train.py first"
            )
        if not any(self._ended(caption) for caption in captions):
            raise ValueError(
                f"--init_from: none of {len(captions)} captions ends within {self.decoding.entry_length} tokens; "
                "train it by train.py first"
            )

    def examples(self, batches, step):
        """Sample captions of the batches' images and weigh them by their rewards.

        Args:
            batches: list of (image indices [B], clip_embedding [B, D]), this process' part.
            step: optimiser steps taken; seeds the sampling, together with the image.
        Returns: list of SampledExamples of at most B captions of similar length, so batches are as large as in
            cross-entropy training.
        Raises: CollapsedError.
        """
        numbers = torch.cat([numbers for numbers, _ in batches]).tolist()
        embeddings = torch.cat([embeddings for _, embeddings in batches])  # [B, D]
        groups = self._sample(numbers, embeddings, step, max(len(part) for part, _ in batches))
        captions = [caption for group in groups for caption in group]  # [R]
        images = np.repeat(numbers, self.samples)
        repeated = embeddings.repeat_interleave(self.samples, 0)  # [R, D]
        ended = [self._ended(caption) for caption in captions]
        advantage = self._advantage([caption.text for caption in captions], images, repeated, ended)
        self._watch(groups, ended)
        # sorted by length, so that little is padded
        order = sorted(range(len(captions)), key=lambda row: len(captions[row].tokens))
        size = max(len(part) for part, _ in batches)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        examples = [self._example([captions[row] for row in part], advantage[part], repeated[part]) for part in parts]
        self.divergence, self.counted = 0.0, sum(example.counted for example in examples)
        return examples

    def _caption(self, embeddings, decoding, keys):
        self.model.eval()
        device = next(self.model.clip_project.parameters()).device
        return self.model.caption(generate_captions, self.tokenizer, embeddings.to(device), decoding, step_for, keys)

    def _sample(self, numbers, embeddings, step, size):
        """Return N Captions of each image, `size` images at a time."""
        mine = slice(0, len(numbers))
        if is_sharded(self.model):  # sharded weights need all processes on the same images
            everyone = all_gather((numbers, embeddings))
            before = sum(len(theirs) for theirs, _ in everyone[: rank()])
            mine = slice(before, before + len(numbers))
            numbers = [number for theirs, _ in everyone for number in theirs]
            embeddings = torch.cat([theirs for _, theirs in everyone])
        groups = []
        for start in range(0, len(numbers), size):
            keys = [f"{step} {number}".encode() for number in numbers[start : start + size]]
            groups += self._caption(embeddings[start : start + size], self.decoding, keys)
        return groups[mine]

    def _ended(self, caption):
        """Tell whether a caption ended by itself, not at the length limit."""
        stop = self.decoding.stop_token
        said_so = caption.tokens[-1] in self.ends or bool(stop and stop in caption.text)
        return len(caption.tokens) < self.decoding.entry_length or said_so

    def _advantage(self, texts, images, embeddings, ended):
        """Return each caption's reward less the mean of its image's others, [R] float32, over the step's deviation."""
        total = np.zeros(len(texts))
        for reward in self.rewards:
            values = reward(texts, images, embeddings, ended)  # [R]
            groups = values.reshape(-1, self.samples)  # [B, N]
            others = (groups.sum(1, keepdims=True) - groups) / (self.samples - 1)
            advantage = (groups - others).ravel()
            count = all_sum(len(texts))
            spread = (all_sum(float((advantage**2).sum())) / count) ** 0.5
            self.logged[f"reward_{reward.name}"] = all_sum(float(values.sum())) / count
            self.logged[f"advantage_spread_{reward.name}"] = spread
            if spread > 0:
                total += advantage / spread
        return torch.from_numpy(total).float()

    def _watch(self, groups, ended):
        """Log the captions' length and variety, and stop where they have collapsed.

        Raises: CollapsedError.
        """
        captions, count = sum(map(len, groups)), all_sum(len(groups))
        self.logged["length"] = all_sum(sum(len(c.tokens) for group in groups for c in group)) / all_sum(captions)
        # one sample per image: an image's samples may well agree
        distinct = len(all_union({group[0].text for group in groups})) / count
        self.logged["share_of_distinct_captions"] = distinct
        self.lately.append((distinct, all_sum(sum(ended)) / all_sum(captions)))
        if len(self.at_first) < WINDOW:
            self.at_first.append(self.lately[-1])
            return
        (distinct, whole), (distinct_before, whole_before) = (
            np.mean(steps, axis=0) for steps in (self.lately, self.at_first)
        )
        if distinct < COLLAPSED * distinct_before:
            raise CollapsedError(
                f"the captions have collapsed: {distinct:.0%} of different images' captions differ, and "
                f"{distinct_before:.0%} did at first"
            )
        if whole < COLLAPSED * whole_before:
            raise CollapsedError(
                f"the captions have collapsed: {whole:.0%} of them end by themselves, {whole_before:.0%} did at first"
            )

    def _example(self, captions, advantage, embeddings):
        """Return captions [R], their advantages [R] and embeddings [R, D] as a SampledExample."""
        rows = [torch.tensor([*self.before, *caption.tokens]) for caption in captions]
        lengths = torch.tensor([len(row) for row in rows])
        sampled = torch.cat([torch.arange(len(row)) >= len(self.before) for row in rows]).float()
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        per_token = advantage.repeat_interleave(lengths) * sampled
        return SampledExample(tokens, embeddings, lengths, int(sampled.sum()), per_token, sampled)

    def loss(self, logprobs, example):
        """Return the summed loss of log-probabilities [sum(lengths)]: -advantage · log p, and the divergence."""
        sampled = example.sampled.to(logprobs.device)
        losses = -example.advantage.to(logprobs.device) * logprobs
        if self.kl:
            device = next(self.reference.clip_project.parameters()).device
            with torch.no_grad():
                before = self.reference.token_logprobs(
                    example.tokens.to(device), example.clip_embedding.to(device), example.lengths
                ).to(logprobs.device)
            ratio = before - logprobs
            divergence = (ratio.exp() - ratio - 1) * sampled
            self.divergence += divergence.detach().sum().item()
            losses = losses + self.kl * divergence
        return losses.sum()

    def metrics(self):
        """Return rewards, spreads of the advantage, length, share of distinct captions, divergence per token."""
        divergence = {"kl": all_sum(self.divergence) / all_sum(self.counted)} if self.kl else {}
        return {name: round(value, 5) for name, value in (self.logged | divergence).items()}

    def state(self):
        """Return what collapse is detected by; sampling depends on the number of steps taken only."""
        return {"at_first": self.at_first, "lately": list(self.lately)}

    def load_state(self, state):
        """Go back to what `state` returned."""
        self.at_first, self.lately = state["at_first"], deque(state["lately"], WINDOW)
