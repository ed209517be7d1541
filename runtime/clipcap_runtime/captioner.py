"""An exported captioner: pictures or embeddings -> captions.

Axes: B images, D width of an embedding, K its tokens, T prompt tokens, R rows, V vocabulary.
"""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime import OrtValue
from PIL import Image
from tokenizers import Tokenizer

from clipcap_runtime.images import Preprocess, from_array, read_image, to_rgb
from clipcap_runtime.searches import Stop, beam, greedy, sample

FORMAT = 2  # of captioner.json
KEYS = {  # of captioner.json -> their types
    "graphs": list, "preprocessing": dict, "shape": list, "prefix_length": int, "context": (int, type(None)),
    "begin_tokens": list, "end_tokens": list, "decoding": dict,
}  # fmt: skip
SETTINGS = {  # of decoding that callers may give -> (type, what the value must be, its check)
    "method": (str, "greedy, beam or sample", lambda value: value in ("greedy", "beam", "sample")),
    "beam_size": (int, "at least 1", lambda value: value >= 1),
    "entry_length": (int, "at least 1", lambda value: value >= 1),
    "num_captions": (int, "at least 1", lambda value: value >= 1),
    "seed": (int, "at least 0", lambda value: value >= 0),
    "top_p": ((int, float), "above 0 and at most 1", lambda value: 0 < value <= 1),
    "temperature": ((int, float), "above 0", lambda value: value > 0),
    "length_penalty": ((int, float), "a number", lambda value: value == value),
    "stop_token": (str, "a text", lambda value: True),
    "prompt": (str, "a text", lambda value: True),
}


class Captioner:
    """An exported captioner, loaded from a folder that export.py wrote."""

    def __init__(self, folder, threads=None):
        """Load the folder.

        Args:
            folder: the one that export.py wrote.
            threads: CPU threads; None: one per core.
        Raises: ValueError where it is of another version or incomplete; FileNotFoundError where it is no such folder.
        """
        self.folder = Path(folder)
        file = self.folder / "captioner.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no captioner.json: pass a folder that export.py wrote")
        with _reading(file):
            self.config = json.loads(file.read_text(encoding="utf-8"))
            number = self.config["format"]
        if number != FORMAT:
            raise ValueError(f"{file} has format {number} and this version reads {FORMAT}: update, or export again")
        with _reading(file):
            wrong = {name: self.config[name] for name, kind in KEYS.items() if not isinstance(self.config[name], kind)}
            if wrong:
                raise TypeError(f"it says {wrong}")
            self.preprocess = Preprocess(**self.config["preprocessing"])
            self.settings({name: self.config["decoding"][name] for name in SETTINGS})
        for name in (*self.config["graphs"], "tokenizer.json", "weights.bin"):
            if not (self.folder / name).is_file():
                raise ValueError(f"{folder} lacks {name}; export the captioner again")
        with _reading(self.folder / "tokenizer.json"):
            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads or len(getattr(os, "sched_getaffinity", lambda _: range(0))(0))
        # spinning threads would take cores from working ones: measured 4 times slower on a busy machine
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.options.log_severity_level = 4  # errors are raised instead
        self.encoder, self.prefill, self.step = map(self._session, ("encoder", "prefill", "step"))
        self.outputs, inputs = [output.name for output in self.step.get_outputs()], self.step.get_inputs()
        self.inputs = [put.name for put in inputs]
        # shapes of keys and values before there are any, without the rows
        self.empty = [[0 if isinstance(size, str) else size for size in put.shape[1:]] for put in inputs[3:]]
        self._stop = functools.lru_cache(8)(lambda text: Stop(self.tokenizer, text, self.config["end_tokens"]))

    def _session(self, name):
        file = self.folder / f"{name}.onnx"
        with _reading(f"{file} or weights.bin"):
            return onnxruntime.InferenceSession(file, self.options, providers=["CPUExecutionProvider"])

    def caption(self, image, **decoding):
        """Return the caption of a picture (file, PIL image or array), or the list of captions of a list of pictures."""
        if isinstance(image, list | tuple):
            return [group[0].text for group in self.captions(image, **decoding)]
        return self.captions([image], **decoding)[0][0].text

    def captions(self, images, **decoding):
        """Return per picture a list of Captions, best (or first drawn) first.

        Args:
            images: files, PIL images, arrays [H, W] or [H, W, 1..4]; one batch.
            decoding: in place of what captioner.json says; see SETTINGS.
        Raises: ImageError where a picture cannot be read; ValueError for an unknown or invalid setting.
        """
        return self.caption_pixels([self.preprocess(_rgb(image)) for image in images], images, **decoding)

    def caption_pixels(self, pixels, images, **decoding):
        """Return what `captions` does for preprocessed pixels, each [3, H, W], of `images`."""
        if not pixels:
            return []
        embeddings = self.encoder.run(None, {"pixels": np.stack(pixels)})[0]
        return self.caption_embeddings(embeddings, [_key(image) for image in images], **decoding)

    def caption_embeddings(self, embeddings, keys=None, **decoding):
        """Return what `captions` does for embeddings [B, D] or [B, K, D].

        `keys`: bytes that seed each image's random numbers; None, for one image or all: the embedding's own bytes.
        """
        embeddings, settings = np.asarray(embeddings, np.float32), self.settings(decoding)
        if list(embeddings.shape[1:]) != self.config["shape"]:
            raise ValueError(f"embeddings are {list(embeddings.shape[1:])}, not {self.config['shape']}, for each image")
        if not len(embeddings):
            return []
        stop = self._stop(settings["stop_token"])
        prompt = self.config["begin_tokens"] + self.tokenizer.encode(settings["prompt"], add_special_tokens=False).ids
        length, temperature = self._room(settings["entry_length"], len(prompt)), np.float32(settings["temperature"])
        prefix = self.prefill.run(None, {"embedding": embeddings})[0]  # [B, P, E]
        past = [OrtValue.ortvalue_from_numpy(np.empty((len(prefix), *shape), np.float32)) for shape in self.empty]

        def step(tokens, sources, before=None):
            """Append tokens [R] or [R, T], after a prefix `before` in the first call; returns the next logits."""
            nonlocal past
            before = np.empty((len(tokens), 0, prefix.shape[2]), np.float32) if before is None else before
            given = [before, *(np.array(ids, np.int64) for ids in (tokens.reshape(len(tokens), -1), sources))]
            given = [OrtValue.ortvalue_from_numpy(array) for array in given]
            feeds = dict(zip(self.inputs, [*given, *past], strict=True))
            logits, *past = self.step.run_with_ort_values(self.outputs, feeds)
            return logits.numpy() / temperature

        first = step(np.tile(np.array(prompt, np.int64), (len(prefix), 1)), np.arange(len(prefix)), prefix)
        common, count = (step, first, stop, length), settings["num_captions"]
        if settings["method"] == "beam":
            groups = beam(*common, settings["beam_size"], settings["length_penalty"], count)
        elif settings["method"] == "sample":
            own = [row.tobytes() for row in embeddings.astype(np.float16)]
            keys = [key or other for key, other in zip(keys or own, own, strict=True)]
            groups = sample(*common, keys, count, settings["top_p"], settings["seed"])
        else:
            groups = greedy(*common)
        for caption in (caption for group in groups for caption in group):
            caption.text = stop.text_until(caption.tokens)
        return groups

    def settings(self, given):
        """Return captioner.json's decoding, overridden by `given`; raises ValueError."""
        for name, value in given.items():
            if name not in SETTINGS:
                raise ValueError(f"{name} is no setting of decoding; there are {', '.join(SETTINGS)}")
            kind, what, fits = SETTINGS[name]
            if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
                raise ValueError(f"{name} {value!r} is not {what}")
        settings = self.config["decoding"] | given
        most = {"greedy": 1, "beam": settings["beam_size"]}.get(settings["method"], settings["num_captions"])
        if settings["num_captions"] > most:
            raise ValueError(f"num_captions {settings['num_captions']} is more than the {most} of {settings['method']}")
        return settings

    def _room(self, entry_length, prompt):
        """Return how many tokens a caption can have; raises ValueError where the context has no room for one."""
        context, taken = self.config["context"], self.config["prefix_length"] + prompt
        if context and context + 1 - taken < 1:
            raise ValueError(f"prefix and prompt take {taken} positions and the language model has only {context}")
        return min(entry_length, context + 1 - taken) if context else entry_length


@contextlib.contextmanager
def _reading(what):
    """Turn whatever reading a damaged file raises into a ValueError."""
    try:
        yield
    except Exception as error:  # each library raises classes of its own
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{what} is damaged ({said}); export the captioner again") from None


def _rgb(image):
    if isinstance(image, np.ndarray):
        return from_array(image)
    return to_rgb(image.copy()) if isinstance(image, Image.Image) else read_image(image)


def _key(image):
    """Return what seeds a file's random numbers, its name and hash; None for what is not a file."""
    if isinstance(image, np.ndarray | Image.Image):
        return None
    path = Path(image)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return f"{path.name} {digest}".encode("utf-8", "surrogateescape")
