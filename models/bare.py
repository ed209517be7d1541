"""The predecessors' bare checkpoints, which have no json: their configuration from the weights' keys and shapes."""

from models.mapping import recognise_mapping_network
from models.settings import CaptionConfig
from utils.cli import note
from utils.lean import lean

with lean():
    from transformers import GPT2Config, OPTConfig

MAPPING = "clip_project."  # what the names of a mapping network's weights begin with
OPT_EMBEDDINGS = "gpt.model.decoder.embed_tokens.weight"
# width of the language model's embeddings -> its name on the hub; heads are 64 wide in all of them
GPT2_NAMES = {768: "gpt2", 1024: "gpt2-medium", 1280: "gpt2-large", 1600: "gpt2-xl"}
OPT_NAMES = {
    (768, 12): "facebook/opt-125m", (2048, 24): "facebook/opt-1.3b", (2560, 32): "facebook/opt-2.7b",
    (4096, 32): "facebook/opt-6.7b", (5120, 40): "facebook/opt-13b",
}  # fmt: skip
# mapping network, P, K, D and layers of the published transformer weights, trained on normalised embeddings
PUBLISHED_TRANSFORMER = ("transformer", 40, 40, 640, 8)
# width of the CLIP embedding -> the encoder that the predecessors used for it
CLIP_NAMES = {512: "ViT-B/32", 640: "RN50x4", 768: "ViT-L/14", 1024: "RN50"}


def infer_config(state_dict, path="the checkpoint"):
    """Read a captioner's configuration off the shapes of its weights.

    Args:
        state_dict: name -> tensor.
        path: named in errors.
    Returns: CaptionConfig; what shapes cannot tell (normalisation) has its default.
    Raises: ValueError where there is no mapping network or language model.
    """
    embedding = state_dict.get("gpt.transformer.wte.weight")
    if embedding is None:
        embedding = state_dict.get(OPT_EMBEDDINGS)
    if embedding is None:
        raise ValueError(f"{path} has no gpt.* weights of GPT-2 or OPT, and no json beside it: it is no captioner")
    width = embedding.shape[1]
    mapping = {key.removeprefix(MAPPING): value for key, value in state_dict.items() if key.startswith(MAPPING)}
    found = recognise_mapping_network(mapping, width)
    if found is None and mapping:
        raise ValueError(f"{path} has a mapping network that keys and shapes do not identify: put its json beside it")
    if found is None:
        raise ValueError(f"{path} has no mapping network (clip_project.model.* or clip_project.transformer.*)")
    config = CaptionConfig(**found, language_model=_language_model_name(state_dict, width))
    config.clip_model_type = CLIP_NAMES.get(config.prefix_dim)
    return config


def _count(state_dict, stem):
    """Return how many numbered layers there are under `stem`."""
    return len({key[len(stem) :].split(".")[0] for key in state_dict if key.startswith(stem)})


def _language_model_name(state_dict, width):
    """Return the hub's name of the language model with these shapes, or '' where none has them."""
    if "gpt.transformer.wte.weight" in state_dict:
        return GPT2_NAMES.get(width, "")
    return OPT_NAMES.get((width, _count(state_dict, "gpt.model.decoder.layers.")), "")


def infer_language_config(state_dict):
    """Build transformers' configuration of a GPT-2 or OPT of the published sizes from the shapes of its weights.

    Returns: the configuration, or None for another architecture or unpublished sizes: weights do not tell the number
        of heads.
    """
    embedding = state_dict.get("gpt.transformer.wte.weight")
    if embedding is not None and embedding.shape[1] in GPT2_NAMES:
        vocab_size, width = embedding.shape
        return GPT2Config(
            vocab_size=vocab_size, n_embd=width, n_head=width // 64,
            n_layer=_count(state_dict, "gpt.transformer.h."),
            n_positions=len(state_dict["gpt.transformer.wpe.weight"]),
        )  # fmt: skip
    embedding = state_dict.get(OPT_EMBEDDINGS)
    if embedding is not None and embedding.shape[1] in {width for width, _ in OPT_NAMES}:
        vocab_size, width = embedding.shape
        return OPTConfig(
            vocab_size=vocab_size, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
            num_attention_heads=width // (80 if width == 2560 else 128 if width in (4096, 5120) else 64),
            num_hidden_layers=_count(state_dict, "gpt.model.decoder.layers."),
        )  # fmt: skip
    return None


def guess_normalization(checkpoint, config, state_dict):
    """Turn normalisation on for the published transformer, recognised by its shapes; warn for other checkpoints."""
    shape = (config.mapping_type, config.prefix_length, config.prefix_length_clip, config.prefix_dim, config.num_layers)
    layers = _count(state_dict, "gpt.transformer.h.")
    if shape == PUBLISHED_TRANSFORMER and (config.language_model, layers) == ("gpt2", 12):
        config.normalize_prefix = True
        note(
            f"{checkpoint} has the shapes of the published transformer weights: "
            f"embeddings of {config.clip_model_type}, normalised"
        )
    else:
        note(
            f"warning: {checkpoint} does not say whether it was trained on normalised embeddings: assuming it was "
            f"not; pass --normalize_prefix if it was"
        )
