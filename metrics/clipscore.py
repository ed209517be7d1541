"""CLIPScore and RefCLIPScore on embeddings (Hessel et al., 2021, arXiv 2104.08718).

The published scores embed images and captions with CLIP ViT-B/32 and put "A photo depicts " before every caption and
reference.
"""

import numpy as np

WEIGHT = 2.5  # section 3 of the paper
PROMPT = "A photo depicts "


def add_clip_scores(scores, captions, references, image_embeddings, encode_texts):
    """Add CLIPScore and RefCLIPScore to a system's scores.

    Args:
        scores: metrics.coco.Scores of N images.
        captions: {image id: caption}.
        references: {image id: [caption, ...]}.
        image_embeddings: [N, D], in the order of `scores.ids`.
        encode_texts: function of a list of texts to [number, D].
    """
    text_embeddings = encode_texts([PROMPT + captions[i] for i in scores.ids])
    scores.keep("CLIPScore", clip_scores(image_embeddings, text_embeddings))
    flat = encode_texts([PROMPT + reference for i in scores.ids for reference in references[i]])
    ends = np.cumsum([len(references[i]) for i in scores.ids])
    scores.keep(
        "RefCLIPScore", ref_clip_scores(image_embeddings, text_embeddings, np.split(np.asarray(flat), ends[:-1]))
    )


def text_scores(image_embeddings, texts, encode_texts):
    """Score texts against their images without references; each different text is embedded once, in one call.

    Args:
        image_embeddings: [N, D].
        texts: N captions.
        encode_texts: function of a list of texts to [number, D].
    Returns: [N], see `clip_scores`.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    embedded = np.asarray(encode_texts([PROMPT + text for text in number]))
    return clip_scores(image_embeddings, embedded[[number[text] for text in texts]])


def clip_scores(image_embeddings, caption_embeddings):
    """Score captions against their images without references.

    Args:
        image_embeddings: [N, D], of any norm.
        caption_embeddings: [N, D], of any norm.
    Returns: [N] 2.5 * max(cosine, 0); the score of a system is their mean.
    Raises: ValueError where the shapes differ.
    """
    images, captions = _unit(image_embeddings), _unit(caption_embeddings)
    if images.shape != captions.shape:
        raise ValueError(f"image embeddings {images.shape} and caption embeddings {captions.shape} must match")
    return WEIGHT * np.maximum((images * captions).sum(1), 0)


def ref_clip_scores(image_embeddings, caption_embeddings, reference_embeddings):
    """Score captions against their images and references.

    Args:
        image_embeddings: [N, D].
        caption_embeddings: [N, D].
        reference_embeddings: N arrays [R_i, D], R_i >= 1.
    Returns: [N] harmonic mean of CLIPScore and max(0, the largest cosine to a reference).
    Raises: ValueError where the shapes differ.
    """
    scores, captions = clip_scores(image_embeddings, caption_embeddings), _unit(caption_embeddings)
    if len(reference_embeddings) != len(captions):
        raise ValueError(f"{len(captions)} captions and references of {len(reference_embeddings)} images must match")
    nearest = np.array([max(0, *_unit(r) @ c) for r, c in zip(reference_embeddings, captions, strict=True)])  # [N]
    total = scores + nearest
    return np.divide(2 * scores * nearest, total, out=np.zeros_like(total), where=total > 0)


def _unit(embeddings):
    """Return float64 rows of length 1."""
    embeddings = np.asarray(embeddings, dtype=np.float64)
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings have shape {embeddings.shape}; [number, width] is needed")
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
