"""Captioners by name, for code that captions one image at a time."""

import threading
from concurrent.futures import Future
from dataclasses import replace

from features.images import ImageError
from models.captioner import Captioner
from models.captioner_files import is_export
from models.exported import ExportedCaptioner
from models.pretrained import ALIASES
from models.settings import BEAM


class Predictor:
    """Captions one image at a time, as the predecessor's class of this name does; several threads may load at once."""

    def setup(self, models=("coco", "conceptual"), device=None, dtype=None):
        """Say which captioners there are; each is loaded when it is first asked for.

        Args:
            models: names, files, or folders that export.py wrote, the first being the default; or {name: file}.
            device: torch device; None takes a GPU if there is one. Exported captioners run on the CPU.
            dtype: as the flag --dtype; exported captioners keep the dtype of their export.
        """
        self.checkpoints = dict(models) if isinstance(models, dict) else {name: name for name in models}
        self.device, self.dtype = device, dtype
        self.loads, self.lock = {}, threading.Lock()  # {name: Future of its captioner}

    def captioner(self, model=None):
        """Return the captioner of one of the names given to `setup`; None is the first.

        The first thread to ask loads it; meanwhile only threads that ask for the same captioner wait.

        Raises: ValueError where there is no such model; an error of loading, in every thread that waits.
        """
        model = self.name(model)
        with self.lock:
            load, own = self.loads.get(model), model not in self.loads
            if own:
                load = self.loads[model] = Future()
        if own:
            try:
                load.set_result(self._load(self.checkpoints[model]))
            except BaseException as error:
                del self.loads[model]  # the next caller tries again
                load.set_exception(error)
        return load.result()

    def name(self, model=None):
        """Return the name in `setup` that a name or alias stands for; raises ValueError where there is none."""
        model = ALIASES.get(model, model) if model else next(iter(self.checkpoints))
        if model not in self.checkpoints:
            raise ValueError(f"model {model!r} is not one of {', '.join(self.checkpoints)}")
        return model

    def is_loaded(self, model=None):
        """Tell whether `captioner` returns at once."""
        load = self.loads.get(self.name(model))
        return load is not None and load.done()

    def _load(self, checkpoint):
        if is_export(checkpoint):
            return ExportedCaptioner(checkpoint)
        return Captioner(checkpoint, device=self.device, dtype=self.dtype)

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
