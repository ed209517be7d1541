"""The notebooks run from top to bottom as they stand, define nothing, and hold no outputs."""

import ast
import re
import shutil

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="reads notebooks")
nbclient = pytest.importorskip("nbclient", reason="runs notebooks")
pytest.importorskip("ipykernel", reason="the kernel that notebooks run on")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# the last runs five commands
LEFT_OUT = shutil.ignore_patterns(".*", "out", "data", "docs", "tests", "__pycache__", "*_train", "checkpoints")
COMMAND = re.compile(r"^(\s*)[!%](?:.*\\\n)*.*$", re.MULTILINE)  # of the shell or of IPython
# found in what the cells put out
EXPECTED = {
    "clip_prefix_captioning_inference": [
        r"yellow rings .* green square",
        r"200041\.jpg\t",
    ],
    "transformer_inference": [r"-\d\.\d\d  .* yellow rings .* green square", "cc-words", r"  9  \w+ 0\.\d\d, "],
    "train_your_own": [r"image,caption\n\d{6}\.jpg,", r"image/png", r"(\w+ ){5,}\w+\.\n"],
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository that notebooks may write into."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("notebooks") / "clipcap", ignore=LEFT_OUT)


def code_of(notebook):
    """Return the Python of a notebook's code cells."""
    return [COMMAND.sub(r"\1pass", cell.source) for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, checkout, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": checkout / "notebooks"}})
    client.execute()
    text = "\n".join(
        output.get("text") or "\n".join(f"{kind}: {data}" for kind, data in output.get("data", {}).items())
        for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )  # fmt: skip
    for pattern in EXPECTED[path.stem]:
        assert re.search(pattern, text), text[-3000:]
    assert "error:" not in text and "Traceback" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_plain(path):
    """No outputs, no definitions; the first code cell clones and installs where it runs in Colab."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = code_of(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for source in code for node in ast.walk(ast.parse(source)) if isinstance(node, defined)]
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert all(word in first for word in ("google.colab", "git clone", "pip install", "REPOSITORY"))
    assert f"/notebooks/{path.name})" in notebook.cells[0].source  # the badge opens this one


def test_all_notebooks_are_tested():
    assert {path.stem for path in NOTEBOOKS} == set(EXPECTED)
