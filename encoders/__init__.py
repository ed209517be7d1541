"""Image encoders: any of them behind one interface, `base.ImageEncoder`."""

from encoders import openai_clip


def load_encoder(name, device="cpu", dtype=None, tokens=None):
    """Load an encoder.

    Args:
        name: what --clip_model_type takes.
        device: torch device.
        dtype: as the flag --dtype; None: float32 on the CPU, elsewhere as the weights are stored.
        tokens: `pooled`, one vector an image; `patches`, all tokens of the last layer; None: what the encoder is for.
    Returns: ImageEncoder.
    Raises: ValueError for a name that is none, or a file that is no encoder; FileNotFoundError where a named one is not
        in the cache and cannot be fetched.
    """
    return openai_clip.OpenAIClip(name, device, dtype, tokens)


def named_sha256(name):
    """Return the SHA-256 of the one file that a published name stands for; None: it stands for none."""
    return openai_clip.named_sha256(name)


def known_encoder(described):
    """Return what tells an encoder: its file's hash, which some names have too, else its name; None: unknown.

    Args:
        described: what the json of a store or a captioner's configuration says, as a dictionary.
    """
    name = described.get("clip_model_type")
    return described.get("clip_sha256") or named_sha256(name) or name
