"""What decides a captioner and its captions, as flags and json files say it; builds and loads nothing."""

from dataclasses import asdict, dataclass, field, fields

# options in every captioner's json, whatever its mapping network, as when there were only two networks
USUAL = {"prefix_length": 10, "prefix_length_clip": 10, "num_layers": 8}
NEWER = ("num_heads", "num_tokens")  # keys that the json of a captioner without them leaves out
LOAD_IN = ("16bit", "8bit", "4bit")  # of --load_in: bfloat16; bitsandbytes

GREEDY, BEAM, SAMPLE = "greedy", "beam", "sample"
NO_RERANK, CLIP, MBR = "none", "clip", "mbr"  # how a caption is chosen among candidates; see models.rerank
DECODERS = ("clipcap", "transformers")
RERANKS = (NO_RERANK, CLIP, MBR)


@dataclass(frozen=True)
class MappingOptions:
    """The options of a kind of mapping network.

    Args:
        options: fields of CaptionConfig that it reads besides those that all networks read, with their defaults.
        ignored: other networks' options that are accepted and ignored.
        length_of_tokens: the field that must be the number of tokens, where the embedding has tokens.
        needs_tokens: it takes tokens only, not one vector.
    """

    options: dict = field(default_factory=dict)
    ignored: tuple = ()
    length_of_tokens: str | None = None
    needs_tokens: bool = False


# --mapping_type -> what it takes; models.mapping has the networks
MAPPING_OPTIONS = {
    # it ignores options of the transformer, because the predecessors' commands pass them to both
    "mlp": MappingOptions(ignored=("prefix_length_clip", "num_layers"), length_of_tokens="prefix_length"),
    "transformer": MappingOptions({"prefix_length_clip": 10, "num_layers": 8}, length_of_tokens="prefix_length_clip"),
    "resampler": MappingOptions({"num_layers": 4, "num_heads": 8}, needs_tokens=True),
}


@dataclass
class CaptionConfig:
    """What must be known to rebuild a captioner and to feed it; stored beside its weights.

    Args:
        prefix_dim: D, width of the CLIP embedding.
        prefix_length: P, prefix positions given to the language model; None: 10, or num_tokens where the
            mapping network maps each token by itself.
        prefix_length_clip: K, tokens the transformer mapping network makes of the CLIP embedding; None: 10, or
            num_tokens.
        mapping_type: key of MAPPING_OPTIONS.
        num_layers: layers of the mapping network; None: its default.
        only_prefix: the language model was frozen.
        normalize_prefix: CLIP embeddings are divided by their L2 norm first.
        language_model: name or folder the language model and its tokenizer came from.
        clip_model_type: name or file of the encoder whose embeddings it was trained on.
        clip_sha256: of that file, or of the one that the name stands for.
        lora_rank: rank of the LoRA that the language model learns; 0: none.
        load_in: precision in which the language model's untrained weights were held; None: float32.
        num_heads: attention heads of the resampler; None: its default.
        num_tokens: K, tokens of an image's CLIP embedding; None: it is one vector.
    Raises: ValueError naming the flag that does not fit.
    """

    prefix_dim: int
    prefix_length: int | None = None
    prefix_length_clip: int | None = None
    mapping_type: str = "mlp"
    num_layers: int | None = None
    only_prefix: bool = False
    normalize_prefix: bool = False
    language_model: str = "gpt2"
    clip_model_type: str | None = None
    clip_sha256: str | None = None
    lora_rank: int = 0
    load_in: str | None = None
    num_heads: int | None = None
    num_tokens: int | None = None

    def __post_init__(self):
        if self.mapping_type not in MAPPING_OPTIONS:
            raise ValueError(f"mapping_type is {self.mapping_type!r}; it can be {' or '.join(MAPPING_OPTIONS)}")
        network = MAPPING_OPTIONS[self.mapping_type]
        if network.needs_tokens and not self.num_tokens:
            raise ValueError(
                f"--mapping_type {self.mapping_type} reads tokens, and the embeddings are one vector an image: extract "
                f"them with parse_coco.py --tokens patches, or use --mapping_type mlp or transformer"
            )
        defaults = USUAL | network.options
        length = network.length_of_tokens if self.num_tokens else None
        if length:
            defaults[length] = self.num_tokens
            if getattr(self, length) not in (None, self.num_tokens):
                raise ValueError(
                    f"--{length} {getattr(self, length)}: --mapping_type {self.mapping_type} has one for each of the "
                    f"{self.num_tokens} tokens of an image; leave it out"
                )
        for name, default in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, default)

    @property
    def shape(self):
        """Shape of an image's CLIP embedding: (D,) or (K, D)."""
        return (self.num_tokens, self.prefix_dim) if self.num_tokens else (self.prefix_dim,)

    @property
    def tokens(self):
        """What the encoder gives for an image: `pooled`, one vector, or `patches`, tokens."""
        return "patches" if self.num_tokens else "pooled"

    def to_dict(self):
        """Return the fields as a plain dictionary, with `tokens` where the embedding has tokens."""
        values = asdict(self) | ({"tokens": self.tokens} if self.num_tokens else {})
        # fields of newer captioners are left out of others' json, so that older versions can read it
        return {name: value for name, value in values.items() if value is not None or name not in NEWER}

    @classmethod
    def from_dict(cls, values):
        """Build from a dictionary.

        Raises: ValueError naming a key of a later version, which would change what the captioner is.
        """
        tokens = values.get("tokens", "pooled")
        values = {name: value for name, value in values.items() if name != "tokens"}
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r}: it was written by a newer version; update this one")
        config = cls(**values)
        if config.tokens != tokens:
            raise ValueError(f"tokens is {tokens!r} and num_tokens {config.num_tokens}, which contradict each other")
        return config


@dataclass
class DecodingConfig:
    """How captions are made.

    Args:
        method: `greedy`, `beam` or `sample`.
        decoder: `clipcap`, our own searches, or `transformers`, the library's `generate`, as the OPT predecessor; both
            sample alike.
        beam_size: W.
        entry_length: new tokens at most, within the language model's context.
        stop_token: text that ends a caption, whatever tokens make it; it is kept in the text.
        top_p: probability mass that sampling draws from, in (0, 1].
        temperature: divides the logits.
        length_penalty: exponent of the length that a beam's log-probability is divided by; 1 is the mean.
        num_captions: captions per image; at most `beam_size` in beam search, `num_candidates` in reranking.
        seed: of sampling.
        prompt: text that the caption continues; not part of it.
        rerank: `none`, or how the best of many candidates are chosen: `clip` or `mbr`, see models.rerank. `Captioner`
            does it; `generate_captions` does not.
        num_candidates: candidates per image: beams of beam search, else samples.
    """

    method: str = GREEDY
    decoder: str = "clipcap"
    beam_size: int = 5
    entry_length: int = 67
    stop_token: str = "."
    top_p: float = 0.8
    temperature: float = 1.0
    length_penalty: float = 1.0
    num_captions: int = 1
    seed: int = 0
    prompt: str = ""
    rerank: str = NO_RERANK
    num_candidates: int = 16

    def __post_init__(self):
        if self.method not in (GREEDY, BEAM, SAMPLE):
            raise ValueError(f"decoding method {self.method!r} is not one of {GREEDY}, {BEAM}, {SAMPLE}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} is not above 0 and at most 1")
        if not self.temperature > 0:  # refuses NaN too
            raise ValueError(f"--temperature {self.temperature} is not above 0; leave --top_p out for greedy decoding")
        if self.rerank not in RERANKS:
            raise ValueError(f"--rerank {self.rerank!r} is not one of {', '.join(RERANKS)}")
        if self.decoder not in DECODERS:
            raise ValueError(f"--decoder {self.decoder!r} is not one of {', '.join(DECODERS)}")
        if self.rerank != NO_RERANK:
            if self.num_captions > self.num_candidates:
                raise ValueError(
                    f"--num_captions {self.num_captions} is more than --num_candidates {self.num_candidates} to choose "
                    "from; raise --num_candidates"
                )
            return
        if self.method == BEAM and self.num_captions > self.beam_size:
            raise ValueError(
                f"--num_captions {self.num_captions} is more than --beam_size {self.beam_size}; raise --beam_size"
            )
        if self.method == GREEDY and self.num_captions > 1:
            raise ValueError(
                "--num_captions above 1 needs --use_beam_search, --top_p or --rerank: greedy decoding gives one"
            )

    @property
    def rows(self):
        """Captions of an image that are decoded side by side."""
        candidates = self.num_captions if self.rerank == NO_RERANK else self.num_candidates
        return max(candidates, self.beam_size) if self.method == BEAM else candidates

    @classmethod
    def from_dict(cls, values, path):
        """Build from a run's json; settings that it lacks have their defaults.

        Args:
            path: the json, named in errors.
        Raises: ValueError naming a key that is unknown or has an invalid value.
        """
        types = {f.name: (int, float) if f.type is float else f.type for f in fields(cls)}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: decoding is not a dictionary of settings")
        for name, value in values.items():
            if name not in types:
                raise ValueError(
                    f"{path}: decoding has the unknown key {name!r}; this version knows {', '.join(types)}"
                )
            if isinstance(value, bool) or not isinstance(value, types[name]):
                raise ValueError(f"{path}: decoding has {name} {value!r}, which is not a valid value")
            if name in ("beam_size", "entry_length", "num_captions", "num_candidates") and value < 1:
                raise ValueError(f"{path}: decoding has {name} {value}, which is not at least 1")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: decoding: {error}") from None
