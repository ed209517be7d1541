"""What the page and its endpoint answer: captions with their scores, and why they say what they say."""

import traceback
from collections import OrderedDict
from dataclasses import astuple, dataclass, replace
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from features.images import read_image
from features.loader import encode_files
from models.captioner import image_key
from models.decoding import BEAM, CLIP, GREEDY, SAMPLE, DecodingConfig, context_room
from models.explain import nearest_words, word_heat
from models.predictor import Predictor
from models.rerank import clip_value, scores_by_clip
from models.stopping import continuing_tokens, opening_tokens, spoken
from pages.errors import Refused
from utils.batching import Batcher

PICTURE_SIDE = 640  # pixels of the picture that words are shown on
MAX_TEXT = 1000  # characters of a caption that a visitor writes
CANDIDATES = 16  # of which the captions are chosen by the encoder's text tower
BEAMS = 5  # or as many as there are captions to show
ENTRY_LENGTH = 67  # tokens of a caption, written or decoded, at most
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


class Service:
    """What the page and its endpoint answer; many may call at once."""

    methods = {"beam search": BEAM, "greedy": GREEDY, "sampling": SAMPLE}  # the first is the default
    reranking = {f"best of {CANDIDATES}": CLIP}  # comes before them where the encoder has a text tower

    def __init__(self, models, device=None, batch_size=16):
        """Load the first captioner; the others are loaded when they are first asked for.

        Args:
            models: {name that visitors see: name or file of the captioner}; the first is the default.
            device: torch device; None takes a GPU if there is one.
            batch_size: images at a time.
        Raises: as `Captioner`.
        """
        self.models, self.batch_size = list(models), batch_size
        self.batches = Batcher(self._caption_all, batch_size)
        self.said = OrderedDict()  # {(image, model, text): tokens}; the text alone may be written with others
        self.predictor = Predictor()
        self.predictor.setup(models, device)
        first = self.predictor.captioner()
        if first.encoder.compares_texts:
            self.methods = self.reranking | self.methods

    def decoding(self, method, num_captions, top_p, temperature, seed):
        """Return the DecodingConfig for a visitor's choices; those that the method has no use for do not count.

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
            token, whatever the method and its length penalty. Those that were chosen among candidates have a `score`
            too, which made the choice and orders them. `clip_score` is None where the encoder has no text tower.
        Raises: Refused where the image cannot be read or the model not be loaded.
        """
        self._known(model)  # before it comes into a batch with others'
        return self.batches((image, model, decoding))

    def _known(self, model):
        """Raise Refused for a model that is not offered; None is the default one."""
        if model is not None and model not in self.models:
            raise Refused(f"the model is one of {', '.join(self.models)}")

    def _captioner(self, model):
        """Return a captioner by the name that visitors see.

        Raises: Refused where it cannot be loaded; out-of-memory errors as they are.
        """
        self._known(model)
        try:
            return self.predictor.captioner(model)
        except (ValueError, OSError) as error:
            traceback.print_exception(error)
            raise Refused(f"the model {model} cannot be loaded on this server: choose another") from None

    def _caption_all(self, requests):
        """Caption (image, model, decoding) each; returns the captions of each, or the error that befell it."""
        groups, answers = {}, [None] * len(requests)
        for number, (_, model, decoding) in enumerate(requests):
            groups.setdefault((model, astuple(decoding)), []).append(number)
        for numbers in groups.values():
            images, models, decodings = zip(*(requests[number] for number in numbers), strict=True)
            try:
                found = self._caption_alike(images, models[0], decodings[0])
            except Exception as error:  # whatever it is, it is not the other groups'
                found = [error] * len(numbers)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
        return answers

    def _caption_alike(self, images, model, decoding):
        """Caption image files the same way; see `_caption_all`."""
        captioner = self._captioner(model)
        [(indices, embeddings, errors)] = encode_files(captioner.encoder, images, len(images))
        answers = {index: Refused(reason) for index, reason in errors.items()}
        if indices:
            keys = [image_key(images[index]) for index in indices]
            encode_texts = captioner.encoder.encode_texts if captioner.encoder.compares_texts else None
            if decoding.rerank == CLIP and not encode_texts:
                raise Refused("this model has no text tower to compare images with: take another decoding")
            groups = captioner.caption_embeddings(embeddings, as_trained(decoding, captioner.decoding), keys)
            answers |= zip(indices, _scored(embeddings, groups, decoding, encode_texts), strict=True)
            self._remember([images[index] for index in indices], model, groups)
        return [answers[index] for index in range(len(images))]

    def _remember(self, images, model, groups):
        """Keep the tokens of captions; of an image's equal ones, the likeliest's."""
        for image, captions in zip(images, groups, strict=True):
            for caption in sorted(captions, key=lambda caption: caption.mean_logprob):
                self.said[image, model, caption.text.strip()] = caption.tokens
        while len(self.said) > REMEMBERED:
            self.said.popitem(last=False)

    def explain(self, image, model, text):
        """Explain why a captioner would say `text` of an image.

        Args:
            image: file.
            model: name of the captioner.
            text: a caption of its own, or any other.
        Returns: Explanation.
        Raises: Refused where there is no text or the model cannot be loaded; ImageError where the image cannot be read.
        """
        text = (text or "")[:MAX_TEXT].strip()
        if not text:
            raise Refused("there is no caption to explain: pick one or write one")
        return self.batches.alone(  # memory and cores are for one at a time
            lambda: self._explain(self._captioner(model), read_image(image), text, self.said.get((image, model, text)))
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
    if decoding.rerank != CLIP:  # samples come as drawn
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
