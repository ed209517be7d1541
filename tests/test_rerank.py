"""Choosing among candidates: order, duplicates, batches, memory that runs out, flags."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from test_scripts import one_line_error

import predict
import predict_nice
import predict_OPT
from demo import rerank as experiment
from features.loader import encode_files
from models import rerank
from models.captioner import Captioner
from models.decoding import generate_captions
from models.rerank import Reranker, candidates_config, rank_by_clip, rank_by_consensus
from models.searches import Caption
from models.settings import BEAM, GREEDY, SAMPLE, DecodingConfig
from pages.errors import Refused
from pages.fragments import captions_html
from pages.service import Service
from utils.files import read_json

IMAGES = sorted(map(str, (ROOT / "demo" / "images").iterdir()))[:5]
CLIP = DecodingConfig(rerank="clip", num_captions=3)
WAYS = {
    "clip": CLIP,
    "mbr": replace(CLIP, rerank="mbr"),
    "clip, beams": replace(CLIP, method=BEAM, num_candidates=6),
    "mbr, beams": replace(CLIP, method=BEAM, num_candidates=6, rerank="mbr"),
    "mbr, the library's beams": replace(
        CLIP, method=BEAM, num_candidates=6, rerank="mbr", decoder="transformers", entry_length=30
    ),
}


@pytest.fixture(scope="module")
def demo():
    """The demo's captioner and the embeddings of five images."""
    captioner = Captioner("demo", device="cpu")
    [(_, embeddings, _)] = encode_files(captioner.encoder, IMAGES, 5)
    return captioner, embeddings


def texts_of(groups):
    return [[caption.text for caption in group] for group in groups]


@pytest.mark.parametrize("way", WAYS)
def test_batch_equals_single_and_texts_differ(demo, way):
    captioner, embeddings = demo
    groups = texts_of(captioner.caption_embeddings(embeddings, WAYS[way]))
    single = [captioner.caption_embeddings(row[None], WAYS[way])[0] for row in embeddings]
    assert groups == texts_of(single)
    assert all(len(group) == len(set(group)) == 3 for group in groups)


def test_best_by_clip_and_logprob_of_all_candidates(demo):
    """Against the scores of all candidates, one by one; every text is embedded once and in one call."""
    captioner, embeddings = demo
    asked = []

    def encode_texts(texts):
        asked.append(texts)
        return captioner.encoder.encode_texts(texts)

    ranker = Reranker(captioner.model, captioner.tokenizer, encode_texts)
    best = [group[0].text for group in ranker.caption(embeddings, CLIP)]
    assert len(asked) == 1 and len(set(asked[0])) == len(asked[0])
    candidates = generate_captions(captioner.model, captioner.tokenizer, embeddings, candidates_config(CLIP))
    assert len(candidates[0]) == 16
    for embedding, group, chosen in zip(embeddings, candidates, best, strict=True):
        values = []
        for caption in group:
            text = captioner.encoder.encode_texts(["A photo depicts " + caption.text.strip()])[0]
            cosine = torch.cosine_similarity(text, embedding, 0).item()
            values.append(2.5 * max(0, cosine) + rerank.LOGPROB_WEIGHT * caption.mean_logprob)
        assert group[int(np.argmax(values))].text == chosen


def test_consensus_and_duplicates():
    def captions(*texts):
        return [Caption([1], -1.0 - i, text) for i, text in enumerate(texts)]

    odd, common, near = "A blue ring.", "A red star on sand.", "A red star on the sand."
    assert [c.text for c in rank_by_consensus([captions(odd, near, common)], False)[0]][2] == odd
    assert texts_of(rank_by_consensus([captions(odd, near, odd, odd, " " + odd)], False)) == [[odd, near]]
    certain = [Caption([1], 0.0, odd), Caption([1], -5.0, near), Caption([1], -6.0, common)]
    assert texts_of(rank_by_consensus([certain], True))[0][0] != odd  # nobody agrees with it, however probable
    for alone in ("", "!", odd):
        assert texts_of(rank_by_consensus([captions(alone), captions(alone, alone)], False)) == [[alone], [alone]]
    image, other = torch.tensor([[1.0, 0.0]]), {near: [1.0, 0.1], odd: [0.0, 1.0], common: [1.0, 1.0]}
    ranked = rank_by_clip(
        image,
        [captions(odd, near, common, near)],
        lambda texts: [other[t.removeprefix("A photo depicts ")] for t in texts],
    )
    assert texts_of(ranked) == [[near, common, odd]]


def test_candidates_that_do_not_fit_in_memory(demo, monkeypatch, capsys):
    """Fewer images at a time change nothing; an image alone has fewer candidates; both are told once."""
    captioner, embeddings = demo
    expected = texts_of(captioner.caption_embeddings(embeddings, CLIP))
    asked, room = [], 40

    def limited(model, tokenizer, rows, config, keys=None):
        asked.append(len(rows) * config.num_captions)
        if asked[-1] > room:
            raise torch.OutOfMemoryError
        return generate_captions(model, tokenizer, rows, config, keys=keys)

    monkeypatch.setattr(rerank, "generate_captions", limited)
    ranker = Reranker(captioner.model, captioner.tokenizer, captioner.encoder.encode_texts)
    assert texts_of(ranker.caption(embeddings, CLIP)) == expected
    assert asked == [80, 32, 16, 32]
    assert capsys.readouterr().err == "warning: 80 candidates do not fit in memory; going on with 40 at a time\n"
    asked, room = [], 5
    for way in ("clip", "clip, beams"):
        assert all(1 <= len(group) <= 3 for group in ranker.caption(embeddings, WAYS[way]))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[-1].endswith("going on with 4 at a time, so that an image has fewer")
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        ranker.caption(embeddings, CLIP)


def test_no_text_tower(demo):
    captioner, embeddings = demo
    ranker = Reranker(captioner.model, captioner.tokenizer)
    with pytest.raises(ValueError, match="--rerank clip needs an encoder with a text tower, .*; use --rerank mbr"):
        ranker.caption(embeddings, CLIP)
    assert len(ranker.caption(embeddings, WAYS["mbr"])) == 5


def test_page_without_text_tower(demo):
    """It offers no choice by text, says so where it is asked for all the same, and shows no score of it."""
    captioner, _ = demo
    captioner = copy.copy(captioner)
    captioner.encoder = copy.copy(captioner.encoder)
    captioner.encoder.has_texts = False
    service = Service({"demo": "demo"}, "cpu")
    assert next(iter(service.methods.values())) == "clip"
    service.predictor = SimpleNamespace(captioner=lambda model: captioner, is_loaded=lambda model: True)
    with pytest.raises(Refused, match="no text tower"):
        service.caption(IMAGES[0], "demo", service.decoding("clip", 3, 1, 1, 0))
    answer = service.caption(IMAGES[0], "demo", service.decoding("beam", 3, 1, 1, 0))
    assert [found["clip_score"] for found in answer] == [None] * 3 and "CLIP score" not in captions_html(answer)


@pytest.mark.parametrize("parser", (predict.get_parser, predict_OPT.get_parser, predict_nice.get_parser))
def test_flags(parser):
    parser = parser()
    images = [] if parser.description.startswith("Caption the images of the NICE") else ["x.jpg"]

    def decoding(*flags):
        return predict.decoding_config(parser.parse_args([*images, "--checkpoint", "no.pt", *flags]))

    base = decoding()
    assert base.rerank == "none" and decoding("--rerank", "mbr") == replace(base, rerank="mbr")
    asked = decoding("--rerank", "clip", "--num_candidates", "32", "--num_captions", "8")
    assert (asked.rerank, asked.num_candidates, asked.num_captions) == ("clip", 32, 8)
    made = candidates_config(asked)
    assert made.num_captions == 32 and made.method == (BEAM if base.method == BEAM else SAMPLE)
    for flags, named in (
        (["--num_candidates", "8"], "--num_candidates 8 needs --rerank"),
        (["--rerank", "none", "--num_candidates", "8"], "--num_candidates 8 needs --rerank"),
        (["--rerank", "clip", "--num_candidates", "2", "--num_captions", "3"], "--num_captions 3 is more than"),
    ):
        with pytest.raises(ValueError, match=named):
            decoding(*flags)


def test_reranking_travels_in_a_json():
    stored = DecodingConfig.from_dict({"method": GREEDY, "rerank": "mbr", "num_candidates": 8, "num_captions": 2}, "x")
    assert stored.rerank == "mbr" and candidates_config(stored).num_captions == 8
    for values, named in (({"rerank": "cider"}, "--rerank 'cider'"), ({"num_candidates": 0}, "num_candidates 0")):
        with pytest.raises(ValueError, match=named):
            DecodingConfig.from_dict(values, "x")


def test_command_reranks():
    flags = ("--checkpoint", "demo", "--device", "cpu")
    done = run_script("predict.py", *IMAGES[:2], *flags, "--rerank", "clip", "--num_captions", 2)
    assert len({line.split("\t")[1] for line in done.stdout.splitlines()}) == 4
    one_line_error(run_script("predict.py", IMAGES[0], *flags, "--num_candidates", 4, check=2), "--rerank")


def test_experiment_runs(tmp_path, monkeypatch, capsys):
    """Few scenes and candidates: shares, times, the picture."""
    for name, value in (("TEST", 4), ("TUNE", 4), ("TIMED", 2), ("BATCH", 3)):
        monkeypatch.setattr(experiment, name, value)
    flags = ["--out", str(tmp_path), "--picture", str(tmp_path / "x.png"), "--seeds", "2", "--candidates", "1", "5"]
    experiment.main(flags)
    results = read_json(tmp_path / "rerank.json")
    one, five = results["frontier"]
    assert one["candidates"] == 1 and all(one[name] == one["clip"] for name in experiment.PICKS)
    assert all(np.all(np.array(five["a perfect judge"]) >= five[name]) for name in experiment.PICKS)
    assert results["different"]["1"] == 1 < results["different"]["5"] and (tmp_path / "x.png").stat().st_size > 5000
    experiment.main([*flags, "--tune"])
    assert capsys.readouterr().out.count("5 candidates, by weight") == 3
