"""The model card of a shared captioner: its repository's README.md, written from its files alone."""

from pathlib import Path

from utils.files import read_json

TORCH, ONNX = "torch", "onnx"
USE = {
    TORCH: """From a checkout of ClipCap{extra}:

```bash
python predict.py photo.jpg --checkpoint {repository}
```

```python
from predict import Predictor

predictor = Predictor()
predictor.setup(["{repository}"])
print(predictor.predict("photo.jpg"))
```

`{repository}@COMMIT` stays at one commit of this repository. Once fetched, it works without a network.""",
    ONNX: """Without torch, by the package `runtime/` of a checkout of ClipCap:

```bash
pip install ./runtime huggingface_hub
hf download {repository} --local-dir {name}
clipcap {name} photo.jpg
```""",
}
EXTRAS = {"open_clip": "open_clip", "hf-hub": "open_clip", "local-dir": "open_clip", "timm": "timm"}


def make_card(repository, form, described, base_model=None, license=None, scores=None):
    """Return the text of a card.

    Args:
        repository: ORG/NAME.
        form: TORCH or ONNX.
        described: contents of the shared captioner's captioner.json.
        base_model: the language model's name on the hub, or None.
        license: the hub's identifier of the licence, or None where none was given.
        scores: as evaluate.py writes them, or None.
    """
    name, model = repository.split("/")[1], described["model"]
    extra = EXTRAS.get(model["clip_model_type"].partition(":")[0])
    use = USE[form].format(
        repository=repository, name=name, extra=f' with `pip install -e ".[{extra}]"`' if extra else ""
    )
    parts = [
        _front_matter(form, base_model, license),
        f"# {name}\n\nAn image captioner of [ClipCap](https://arxiv.org/abs/2111.09734)'s kind: image → encoder → "
        "mapping network → prefix → language model → caption.",
        f"## Use\n\n{use}",
        f"## What it is made of\n\n{_table(_parts(described, base_model))}",
        f"## Data\n\n{_table(_data(described))}",
        f"## Training\n\n{_table(_training(described))}",
        f"## Scores\n\n{_scores(scores)}",
        "## Licence\n\n" + (f"`{license}`, as who uploaded it says." if license else "Not stated: ask who uploaded it.")
        + " Encoder and language model have licences of their own.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _front_matter(form, base_model, license):
    """Return the block that the hub reads."""
    lines = [f"license: {license or 'unknown'}", "library_name: clipcap", "pipeline_tag: image-to-text"]
    if base_model:
        lines += [f"base_model: {base_model}"]
    lines += [
        "tags:",
        *(f"- {tag}" for tag in ("image-captioning", "clipcap", "onnx" if form == ONNX else "safetensors")),
    ]
    return "\n".join(["---", *lines, "---"])


def _table(rows):
    """Return rows of two cells as a table, or "Not recorded." for none."""
    if not rows:
        return "Not recorded."
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {' | '.join(row)} |" for row in cells)])


def _parts(described, base_model):
    """Return rows that say what a captioner is made of."""
    model, language = described["model"], described.get("language_model_config") or {}
    trained = "frozen" if model["only_prefix"] else "fine-tuned"
    if model["lora_rank"]:
        trained = f"LoRA of rank {model['lora_rank']}"
    sizes = [
        f"{language[key]:,} {word}"
        for keys, word in ((("num_hidden_layers", "n_layer"), "layers"), (("hidden_size", "n_embd"), "wide"))
        for key in keys
        if key in language
    ]
    kind = [language["model_type"]] if "model_type" in language else []
    decoding = described.get("decoding") or {}
    said = [f"{key} {decoding[key]!r}" for key in ("method", "prompt", "entry_length", "stop_token") if key in decoding]
    prefix = f"{model['mapping_type']}, prefix of {model['prefix_length']}"
    return [
        ("encoder", f"`{model['clip_model_type']}`, "
         f"{'all its tokens' if model.get('num_tokens') else 'one vector an image'}"
         f"{', normalised' if model['normalize_prefix'] else ''}"),
        ("SHA-256 of the encoder", f"`{model['clip_sha256']}`" if model["clip_sha256"] else "not recorded"),
        ("mapping network", f"{prefix}, {model['num_layers']} layers" if model["mapping_type"] != "mlp" else prefix),
        ("language model", ", ".join([f"`{base_model}`" if base_model else "one of its own", *kind, *sizes, trained])),
        *([("decoding", ", ".join(said))] if said else []),
        *([("numbers", described["dtype"])] if "dtype" in described else []),
    ]  # fmt: skip


def _data(described):
    """Return rows that say what it was trained on, as the feature store recorded it."""
    data, names = described.get("data") or {}, ("annotations", "annotations_sha256", "split", "images", "captions")
    return [(name.replace("_", " "), data[name]) for name in names if data.get(name) not in (None, "", [])]


def _training(described):
    """Return rows of the flags of the training."""
    training = described.get("training") or {}
    return [
        (f"`--{name}`", value) for name, value in training.items() if value is not False and value not in (None, "")
    ]


def read_scores(path):
    """Return the scores that evaluate.py wrote into a file; raises ValueError for any other file."""
    scores = read_json(path)
    metrics = scores.get("metrics") if isinstance(scores, dict) else None
    numbers = isinstance(metrics, dict) and all(isinstance(value, int | float | None) for value in metrics.values())
    if not numbers or not isinstance(scores.get("images"), int):
        raise ValueError(f"--scores {path} is not what evaluate.py --out writes")
    return scores


def _scores(scores):
    """Return a table of scores with their intervals, and how they were computed."""
    if not scores:
        return "None were given."
    spans = scores.get("intervals") or {}
    rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value in scores["metrics"].items():
        span = spans.get(name)
        within = f"{span[0]:.3f} to {span[1]:.3f}" if span else "–"
        rows.append(f"| {name} | {'–' if value is None else f'{value:.3f}'} | {within} |")
    files = " against ".join(f"`{Path(scores[key]).name}`" for key in ("captions", "references") if scores.get(key))
    method_parts = [f"`evaluate.py`, {scores['images']:,} images"]
    method_parts += [files] if files else []
    method_parts += [f"tokenizer {scores['tokenizer']}"] if scores.get("tokenizer") else []
    method = (scores.get("bootstrap") or {}).get("method")
    return "\n".join(rows) + "\n\n" + ": ".join([", ".join(method_parts), *([method] if method else [])]) + "."
