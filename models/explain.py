"""What a caption rests on: image regions behind each of its words, and the words nearest to the prefix.

Axes: B batch, D CLIP width, G grid cells a side, P prefix, R input resolution, T caption tokens, W words.
"""

import re

import numpy as np
import torch
from torch.nn import functional as F

WORD = re.compile(r"\s*(\w+(?:['’-]\w+)*|[^\w\s]+)")  # with the space before it, which may be a token of its own
GRID = 8  # cells a side
WINDOW = 3  # cells a side of the mask, which moves by one cell: narrower ones rarely change a word


def split_words(tokenizer, tokens):
    """Return the words of a caption, each with the positions of its tokens: [("red", [3, 4]), ...]."""
    decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
    ends = [len(decode(tokens[: i + 1])) for i in range(len(tokens))]
    # a token that only completes a character adds no length; it belongs to that character
    spans = [(min(start, end - 1), end) for start, end in zip([0, *ends], ends, strict=False)]
    return [
        (word[1], [i for i, (start, end) in enumerate(spans) if start < word.end() and end > word.start()])
        for word in WORD.finditer(decode(tokens))
    ]


@torch.inference_mode()
def token_logprobs(model, tokens, clip_embedding, before=()):
    """Score one caption under several images.

    Args:
        model: ClipCaptionModel, in evaluation mode.
        tokens: T token ids.
        clip_embedding: [B, D].
        before: token ids between prefix and caption, as `opening_tokens` returns them.
    Returns: [B, T] log-probability of each token, given the image and the tokens before it.
    """
    device, images = model.gpt.get_input_embeddings().weight.device, len(clip_embedding)
    read = torch.tensor([*before, *tokens], device=device).expand(images, -1)
    lengths = torch.full((images,), read.shape[1])
    return model.token_logprobs(read, clip_embedding.to(device), lengths).view(images, -1)[:, len(before) :]


def masked_images(pixels, grid=GRID, window=WINDOW):
    """Hide every window of a grid in turn behind the image's mean colour.

    Args:
        pixels: [3, R, R].
        grid: G.
        window: cells a side; windows reach over the edge, so that all cells are hidden equally often.
    Returns: list of (rows slice, columns slice) in cells, and [(G + window - 1)², 3, R, R].
    """
    edges = np.linspace(0, pixels.shape[-1], grid + 1).round().astype(int)
    spans = [slice(max(low, 0), min(low + window, grid)) for low in range(1 - window, grid)]
    cells = [(rows, columns) for rows in spans for columns in spans]
    images = pixels.repeat(len(cells), 1, 1, 1)
    for image, (rows, columns) in zip(images, cells, strict=True):
        top, bottom, left, right = edges[[rows.start, rows.stop, columns.start, columns.stop]]
        image[:, top:bottom, left:right] = pixels.mean((1, 2))[:, None, None]
    return cells, images


def word_heat(model, tokenizer, encode, pixels, tokens, batch_size=32, grid=GRID, window=WINDOW, before=()):
    """Find the image regions that each word of a caption rests on, by hiding them.

    Args:
        model: ClipCaptionModel, in evaluation mode.
        tokenizer: of its language model.
        encode: function of pixels [B, 3, R, R] to CLIP embeddings [B, D].
        pixels: [3, R, R], preprocessed for `encode`.
        tokens: the caption's token ids.
        batch_size: masked images at a time.
        before: see `token_logprobs`.
    Returns: words; [W, G, G] the share, 0..1, of the word's probability that is lost where a cell is hidden: the mean
        over the windows that hold the cell; [W] the share that is lost where the whole picture is hidden.
    Source: occlusion sensitivity, Zeiler and Fergus (arXiv 1311.2901), on the caption's log-probability.
    """
    words = split_words(tokenizer, tokens)
    cells, images = masked_images(pixels, grid, window)
    # the whole picture hidden: pixels 0, the encoder's mean; its own mean colour would still tell snow from grass
    images = torch.cat([images, torch.zeros_like(pixels)[None]])
    unhidden = token_logprobs(model, tokens, encode(pixels[None]), before)
    hidden = torch.cat([token_logprobs(model, tokens, encode(part), before) for part in images.split(batch_size)])
    drops = (unhidden - hidden).cpu().numpy()  # [windows + 1, T]
    drops = np.stack([drops[:, positions].sum(1) for _, positions in words], 1)  # [windows + 1, W]
    lost = 1 - np.exp(-drops.clip(min=0))
    heat, count = np.zeros((len(words), grid, grid)), np.zeros((grid, grid))
    for place, shares in zip(cells, lost[:-1], strict=True):
        count[place] += 1
        heat[(slice(None), *place)] += shares[:, None, None]
    return [word for word, _ in words], heat / count, lost[-1]


@torch.inference_mode()
def nearest_words(model, tokenizer, clip_embedding, count=3):
    """Read an image's prefix back as words of the language model.

    Args:
        clip_embedding: [1, D].
        count: words per position; special tokens and those without a letter or digit are passed over.
    Returns: per prefix position, up to `count` (word, cosine), nearest first.
    Source: ClipCap paper, section 4.3, figure 5.
    """
    words = model.gpt.get_input_embeddings().weight  # [V, E]
    prefix = model.prefix(clip_embedding.to(words.device))[0].float()  # [P, E]
    words = F.normalize(words.float(), dim=-1)
    nearest = (F.normalize(prefix, dim=-1) @ words.T).topk(min(20 * count, len(words)))  # [P, 20 · count]
    read = []
    for cosines, ids in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True):
        texts = [
            (tokenizer.decode([token], skip_special_tokens=True).strip(), cosine)
            for token, cosine in zip(ids, cosines, strict=True)
        ]
        read.append([(text, cosine) for text, cosine in texts if re.search(r"\w", text)][:count])
    return read
