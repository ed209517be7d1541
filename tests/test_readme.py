"""The commands of the README and of docs/ run as they stand, but for one epoch, in a folder laid out as they say, on
small models under the real names."""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from conftest import ROOT, run_script
from test_share import hub  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

from encoders import openai_clip
from features import addresses, conceptual, references
from metrics import coco
from models import language, pretrained
from training.self_critical import SelfCritical
from utils.files import read_json, write_json


def blocks(page):
    """Return a page's fenced blocks that name a language: [(language, text)]."""
    return re.findall(r"```(\w+)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(block):
    """Return the words of the `python script.py` commands of a bash block."""
    lines = (line.split(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [shlex.split(line)[1:] for line in lines if re.match(r"(\.venv/bin/)?python \w+\.py", line)]


SERVERS = ("app.py", "cog_predict.py")  # their own tests run them
COMMANDS = [words for kind, block in blocks("README.md") if kind == "bash" for words in commands(block)]


def lay_out(folder, photos):
    """Make the folders that the pages speak of."""
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
    table = folder / "my" / "captions.csv"
    for row in rows[2:6:2]:  # by their names these two are for validation, and CIDEr needs two
        (folder / "my" / "photos" / row["image"]).rename(folder / "my" / "photos" / f"my_{row['image']}")
        table.write_text(table.read_text().replace(row["image"], f"my_{row['image']}"))
    lay_out_published(folder, photos, records)


def lay_out_published(folder, photos, records):
    """Make what docs/reproduce.md fetches: Karpathy's split, nocaps, Conceptual Captions."""
    splits = dict(zip(range(1, 13), ("train", "restval", "val", "test") * 3, strict=True))
    images = []
    for number, split in splits.items():
        year = "train2014" if number % 2 else "val2014"
        sentences = [{"raw": record["caption"]} for record in records if record["image_id"] == number]
        images.append({"cocoid": number, "filepath": year, "filename": f"COCO_{year}_{number:012d}.jpg",
                       "split": split, "sentences": sentences})  # fmt: skip
    write_json(folder / "data" / "coco" / "annotations" / "dataset_coco.json", {"images": images})
    (folder / "data" / "nocaps" / "val").mkdir(parents=True)
    heads = [{"id": i, "file_name": f"{i}ea2.jpg", "domain": ("in-domain", "out-domain")[i % 2]} for i in range(4)]
    annotations = [{"image_id": i, "caption": records[i]["caption"]} for i in range(4)]
    write_json(folder / "data/nocaps/nocaps_val_4500_captions.json", {"images": heads, "annotations": annotations})
    for number, head in enumerate(heads, 1):
        picture = photos / f"COCO_val2014_{number:012d}.jpg"
        shutil.copy(picture, folder / "data" / "nocaps" / "val" / head["file_name"])
    (folder / "data" / "conceptual").mkdir(parents=True)
    for table in addresses.TABLES.values():
        lines = (f"{record['caption']}\thttp://pictures.example/{number}" for number, record in enumerate(records[:12]))
        (folder / "data" / "conceptual" / table).write_text("\n".join(lines) + "\n")


class Pictures:
    """In the place of the internet: number N of twelve photos is at an address that ends in /N."""

    def __init__(self, photos):
        self.files = sorted(photos.glob("*.jpg"))

    def __call__(self, *_limits):
        return self

    def fetch(self, address, _stopped):
        return self.files[int(address.rsplit("/", 1)[1])].read_bytes()


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
    load_clip, load = openai_clip._load, language._from_pretrained
    clips = ("ViT-B/32", "RN50x4")
    models = {"gpt2": str(language_model), "facebook/opt-125m": str(twelve_layers)}

    def clip_of_that_name(clip, name, device):
        return load_clip(clip, str(clip_file) if name in clips else name, device)

    def model_of_that_name(kind, source, **options):
        return load(kind, models.get(source, source), **options)

    monkeypatch.setattr(openai_clip, "_load", clip_of_that_name)
    monkeypatch.setattr(language, "_from_pretrained", model_of_that_name)
    monkeypatch.setattr(pretrained, "fetch", fetched)
    monkeypatch.setattr(conceptual, "Fetcher", Pictures(photos))
    return tmp_path


def fetched(name):
    """Return the captioner that an earlier command trained, as if it were the published one."""
    return Path(f"published/{name}/coco_prefix_latest.pt")


def publish(folder, name):
    """Keep a trained captioner as the published one `name`."""
    folder = shutil.copytree(folder, f"published/{name}")
    config = read_json(f"{folder}/coco_prefix.json")
    config["model"]["normalize_prefix"] = name == "coco-transformer"
    write_json(f"{folder}/coco_prefix.json", config)


def run_one_epoch(words):
    """Run a command; a training for one epoch only."""
    return run_script(*map(os.path.expanduser, words), *(["--epochs", 1] if words[0].startswith("train") else []))


@pytest.fixture
def small_split(monkeypatch):
    """Let Karpathy's split have as few images as ours; no Java, for speed."""
    monkeypatch.setattr(references, "KARPATHY_COCO", {"train": 6, "val": 3, "test": 3})
    monkeypatch.setattr(coco, "java_available", lambda: False)


def test_commands(workplace, small_split):
    """Training first, in the README's order, then captioning."""
    own = [words for words in COMMANDS if words[0] not in SERVERS and not any("demo" in word for word in words)]
    training = [words for words in own if words[0].startswith(("parse", "train"))]
    captioning = [words for words in own if words not in training]
    assert len(training) >= 8 and len(captioning) >= 7 and any("--num_layres" in words for words in training)
    for words in training:
        run_one_epoch(words)
        if words[0] == "train.py" and words[-1] == "./coco_train/":
            publish("coco_train", "coco")
        if words[-1] == "--is_rn":
            publish("coco_rn", "coco-transformer")
    for words in captioning:
        done = run_script(*words)
        assert "\t" in done.stdout or "captions" in done.stderr or "CIDEr" in done.stdout


@pytest.mark.parametrize(("page", "trainings"), (("docs/your_data.md", 2), ("docs/reproduce.md", 7)))
def test_page(workplace, small_split, monkeypatch, page, trainings):
    """A page from its top to its end, Python and commands."""
    monkeypatch.setenv("HOME", str(workplace))
    ran = []
    for kind, block in blocks(page):
        if kind == "python":
            exec(compile(block, page, "exec"), {})
        for words in commands(block) if kind == "bash" else ():
            done, train = run_one_epoch(words), words[0] == "train.py"
            ran.append(words[0])
            if words[0] == "evaluate.py":
                assert "CIDEr" in done.stdout and ("nocaps" not in words[1] or "out-domain" in done.stdout)
            if train and "--normalize_prefix" in words:
                publish("coco_notebook", "coco-transformer")
            if train and "my_captioner" in words:  # as if it were the published one
                (workplace / ".cache" / "clipcap").mkdir(parents=True)
                shutil.copy("my_captioner/coco_prefix_best.pt", workplace / ".cache" / "clipcap" / "coco_weights.pt")
    assert ran.count("train.py") == trainings and ran[-1] == "evaluate.py"


def test_demo_commands(monkeypatch):
    """Those that need no data run from the checkout."""
    monkeypatch.chdir(ROOT)
    for words in COMMANDS:
        if any("demo" in word for word in words):
            assert run_script(*words).stdout.count("\t") > 3
    code = [block for kind, block in blocks("README.md") if kind == "python"]
    assert code
    for block in code:
        exec(compile(block, "README.md", "exec"), {})


def test_servers_know_their_flags():
    for words in (words for words in COMMANDS if words[0] in SERVERS):
        pytest.importorskip("cog" if "cog" in words[0] else "gradio")
        importlib.import_module(words[0].removesuffix(".py")).get_parser().parse_args(words[1:])


def test_endpoint_knows_what_is_asked():
    """The query of the README's curl, by the page's own models."""
    pytest.importorskip("gradio")
    from pages.route import read_options
    from pages.service import Service

    [query] = re.findall(r"/caption\?([^\"]+)", (ROOT / "README.md").read_text())
    service = Service({name: name for name in (pretrained.DEMO, *pretrained.PRETRAINED)})
    model, method, *_ = read_options(dict(parse_qsl(query, strict_parsing=True)), service)
    assert (model, method) == ("coco", "greedy") and model in pretrained.PRETRAINED  # a photo


@pytest.mark.parametrize(
    "page",
    (
        "README.md",
        "CONTRIBUTING.md",
        "data/README.md",
        *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
    ),
)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)|src=\"([^\"]+)\"", (ROOT / page).read_text()):
        path = next(filter(None, target))
        assert ((ROOT / page).parent / path).exists(), path


def test_published_weights_are_named():
    assert set(pretrained.PRETRAINED) == {"coco", "conceptual", "coco-transformer"}


def run_page(page, scripts=None):
    """Run a page's commands, of some scripts or all; returns what each printed: [(words, stdout)]."""
    found = [words for kind, block in blocks(page) if kind == "bash" for words in commands(block)]
    return [(words, run_one_epoch(words).stdout) for words in found if scripts is None or words[0] in scripts]


@pytest.fixture
def hardly_trained(monkeypatch):
    """Let rewards train a captioner that says the same of every image, as ours do after an epoch of twelve."""
    monkeypatch.setattr(SelfCritical, "check_trained", lambda _: None)


def test_page_on_training(workplace, small_split, hardly_trained):
    """Rewards, sentences alone, photos alone, candidates."""
    with open("my/captions.csv") as file:
        Path("sentences.txt").write_text("".join(f"{row['caption']}\n" for row in csv.DictReader(file)))
    os.mkdir("a_few_photos")
    for photo in Path("photos").iterdir():
        for number in range(3):  # --match needs 32
            shutil.copy(photo, f"a_few_photos/{number}_{photo.name}")
    ran = run_page("docs/training.md")
    assert {words[0] for words, _ in ran} == {"parse_coco.py", "train.py", "train_scst.py", "predict.py"}
    assert [words[0] for words, _ in ran].count("train_scst.py") == 3
    assert all("\t" in said for words, said in ran if words[0] == "predict.py" and "--out" not in words)
    for file in ("text_captioner/coco_prefix_latest.pt", "my_captioner/scst_prefix_latest.pt", "captions.json"):
        assert Path(file).is_file()


def test_page_on_encoders(workplace):
    ran = run_page("docs/encoders.md")
    (_, names), *_, (_, captions) = ran
    assert {words[0] for words, _ in ran} == {"parse_coco.py", "train.py", "predict.py"}
    assert "siglip" in names.lower() and captions.count("\t") == len(os.listdir("photos"))


def test_page_on_sharing(workplace, small_split, hardly_trained, hub):  # noqa: F811
    """Trained as another page says, pushed, then loaded, at a tag too."""
    for words in commands(blocks("docs/training.md")[0][1]):
        run_one_epoch(words)
    run_script(
        "predict.py", "data/coco/val2014", "--checkpoint", "coco_train/coco_prefix_best.pt", "--out", "captions.json"
    )
    pushed = run_page("docs/share.md", ("evaluate.py", "export.py"))
    repository = hub.repositories["ORG/NAME"]
    repository.tags["v1.0"] = repository.commits[-1][0]
    loaded = run_page("docs/share.md", ("predict.py", "train_scst.py"))
    scripts = {words[0] for words, _ in (*pushed, *loaded)}
    assert scripts == {"predict.py", "train_scst.py", "evaluate.py", "export.py"}
    assert len(pushed) == 3 and hub.repositories["ORG/NAME-onnx"].private
    assert [said.count("\t") for words, said in loaded if words[0] == "predict.py"] == [1, 1] and len(loaded) == 3
