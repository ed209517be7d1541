"""Images -> captions: the encoder and the captioner of a checkpoint, loaded together.

Axes: B batch, D CLIP width.
"""

import hashlib
from pathlib import Path

from encoders import encoder_sha256, load_encoder, split_path
from features.loader import encode_files
from features.tars import TarMember
from models.captioner_files import config_path, stored_decoding
from models.checkpoint import load_captioner
from models.decoding import generate_captions
from models.placement import place
from models.pretrained import ALIASES, PRETRAINED, checkpoint_file
from models.rerank import Reranker, draws_samples
from models.settings import NO_RERANK, DecodingConfig
from utils.cli import in_words
from utils.devices import pick_devices
from utils.files import sha256
from utils.flags import Placement
from utils.logits import refine_output
from utils.precision import own_weights, pick_dtype, prepare_for_inference


class Captioner:
    """Encoder, mapping network, language model and tokenizer, ready to caption."""

    explains = True  # its words can be traced to the picture

    def __init__(
        self, checkpoint="coco", clip_model_type=None, language_model=None, normalize_prefix=None, device=None, pn=None,
        dtype=None, offload_dir=None, max_memory=None, with_encoder=True, repack=True,
    ):  # fmt: skip
        """Load everything.

        Args:
            checkpoint: see `checkpoint_file`.
            clip_model_type, language_model, normalize_prefix: what a bare checkpoint does not say.
            device, pn, offload_dir, max_memory: the flags of these names; None takes a GPU if there is one.
            dtype: the flag --dtype.
            with_encoder: load the encoder too; without it, embeddings alone can be captioned.
            repack: as of `prepare_for_inference`, for mapping network and language model.
        Raises: ValueError where an argument contradicts the checkpoint; FileNotFoundError where a file is missing.
        """
        self.decoding = stored_decoding(checkpoint) or DecodingConfig()
        placement = Placement(pick_devices(device), pn, offload_dir, max_memory)
        self.device = placement.devices[0]
        name = ALIASES.get(checkpoint, checkpoint)
        if name in PRETRAINED:
            pretrained = PRETRAINED[name]
            clip_model_type = clip_model_type or pretrained.clip_model_type
            normalize_prefix = pretrained.normalize_prefix if normalize_prefix is None else normalize_prefix
        checkpoint = checkpoint_file(checkpoint)
        self.model, self.tokenizer, described = load_captioner(
            checkpoint, language_model, normalize_prefix, self.device, mapped=pn != "auto"
        )
        place(self.model, placement)
        if pn != "auto" and not self.model.config.load_in:
            prepare_for_inference(self.model, pick_dtype(dtype, self.device), self.device, repack=repack)
            own_weights(self.model)
        elif dtype:
            raise ValueError(f"--dtype {dtype} cannot change weights that --pn auto or --load_in loaded; leave it out")
        elif pn != "auto":
            refine_output(self.model.gpt)
        named = clip_model_type and {"clip_model_type": clip_model_type, "clip_sha256": encoder_sha256(clip_model_type)}
        own = {"clip_model_type": self.model.config.clip_model_type, "clip_sha256": self.model.config.clip_sha256}
        self.described = named or own  # what is known of its encoder
        if not with_encoder:
            self.encoder, self.reranker = None, Reranker(self.model, self.tokenizer)
            return
        self.encoder = encoder_of(self.model.config, checkpoint, clip_model_type, described, self.device, dtype)
        self.reranker = Reranker(
            self.model, self.tokenizer, self.encoder.encode_texts if self.encoder.compares_texts else None
        )

    def caption_files(self, paths, decoding, batch_size=32, num_workers=0):
        """Caption image files, in order.

        Args:
            paths: image files.
            decoding: DecodingConfig.
            batch_size: images at a time.
            num_workers: processes that read images.
        Yields: per batch ({path: list of Caption, best first}, {path: why it could not be read}).
        """
        for indices, embeddings, errors in encode_files(self.encoder, paths, batch_size, num_workers):
            keys = [image_key(paths[index]) for index in indices] if draws_samples(decoding) else None
            captions = self.caption_embeddings(embeddings, decoding, keys) if indices else []
            read = {paths[index]: group for index, group in zip(indices, captions, strict=True)}
            yield read, {paths[index]: reason for index, reason in errors.items()}

    def caption_embeddings(self, clip_embedding, decoding, keys=None):
        """Caption CLIP embeddings [B, D] or [B, K, D]; returns per image a list of Caption, best first.

        `keys`: see `generate_captions`.
        """
        embeddings = clip_embedding.to(self.device)
        if decoding.rerank != NO_RERANK:
            return self.reranker.caption(embeddings, decoding, keys)
        return generate_captions(self.model, self.tokenizer, embeddings, decoding, keys=keys)


def captioner_of(args, with_encoder=True, repack=True):
    """Return the Captioner that the command line asks for; `with_encoder`, `repack` as in Captioner."""
    return Captioner(
        args.checkpoint, args.clip_model_type, args.language_model, args.normalize_prefix, args.device, args.pn,
        args.dtype, args.offload_dir, args.max_memory, with_encoder, repack,
    )  # fmt: skip


def image_key(path):
    """Return the key that seeds an image file's random numbers: its name and hash, whatever its folder."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if isinstance(path, TarMember) else sha256(path)
    return f"{Path(path).name} {digest}".encode("utf-8", "surrogateescape")


def encoder_of(config, checkpoint, given, described, device, dtype=None):
    """Load the encoder that a captioner was trained on.

    Args:
        config: CaptionConfig. checkpoint: its file. given: --clip_model_type, or None.
        described: whether `config` is from a json beside the checkpoint.
        device, dtype: see `load_encoder`.
    Raises: ValueError where it is not the captioner's encoder; also the errors of `encoder_source`.
    """
    source = encoder_source(config, checkpoint, given, described)
    encoder = load_encoder(source, device, dtype, config.tokens)
    if encoder.shape != config.shape:
        raise ValueError(
            f"encoder {source} gives of an image {in_words(encoder.shape)}, and {checkpoint} was trained on "
            f"{in_words(config.shape)}; pass its own --clip_model_type"
        )
    if described and config.clip_sha256 and encoder.sha256 != config.clip_sha256:
        raise ValueError(
            f"the weights of {source} are others than {checkpoint} was trained on (SHA-256 {encoder.sha256[:8]}…, not "
            f"{config.clip_sha256[:8]}…); pass its own --clip_model_type"
        )
    return encoder


def encoder_source(config, checkpoint, given, described):
    """Return the encoder to load: the one given, if it does not contradict the checkpoint, else the checkpoint's own.

    Raises: ValueError where it contradicts the checkpoint; FileNotFoundError where the checkpoint's own file has moved.
    """
    own = config.clip_model_type
    if given:
        known = config.clip_sha256 or (encoder_sha256(own) if own else None)
        hashes = [encoder_sha256(given), known]
        same = hashes[0] == hashes[1] if all(hashes) else given == own
        if described and own and not same:
            raise ValueError(
                f"--clip_model_type {given} contradicts {config_path(checkpoint)}: the captioner was trained on {own}; "
                f"leave the flag out"
            )
        return given
    if not own:
        raise ValueError(f"{checkpoint} does not say which encoder it was trained on; pass --clip_model_type")
    prefix, path = split_path(own, config_path(checkpoint).parent)
    if not config.clip_sha256 or (path is None and encoder_sha256(own) in (None, config.clip_sha256)):
        return own  # where the name gives no hash, the loaded weights are compared instead
    # the path may be relative to where training ran, or to the checkpoint's folder
    for file in (Path(path or own), config_path(checkpoint).parent / (path or own)):
        if encoder_sha256(f"{prefix}{file}") == config.clip_sha256:
            return f"{prefix}{file}"
    raise FileNotFoundError(
        f"the encoder {own} of {checkpoint} is not there, or is another file by now; pass --clip_model_type FILE"
    )
