"""Captioners by name, for code that captions one image at a time."""

from dataclasses import replace

from features.images import ImageError
from models.captioner import Captioner
from models.decoding import BEAM
from models.pretrained import ALIASES


class Predictor:
    """Captions one image at a time, as the predecessor's class of this name does."""

    def setup(self, models=("coco", "conceptual"), device=None):
        """Say which captioners there are; each is loaded when it is first asked for.

        Args:
            models: names or files, the first being the default; or {name: file}.
            device: torch device; None takes a GPU if there is one.
        """
        self.checkpoints = dict(models) if isinstance(models, dict) else {name: name for name in models}
        self.device, self.captioners = device, {}

    def captioner(self, model=None):
        """Return the captioner of one of the names given to `setup`; None is the first.

        Raises: ValueError where there is no such model.
        """
        model = ALIASES.get(model, model) if model else next(iter(self.checkpoints))
        if model not in self.checkpoints:
            raise ValueError(f"model {model!r} is not one of {', '.join(self.checkpoints)}")
        if model not in self.captioners:
            self.captioners[model] = Captioner(self.checkpoints[model], device=self.device)
        return self.captioners[model]

    def predict(self, image, model=None, use_beam_search=False):
        """Caption one image.

        Args:
            image: path of an image file.
            model: one of the names given to `setup`; None is the first.
            use_beam_search: beam search, whatever the checkpoint's json says.
        Returns: the caption.
        Raises: ValueError where there is no such model; ImageError where the image cannot be read.
        """
        captioner = self.captioner(model)
        decoding = replace(captioner.decoding, method=BEAM) if use_beam_search else captioner.decoding
        captions, errors = next(captioner.caption_files([image], decoding))
        if errors:
            raise ImageError(f"{image}: {errors[image]}")
        return captions[image][0].text
