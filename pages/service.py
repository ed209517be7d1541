"""What the page and its endpoint answer: captions with their scores, and explanations of them."""

import os
import threading
import traceback
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from features.images import read_image
from models.captioner import Captioner, image_key
from models.decoding import context_room
from models.explain import nearest_words, word_heat
from models.predictor import Predictor
from models.rerank import clip_value, draws_samples, scores_by_clip
from models.settings import BEAM, CLIP, GREEDY, SAMPLE, DecodingConfig
from models.stopping import continuing_tokens, opening_tokens, spoken
from pages.errors import Refused, Unexplained
from utils.batching import Batcher

PICTURE_SIDE = 640  # pixels of the picture that words are shown on
MAX_TEXT = 1000  # characters of a caption that a visitor writes
CANDIDATES = 16  # per image, from which the encoder's text tower chooses the captions
BEAMS = 5  # or the number of captions to show, if that is larger
ENTRY_LENGTH = 67  # tokens of a caption, written or decoded, at most
LOADING = 64  # requests that may wait at once for captioners that are being loaded
# option -> smallest, largest and default
RANGES = {"num_captions": (1, 10, 3), "top_p": (0.05, 1, 0.8), "temperature": (0.1, 2, 1), "seed": (0, 2**31, 0)}
REMEMBERED = 10_000  # captions whose tokens are kept for their explanation


@dataclass
class Explanation:
    """Why a caption says what it says.

    Args:
        picture: the square of the image that CLIP sees.
        words: of the caption.
        heat: [W, G, G] share of each word's probability that is lost where a cell of the picture is hidden.
        unseen: [W] the share that is lost where the whole picture is hidden.
        prefix: per prefix position its nearest words and their cosines.
    """

    picture: Image.Image
    words: list
    heat: np.ndarray
    unseen: np.ndarray
    prefix: list


class Question(NamedTuple):
    """A picture to caption, ready to be captioned.

    Args:
        captioner: Captioner.
        pixels: [3, R, R], preprocessed.
        key: bytes that seed its random numbers; None without sampling.
        decoding: DecodingConfig.
        asked: (image, model), as visitors name them.
    """

    captioner: Captioner
    pixels: torch.Tensor
    key: bytes | None
    decoding: DecodingConfig
    asked: tuple


class Service:
    """What the page and its endpoint answer; many threads may call it at once."""

    methods = {"beam search": BEAM, "greedy": GREEDY, "sampling": SAMPLE}  # the first is the default
    reranking = {f"best of {CANDIDATES}": CLIP}  # comes before `methods` where the encoder has a text tower

    def __init__(self, models, device=None, batch_size=16, dtype=None):
        """Load the first captioner; the others are loaded when they are first asked for.

        Args:
            models: {name that visitors see: name, file or exported folder of the captioner}; the first is the default.
            device: torch device; None takes a GPU if there is one.
            batch_size: images at a time.
            dtype: as the flag --dtype.
        Raises: as `Captioner`.
        """
        self.models, self.batch_size = list(models), batch_size
        # requests at work at once: a batch that is captioned, one that is read, those that wait for a captioner
        self.at_once = 2 * batch_size + LOADING
        self.loading = threading.BoundedSemaphore(LOADING)
        # a few threads read for all: each decodes a picture at a time and keeps memory of its own
        self.readers = ThreadPoolExecutor(os.cpu_count() or 1, "readers")
        self.batches = Batcher(self._caption_all, batch_size)
        self.said = OrderedDict()  # {(image, model, text): tokens}; other tokens may spell the same text
        self.predictor = Predictor()
        self.predictor.setup(models, device, dtype)
        first = self.predictor.captioner()
        if first.encoder.compares_texts:
            self.methods = self.reranking | self.methods

    def decoding(self, method, num_captions, top_p, temperature, seed):
        """Return the DecodingConfig for a visitor's choices; options that the method does not use are ignored.

        Raises: Refused for a value that is out of range.
        """
        try:
            count = 1 if method == GREEDY else int(num_captions)
            if method == CLIP:
                return DecodingConfig(
                    rerank=CLIP, num_candidates=CANDIDATES, num_captions=count, entry_length=ENTRY_LENGTH
                )
            sampling = {"top_p": top_p, "temperature": temperature, "seed": int(seed)} if method == SAMPLE else {}
            return DecodingConfig(
                method, entry_length=ENTRY_LENGTH, num_captions=count, beam_size=max(BEAMS, count), **sampling
            )
        except ValueError as error:
            raise Refused(str(error).replace("--", "")) from None  # visitors have no flags
        except (TypeError, OverflowError):
            raise Refused("captions, top_p, temperature and seed are numbers") from None

    def caption(self, image, model, decoding):
        """Caption an image, in one batch with others that are asked for at the same time.

        Args:
            image: file.
            model: name of the captioner.
            decoding: DecodingConfig.
        Returns: list of {"caption", "logprob", "clip_score"}, best first: by `logprob`, the mean log-probability per
            token, whatever the method and its length penalty. Captions chosen among candidates also have the `score`
            that chose and orders them. `clip_score` is None where the encoder has no text tower.
        Raises: Refused where the model cannot be loaded or decode that way; ImageError where the image cannot be read.
        """
        captioner = self._captioner(model)
        if decoding.rerank == CLIP and not captioner.encoder.compares_texts:
            raise Refused("this model has no text tower to compare images with: take another decoding")
        pixels = self._read(image, captioner.encoder.preprocess)  # read before batching: a batch waits for no file
        key = image_key(image) if draws_samples(decoding) else None
        return self.batches(Question(captioner, pixels, key, decoding, (image, model)))

    def _read(self, image, preprocess):
        """Return what a function makes of an image file; raises ImageError."""
        return self.readers.submit(lambda: preprocess(read_image(image))).result()

    def _known(self, model):
        """Raise Refused for a model that is not offered; None is the default one."""
        if model is not None and model not in self.models:
            raise Refused(f"the model is one of {', '.join(self.models)}")

    def _captioner(self, model):
        """Return a captioner by the name that visitors see; the first thread to ask for it loads it.

        Raises: Refused where it cannot be loaded, or too many wait for it; out-of-memory errors unchanged.
        """
        self._known(model)
        if self.predictor.is_loaded(model):
            return self.predictor.captioner(model)
        if not self.loading.acquire(blocking=False):  # leaves room for requests for loaded models
            raise Refused(f"the model {model} is being loaded for others: try again in a minute")
        try:
            return self.predictor.captioner(model)
        except (ValueError, OSError) as error:
            traceback.print_exception(error)
            raise Refused(f"the model {model} cannot be loaded on this server: choose another") from None
        finally:
            self.loading.release()

    def _caption_all(self, questions):
        """Caption Questions together; returns the captions of each, or its error."""
        groups, answers = {}, [None] * len(questions)
        for number, question in enumerate(questions):
            groups.setdefault((id(question.captioner), astuple(question.decoding)), []).append(number)
        for numbers in groups.values():
            try:
                found = self._caption_alike([questions[number] for number in numbers])
            except Exception as error:  # one group's error must not fail the others
                found = [error] * len(numbers)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
        return answers

    def _caption_alike(self, questions):
        """Caption Questions of one captioner and decoding; returns the captions of each."""
        captioner, decoding = questions[0].captioner, questions[0].decoding
        embeddings = captioner.encoder.encode_images(torch.stack([question.pixels for question in questions]))
        keys = [question.key for question in questions] if draws_samples(decoding) else None
        groups = captioner.caption_embeddings(embeddings, as_trained(decoding, captioner.decoding), keys)
        self._remember([question.asked for question in questions], groups)
        encode_texts = captioner.encoder.encode_texts if captioner.encoder.compares_texts else None
        return _scored(embeddings, groups, decoding, encode_texts)

    def _remember(self, asked, groups):
        """Keep the tokens of each (image, model)'s captions; of captions with the same text, the likeliest's."""
        for image_and_model, captions in zip(asked, groups, strict=True):
            for caption in sorted(captions, key=lambda caption: caption.mean_logprob):
                self.said[(*image_and_model, caption.text.strip())] = caption.tokens
        while len(self.said) > REMEMBERED:
            self.said.popitem(last=False)

    def explain(self, image, model, text):
        """Explain why a captioner would say `text` of an image.

        Args:
            image: file.
            model: name of the captioner.
            text: a caption of its own, or any other.
        Returns: Explanation.
        Raises: Refused where there is no text or the model cannot be loaded, Unexplained where it cannot
            explain; ImageError where the image cannot be read.
        """
        text = (text or "")[:MAX_TEXT].strip()
        if not text:
            raise Refused("there is no caption to explain: pick one or write one")
        captioner = self._captioner(model)
        if not captioner.explains:
            raise Unexplained("an exported captioner cannot explain its words: serve the checkpoint that it is made of")
        picture = self._read(image, lambda picture: picture)
        return self.batches.alone(  # memory and cores are for one at a time
            lambda: self._explain(captioner, picture, text, self.said.get((image, model, text)))
        )

    def _explain(self, captioner, image, text, tokens):
        """Explain with a loaded captioner and image, and the text's tokens if they are known; see `explain`."""
        encoder, tokenizer, own = captioner.encoder, captioner.tokenizer, captioner.decoding
        before = opening_tokens(tokenizer, own.prompt)
        tokens = spoken(tokenizer, tokens or continuing_tokens(tokenizer, own.prompt, text))
        if not tokens:
            raise Refused("there is no caption to explain: pick one or write one")
        room = context_room(captioner.model.gpt.config, captioner.model.config.prefix_length + len(before))
        tokens = tokens[: min(max(ENTRY_LENGTH, own.entry_length), room)]
        pixels = encoder.preprocess(image)
        words, heat, unseen = word_heat(
            captioner.model, tokenizer, encoder.encode_images, pixels, tokens, self.batch_size, before=before
        )
        prefix = nearest_words(captioner.model, tokenizer, encoder.encode_images(pixels[None]))
        side = min(PICTURE_SIDE, *image.size)
        return Explanation(ImageOps.fit(image, (side, side)), words, heat, unseen, prefix)


def as_trained(decoding, own):
    """Return a visitor's DecodingConfig with a checkpoint's own prompt, stop text, search and lengths."""
    return replace(
        decoding, prompt=own.prompt, stop_token=own.stop_token, decoder=own.decoder, entry_length=own.entry_length,
        length_penalty=own.length_penalty, beam_size=max(own.beam_size, decoding.num_captions),
    )  # fmt: skip


def _scored(embeddings, groups, decoding, encode_texts):
    """Return the captions of images, whose embeddings are [B, D], with their scores, as the endpoint gives them."""
    if decoding.rerank != CLIP:  # samples come in the order drawn
        groups = [sorted(captions, key=lambda caption: -caption.mean_logprob) for captions in groups]
    scores = scores_by_clip(embeddings, groups, encode_texts) if encode_texts else [None] * len(groups)
    return list(map(partial(_entries, decoding), groups, scores))


def _entries(decoding, captions, scores):
    """Return one image's captions as the endpoint gives them; scores: their CLIPScores, or None."""
    entries = [{"caption": c.text.strip(), "logprob": round(c.mean_logprob, 4), "clip_score": None} for c in captions]
    if scores is not None:
        values = clip_value(captions, scores)
        for entry, score, value in zip(entries, scores.tolist(), values.tolist(), strict=True):
            entry["clip_score"] = round(score, 4)
            if decoding.rerank == CLIP:
                entry["score"] = round(value, 4)
    return entries
