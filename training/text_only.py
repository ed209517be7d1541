"""Training on texts instead of images, as the flags of training.text_flags say."""

from dataclasses import replace

from features.store import check_encoders, read_store
from features.text_only import FEWEST, MatchedTexts
from training.text_flags import AUTO
from utils.cli import note

MOST_ANGLE = 80  # beyond which an image and its text have next to nothing in common


def read_match(path, noise_angle, store, val_store=None):
    """Read --match, after checking that each store holds what its flag needs, texts or images.

    Args:
        path, noise_angle: the flags' values, or None.
        store: FeatureStore of --data. val_store: of --val_data, or None.
    Returns: FeatureStore, or None.
    Raises: ValueError where the stores and flags do not fit each other; else as `read_store`.
    """
    _check_modality(store, noise_angle, val_store)
    if not path:
        return None
    match = read_store(path)
    if match.is_of_texts:
        raise ValueError(f"--match {path} holds texts; it takes images (parse_coco.py --no_captions)")
    if match.num_tokens:
        raise ValueError(f"--match {path} holds tokens, and texts are one vector each; extract it with --tokens pooled")
    check_encoders(f"--match {path}", match, f"--data {store.path}", store.shape, store.info)
    if len(match.clip_embedding) < FEWEST:
        raise ValueError(f"--match {path} holds {len(match.clip_embedding)} images; {FEWEST} are needed")
    return match


def _check_modality(store, noise_angle, val_store):
    """Refuse texts where images are needed, and the reverse."""
    if store.is_of_texts and noise_angle is None:
        raise ValueError(
            f"--data {store.path} holds texts: pass --noise_angle auto --match STORE, with a store of a few images "
            "(parse_coco.py --no_captions), else what is learned does not fit images"
        )
    if noise_angle is not None and store.info and not store.is_of_texts:
        raise ValueError(
            f"--noise_angle is for texts, and --data {store.path} holds images: leave it out, or make a store of texts "
            "by parse_coco.py --text_only"
        )
    if noise_angle is not None and store.num_tokens:
        raise ValueError(f"--noise_angle is for texts, and --data {store.path} holds tokens of images: leave it out")

    if noise_angle is not None and not store.info:
        note(f"warning: no json beside --data {store.path} says what its rows are: they are taken for texts'")
    if val_store and val_store.is_of_texts:
        raise ValueError(
            f"--val_data {val_store.path} holds texts, and captions are scored on images; pass a store of images"
        )


def prepare_texts(store, noise_angle, match):
    """Return (the store with its text embeddings moved to where images lie, the angle in degrees).

    Args:
        store: FeatureStore of texts.
        noise_angle: in degrees, or AUTO.
        match: FeatureStore of images, or None.
    Raises: ValueError where AUTO finds images and texts unrelated.
    """
    texts = MatchedTexts(store.clip_embedding, match and match.clip_embedding)
    if noise_angle == AUTO:
        noise_angle = round(texts.angle, 1)
        if not 0 < noise_angle < MOST_ANGLE:
            raise ValueError(
                f"--noise_angle auto: images of {match.path} are {noise_angle} degrees from the nearest texts; "
                "pass images of what the texts describe, or an angle"
            )
        note(f"--noise_angle auto: {noise_angle} degrees, from {len(match.clip_embedding):,} images of {match.path}")
    return replace(store, clip_embedding=texts), noise_angle
