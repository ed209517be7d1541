"""The files of a training run, and how it is asked to stop."""

import contextlib
import os
import shutil
import signal
from dataclasses import asdict

import torch
import transformers

from models.captioner_files import tokenizer_folder
from models.checkpoint import FORMAT, captioner_weights, check_format, save_torch, save_weights
from models.placement import is_sharded
from models.settings import DecodingConfig
from training.optimizers import BEFORE_THE_OPTION
from training.run_names import RunNames
from utils.cli import VERSION, agree_on_stop, note, told_to_stop
from utils.distributed import all_gather, all_sum
from utils.files import atomic_path, disk_errors, read_json, write_json
from utils.outputs import same_file
from utils.processes import is_main, world_size


class RunFiles(RunNames):
    """The files of a run, written and read."""

    def __init__(self, out_dir, prefix, decoding=None):
        """Name the files.

        Args:
            decoding: DecodingConfig that the run's captioner is meant to be decoded with.
        """
        super().__init__(out_dir, prefix)
        self.decoding = decoding or DecodingConfig()

    def move_aside(self):
        """Move an earlier run of the same name into `<prefix>-previous/`, or `-previous-2/` where that is taken."""
        files = [self.config, self.latest, self.best, self.state, self.log, self.plot, tokenizer_folder(self.config)]
        files = [f for f in (*files, *self.epochs()) if f.exists()]
        if not files:
            return
        previous, number = self.out_dir / f"{self.prefix}-previous", 1
        while previous.exists():
            number += 1
            previous = self.out_dir / f"{self.prefix}-previous-{number}"
        previous.mkdir()
        for file in files:
            os.replace(file, previous / file.name)
        note(f"an earlier run {self.prefix} was there; it is now in {previous} (--resume goes on with a run)")

    def write_config(self, config, training, gpt_config, tokenizer, store, contents):
        """Write `<prefix>.json` and the tokenizer's folder, before the first step.

        Args:
            config: CaptionConfig. training: TrainingConfig. store: FeatureStore.
            gpt_config: the language model's configuration.
            contents: {flag: fingerprint of the feature store that it names}.
        """
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with disk_errors(self.out_dir):
            tokenizer.save_pretrained(tokenizer_folder(self.config))
        write_json(
            self.config,
            {
                "format": FORMAT,
                "model": config.to_dict(),
                "language_model_config": gpt_config.to_dict(),
                "training": asdict(training),
                "decoding": asdict(self.decoding),
                "data": {key: store.info[key] for key in store.info if key != "skipped"},
                "contents": contents,
                "versions": {"clipcap": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
            },
        )

    def check_resume(self, config, training, contents):
        """Refuse to resume a run that had other options or other data; the data may have moved.

        Args:
            config: CaptionConfig. training: TrainingConfig.
            contents: as in `write_config`.
        Raises: ValueError naming the first flag that differs.
        """
        stored = read_json(self.config)
        check_format(stored, self.config)
        before, contents_before = stored["model"] | BEFORE_THE_OPTION | stored["training"], stored.get("contents", {})
        if "decoding" in stored:
            self.decoding = DecodingConfig.from_dict(stored["decoding"], self.config)
        for name, value in (config.to_dict() | asdict(training)).items():
            if name not in before or before[name] == value or _same_place(name, before[name], value):
                continue
            if name in contents_before and name in contents:  # whose content is compared below
                continue
            remedy = "pass the same, or leave out --resume"
            if name == "epochs":
                remedy = (
                    f"its learning rate comes down to 0 by then; to train on after it, begin a new run with "
                    f"--init_from {self.latest} and another --prefix, without --resume"
                )
            raise ValueError(f"--resume: the run had --{name} {before[name]}, not {value}; {remedy}")
        for name, content in contents.items():
            if contents_before.get(name, content) != content:
                raise ValueError(
                    f"--resume: --{name} {getattr(training, name)} does not hold what the run was begun with; pass the "
                    f"same data, or leave out --resume"
                )

    def resume(self, trainer):
        """Load the run's state; returns whether there was one.

        Raises: ValueError where it is damaged or of another run.
        """
        if not self.state.is_file():
            note(f"nothing to resume: there is no {self.state}; beginning")
            return False
        try:
            # memory-mapped where weights are sharded: only process 0 reads the tensors
            state = torch.load(self.state, "cpu", weights_only=True, mmap=is_sharded(trainer.model))
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise ValueError(
                f"{self.state} is damaged ({type(error).__name__}); remove it and pass --init_from {self.latest}"
            ) from None
        trainer.load_state(state)
        note(f"resuming {self.prefix} after step {trainer.step}, epoch {trainer.epoch}, batch {trainer.batch}")
        return True

    def save_weights(self, model, epoch=None):
        """Write the latest weights and, where `epoch` is given, that epoch's checkpoint."""
        weights = captioner_weights(model)  # needs all processes
        if not is_main():
            return
        if epoch is None:
            save_weights(self.latest, weights)
            return
        save_weights(self.epoch(epoch), weights)
        with atomic_path(self.latest) as temporary:
            temporary.unlink()
            try:
                os.link(self.epoch(epoch), temporary)
            except OSError:  # a file system without links
                shutil.copyfile(self.epoch(epoch), temporary)

    def save_best(self, model):
        """Write the weights with the highest validation CIDEr so far."""
        weights = captioner_weights(model)  # needs all processes
        if is_main():
            save_weights(self.best, weights)

    def save_state(self, trainer):
        """Write what --resume needs."""
        state = trainer.state()  # needs all processes
        if is_main():
            save_torch(self.state, state)

    def save_step(self, trainer, log):
        """Save what resuming after the trainer's last step needs."""
        log.flush()  # first: a resumed run keeps the lines up to the state's step
        self.save_weights(trainer.model)
        self.save_state(trainer)

    def last_checkpoint(self):
        """Return the newest checkpoint, or None."""
        return self.latest if self.latest.exists() else None


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request to stop after the step under way; a second Ctrl-C stops at once.

    Under torchrun a Ctrl-C arrives twice: as the terminal's SIGINT, then as torchrun's SIGTERM.
    """

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self):
        """Tell whether any process was asked to stop: all stop at the same step, with the exit status of the first.

        Every process must call this.
        """
        if not all_sum(int(self.signal is not None)):
            return False
        agree_on_stop(next(filter(None, all_gather(self.signal))))
        return True

    def _ask(self, number, _frame):
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        told_to_stop(number)
        note("stopping after this step; once more to stop at once")


class DivergedError(ValueError):
    """Training diverged or collapsed: the current weights are not saved, the last checkpoint's are better."""


@contextlib.contextmanager
def saved_on_error(trainer, files, log):
    """Save the run where the body fails, as a stop does.

    Only with one process: with several, saving would wait for others that may be gone.
    """
    begun = trainer.step
    try:
        yield
    except DivergedError:
        raise
    except Exception:
        if world_size() == 1 and trainer.step > begun:
            files.save_step(trainer, log)
            note(f"warning: step {trainer.step} is saved; the same command with --resume goes on")
        raise


def _same_place(name, before, value):
    """Tell whether two values of a path option name the same file or folder."""
    paths = ("data", "val_data", "match", "init_from", "language_model")
    return name in paths and None not in (before, value) and os.path.exists(value) and same_file(before, value)
