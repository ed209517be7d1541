"""Training on a reward: what is sampled, how it is weighed, what a run keeps and refuses."""

import shutil

import numpy as np
import pytest
import torch
from conftest import EMBED_DIM, captions_of, read_log, run_script, slow_but, train
from test_distributed import launch, losses
from test_scripts import one_line_error, weights

from encoders import load_encoder
from features.image_dataset import ImageDataset
from features.store import FeatureStore, read_store, write_store
from metrics.cider_d import CiderD
from models.checkpoint import load_captioner
from models.decoding import generate_captions
from models.settings import DecodingConfig
from training import reward_run, rewards, self_critical
from training.rewards import CiderReward, ClipReward
from training.self_critical import SelfCritical
from training.settings import REWARDS
from utils.files import read_json


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CLIPCAP_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def store(store, tmp_path_factory):
    """The twelve images as an encoder would see them that tells them apart."""
    loaded, path = read_store(store), tmp_path_factory.mktemp("apart") / "photos.pkl"
    embeddings = torch.randn(12, EMBED_DIM, generator=torch.Generator().manual_seed(0))
    write_store(path, embeddings, loaded.captions, loaded.info)
    return path


@pytest.fixture(scope="module")
def taught(store, language_model, tmp_path_factory):
    """A captioner that tells its images apart and ends its sentences."""
    folder, loaded = tmp_path_factory.mktemp("taught"), read_store(store)
    often = folder / "often.pkl"
    write_store(often, loaded.clip_embedding, loaded.captions * 40, loaded.info)
    train(often, language_model, folder, "--epochs", 1)
    return folder / "run_latest.pt"


def scst_command(taught, store, out, *more):
    return [str(word) for word in (
        "train_scst.py", "--init_from", taught, "--data", store, "--out_dir", out, "--prefix", "run", "--bs", 4,
        "--lr", 1e-3, "--epochs", 2, "--device", "cpu", *more,
    )]  # fmt: skip


def scst(taught, store, out, *more, check=0):
    """Run train_scst.py with small settings."""
    return run_script(*scst_command(taught, store, out, *more), check=check)


class Lengths:
    """A reward: the shorter the better."""

    name = "short"

    def __call__(self, texts, images, clip_embedding, ended):
        return np.array([-len(text) for text in texts], float)


def objective(taught, store, rewards=(), **options):
    model, tokenizer, _ = load_captioner(taught)
    dataset = ImageDataset(read_store(store), with_references=True)
    return SelfCritical(model, tokenizer, dataset, list(rewards), 3, DecodingConfig(), **options)


def test_images_whose_captions_are_empty_are_images_without_captions(tmp_path, capsys):
    records = [(1, " ", 0), (2, "a dog", 1), (2, "", 2), (None, "a cat", 3), (None, "a cow", 4)]
    keys = ("image_id", "caption", "clip_embedding")
    captions = [dict(zip(keys, record, strict=True)) for record in records]
    store = FeatureStore(torch.randn(6, 4), captions, {}, tmp_path / "made.pkl")
    dataset = ImageDataset(store, with_references=True)
    assert dataset.embedding_index.tolist() == [1, 3, 4] and dataset.references == [["a dog"], ["a cat"], ["a cow"]]
    assert "warning: 2 images without captions are left out" in capsys.readouterr().err
    # row 2 is another row of image 2, as predecessors' stores have one per caption
    assert ImageDataset(store, with_references=False).embedding_index.tolist() == [1, 3, 4, 0, 5]


# ---- the objective


def test_images_keep_their_references(store):
    dataset = ImageDataset(read_store(store), with_references=True)
    assert len(dataset) == 12 and dataset.references[3] == captions_of(24)[6:8]
    numbers, embeddings = dataset.batch(np.array([3, 1]))
    assert numbers.tolist() == [3, 1] and torch.equal(embeddings, read_store(store).clip_embedding[[3, 1]].float())


def test_the_gradient_is_that_of_the_expected_reward(taught, store):
    """-(r - mean of the others) / deviation · log p, summed over the tokens that were sampled and no others."""
    learning = objective(taught, store, [Lengths()])
    batch = learning.dataset.batch(np.arange(4))
    examples = learning.examples([batch], step=7)
    assert [len(example.tokens) for example in examples] == [4, 4, 4]  # as many at a time as of cross-entropy
    config = learning.decoding
    keys = [f"7 {number}".encode() for number in range(4)]
    groups = generate_captions(learning.model, learning.tokenizer, batch[1], config, keys=keys)
    reward = np.array([[-len(caption.text) for caption in group] for group in groups], float)
    advantage = reward - (reward.sum(1, keepdims=True) - reward) / 2
    advantage /= np.sqrt((advantage**2).mean())
    expected = -sum(advantage[i, n] * groups[i][n].logprob for i in range(4) for n in range(3))
    summed = 0
    for example in examples:
        logprobs = learning.model.token_logprobs(example.tokens, example.clip_embedding, example.lengths)
        summed += learning.loss(logprobs, example).item()
    assert summed == pytest.approx(expected, rel=1e-4)
    assert sum(example.counted for example in examples) == sum(len(c.tokens) for group in groups for c in group)
    assert learning.metrics()["reward_short"] == pytest.approx(reward.mean())


def test_a_prompt_is_read_and_not_rewarded(taught, store):
    plain = objective(taught, store, [Lengths()])
    prompted = SelfCritical(
        plain.model, plain.tokenizer, plain.dataset, [Lengths()], 3, DecodingConfig(prompt="a small")
    )
    [example] = prompted.examples([plain.dataset.batch([0])], 0)[:1]
    before = plain.tokenizer.encode("a small")
    assert example.tokens[:, : len(before)].tolist() == [before] * len(example.tokens)
    assert example.counted == int(example.lengths.sum()) - len(before) * len(example.tokens)
    per_row = example.sampled.split(example.lengths.tolist())
    assert all(row[: len(before)].sum() == 0 and row[len(before) :].all() for row in per_row)


def test_sampling_is_decided_by_step_and_image_alone(taught, store):
    learning = objective(taught, store, [Lengths()])

    def drawn(numbers, step):
        learning.examples([learning.dataset.batch(numbers)], step)
        groups = learning._sample(numbers, learning.dataset.batch(numbers)[1], step, len(numbers))
        return [[caption.tokens for caption in group] for group in groups]

    assert drawn([0, 1, 2, 3], 1)[2] == drawn([2], 1)[0] != drawn([2], 2)[0]


def test_the_divergence_is_of_the_captioner_at_the_start(taught, store):
    learning = objective(taught, store, [Lengths()], kl=0.5)
    learning.reference = reward_run.frozen_copy(learning.model, train_scst_placement())
    [example] = learning.examples([learning.dataset.batch([0])], 0)[:1]
    score = lambda: learning.model.token_logprobs(example.tokens, example.clip_embedding, example.lengths)  # noqa: E731
    learning.loss(score(), example)
    assert learning.metrics()["kl"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for weight in learning.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    learning.loss(score(), example)
    assert learning.metrics()["kl"] > 0.001
    assert not any(weight.requires_grad for weight in learning.reference.parameters())


def train_scst_placement():
    from utils.flags import Placement

    return Placement([torch.device("cpu")])


def test_collapsed_captions_stop_the_run(taught, store, tmp_path, monkeypatch):
    """With the same caption for every image, whatever the reward says."""
    monkeypatch.setattr(self_critical, "WINDOW", 2)
    plain = SelfCritical._sample

    def sample(self, numbers, *more):
        groups = plain(self, numbers, *more)
        return groups if more[1] < 4 else [groups[0]] * len(groups)

    monkeypatch.setattr(SelfCritical, "_sample", sample)
    done = scst(taught, store, tmp_path, "--epochs", 9, check=2)
    one_line_error(done, "the captions have collapsed: 25% of different images' captions differ", "raise --kl")


# ---- CIDEr-D's counts


def test_counts_are_read_back(cache, monkeypatch):
    references = [["A dog.", "a brown dog"], ["the cat sat", "a cat"], ["no dog, no cat"]]
    texts, images, ended = ["A dog!", "the cat sat with a"], [0, 1], [True, False]
    first = CiderReward(references)
    with monkeypatch.context() as patch:
        patch.setattr(rewards, "CiderD", type("Fails", (), {"read": CiderD.read}))  # which cannot count
        second = CiderReward(references)
    np.testing.assert_array_equal(first(texts, images, None, ended), second(texts, images, None, ended))
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:300])
    third = CiderReward(references)
    np.testing.assert_array_equal(third(texts, images, None, ended), first(texts, images, None, ended))
    assert len(list(cache.iterdir())) == 1
    CiderReward([["A dog.", "a brown dog"], ["the cat sat"], ["a cat", "no dog, no cat"]])
    assert len(list(cache.iterdir())) == 2  # the same captions of other images


def test_counts_are_of_references_as_they_are_divided(cache):
    for references in ([["a dog\nruns"], ["a cat"]], [["a dog", "runs"], ["a cat"]], [["a dog"], ["runs\0a cat"]]):
        CiderReward(references)
    assert len(list(cache.iterdir())) == 3


def test_clip_scores_are_of_full_precision(clip_file):
    """Whatever the captioner computes in: a caption's advantage is a small difference."""
    encoder = load_encoder(clip_file)
    texts, images = captions_of(6), torch.randn(6, EMBED_DIM)
    expected = ClipReward(encoder)(texts, range(6), images, [True] * 6)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(ClipReward(encoder)(texts, range(6), images, [True] * 6), expected)


def test_counts_that_cannot_be_kept_are_counted_again(cache, capsys):
    cache.rmdir()
    cache.write_text("a file in the place of the folder")
    scorer = CiderReward([["a dog runs"], ["the cat sat"]])
    assert scorer(["a dog runs"], [0], None, [True])[0] > 9
    assert "warning: the counts were not kept" in capsys.readouterr().err


def test_a_bare_checkpoint_is_taken_as_predict_takes_it(taught, store, tmp_path, language_model, monkeypatch):
    """Also the published transformer's, which is known to want normalised embeddings."""
    bare = tmp_path / "weights.pt"
    shutil.copy(taught, bare)
    flags = ("--language_model", language_model)

    def guess(checkpoint, config, state_dict):
        config.normalize_prefix = True

    monkeypatch.setattr("training.reward_run.guess_normalization", guess)
    scst(bare, store, tmp_path / "run", *flags, "--epochs", 1)
    assert read_json(tmp_path / "run" / "run.json")["model"]["normalize_prefix"]
    monkeypatch.undo()
    done = scst(bare, store, tmp_path / "plain", *flags, "--epochs", 1)
    assert "does not say whether it was trained on normalised embeddings" in done.stderr
    assert not read_json(tmp_path / "plain" / "run.json")["model"]["normalize_prefix"]


def test_opt_is_told_by_its_weights_not_by_its_name(taught, store, tmp_path, language_model):
    """A GPT-2 in a folder of this name is decoded as GPT-2 is."""
    shutil.copytree(language_model, tmp_path / "adopted")
    shutil.copy(taught, tmp_path / "weights.pt")
    scst(tmp_path / "weights.pt", store, tmp_path / "run", "--language_model", tmp_path / "adopted", "--epochs", 1)
    assert read_json(tmp_path / "run" / "run.json")["decoding"]["prompt"] == ""


def test_a_caption_that_was_cut_has_no_end():
    scorer = CiderReward([["a dog runs"], ["the cat sat with a dog"]])
    whole, cut = scorer(["a dog runs", "a dog runs"], [0, 0], None, [True, False])
    assert whole > cut


# ---- the command


@pytest.mark.parametrize("reward", slow_but(REWARDS, "cider+clip"))
def test_training(taught, store, tmp_path, reward):
    scst(taught, store, tmp_path, "--reward", reward, "--epochs", 5, "--lr", 5e-3, "--kl", 0.01, "--val_data", store)
    log = [entry for entry in read_log(tmp_path) if "loss" in entry]
    assert len(log) == 15
    for name in reward.split("+"):
        values = [entry[f"reward_{name}"] for entry in log]
        assert np.mean(values[-5:]) > np.mean(values[:5])
        assert all(entry[f"advantage_spread_{name}"] > 0 for entry in log[:3])
    assert {"length", "share_of_distinct_captions", "kl"} <= log[0].keys()
    assert (tmp_path / "run_best.pt").is_file() and (tmp_path / "run-loss.png").is_file()
    run_script("predict.py", store.parent.parent / "none.jpg", "--checkpoint", tmp_path / "run_latest.pt", check=2)


@pytest.mark.parametrize("flags", ([], ["--lora_rank", "2"], ["--only_prefix"]), ids=("all", "lora", "prefix"))
def test_resume_is_exact(taught, store, tmp_path, monkeypatch, flags):
    """Stopped after two steps of six: the same draws, losses and weights."""
    import os
    import signal

    from test_run_files import at_step

    flags = [*flags, "--kl", "0.1", "--gradient_accumulation_steps", "1"]
    scst(taught, store, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        scst(taught, store, tmp_path / "cut", *flags, check=143)
    scst(taught, store, tmp_path / "cut", *flags, "--resume")
    plain = lambda log: [{k: v for k, v in entry.items() if k != "examples_per_s"} for entry in log]  # noqa: E731
    assert plain(read_log(tmp_path / "whole")) == plain(read_log(tmp_path / "cut"))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    done = scst(taught, store, tmp_path / "cut", *flags, "--resume", "--samples", 4, check=2)
    one_line_error(done, "the run had --samples 5, not 4")


def test_what_is_frozen_stays(taught, store, tmp_path):
    scst(taught, store, tmp_path, "--only_prefix")
    before, after = load_captioner(taught)[0].state_dict(), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("clip_project.") for name in changed)


def test_images_without_captions(taught, store, tmp_path):
    loaded = read_store(store)
    bare = tmp_path / "bare.pkl"
    pictures = [{"image_id": row, "file_name": f"{row}.jpg"} for row in range(12)]
    write_store(bare, loaded.clip_embedding, [], loaded.info, pictures)
    one_line_error(scst(taught, bare, tmp_path / "run", check=2), "holds no captions", "--reward clip")
    scst(taught, bare, tmp_path / "run", "--reward", "clip", "--kl", "0.05")
    assert "reward_clip" in read_log(tmp_path / "run")[0]


def test_flags_that_cannot_be(taught, store, tmp_path):
    for flags, *words in (
        (["--samples", 1], "--samples 1", "pass 2 or more"),
        (["--group_by_length"], "--group_by_length"),
        (["--mapping_type", "transformer"], "--mapping_type transformer contradicts", "which has mlp"),
        (["--init_from", tmp_path / "none.pt"], "does not exist"),
        (["--out_dir", taught.parent], "would overwrite"),
    ):
        one_line_error(scst(taught, store, tmp_path / "run", *flags, check=2), *words)
    done = run_script("train_scst.py", "--data", store, check=2)
    one_line_error(done, "--init_from FILE is needed")
    narrow = tmp_path / "narrow.pkl"
    write_store(narrow, torch.randn(12, 7), read_store(store).captions, {})
    one_line_error(scst(taught, narrow, tmp_path / "run", check=2), "7 wide", "32 wide")
    assert not (tmp_path / "run").exists()


def test_an_untrained_captioner_is_refused(store, language_model, tmp_path):
    train(store, language_model, tmp_path / "new", "--epochs", 1, "--lr", 1e-9)
    done = scst(tmp_path / "new" / "run_latest.pt", store, tmp_path / "run", check=2)
    one_line_error(done, "train it by train.py first")


@pytest.mark.slow
@pytest.mark.parametrize("flags", ([], ["--fsdp"]), ids=("data parallel", "sharded"))
def test_two_processes_train_as_one_does(taught, store, tmp_path, flags):
    one, two = tmp_path / "one", tmp_path / "two"
    scst(taught, store, one, "--kl", "0.1")
    launch(2, two, scst_command(taught, store, two, "--kl", "0.1", *flags))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3, abs=1e-4)
    assert [e["reward_cider"] for e in read_log(two)] == pytest.approx([e["reward_cider"] for e in read_log(one)])
