"""What is found of one SAE: figures, sums by document, vectors by latent."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prolu import SAE, HeldOut, LanguageModel, SAEConfig, evaluate
from prolu.activations import language_model
from prolu.evaluation.comparison.figures import draw_scale_response, save_figure
from prolu.evaluation.held_out import choose_blocks
from prolu.evaluation.latents import latent_figures, scale_response
from prolu.evaluation.metrics import CodeSums
from prolu.evaluation.predictions import clean_predictions, kl_of_logits, spliced_losses
from prolu.evaluation.scoring import score
from prolu.runtime import progress
from prolu.training.starting_weights import initial_weights


@pytest.fixture(scope="module")
def held_out(tiny_lm, tiny_blocks):
    return HeldOut(tiny_lm, tiny_blocks, 640)


def sae_of(nonlinearity="relu", d_sae=48, bias=-0.1, d_in=16):
    config = SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity=nonlinearity)
    return SAE(config, initial_weights(config, 0, initial_bias=bias))


def perfect_sae(d_in=16):
    """x = relu(x) - relu(-x)."""
    sae = sae_of(d_sae=2 * d_in, bias=0.0)
    eye = torch.eye(d_in)
    sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], 1), torch.cat([eye, -eye])
    return sae


@pytest.mark.parametrize("hook_out", ["", "blocks.1.hook_mlp_out"])
def test_the_passes_of_the_language_model_are_counted_to_their_end(tiny_lm, tiny_blocks, monkeypatch, hook_out):
    seen = []
    monkeypatch.setattr(progress, "listeners", [lambda *facts: seen.append(facts)])
    HeldOut(tiny_lm, tiny_blocks, 640, hook_out=hook_out, progress=True)
    n_passes = 5 if hook_out else 4
    assert seen == [("scoring the language model", 640 * n, 640 * n_passes) for n in range(1, n_passes + 1)]


def test_sums_by_document_give_the_figures(held_out):
    figures, documents, *_ = score(sae_of(), held_out)
    assert documents.n_tokens.sum() == held_out.n_tokens
    assert documents.n_predicted.sum() == held_out.n_tokens - len(held_out.tokens)
    n, predicted = documents.n_tokens.sum(), documents.n_predicted.sum()
    assert documents.l0.sum() / n == pytest.approx(figures["l0"])
    assert documents.squared_error.sum() / n / 16 == pytest.approx(figures["mse"], rel=1e-6)
    for name in ("ce_clean", "ce_recon", "kl"):
        assert getattr(documents, name).sum() / predicted == pytest.approx(figures[name], rel=1e-9)


def test_a_document_has_what_its_own_tokens_give(tiny_lm, tiny_blocks):
    held_out, numbers = HeldOut(tiny_lm, tiny_blocks, tiny_blocks.held_out.size), tiny_blocks.held_out_documents
    assert held_out.unit == "document"
    ce = tiny_lm.cross_entropy(held_out.tokens).double().numpy()
    documents = score(sae_of(), held_out).documents
    assert documents.document.tolist() == np.unique(numbers).tolist()
    for row, number in enumerate(documents.document):
        assert documents.n_tokens[row] == (numbers == number).sum()
        assert documents.ce_clean[row] == pytest.approx(ce[numbers[:, 1:] == number].sum(), abs=1e-9)


def test_blocks_without_documents_count_as_such(tiny_lm, tiny_blocks):
    from dataclasses import replace

    held_out = HeldOut(tiny_lm, replace(tiny_blocks, held_out_documents=None), 320)
    assert held_out.unit == "block"
    assert score(sae_of(), held_out).documents.n_tokens.tolist() == [32.0] * 10


def test_the_choice_of_blocks_needs_a_token_and_a_block(tiny_lm, tiny_blocks):
    from dataclasses import replace

    assert set(choose_blocks(tiny_blocks, 33)) < set(choose_blocks(tiny_blocks, 320))
    assert choose_blocks(tiny_blocks, 10**9).tolist() == list(range(len(tiny_blocks.held_out)))
    with pytest.raises(ValueError, match="eval_tokens 0: must be at least 1"):
        HeldOut(tiny_lm, tiny_blocks, 0)
    with pytest.raises(ValueError, match="hold out none"):
        HeldOut(tiny_lm, replace(tiny_blocks, held_out=tiny_blocks.held_out[:0]), 640)


def test_perfect_reconstruction(held_out):
    figures = evaluate(perfect_sae(), held_out)
    assert figures["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["kl_no_bos"] == pytest.approx(0, abs=1e-6)
    assert figures["norm_ratio"] == pytest.approx(1, rel=1e-6)
    assert figures["relative_bias"] == pytest.approx(1, rel=1e-6)
    assert figures["encoder_decoder_cosine"] == pytest.approx(1)


def test_kl_is_its_definition_in_the_pass_that_gives_cross_entropy(tiny_lm, held_out):
    acts = held_out.acts + 0.3 * torch.randn(held_out.acts.shape, generator=torch.Generator().manual_seed(0))
    ce, kl = spliced_losses(tiny_lm, held_out.tokens, acts, held_out.restart_points, held_out.clean)
    assert torch.equal(ce, tiny_lm.cross_entropy(held_out.tokens, acts, held_out.restart_points))
    clean = torch.cat([logits[:, :-1].flatten(0, 1) for *_, logits in tiny_lm.predictions(held_out.tokens)])
    passes = tiny_lm.predictions(held_out.tokens, acts, held_out.restart_points)
    other = torch.cat([logits[:, :-1].flatten(0, 1) for *_, logits in passes])
    assert kl.flatten() == pytest.approx(kl_of_logits(clean, other), abs=2e-6)
    assert kl.min() > -1e-5
    assert kl.mean() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_do_not_depend_on_how_many_logits_are_read_at_once(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 7, 301, generator=generator)).to(dtype)
    ids = torch.randint(301, (5, 7), generator=generator)
    log_p = logits.double().log_softmax(-1)[:, :-1]
    whole = language_model.next_token_loss(logits, ids)
    torch.testing.assert_close(whole[0].double(), -log_p.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole[1].double(), logits.double().logsumexp(-1)[:, :-1], rtol=1e-6, atol=1e-6)
    for n in (1, 301, 4 * 301, 10**9):
        monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", n)
        parts = language_model.next_token_loss(logits, ids)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_kl_where_logits_are_not_linear(tiny_lm_folder, held_out, monkeypatch):
    """As in Gemma 2, which soft-caps them."""
    lm = LanguageModel(tiny_lm_folder, "blocks.1.hook_resid_pre")
    forward = lm._model.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    monkeypatch.setattr(lm._model, "forward", capped)
    clean = clean_predictions(lm, held_out.tokens)
    assert clean.mean_row is None
    _, same = spliced_losses(lm, held_out.tokens, held_out.acts, None, clean)
    assert same.abs().max() < 1e-9
    _, kl = spliced_losses(lm, held_out.tokens, held_out.acts * 1.5 + 1, None, clean)
    assert kl.min() > 0


def test_latents_are_described(held_out, tmp_path):
    sae = sae_of(d_sae=3, bias=0.0, d_in=4)
    sae.b_enc.data = torch.tensor([-1.0, 0.5, -0.2])
    sae.W_dec.data[0] = -sae.W_dec.data[0]
    code = CodeSums(3)
    code.update(torch.tensor([[2.0, 0.0, 0.0], [4.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    found = latent_figures(sae, code)
    assert found.density.tolist() == [0.5, 0.25, 0]
    assert found.mean_when_on.tolist() == [3.0, 1.0, 0]
    assert found.encoder_decoder_cosine.tolist() == pytest.approx([-1, 1, 1])
    assert found.density_histogram() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]  # 0; 0.25; 0.5
    assert found.summary() == pytest.approx({"negative_bias_fraction": 2 / 3, "encoder_decoder_cosine": 0})
    assert code.figures()["dense_fraction"] == pytest.approx(2 / 3)
    found.save(tmp_path)
    kept = load_file(tmp_path / "latents.safetensors")
    assert {name: list(t.shape) for name, t in kept.items()} == {name: [3] for name in found._fields[:3]}


def test_prolu_keeps_the_scale_of_what_is_on_and_relu_does_not(held_out):
    prolu, relu = (scale_response(sae_of(n, bias=-0.3), held_out.acts) for n in ("prolu_ste", "relu"))
    for k, response in prolu.items():
        assert response.gain == pytest.approx(1, rel=1e-5)
        assert (response.still_active < 1) is (k < 1)
    gains = [response.gain for response in relu.values()]
    assert gains == sorted(gains)
    assert relu[0.5].gain < 0.95 < relu[1.0].gain == pytest.approx(1, rel=1e-6)
    assert relu[2.0].gain > 1.05
    free = scale_response(sae_of("relu", bias=0.0), held_out.acts)
    assert all(response.gain == pytest.approx(1, rel=1e-5) for response in free.values())
    dead = scale_response(sae_of("relu", bias=-1e3), held_out.acts)[2.0]
    assert math.isnan(dead.gain)
    assert math.isnan(dead.still_active)


def test_an_evaluation_records_the_gain_at_half_and_double(held_out):
    figures = evaluate(sae_of("relu", bias=-0.3), held_out)
    assert figures["scale_gain_half"] < 1 < figures["scale_gain_double"]
    assert figures["scale_on_half"] < 1 == figures["scale_on_double"]


def test_the_figure_of_responses_is_drawn(held_out, tmp_path):
    responses = {f"{n} + l1": scale_response(sae_of(n, bias=-0.3), held_out.acts) for n in ("prolu_ste", "relu")}
    figure = draw_scale_response(responses)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["prolu_ste + l1"].get_ydata() == pytest.approx(1, rel=1e-5)
    save_figure(figure, tmp_path / "response.svg")
    assert (tmp_path / "response.svg").stat().st_size > 1000
