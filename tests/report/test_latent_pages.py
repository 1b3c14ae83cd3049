"""Pages of latents: what they show equals a plain computation."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from prolu import SAE, LanguageModel, SAEConfig
from prolu.activations.token_texts import PART, TokenTexts
from prolu.cli.entry_point import main
from prolu.report.latents import accumulators, browser, firings
from prolu.report.latents.accumulators import Histogram, KeptFirings
from prolu.report.latents.browser import PageSource, write_browser
from prolu.report.latents.directions import logit_effects, neighbours, unembedding_of
from prolu.report.latents.firings import HeldOutText, collect
from prolu.training.starting_weights import initial_weights
from support.models import write_tokenizer

N_LATENTS = 40


@pytest.fixture(scope="module")
def sae():
    config = SAEConfig(d_in=16, d_sae=N_LATENTS, nonlinearity="prolu_relu")
    weights = initial_weights(config, 3)
    weights.own["b_enc"] -= torch.linspace(0.1, 3, N_LATENTS)  # from often on to never
    return SAE(config, weights)


@pytest.fixture(scope="module")
def text(tiny_lm, tiny_blocks):
    return HeldOutText.read(tiny_lm, tiny_blocks, 2000, lambda n: None)


@pytest.fixture(scope="module")
def plain(sae, text):
    """Latents of all tokens but BOS, [n, ctx, d_sae]."""
    latents = sae.encode(text.acts).detach().numpy().copy()
    latents[:, 0] = 0
    return latents


@pytest.fixture(scope="module")
def found(sae, text):
    return collect(sae, text, 7)


def test_figures_equal_encode(found, plain):
    flat = plain.reshape(-1, N_LATENTS)
    assert found.n_tokens == plain[:, 1:, 0].size
    assert np.array_equal(found.n_active, (flat > 0).sum(0))
    assert np.array_equal(found.max, flat.max(0))
    active = found.n_active > 0
    assert 5 < active.sum() < N_LATENTS
    assert found.mean[active] == pytest.approx(flat.sum(0)[active] / found.n_active[active], rel=1e-6)
    assert (found.mean[~active] == 0).all()


def test_histograms_equal_numpys(found, plain):
    for i in range(N_LATENTS):
        values = plain[..., i][plain[..., i] > 0].astype(np.float64)
        assert np.array_equal(found.histogram[i], np.histogram(values, accumulators.N_BINS, (0, found.reach[i]))[0])
        if len(values):
            assert found.reach[i] / 2 <= values.max() < found.reach[i]


def test_the_strongest_are_one_a_block_and_in_order(found, plain):
    for i, examples in enumerate(found.examples):
        best = np.sort(plain[..., i].max(1))[::-1]
        assert [plain.reshape(-1, N_LATENTS)[e.position, i] for e in examples.strongest] == best[best > 0][:7].tolist()
        blocks = [e.position // plain.shape[1] for e in examples.strongest]
        assert len(set(blocks)) == len(blocks)


def test_windows_hold_what_encode_gives(found, plain):
    n, ctx = plain.shape[:2]
    flat = plain.reshape(-1, N_LATENTS)
    for i, (top, bands) in enumerate(found.examples):
        for example in [*top, *(e for band in bands for e in band)]:
            assert len(example.activations) == min(firings.WIDTH, ctx)
            assert (
                example.start // ctx == example.position // ctx == (example.start + len(example.activations) - 1) // ctx
            )
            window = slice(example.start, example.start + len(example.activations))
            assert example.start <= example.position < window.stop
            assert np.array_equal(example.activations, flat[window, i])
    assert n > 7


def test_bands_are_fifths_of_the_activations(sae, text, plain, monkeypatch):
    monkeypatch.setattr(firings, "SAMPLE", 10**6)  # of all of them
    flat = plain.reshape(-1, N_LATENTS)
    for i, (_, bands) in enumerate(collect(sae, text, 10).examples):
        values = np.sort(flat[flat[:, i] > 0, i])
        fifths = np.array_split(values, firings.N_BANDS)
        for band, fifth in zip(bands, fifths, strict=True):
            shown = [flat[e.position, i] for e in band]
            assert len(shown) == min(2, len(fifth))
            assert shown == sorted(shown, reverse=True)
            assert all(fifth[0] <= value <= fifth[-1] for value in shown)
            assert len({e.position for e in band}) == len(band)


def test_the_sample_is_of_all_firings_alike(sae, text, plain, monkeypatch):
    """Its mean is that of all activations, within what chance explains."""
    monkeypatch.setattr(firings, "SAMPLE", 100)
    latents = collect(sae, text, 500).examples  # a hundred a band: the whole sample is shown
    for i, (_, bands) in enumerate(latents):
        values = plain[..., i][plain[..., i] > 0]
        shown = [plain.reshape(-1, N_LATENTS)[e.position, i] for band in bands for e in band]
        assert len(shown) == min(100, len(values))
        if len(values) > 300:
            assert abs(np.mean(shown) - values.mean()) < 4.5 * values.std() / 10


def test_passes_and_merges_do_not_matter(sae, text, found, monkeypatch):
    monkeypatch.setattr(firings, "ENTRIES_PER_PASS", 3 * text.ctx * N_LATENTS)
    monkeypatch.setattr(KeptFirings, "ENTRIES_BETWEEN_MERGES", 50)
    again = collect(sae, text, 7)
    for one, other in zip(found.examples, again.examples, strict=True):
        assert [e.position for e in one.strongest] == [e.position for e in other.strongest]
        assert [[e.position for e in band] for band in one.bands] == [
            [e.position for e in band] for band in other.bands
        ]
    assert np.array_equal(found.histogram, again.histogram)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 99)), max_size=60, unique_by=lambda e: e[::2]
    )
)
def test_kept_is_its_definition(entries):
    kept = KeptFirings(4, 3)
    kept.ENTRIES_BETWEEN_MERGES = 5
    for entry in entries:
        latent, key, position = (np.array([part]) for part in entry)
        kept.offer(latent, key.astype(float), position, key.astype(np.float32))
    for latent, rows in enumerate(kept.by_latent()):
        best = sorted((key, position) for which, key, position in entries if which == latent)[:3]
        assert [(row["key"], row["position"]) for row in rows] == best


@settings(deadline=None)
@given(st.lists(st.floats(2**-20, 2**20, width=32), min_size=1, max_size=50))
def test_a_histogram_may_grow(values):
    histogram, values = Histogram(1), np.array(values, np.float32)
    for value in values:
        histogram.add(np.array([0]), np.array([value]), np.array([value]))
    reach = histogram.reach[0]
    assert values.max() < reach
    assert np.array_equal(histogram.counts[0], np.histogram(values.astype(float), accumulators.N_BINS, (0, reach))[0])


def families(folder):
    sizes = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)),
        "gemma": Gemma2ForCausalLM(Gemma2Config(**sizes)),
    }[folder]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_promoted_tokens_equal_a_plain_computation(name, tiny_lm_folder, tmp_path, sae):
    torch.manual_seed(1)
    if name == "gpt2":
        lm = LanguageModel(tiny_lm_folder, "blocks.1.hook_resid_pre")
        norm, head = lm.model.transformer.ln_f, lm.model.lm_head
    else:
        model = families(name)
        model.save_pretrained(tmp_path)
        write_tokenizer(tmp_path)
        lm = LanguageModel(tmp_path, "blocks.1.hook_resid_pre")
        norm, head = lm.model.model.norm, lm.model.lm_head
    norm.weight.copy_(torch.randn(16))
    if name == "gpt2":
        norm.bias.copy_(torch.randn(16))
    through, rows = unembedding_of(lm), sae.W_dec.detach()
    gain = 1 + norm.weight if name == "gemma" else norm.weight
    centred = rows - rows.mean(1, keepdim=True) if name == "gpt2" else rows
    plain = (centred * gain) @ head.weight.T
    vocabulary = len(lm.tokenizer)
    assert through is not None
    torch.testing.assert_close(through.logits(rows), plain[:, :vocabulary], rtol=1e-4, atol=1e-4)
    for row, effect in zip(plain[:, :vocabulary], logit_effects(rows, through, 5), strict=True):
        assert [v for _, v in effect.promoted] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
        assert [v for _, v in effect.suppressed] == pytest.approx(row.topk(5, largest=False).values.tolist(), abs=1e-4)
        assert all(row[token].item() == pytest.approx(v, abs=1e-4) for token, v in effect.promoted + effect.suppressed)


def test_no_tokens_are_promoted_where_latents_do_not_lie_in_the_residual_stream(tiny_lm_folder):
    assert unembedding_of(LanguageModel(tiny_lm_folder, "transformer.h.1.mlp.c_fc.output")) is None


def test_neighbours_equal_a_plain_computation(sae):
    rows = sae.W_dec.detach()
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-2)
    for i, near in zip(range(5, 9), neighbours(sae, range(5, 9), 4), strict=True):
        assert [cosine for _, cosine in near] == pytest.approx(cosines[i].topk(4).values.tolist(), abs=1e-5)
        assert [other for other, _ in near] == cosines[i].topk(4).indices.tolist()


def test_texts_of_tokens_join_to_the_text(tiny_lm):
    names, ids = TokenTexts(tiny_lm.tokenizer), tiny_lm.tokenizer('Tom: where  is\n<b>my</b> "ball"?')["input_ids"]
    assert "".join(names.texts[names.place_of(i)] for i in ids) == 'Tom: where  is\n<b>my</b> "ball"?'
    assert len(names.texts) == len(set(ids))


def read_data(folder, name):
    """What a script file hands to the page."""
    handed = (folder / "data" / f"{name}.js").read_text()
    start = f'put("{name}", '
    assert handed.startswith(start)
    return json.loads(handed.removeprefix(start).removesuffix(")\n"))


def test_files_hold_what_was_found(tmp_path, monkeypatch, sae, text, tiny_lm, found, plain):
    monkeypatch.setattr(browser, "SHARD", 16)
    done = []
    facts = {"name": "</script><b>a run", "figures": {"L0": 3.0}, "config": {"text": "<!--"}}
    write_browser(tmp_path / "features", PageSource(sae, text, tiny_lm, 7, facts), {"n": 1}, done.append)
    folder = tmp_path / "features"
    assert sum(done) == 3 * text.tokens.size
    columns, tokens, shown = read_data(folder, "list"), read_data(folder, "tokens"), read_data(folder, "text")
    assert columns["density"] == pytest.approx(found.n_active / found.n_tokens, rel=1e-3)
    assert columns["max"] == pytest.approx(found.max, rel=1e-3)
    assert columns["own"]["b_enc"] == pytest.approx(sae.b_enc.detach().numpy(), rel=1e-3)
    ids = text.tokens.ravel()
    assert [tokens[t] for t in shown["tokens"][:30]] == [tiny_lm.tokenizer.decode([i]) for i in ids[:30]]
    searched, numbers = read_data(folder, "search"), read_data(folder, "ids")
    parts = dict(zip(numbers["parts"][::2], numbers["parts"][1::2], strict=True))
    assert [parts.get(p, numbers["of"][place]) for p, place in enumerate(shown["tokens"])] == ids.tolist()
    for i in range(N_LATENTS):
        latent = read_data(folder, f"details-{i // 16}")[i % 16]
        assert latent["on"] == found.n_active[i]
        assert latent["histogram"] == found.histogram[i].tolist()
        for (position, start, width, pairs), example in zip(latent["top"], found.examples[i].strongest, strict=True):
            window = np.zeros(width)
            window[pairs[::2]] = pairs[1::2]
            assert window == pytest.approx(plain.reshape(-1, N_LATENTS)[start : start + width, i], rel=1e-3)
            assert position == example.position
        top, bands = found.examples[i]
        assert searched["examples"][i] == sorted({e.position for part in (top, *bands) for e in part})
        assert latent["together"] == [
            [c.other, *(pytest.approx(v, rel=1e-3) for v in c[1:])] for c in found.together[i]
        ]
        assert searched["promoted"][i] == [token for token, _ in latent["promoted"]]
    page = (folder / "index.html").read_text()
    assert "<b>a run" not in page
    assert "<!--" not in page
    assert page.count("</script>") == 1
    assert browser.was_made(folder, {"n": 1})
    assert not browser.was_made(folder, {"n": 2})
    assert not list(tmp_path.rglob("*.partial"))


SOURCE = ["--hook", "blocks.1.hook_resid_pre", "--ctx", "32"]
TRAIN = ["--d-sae", "24", "--n-tokens", "1280", "--batch-size", "64", "--coeff", "0.02", "--eval-tokens", "640"]


@pytest.mark.slow  # draws six reports
def test_a_report_makes_pages_once(tiny_lm_folder, stories_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "study"
    source = ["--lm", str(tiny_lm_folder), "--data", str(stories_file), *SOURCE]
    assert main(["train", *source, *TRAIN, "--latent-pages", "none", "--out", str(out)]) == 0
    (run,) = [folder.parent for folder in out.glob("*/sae.safetensors")]
    assert not (run / "features").exists()
    assert main(["report", str(out), "--latent-tokens", "640"]) == 0
    link = f'href="{run.name}/features/index.html"'
    assert link in (out / "report.html").read_text()
    first = {file: file.read_bytes() for file in (run / "features").rglob("*") if file.is_file()}

    def refuse(*_, **__):
        raise ValueError("the model is gone")

    with monkeypatch.context() as patch:
        patch.setattr("prolu.activations.source.LanguageModel", refuse)
        assert main(["report", str(out), "--latent-tokens", "640"]) == 0  # nothing is missing, so nothing is read
        assert main(["report", str(out), "--latent-tokens", "320"]) == 2
        assert main(["report", str(out), "--latent-tokens", "320", "--latent-pages", "none"]) == 0
    assert "the model is gone; --latent-pages none draws the report without pages of latents" in capsys.readouterr().err
    assert main(["report", str(out), "--latent-tokens", "0"]) == 2
    assert main(["report", str(out), "--examples", "0"]) == 2
    assert {file: file.read_bytes() for file in first} == first
    again = tmp_path / "again"
    assert main(["train", *source, *TRAIN, "--latent-tokens", "640", "--out", str(again)]) == 0
    assert {again / file.relative_to(out): content for file, content in first.items()} == {
        file: file.read_bytes() for file in (again / run.name / "features").rglob("*") if file.is_file()
    }


def test_another_model_is_refused(tiny_lm_folder, stories_file, tmp_path, capsys):
    out = tmp_path / "study"
    source = ["--lm", str(tiny_lm_folder), "--data", str(stories_file), *SOURCE]
    assert main(["train", *source, *TRAIN, "--latent-pages", "none", "--out", str(out)]) == 0
    study = json.loads((out / "config.json").read_text())
    study["stream"]["lm_digest"] = "0" * 64
    (out / "config.json").write_text(json.dumps(study))
    capsys.readouterr()
    assert main(["report", str(out)]) == 2
    assert "its weights are not those" in capsys.readouterr().err


SIGNS = "read \u05e9\u05dc\u05d5\u05dd, \u65e5\u672c \U0001f469\u200d\U0001f467 caf\u00e9"


def test_characters_that_are_spread_over_tokens_are_shown_whole_and_found(tiny_lm):
    names = TokenTexts(tiny_lm.tokenizer)
    ids = tiny_lm.tokenizer(SIGNS, add_special_tokens=False)["input_ids"]
    row = names.places_of(ids)
    assert len(row.shown) == len(row.named) == len(ids) > len(SIGNS)  # bytes of their own
    assert "".join(names.texts[place] for place in row.shown).replace(PART, "") == SIGNS
    # Every token of a character is called by it.
    for character in "\u05e9\u65e5\U0001f469\u00e9":
        n = sum(names.texts[place] == character for place in row.named)
        assert n == len(tiny_lm.tokenizer(character, add_special_tokens=False)["input_ids"])


def test_a_row_that_begins_within_a_character_shows_the_next_one_whole(tiny_lm):
    names = TokenTexts(tiny_lm.tokenizer)
    ids = tiny_lm.tokenizer("\u65e5\u672c", add_special_tokens=False)["input_ids"]
    row = names.places_of(ids[1:])
    assert names.texts[row.shown[-1]] == "\u672c"
    assert all("\ufffd" not in names.texts[place] for place in row.shown)
