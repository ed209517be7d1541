"""Imports of libraries without the parts that captioning does not use, which take most of the time.

With any model, transformers imports torch's compiler and distributed tensors, SymPy and SciPy's optimisers;
torchvision imports the compiler too, its models and datasets, OpenAI's clip ftfy and pkg_resources, which new versions
of setuptools no longer have. These parts take two thirds of `import transformers.modeling_utils`. In `lean()` they are
left out, and imported when they are first used.
"""

import contextlib
import importlib
import importlib.machinery
import sys
import threading
import types
from pathlib import Path

import packaging.version  # noqa: F401  read as an attribute of packaging

from utils.processes import world_size

# transformers' checks that answer no, as if torch were built without the part or SciPy were not installed
LEFT_OUT = ("is_scipy_available", "is_torch_flex_attn_available")
OF_SEVERAL_PROCESSES = ("is_torch_distributed_available",)
# module -> functions and classes that others import from it, but call later or never
CALLED_LATER = {
    "ftfy": ("fix_text",),
    "torch._dynamo.utils": ("is_compile_supported",),
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
    "torchvision.datasets": (),
    "torchvision.models": (),
}
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")  # of torch's compiler

_one_at_a_time = threading.RLock()  # what is patched is global


class StandIn(types.ModuleType):
    """Stands in for a module that is imported later; an attribute that it lacks imports the real one at once."""

    def __init__(self, name, **known):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # libraries ask it whether the module exists
        vars(self).update(known)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def later(module, name):
    """Return a function that, when called, imports a module and calls its function `name`."""
    return lambda *arguments, **options: getattr(importlib.import_module(module), name)(*arguments, **options)


def unmarked(function=None, *_, **__):
    """Stand in for decorators of torch's compiler, which change nothing for code that is not compiled."""
    return unmarked if function is None else function


@contextlib.contextmanager
def lean():
    """Let the body import libraries without their unused parts; parts that are imported already stay."""
    with _one_at_a_time, contextlib.ExitStack() as undo:
        known = {name: {part: later(name, part) for part in parts} for name, parts in CALLED_LATER.items()}
        known["pkg_resources"] = {"packaging": packaging}  # clip takes nothing else from it
        for name, parts in known.items():
            if name not in sys.modules:
                sys.modules[name] = stand_in = StandIn(name, **parts)
                undo.callback(_remove, sys.modules, name, stand_in)
        if "torch._dynamo" not in sys.modules:
            _leave_compiler_out(undo)
        _tell_transformers(undo)
        yield


@contextlib.contextmanager
def undrawn(language_models=True):
    """Let the body build models without initialising weights that are loaded later or needed for dtypes only.

    To initialise weights on the meta device, torch would import its compiler. Meanwhile all threads build models so;
    only one at a time is in the body.

    Args:
        language_models: whether transformers builds any.
    """
    import torch

    # those that others call, and what these call: torch's attention has imported some of them under names of its own
    functions = [name for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("__")]
    places = [(torch.nn.init, name) for name in functions]
    if language_models:
        with lean():
            from transformers import PreTrainedModel
        places.append((PreTrainedModel, "initialize_weights"))
    with _one_at_a_time, contextlib.ExitStack() as undo:
        for place, name in places:
            undo.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, lambda tensor, *_, **__: tensor)
        yield


def _leave_compiler_out(undo):
    """Replace torch's compiler, whose decorators libraries put on their own functions, by a StandIn."""
    import torch

    compiler = StandIn("torch._dynamo", **dict.fromkeys(DECORATORS, unmarked))
    torch._dynamo = compiler
    undo.callback(_remove, vars(torch), "_dynamo", compiler)
    for name in DECORATORS:  # torch's public names of them
        undo.callback(setattr, torch.compiler, name, getattr(torch.compiler, name))
        setattr(torch.compiler, name, unmarked)


def _tell_transformers(undo):
    """Make transformers' checks for unused parts answer no; several processes do use its distributed tensors."""
    import transformers
    from transformers import utils

    # else it would scan its models' folder twice, under two names
    find, folder = utils.import_utils.create_import_structure_from_path, Path(transformers.__file__).parent / "models"
    undo.callback(setattr, utils.import_utils, find.__name__, find)
    setattr(utils.import_utils, find.__name__, lambda path: find(folder if Path(path).parent == folder else path))
    for name in LEFT_OUT + (OF_SEVERAL_PROCESSES if world_size() == 1 else ()):
        for module in (utils, utils.import_utils):
            if hasattr(module, name):
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, lambda: False)


def _remove(names, name, stand_in):
    """Take a stand-in out of a dictionary of modules, where it has not been replaced by the real one."""
    if names.get(name) is stand_in:
        del names[name]
