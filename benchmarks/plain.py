"""The predecessors' plain methods, in a few lines each: the baseline that ours is measured against.

Source: rmokady/CLIP_prefix_caption parse_coco.py, train.py and predict.py, at the same settings.
"""

import torch
from PIL import Image
from skimage import io
from torch.nn import functional as F

from models.searches import Beam, decode
from models.steps import UncachedStep


def encode_captions(clip_model, preprocess, records):
    """Encode one image per caption, one at a time.

    Args:
        records: image files, each as often as it has captions.
    Returns: list of [1, D].
    """
    with torch.no_grad():
        return [clip_model.encode_image(preprocess(Image.fromarray(io.imread(path))).unsqueeze(0)) for path in records]


def greedy_caption(gpt, embeddings, length):
    """Run the whole sequence again for every token of one image's caption.

    Args:
        embeddings: [1, P, E].
        length: new tokens.
    Returns: list of token ids.
    """
    tokens = []
    with torch.no_grad():
        for _ in range(length):
            logits = gpt(inputs_embeds=embeddings).logits[:, -1]  # [1, V]
            token = logits.argmax(-1)
            tokens.append(token.item())
            embeddings = torch.cat((embeddings, gpt.get_input_embeddings()(token)[:, None]), dim=1)
    return tokens


def beam_caption(gpt, embeddings, config, stop):
    """Run the whole sequence again for every token of all beams; returns the best beam's token ids."""
    with torch.no_grad():
        return decode(UncachedStep(gpt, embeddings), Beam(config, stop))[0][0].tokens


def training_step(model, optimizer, tokens, clip_embedding, mask, autocast):
    """Take one step with every caption padded to the longest, logits everywhere, and the frozen model's gradients.

    Args:
        tokens: [B, T] padded with 0; mask: [B, P + T].
        autocast: context of the forward pass.
    Returns: the loss.
    """
    with autocast:
        logits = model(tokens, clip_embedding, mask)  # [B, P + T, V]
        logits = logits[:, model.config.prefix_length - 1 : -1]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.flatten(), ignore_index=0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def padded_length(lengths):
    """Return the predecessor's caption length: the longest, or ten standard deviations above the mean."""
    return min(int(lengths.mean() + 10 * lengths.std()), int(lengths.max()))
