"""Where captions begin and end: begin and end tokens, stop texts of any tokens; captions equal what was learnt."""

from unittest.mock import Mock

import pytest
import torch
from conftest import captions_of, mean_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from demo.world.train_gpt2 import train_bpe
from features.dataset import CaptionDataset
from features.store import read_store
from models.clip_caption import build_captioner
from models.decoding import generate_captions
from models.language import load_language_model, load_tokenizer
from models.searches import Beam, Nucleus, decode
from models.settings import BEAM, SAMPLE, CaptionConfig, DecodingConfig
from models.stopping import Stop, begin_tokens, end_tokens, text_of
from training.run_files import RunFiles
from training.validation import Validation


def sentencepiece(pieces):
    """Return a tokenizer of Llama's kind: blanks are part of a piece, bytes stand in for what has none."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    core = Tokenizer(models.Unigram([(word, -float(i > 2)) for i, word in enumerate(words)], 0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece(["▁a", "▁red", "▁star", ".", "▁.", '."', "。", "a", "#", "##", "▁#", "\n", "x.y"])


STOPS = (
    (".", ["▁a", "."], "a."),
    (".", ["▁a", "▁."], "a ."),
    (".", ["▁a", '."'], "a."),
    (".", ["▁a", "x.y"], "ax."),
    (".", ["▁a", "<0x2E>"], "a."),
    (".", ["▁a", "<0xE3>", "<0x2E>", "▁red", "."], "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} red."),
    ("###", ["▁a", "##", "#"], "a###"),
    ("###", ["▁a", "#", "##", "x.y"], "a###"),
    ("\n\n", ["▁a", "\n", "<0x0A>"], "a\n\n"),
    ("。", ["▁a", "。"], "a。"),
    ("。", ["▁a", "<0xE3>", "<0x80>", "<0x82>"], "a。"),
    ("red star", ["▁a", "▁red", "▁star"], "a red star"),
)


class Script:
    """A language model that says the same tokens to every row, each for certain."""

    def __init__(self, tokens, rows, vocabulary):
        self.logits = [torch.full((vocabulary,), -50.0).index_fill(0, torch.tensor(t), 0.0) for t in tokens]
        self.first, self.position = self.logits[0].expand(rows, -1), 0

    def __call__(self, tokens):
        self.position += 1
        return self.logits[min(self.position, len(self.logits) - 1)].expand(len(tokens), -1)

    def select(self, rows):
        pass


@pytest.mark.parametrize("text, said, shown", STOPS)
def test_stop_text_whatever_tokens_make_it(pieces, text, said, shown):
    ids = pieces.convert_tokens_to_ids(said)
    end = next(n for n in range(1, len(ids) + 1) if text in text_of(pieces, ids[:n]))
    going_on = pieces.convert_tokens_to_ids("▁red")
    stop = Stop(pieces, text, len(pieces))
    for search in (
        Beam(DecodingConfig(method=BEAM, beam_size=2, entry_length=9), stop),
        Nucleus(DecodingConfig(method=SAMPLE, entry_length=9), stop, [b"x", b"y"]),
    ):
        for group in decode(Script([*ids, going_on], 2, len(pieces)), search):
            assert group[0].tokens == ids[:end]
            assert stop.text_until(group[0].tokens) == shown
    assert stop.cut([*ids, going_on]) == ids[:end]


def test_no_stop_text_ends_nothing(pieces):
    stop = Stop(pieces, "", len(pieces))
    assert not stop(torch.arange(len(pieces)), lambda row: [row]).any()


def test_begin_and_end_tokens(pieces, language_model):
    from models.language import build_language_model

    gpt = build_language_model(AutoConfig.for_model("gpt2", vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    assert begin_tokens(pieces) == [1] and begin_tokens(load_tokenizer(str(language_model))) == []
    assert end_tokens(pieces, gpt) == [2]


def test_end_token_ends_and_is_not_shown(pieces):
    ids = [*pieces.convert_tokens_to_ids(["▁a", "▁red", "</s>"])]
    stop = Stop(pieces, ".", len(pieces), [2])
    search = Beam(DecodingConfig(method=BEAM, beam_size=1, entry_length=9), stop)
    [[caption]] = decode(Script([*ids, ids[0]], 1, len(pieces)), search)
    assert caption.tokens == ids and stop.text_until(ids) == "a red"


@pytest.fixture(scope="module")
def beginning_model(tmp_path_factory):
    """A small OPT whose tokenizer begins with </s>, which is its end token too, as a folder."""
    folder = tmp_path_factory.mktemp("opt") / "opt-small"
    tokenizer = train_bpe(captions_of(300), 330, ["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt", vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ("gpt2", "opt"))
def test_captions_learnt_by_heart(family, store, language_model, beginning_model, tmp_path):
    """One caption per image, learnt by heart: validation's CIDEr is 10, and every decoder says the caption itself."""
    whole = read_store(store)
    records = list({record["clip_embedding"]: record for record in whole.captions}.values())
    whole.captions[:] = records
    folder = str(beginning_model if family == "opt" else language_model)
    torch.manual_seed(0)
    whole.clip_embedding = torch.randn(len(records), 32)
    model = build_captioner(CaptionConfig(prefix_dim=32, prefix_length=4), load_language_model(folder))
    tokenizer = load_tokenizer(folder)
    batch = CaptionDataset(whole, tokenizer).batch(range(len(records)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(250):
        mean_loss(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    files, log = RunFiles(tmp_path, "run"), Mock()
    files.save_best = Mock()
    trainer = Mock(model=model.eval(), device="cpu", config=Mock(bs=5), best=None, epoch=0)
    Validation(whole, whole).run(trainer, tokenizer, files, log)
    assert trainer.best == pytest.approx(10)
    wanted = [record["caption"] for record in records]
    for decoding in (
        DecodingConfig(),
        DecodingConfig(method=BEAM),
        DecodingConfig(method=SAMPLE, top_p=0.5),
        DecodingConfig(method=BEAM, decoder="transformers"),
    ):
        groups = generate_captions(model, tokenizer, batch[1], decoding)
        assert [group[0].text for group in groups] == wanted, decoding
        for group, embedding in zip(groups, batch[1], strict=True):
            tokens = torch.tensor([begin_tokens(tokenizer) + group[0].tokens])
            with torch.no_grad():
                logits = model(tokens, embedding[None])[:, model.config.prefix_length - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[0, len(begin_tokens(tokenizer)) :]
            assert group[0].logprob == pytest.approx(logprobs.sum().item(), abs=1e-4)
    prompted = generate_captions(model, tokenizer, batch[1][:1], DecodingConfig(prompt=wanted[0][:7]))
    assert wanted[0][:7] + prompted[0][0].text == wanted[0]
