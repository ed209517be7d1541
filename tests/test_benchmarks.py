"""The benchmarks run, and what they compare is the same: tokens, embeddings, losses."""

import contextlib
import csv
import inspect

import numpy as np
import pytest
import torch
from conftest import mean_loss

from benchmarks import captioning, measure, plain, profiling, run, training, workload
from models.settings import BEAM, DecodingConfig
from utils.files import read_json

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Small models, for this test only."""
    for sizes in (workload.GPT2, workload.VIT_B_32):
        monkeypatch.setattr(workload, "GPT2" if sizes is workload.GPT2 else "VIT_B_32", dict(sizes))
    workload.shrink()


@pytest.mark.parametrize("config", (DecodingConfig(entry_length=6), DecodingConfig(method=BEAM, entry_length=6)))
def test_systems_make_the_same_captions(small, config):
    systems = captioning.prepare_systems(CPU, ["fp32"])
    rows = {row["system"]: row for row in captioning.measure_cell(systems, 3, config, 1, CPU)}
    assert rows["plain"]["equal to fp32"] == rows["ours fp32"]["equal to fp32"] == 1
    assert set(rows) == {"plain", "generate fp32", "ours fp32"}
    if config.method != BEAM:  # transformers' beam search is another one
        assert rows["generate fp32"]["equal to fp32"] == 1


@pytest.mark.parametrize("variant", training.VARIANTS)
def test_steps_have_the_same_loss(small, variant):
    workload.GPT2.update(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    mapping_type, frozen = training.VARIANTS[variant]
    tokens, embeddings, lengths = training.MadeCaptions().batch(np.arange(6))
    model = workload.captioner(mapping_type, workload.language_model(), frozen)
    with torch.no_grad():
        expected = mean_loss(model, tokens, embeddings, lengths).item()
    padded = torch.nn.functional.pad(tokens * (torch.arange(tokens.shape[1]) < lengths[:, None]), (0, 5))
    prefix = model.config.prefix_length
    mask = (torch.arange(prefix + padded.shape[1]) < prefix + lengths[:, None]).long()
    theirs = workload.captioner(mapping_type, workload.language_model(ours=False), False)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5)
    loss = plain.training_step(theirs, optimizer, padded, embeddings, mask, contextlib.nullcontext())
    assert loss == pytest.approx(expected, rel=1e-5)


def test_results_are_lines_of_a_table(tmp_path):
    rows = [{"system": "ours, fp32", "x": 1.5}, {"system": "plain", "x": None}]
    run.write_csv({"tokens": {"machine": "a CPU", "date": "2026-01-02", "tables": {"batch": rows}}}, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["column"], line["value"]) for line in lines] == [
        ("0", "system", "ours, fp32"), ("0", "x", "1.5"), ("1", "system", "plain"), ("1", "x", ""),
    ]  # fmt: skip
    assert {(line["section"], line["table"], line["date"], line["machine"]) for line in lines} == {
        ("tokens", "batch", "2026-01-02", "a CPU")
    }


def test_a_loaded_machine_is_seen_beside_each_system(monkeypatch):
    """Medians of the rounds after the first, their spread, and the rate of a product of side 1024 in them."""
    took = iter([9, 9, 9, 0.5, 1, 2, 0.5, 2, 2, 1.0, 3, 4])  # per round: the product, both systems
    monkeypatch.setattr(measure, "_timed", lambda work, device: (next(took), work()))
    timed = measure.interleave({"a": lambda: "x", "b": lambda: "y"}, 3, CPU)
    assert timed.seconds == {"a": 2, "b": 2} and timed.results == {"a": "x", "b": "y"}
    assert timed.quality("b") == {"spread": 1, "product beside": 2 * 1024**3 / 0.5 / 1e9}


def test_of_long_rounds_two_are_measured(monkeypatch):
    monkeypatch.setattr(measure, "LONG", 0)
    took = iter([1, 9, 1, 2, 1, 4])  # per round: the product, the system
    monkeypatch.setattr(measure, "_timed", lambda work, device: (next(took), work()))
    assert measure.interleave({"a": lambda: "x"}, 5, CPU).seconds == {"a": 3}


@pytest.mark.slow
def test_profiles_tell_where_the_time_goes(small, tmp_path):
    """The shares of a cell are those of all of its time, and tables of other names stay."""
    for name in ("before", "now"):
        profiling.main(["--quick", "--name", name, "--out", str(tmp_path)])
    tables = read_json(tmp_path / "profile.json")
    assert list(tables) == ["before", "now"]
    rows = tables["now"]["rows"]
    assert {row["cell"].split(",")[0] for row in rows} == {"captioning", "extraction", "training"}
    for row in rows:
        shares = [value for name, value in row.items() if name not in ("cell", "ms")]
        assert sum(shares) == pytest.approx(100) and min(shares) >= 0 and row["products"] > 1
    assert "## Before" in (tmp_path / "profile.md").read_text()


@pytest.mark.slow
def test_everything_runs(small, tmp_path):
    run.main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    page = (tmp_path / "results.md").read_text()
    assert set(read_json(tmp_path / "results.json")) == set(run.SECTIONS)
    for section in run.TITLES.values():
        assert f"## {section}" in page
    assert "## Aims" in page and "| decoding, fp32, x generate | >= 2 |" in page
    assert "| first caption, x importing and mapping the weights | <= 1.5 |" in page
    assert "x generate" in page and "MiB resident" in page and (tmp_path / "results.png").stat().st_size > 5000


def test_peak_memory_is_asked_for_as_it_can_be():
    """run.py calls a section's `memory` without arguments, in whole runs only."""
    found = [section.memory for section in run.SECTIONS.values() if hasattr(section, "memory")]
    assert len(found) == 2
    for memory in found:
        inspect.signature(memory).bind()


@pytest.mark.parametrize("native", (True, False))
def test_emulated_bf16_is_not_measured(native, monkeypatch):
    """A product of the side that limits are measured at would take minutes."""
    monkeypatch.setattr("utils.precision._cpu_has_bf16", lambda: native)
    monkeypatch.setattr("benchmarks.measure.best_of", lambda work, repeats, device: 1.0)
    found = measure.limits.__wrapped__(torch.device("cpu"), 8)
    assert ("bf16 product" in found) == ("bf16" in measure.precisions(torch.device("cpu"))) == native
    assert found["fp32 product"] == 2 * 8**3 / 1e9
