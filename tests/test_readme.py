"""The README's commands run as they stand, in a folder laid out as it says, on small models under the real names."""

import csv
import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT, run_script
from transformers import AutoConfig, AutoModelForCausalLM

import predict
from features import clip_encoder
from models import language, pretrained
from utils.files import read_json, write_json

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(\.venv/bin/)?python \w+\.py", line)
]


def lay_out(folder, photos):
    """Make the folders that the README and data/README.md speak of."""
    with open(photos / "captions.csv") as file:
        rows = list(csv.DictReader(file))
    coco = folder / "data" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train2014", "val2014"):
        (coco / split).mkdir()
    records = []
    for row in rows:
        number = int(row["image"][-16:-4])
        split = "train2014" if number % 2 else "val2014"
        shutil.copy(photos / row["image"], coco / split / f"COCO_{split}_{number:012d}.jpg")
        records.append({"image_id": number, "id": len(records), "caption": row["caption"]})
    (coco / "annotations" / "train_caption.json").write_text(json.dumps(records))
    annotations = [{"image_id": r["image_id"], "id": r["id"], "caption": r["caption"]} for r in records]
    write_json(coco / "annotations" / "captions_val2014.json", {"annotations": annotations})
    (folder / "my").mkdir()
    shutil.copytree(photos, folder / "my" / "photos")
    (folder / "my" / "photos" / "captions.csv").rename(folder / "my" / "captions.csv")
    for name in ("photos", "new_photos"):
        shutil.copytree(folder / "my" / "photos", folder / name)
    shutil.copytree(folder / "my" / "photos", folder / "data" / "nice" / "images")
    shutil.copy(photos / rows[0]["image"], folder / "photo.jpg")


@pytest.fixture
def twelve_layers(language_model, tmp_path):
    """A language model of as many layers as OPT-125M, so that the README's --pn fits it."""
    folder = shutil.copytree(language_model, tmp_path / "models" / "twelve")
    config = AutoConfig.from_pretrained(language_model)
    config.n_layer = 12
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, photos, clip_file, language_model, twelve_layers, monkeypatch):
    """A laid-out folder, where the published names mean small models."""
    lay_out(tmp_path, photos)
    monkeypatch.chdir(tmp_path)
    load_clip, load = clip_encoder._load, language._from_pretrained
    clips = ("ViT-B/32", "RN50x4")
    models = {"gpt2": str(language_model), "facebook/opt-125m": str(twelve_layers)}

    def clip_of_that_name(clip, name, device):
        return load_clip(clip, str(clip_file) if name in clips else name, device)

    def model_of_that_name(kind, source, **options):
        return load(kind, models.get(source, source), **options)

    monkeypatch.setattr(clip_encoder, "_load", clip_of_that_name)
    monkeypatch.setattr(language, "_from_pretrained", model_of_that_name)
    monkeypatch.setattr(predict, "fetch", fetched)
    return tmp_path


def fetched(name):
    """Return the captioner that an earlier command trained, as if it were the published one."""
    return f"published/{name}/coco_prefix_latest.pt"


def publish(name):
    """Keep what the last command trained as the published captioner `name`."""
    folder = shutil.copytree("coco_train", f"published/{name}")
    config = read_json(f"{folder}/coco_prefix.json")
    config["model"]["normalize_prefix"] = name == "coco-transformer"
    write_json(f"{folder}/coco_prefix.json", config)


def test_commands(workplace):
    """Training first, in the README's order, then captioning."""
    commands = [shlex.split(command)[1:] for command in COMMANDS if "demo" not in command]
    training = [words for words in commands if words[0].startswith(("parse", "train"))]
    captioning = [words for words in commands if words not in training]
    assert len(training) >= 8 and len(captioning) >= 7 and any("--num_layres" in words for words in training)
    for words in training:
        run_script(*words)
        if words[0] == "train.py" and words[-1] == "./coco_train/":
            publish("coco")
        if words[-1] == "--is_rn":
            publish("coco-transformer")
    for words in captioning:
        done = run_script(*words)
        assert "\t" in done.stdout or "captions" in done.stderr or "CIDEr" in done.stdout


def test_demo_commands(monkeypatch):
    """Those that need no data run from the checkout."""
    monkeypatch.chdir(ROOT)
    for command in COMMANDS:
        if "demo" in command:
            assert run_script(*shlex.split(command)[1:]).stdout.count("\t") > 3
    code = [block for kind, block in BLOCKS if kind == "python"]
    assert code
    for block in code:
        exec(compile(block, "README.md", "exec"), {})


def test_the_picture_and_files_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)|src=\"([^\"]+)\"", README):
        path = next(filter(None, target))
        assert (ROOT / path).exists(), path


def test_published_weights_are_named():
    assert set(pretrained.PRETRAINED) == {"coco", "conceptual", "coco-transformer"}
