"""Commands start at once: nothing heavy is imported for help, or before the arguments are right."""

import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = (
    "accelerate", "clip", "gradio", "huggingface_hub", "matplotlib", "numpy", "onnx", "onnxruntime", "open_clip",
    "pyarrow", "safetensors", "scipy", "tifffile", "timm", "tokenizers", "torch", "torchvision", "tqdm", "transformers",
)  # fmt: skip
# runs a command as `python SCRIPT WORD...` does; what it has imported comes last on standard output
HARNESS = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *sorted(sys.modules.keys() & set({HEAVY!r}))))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
REFUSED = {  # words after the script, with {{}} for an empty folder -> what the error says
    "parse_coco.py": {
        "--tokens both": "invalid choice: 'both'",
        "": "data/README.md says where COCO's files go",
        "--annotations {}/none.json": "none.json does not exist",
        "--check --images demo/images --annotations {}/none.json": "none.json does not exist",
        "--no_captions --annotations x.json --images {}": "contradict each other",
        "--no_captions --images demo/images --out {}/x.csv": "must end in .pkl or .pickle",
        "--no_captions --images {}/none": "none",
        "--no_captions --images demo/images --clip_model_type ViT-B/23": "did you mean ViT-B/32?",
    },
    "parse_conceptual.py": {
        "--per_host 0": "not a whole number of at least 1",
        "--data_root {}": "has no Train_GCC-training.tsv",
        "--tars {}/0.tar --out {}/x.pkl": "is no folder",
        "--tars {}/0.tar": "tars do not exist",
    },
    "train.py": {
        "--lr zero": "is not a number above 0",
        "--data {}/none.pkl": "none.pkl does not exist",
        "--data README.md --init_from {}/none.pt": "none.pt does not exist",
        "--only_prefix --lora_rank 4": "leave one of them out",
        "--num_heads 4": "--mapping_type mlp has no such option",
        "--noise_angle auto": "pass a store of a few",
        "--offload_dir {}": "goes with --pn auto",
        "--out_dir README.md": "is no folder",
    },
    "train_OPT.py": {"--data {}/none.pkl": "none.pkl does not exist", "--bs 0": "at least 1"},
    "train_scst.py": {
        "--reward wit": "invalid choice: 'wit'",
        "--data {}/none.pkl": "--init_from FILE is needed",
        "--init_from {}/none.pt --data {}": "none.pt does not exist",
        "--init_from x.pt --samples 1": "pass 2 or more",
    },
    "predict.py": {
        "": "name images, or a store",
        "{}/none.jpg": "none.jpg",
        "demo/images --checkpoint dema": "did you mean demo?",
        "demo/images --checkpoint {}/none.pt": "none.pt does not exist",
        "demo/images --use_beam_search --top_p 0.5": "contradict each other",
        "demo/images --checkpoint demo --out README.md/": "is no folder",
        "demo/images --checkpoint demo --out README.md": "must end in .json or .csv",
        "--data {}/none --checkpoint demo --out {}/out/": "none does not exist",
    },
    "predict_OPT.py": {"demo/images --checkpoint {}/none.pt": "none.pt does not exist", "--seed x": "not a whole"},
    "predict_nice.py": {
        "--images {}/none": "none", "--ofile a/b": "is no plain name", "--images {}": "no image",
    },
    "evaluate.py": {
        "a.json {}/none.json": "none.json does not exist",
        "a.json b.json --metrics CIDEr --tokenizer stone": "invalid choice: 'stone'",
        "a.json b.json --images {}": "--images is for the page and for CLIPScore",
        "a.json b.json --out README.md": "must end in .json",
    },
    "export.py": {
        "--checkpoint demo --out demo": "is no exported captioner",
        "--checkpoint {}/none.pt --out {}/out": "none.pt does not exist",
        "--checkpoint demo --out {}/out --rerank mbr": "does not rerank",
    },
    "app.py": {"--checkpoint {}/none.pt": "none.pt does not exist", "--port 0": "at least 1"},
}  # fmt: skip


def start(script, *words):
    """Run a command; return (exit status, standard output without its last line, standard error, what is imported)."""
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    out, _, imported = done.stdout.rpartition("imported:")
    return done.returncode, out, done.stderr, imported.split()


@pytest.mark.parametrize("script", REFUSED)
def test_nothing_heavy_is_imported_for_help(script):
    for words, said in ((["--help"], "usage: "), (["--version"], ", torch ")):
        status, out, error, imported = start(script, *words)
        assert (status, error, imported) == (0, "", []) and said in out


@pytest.mark.parametrize(("script", "words"), [(script, words) for script, cases in REFUSED.items() for words in cases])
def test_nothing_heavy_is_imported_before_a_refusal(script, words, tmp_path):
    given = [word.replace("{}", str(tmp_path)) for word in words.split()]
    status, out, error, imported = start(script, *given)
    assert (status, out, imported) == (2, "", []), error
    (line,) = error.splitlines()
    assert "error: " in line and REFUSED[script][words] in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", REFUSED)
def test_a_wrong_flag_is_refused_at_once(script):
    status, _, error, imported = start(script, "--batch_sise", "4")
    assert (status, imported) == (2, []) and "error: " in error


# parts of libraries that captioning has no use for; utils/lean.py
LEFT_OUT = (
    "ftfy", "pkg_resources", "pyarrow", "scipy", "sympy", "torch._dynamo", "torch.distributed.tensor",
    "torchvision.datasets", "torchvision.models", "triton",
)  # fmt: skip


@pytest.mark.slow
def test_captioning_imports_no_compiler_and_no_algebra():
    harness = HARNESS.replace(repr(HEAVY), repr((*LEFT_OUT, "transformers")))
    words = ("predict.py", "demo/images/200003.jpg", "--checkpoint", "demo")
    done = subprocess.run([sys.executable, "-c", harness, *words], cwd=ROOT, capture_output=True, text=True)
    said, imported = done.stdout.splitlines()
    assert said == "demo/images/200003.jpg\tA big red star is over a little white star on snow."
    assert imported == "imported: transformers", done.stderr


@pytest.mark.slow
def test_what_is_left_out_comes_when_it_is_used():
    """Afterwards all is as without `lean`, and inside what nothing stands for is."""
    script = """
import importlib.util
import sys
import torch
from utils.lean import lean
with lean():  # libraries ask in this way whether there is a module
    assert importlib.util.find_spec("ftfy") and importlib.util.find_spec("torch._dynamo.utils")
from models import language
from encoders.openai_clip import import_clip
clip = import_clip()
assert "torch._dynamo" not in sys.modules and "ftfy" not in sys.modules
assert clip.tokenize("caf\u00e9 &amp; cake").equal(clip.tokenize("caf\u00c3\u00a9 & cake")) and "ftfy" in sys.modules
from transformers import utils
assert utils.is_torch_distributed_available() and utils.is_torch_flex_attn_available()
with lean():
    import torch._dynamo.config  # a part that nothing stands for
    assert torch._dynamo.config.__file__
assert torch._dynamo.__file__ and torch.compiler.disable.__module__ == "torch.compiler"
from torch._dynamo.utils import is_compile_supported
assert is_compile_supported("cpu") in (True, False)
calls = []
def backend(graph, inputs):
    calls.append(1)
    return graph
assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).tolist() == [2, 2] and calls
import torchvision
assert not {"torchvision.models", "torchvision.datasets"} & sys.modules.keys()
assert torchvision.models.resnet18().fc.out_features == 1000 and torchvision.datasets.FakeData(1)
from torch.distributed.tensor import DTensor
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    pass
assert torch.nn.Linear(2, 2).weight.abs().sum() > 0
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_clip_without_pkg_resources(clip_file):
    """New versions of setuptools have it no longer."""
    script = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name == "pkg_resources":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from encoders import load_encoder
import demo.world.clip_parts
assert load_encoder(sys.argv[1]).embed_dim and "pkg_resources" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script, clip_file], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_garbage_is_looked_for_while_a_command_works():
    """Not among what it imports, nor at its end."""
    script = """
import gc
from utils.cli import late_imports, run

class Part:
    def __del__(self):
        print("collected", flush=True)

def leave():
    part = Part()
    part.itself = part

def main():
    with late_imports():
        assert not gc.isenabled()
        leave()
    assert gc.isenabled() and gc.get_freeze_count()
    leave()
    print("works", flush=True)
    gc.collect()
    print("ends", flush=True)
    leave()

run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["works", "collected", "ends"], done.stderr
