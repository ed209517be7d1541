"""Libraries without those of their parts that captioning has no use for, and that take most of the time to import.

transformers imports, with any model, torch's compiler and distributed tensors, SymPy and SciPy's optimisers;
torchvision the compiler too; OpenAI's clip ftfy. Of `import transformers.modeling_utils` these are two thirds. In
`lean()` the rest is imported alone: what is left out comes when it is first used.
"""

import contextlib
import importlib
import importlib.machinery
import sys
import threading
import types
from pathlib import Path

from utils.processes import world_size

# what transformers does without, as where torch is built without it or SciPy is not installed; it asks by functions
LEFT_OUT = ("is_scipy_available", "is_torch_flex_attn_available")
OF_SEVERAL_PROCESSES = ("is_torch_distributed_available",)
# module -> functions and classes that others take from it when they are imported, and call later, or never
CALLED_LATER = {
    "ftfy": ("fix_text",),
    "torch._dynamo.utils": ("is_compile_supported",),
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
}
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")  # of torch's compiler

_one_at_a_time = threading.RLock()  # the places that are changed are everybody's


class StandIn(types.ModuleType):
    """A module in the place of one that is imported later; what it does not know is taken from that one at once."""

    def __init__(self, name, **known):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # libraries ask by it whether there is the module
        vars(self).update(known)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def later(module, name):
    """Return a function that calls one of a module that is imported then."""
    return lambda *arguments, **options: getattr(importlib.import_module(module), name)(*arguments, **options)


def unmarked(function=None, *_, **__):
    """Decorate as torch's compiler does for its own sake alone: nothing changes for who does not compile."""
    return unmarked if function is None else function


@contextlib.contextmanager
def lean():
    """Import in the body what would import parts without use; those that are here already stay."""
    with _one_at_a_time, contextlib.ExitStack() as undo:
        for name, functions in CALLED_LATER.items():
            if name not in sys.modules:
                stand_in = StandIn(name, **{function: later(name, function) for function in functions})
                sys.modules[name] = stand_in
                undo.callback(_remove, sys.modules, name, stand_in)
        if "torch._dynamo" not in sys.modules:
            _leave_compiler_out(undo)
        _tell_transformers(undo)
        yield


@contextlib.contextmanager
def undrawn():
    """Let the body build language models without drawing their weights, which are given or read for their types alone.

    To draw weights that have no memory, torch would import its compiler. Meanwhile all threads build so, in turn.
    """
    import torch

    with lean():
        from transformers import PreTrainedModel

    functions = [name for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("_")]
    places = [*((torch.nn.init, name) for name in functions), (PreTrainedModel, "initialize_weights")]
    with _one_at_a_time, contextlib.ExitStack() as undo:
        for place, name in places:
            undo.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, lambda tensor, *_, **__: tensor)
        yield


def _leave_compiler_out(undo):
    """Stand in for torch's compiler, whose decorators libraries put on functions of theirs."""
    import torch

    compiler = StandIn("torch._dynamo", **dict.fromkeys(DECORATORS, unmarked))
    torch._dynamo = compiler
    undo.callback(_remove, vars(torch), "_dynamo", compiler)
    for name in DECORATORS:  # torch's public names of them
        undo.callback(setattr, torch.compiler, name, getattr(torch.compiler, name))
        setattr(torch.compiler, name, unmarked)


def _tell_transformers(undo):
    """Tell transformers what it has to do without; other processes of the command share its tensors."""
    import transformers
    from transformers import utils

    # its models' folder would be looked through twice, by another name of it
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
