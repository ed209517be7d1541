"""Decoding: cached = uncached, batch = one by one, against searches written out."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import mean_loss, run_script

from models.clip_caption import build_captioner
from models.decoding import generate_captions
from models.language import load_language_model, load_tokenizer
from models.searches import LOOK_EVERY, ROWS_AT_ONCE, Beam, Greedy, Nucleus, Search, best_tokens, decode
from models.settings import BEAM, GREEDY, SAMPLE, CaptionConfig, DecodingConfig
from models.steps import CachedStep, UncachedStep

METHODS = {
    GREEDY: DecodingConfig(entry_length=16),
    BEAM: DecodingConfig(method=BEAM, beam_size=4, num_captions=4, entry_length=16),
    SAMPLE: DecodingConfig(method=SAMPLE, top_p=0.9, num_captions=3, entry_length=16, seed=3),
}


@pytest.fixture(scope="module")
def captioner(language_model):
    """A captioner that has half learnt nine captions of different lengths, so that decoding ends at different steps."""
    torch.manual_seed(5)
    model = build_captioner(CaptionConfig(prefix_dim=32, prefix_length=4), load_language_model(language_model))
    tokenizer = load_tokenizer(str(language_model))
    words = ["large", "red", "circle", "on", "the", "snow", "a", "green", "star", "sand", "blue"]
    captions = [" ".join(words[i % 3 : i % 3 + 1 + i]) + "." for i in range(9)]
    ids = tokenizer(captions)["input_ids"]
    lengths = torch.tensor([len(row) for row in ids])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    embeddings = torch.randn(9, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        mean_loss(model, tokens, embeddings, lengths).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, embeddings


def tokens_of(groups):
    return [[caption.tokens for caption in group] for group in groups]


@pytest.mark.parametrize("method", METHODS)
def test_cached_equals_uncached_and_batch_equals_single(captioner, method):
    model, tokenizer, embeddings = captioner
    config = METHODS[method]
    cached = generate_captions(model, tokenizer, embeddings, config)
    uncached = generate_captions(model, tokenizer, embeddings, config, UncachedStep)
    single = [generate_captions(model, tokenizer, row[None], config)[0] for row in embeddings]
    assert tokens_of(cached) == tokens_of(uncached) == tokens_of(single)
    lengths = {len(caption.tokens) for group in cached for caption in group}
    assert len(lengths) > 2, "the captions must end at different steps, or nothing is tested"
    assert len({group[0].text for group in cached}) > 2


def reference_beam_search(model, embedding, config, stop):
    """Beam search over plain lists, from its description: no batch, no cache, no tensors of beams."""
    prefix = model.prefix(embedding[None])

    def continuations(tokens):
        embedded = model.gpt.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
        logits = model.gpt(inputs_embeds=torch.cat((prefix, embedded), 1)).logits[0, -1]
        return logits.log_softmax(-1).tolist()

    first = continuations([])
    beams = sorted(((s, [t]) for t, s in enumerate(first)), reverse=True)[: config.beam_size]
    for _ in range(config.entry_length - 1):
        if all(tokens[-1] == stop for _, tokens in beams):
            break
        candidates = []
        for score, tokens in beams:
            if tokens[-1] == stop:
                candidates.append((score, tokens))
            else:
                candidates += [(score + s, [*tokens, t]) for t, s in enumerate(continuations(tokens))]
        candidates.sort(key=lambda c: c[0] / len(c[1]), reverse=True)
        beams = candidates[: config.beam_size]
    return [tokens for score, tokens in sorted(beams, key=lambda c: c[0] / len(c[1]), reverse=True)]


@torch.no_grad()
def test_beam_search_against_lists(captioner):
    model, tokenizer, embeddings = captioner
    config = METHODS[BEAM]
    stop = tokenizer.convert_tokens_to_ids(".")
    ours = tokens_of(generate_captions(model, tokenizer, embeddings[:5], config))
    assert ours == [reference_beam_search(model, e, config, stop) for e in embeddings[:5]]


def test_greedy_is_sampling_of_no_mass(captioner):
    model, tokenizer, embeddings = captioner
    config = DecodingConfig(method=SAMPLE, top_p=1e-9, entry_length=16)
    assert tokens_of(generate_captions(model, tokenizer, embeddings, config)) == tokens_of(
        generate_captions(model, tokenizer, embeddings, METHODS[GREEDY])
    )


def test_logprob_is_that_of_the_tokens(captioner):
    model, tokenizer, embeddings = captioner
    for config in (METHODS[GREEDY], METHODS[BEAM]):
        caption = generate_captions(model, tokenizer, embeddings[:1], config)[0][0]
        tokens = torch.tensor([caption.tokens])
        with torch.no_grad():
            logits = model(tokens, embeddings[:1])[:, model.config.prefix_length - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, tokens[..., None]).sum()
        assert caption.logprob == pytest.approx(wanted.item(), abs=1e-4)


class FixedStep:
    """The same distribution at every step."""

    def __init__(self, probabilities, rows):
        self.first = torch.tensor(probabilities).log().expand(rows, -1)

    def __call__(self, tokens):
        return self.first[:1].expand(len(tokens), -1)

    def select(self, rows):
        self.kept = len(rows)


def test_sampling_draws_from_the_nucleus_in_proportion():
    step = FixedStep([0.5, 0.3, 0.15, 0.05], 1)
    config = DecodingConfig(method=SAMPLE, top_p=0.79, num_captions=500, entry_length=20)
    captions = decode(step, Nucleus(config, lambda tokens, caption: tokens < 0, [b"image"]))[0]
    drawn = torch.tensor([caption.tokens for caption in captions]).flatten()
    shares = drawn.bincount(minlength=4) / len(drawn)
    assert shares[2:].sum() == 0
    assert shares[0].item() == pytest.approx(0.5 / 0.8, abs=0.02)


def test_sampling_seed(captioner):
    model, tokenizer, embeddings = captioner

    def sample(seed):
        config = DecodingConfig(method=SAMPLE, temperature=3, seed=seed, entry_length=16)
        return tokens_of(generate_captions(model, tokenizer, embeddings, config))

    assert sample(1) == sample(1) != sample(2)


def test_random_numbers_are_an_image_s_own(captioner, trained, photos, tmp_path):
    """None shares another's, whatever its place, batch and search; files are told by name and content."""
    model, tokenizer, embeddings = captioner
    config = DecodingConfig(method=SAMPLE, temperature=50, num_captions=3, entry_length=16, stop_token="")
    alike = embeddings[:1].expand(6, -1)
    keys = [b"%d" % number for number in range(6)]
    groups = tokens_of(generate_captions(model, tokenizer, alike, config, keys=keys))
    drawn = [tuple(tokens[:6]) for group in groups for tokens in group]
    assert len(set(drawn)) == len(drawn)
    again = tokens_of(generate_captions(model, tokenizer, alike[:3], config, keys=keys[:2:-1]))
    assert again == groups[:2:-1]
    library = tokens_of(generate_captions(model, tokenizer, alike, replace(config, decoder="transformers"), keys=keys))
    assert library == groups
    backwards = tokens_of(generate_captions(model, tokenizer, embeddings.flip(0), config))
    assert backwards[::-1] == tokens_of(generate_captions(model, tokenizer, embeddings, config))

    flags = ("--checkpoint", trained / "run_latest.pt", "--temperature", 5, "--num_captions", 2, "--seed", 4)
    (tmp_path / "a").mkdir()
    first, second = sorted(photos.glob("*.jpg"))[:2]
    shutil.copy(second, tmp_path / "a" / first.name)
    shutil.copy(first, tmp_path / first.name)
    said = run_script("predict.py", photos, *flags, "--batch_size", 5).stdout.splitlines()
    elsewhere = run_script("predict.py", tmp_path / "a", tmp_path / first.name, *flags).stdout.splitlines()
    assert [line.split("\t")[1] for line in elsewhere[2:]] == [line.split("\t")[1] for line in said[:2]]
    assert len({line.split("\t")[1] for line in said + elsewhere[:2]}) == len(said) + 2


def test_entry_length_and_stop_token(captioner):
    model, tokenizer, embeddings = captioner
    stop = tokenizer.convert_tokens_to_ids(".")
    for config in METHODS.values():
        for caption in sum(generate_captions(model, tokenizer, embeddings, config), []):
            assert len(caption.tokens) == config.entry_length or caption.tokens[-1] == stop
            assert stop not in caption.tokens[:-1]


def test_captions_end_with_the_context(captioner):
    model, tokenizer, embeddings = captioner
    for config in (DecodingConfig(stop_token=""), DecodingConfig(method=BEAM, stop_token="")):
        assert len(generate_captions(model, tokenizer, embeddings[:1], config)[0][0].tokens) == 61
    with pytest.raises(ValueError, match="only 64"):
        generate_captions(model, tokenizer, embeddings[:1], DecodingConfig(prompt="star " * 70))


@pytest.mark.parametrize("rows", (1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 1))
@pytest.mark.parametrize("number, temperature", ((1, 1.0), (1, 0.5), (3, 1.0), (3, 2.0)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_best_tokens(rows, number, temperature, dtype):
    """They are those of the whole log-softmax, the first of equals; the logits stay as they were."""
    logits = (4 * torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows))).to(dtype)
    logits[0, 250] = logits[0, 20] = 40.0
    before = logits.clone()
    tokens, logprobs = best_tokens(logits, number, temperature)
    expected = (logits.double() / temperature).log_softmax(-1)
    assert logits.equal(before) and logprobs.dtype == torch.float32
    assert torch.allclose(logprobs.double(), expected.topk(number).values, atol=1e-5)
    assert torch.allclose(expected.gather(-1, tokens), logprobs.double(), atol=1e-5)
    assert tokens.shape == (rows, number) and (number > 1 or tokens[0, 0] == 20)


@pytest.mark.parametrize(
    "options",
    ({"top_p": 0.0}, {"top_p": 1.2}, {"temperature": 0.0}, {"method": BEAM, "num_captions": 6}, {"num_captions": 2}),
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match="--"):
        DecodingConfig(**options)


def test_first_token_may_stop():
    step = FixedStep([0.1, 0.9], 3)
    stop = lambda tokens, caption: tokens == 1  # noqa: E731
    assert [group[0].tokens for group in decode(step, Greedy(DecodingConfig(), stop))] == [[1]] * 3
    beams = decode(FixedStep([0.1, 0.9], 3), Beam(DecodingConfig(method=BEAM, beam_size=1), stop))
    assert [group[0].tokens for group in beams] == [[1]] * 3


def test_cached_step_is_one_prefill(captioner):
    """The cached step never runs the prefix again."""
    model, _, embeddings = captioner
    seen = []
    handle = model.gpt.transformer.h[0].register_forward_hook(lambda m, i, o: seen.append(i[0].shape[1]))
    step = CachedStep(model.gpt, model.prefix(embeddings))
    step(torch.zeros(9, dtype=torch.long))
    handle.remove()
    assert seen == [4, 1]


@pytest.mark.parametrize("step_type", (CachedStep, UncachedStep))
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_different_prompts_share_a_batch(captioner, method, step_type):
    model, tokenizer, embeddings = captioner
    prompts = ["", "large red", "a", "", "green star on the snow a blue", "star", "a large", "", "circle " * 20]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in prompts}) > 5
    config = replace(METHODS[method], stop_token="", entry_length=40) if method == GREEDY else METHODS[method]
    together = generate_captions(model, tokenizer, embeddings, config, step_type, prompts=prompts)
    for group, embedding, prompt in zip(together, embeddings, prompts, strict=True):
        [alone] = generate_captions(model, tokenizer, embedding[None], replace(config, prompt=prompt), step_type)
        assert [caption.tokens for caption in group] == [caption.tokens for caption in alone]
        assert [c.logprob for c in group] == pytest.approx([c.logprob for c in alone], abs=1e-4)
    if method == GREEDY:  # the longest prompt leaves less room than the others have
        lengths = {len(group[0].tokens) for group in together}
        assert lengths == {40, 61 - len(tokenizer(prompts[-1])["input_ids"])} and min(lengths) < 40


def test_candidates_share_their_image_s_prefix(captioner):
    """The prefix is run once per image, candidates go on together until they differ, and finished ones leave."""
    model, tokenizer, embeddings = captioner
    seen = []
    handle = model.gpt.transformer.h[0].register_forward_hook(lambda m, i, o: seen.append(tuple(i[0].shape[:2])))
    groups = generate_captions(model, tokenizer, embeddings, replace(METHODS[SAMPLE], temperature=3))
    handle.remove()
    said = [tuple(caption.tokens) for group in groups for caption in group]
    image = [number for number, group in enumerate(groups) for _ in group]
    wanted = [(9, 4)]
    for length in range(1, max(map(len, said))):
        going = {(i, tokens[:length]) for i, tokens in zip(image, said, strict=True) if len(tokens) > length}
        wanted.append((len(going), 1))
    assert seen == wanted and max(rows for rows, _ in seen) > 9


@pytest.mark.parametrize("every", (3, 8, 100))
@pytest.mark.parametrize("method", METHODS)
def test_a_search_that_looks_seldom_says_the_same(captioner, method, every, monkeypatch):
    """As on a GPU: of rows of different prompts and lengths, too, and never past the language model's context."""
    model, tokenizer, embeddings = captioner
    configs = [
        METHODS[method],
        replace(METHODS[method], stop_token=" on the"),
        replace(METHODS[method], num_captions=1),
    ]
    prompts = ["", "large red", "a", "", "green star on the snow a blue", "star", "a large", "", "circle " * 20]
    work = [(config, None) for config in configs] + [(replace(configs[0], entry_length=40), prompts)]
    run = lambda config, prompts: generate_captions(model, tokenizer, embeddings, config, prompts=prompts)  # noqa: E731
    expected = [run(*each) for each in work]
    looks, look = [], Search._looks
    monkeypatch.setattr(Search, "_looks", lambda self: looks.append(look(self)) or looks[-1])
    monkeypatch.setitem(LOOK_EVERY, "cpu", every)
    for each, own in zip(work, expected, strict=True):
        found = run(*each)
        assert tokens_of(found) == tokens_of(own)
        for group, other in zip(found, own, strict=True):
            assert [caption.logprob for caption in group] == pytest.approx([c.logprob for c in other], abs=1e-4)
    assert not all(looks)
