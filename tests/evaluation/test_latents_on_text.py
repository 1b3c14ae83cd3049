"""Which latents are active on a text: the same as `encode` gives, token by token, and shown as people need it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prolu import SAE, SAEConfig, latents_on
from prolu.evaluation import latents_on_text
from prolu.training.starting_weights import initial_weights

SIGNS = "naïve שלום, 日本 👩‍👧 café\n\tend"
N_LATENTS = 24


@pytest.fixture(scope="module")
def sae(tiny_lm):
    config = SAEConfig(d_in=16, d_sae=N_LATENTS, nonlinearity="topk(4)")
    return SAE(
        config, initial_weights(config, 3), {"hook": tiny_lm.hook, "lm": tiny_lm.name, "ctx": 32, "centred": True}
    )


def test_latents_are_those_of_encode_without_bos(tiny_lm, sae):
    text = "where is my ball?"
    found = latents_on(tiny_lm, sae, text)
    plain = sae.encode(tiny_lm.activations(text)).detach()[1:]
    assert torch.equal(found.latents, plain.as_subclass(torch.Tensor))
    assert [token.token_id for token in found.tokens] == tiny_lm.token_ids(text).tolist()[1:]
    assert "".join(token.name for token in found.tokens) == text
    for i, row in enumerate(plain):
        values, which = row.topk(4)
        assert found.strongest_of(i) == list(zip(which.tolist(), values.tolist(), strict=True))


def test_a_long_text_is_divided_into_blocks_each_with_bos(tiny_lm, sae):
    text = "Tom saw it in the tree. " * 12
    ids = tiny_lm.token_ids(text)[1:]
    found = latents_on(tiny_lm, sae, text)
    assert len(found.tokens) == len(ids) > 2 * 31
    assert [i for i, token in enumerate(found.tokens) if token.begins_block] == list(range(0, len(ids), 31))
    last = len(ids) // 31 * 31
    plain = sae.encode(tiny_lm.activations(torch.cat([torch.tensor([tiny_lm.bos]), ids[last:]])))[1:].detach()
    assert torch.equal(found.latents[last:], plain.as_subclass(torch.Tensor))
    whole = latents_on(tiny_lm, sae, text[:100], ctx=64)
    assert sum(token.begins_block for token in whole.tokens) == 1


def test_characters_over_several_tokens_are_shown_whole(tiny_lm, sae):
    found = latents_on(tiny_lm, sae, SIGNS)
    shown = "".join(token.shown for token in found.tokens)
    assert shown.replace("▫", "") == SIGNS
    assert len(found.tokens) > len(SIGNS)
    assert sum(token.name == "日" for token in found.tokens) == 3
    html = found._repr_html_()
    assert "日" in html
    assert "�" not in html


@settings(max_examples=25, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_whatever_the_text_every_token_is_there(text, tiny_lm, sae):
    found = latents_on(tiny_lm, sae, text)
    assert len(found.tokens) == len(found.latents) == len(tiny_lm.token_ids(text)) - 1


def test_html_escapes_all_text(tiny_lm, sae):
    html = latents_on(tiny_lm, sae, ["<script>alert(1)</script>\"'&", "x\u202ey"])._repr_html_()
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("pre-wrap") == 2
    assert "http" not in html
    assert "border-bottom" in html  # not by colour alone


def test_chosen_latents_are_all_that_is_shown(tiny_lm, sae):
    everything = latents_on(tiny_lm, sae, "Lily had a red ball.", top=24)
    strongest = everything.strongest
    assert [row.largest for row in strongest] == sorted((row.largest for row in strongest), reverse=True)
    first = strongest[0]
    column = everything.latents[:, first.latent]
    assert (first.largest, first.n_tokens) == (column.max().item(), int((column > 0).sum()))
    assert first.token == everything.tokens[int(column.argmax())].name
    only = latents_on(tiny_lm, sae, "Lily had a red ball.", latents=[first.latent])
    assert [row.latent for row in only.strongest] == [first.latent]
    frame = only.to_pandas()
    assert list(frame.columns) == ["text", "position", "token", "token_id", "latent", "activation"]
    assert frame.activation.tolist() == column[column > 0].tolist()
    assert len(everything.to_pandas()) == int((everything.latents > 0).sum())


def test_an_sae_that_is_active_on_nothing_is_shown_too(tiny_lm):
    config = SAEConfig(d_in=16, d_sae=8, nonlinearity="relu")
    weights = initial_weights(config, 3)
    weights.own["b_enc"] -= 100
    found = latents_on(tiny_lm, SAE(config, weights), "my ball")
    assert found.strongest == []
    assert "no active latent" in found._repr_html_()
    assert found.to_pandas().empty


def test_it_is_read_where_the_sae_was_trained(tiny_lm, sae):
    elsewhere = tiny_lm.at("blocks.2.hook_mlp_out")
    assert torch.equal(latents_on(elsewhere, sae, "a ball").latents, latents_on(tiny_lm, sae, "a ball").latents)


def test_wrong_requests_are_refused(tiny_lm, tiny_lm_folder, sae, monkeypatch):
    for text, said in [("", "text 0: has no tokens"), ([], "give at least one"), (["a", ""], "text 1: has no tokens")]:
        with pytest.raises(ValueError, match=said):
            latents_on(tiny_lm, sae, text)
    with pytest.raises(ValueError, match="latent 24: this SAE has the latents 0-23"):
        latents_on(tiny_lm, sae, "a", latents=[24])
    with pytest.raises(ValueError, match=r"ctx 65: .* takes 2 to 64 tokens"):
        latents_on(tiny_lm, sae, "a", ctx=65)
    config = SAEConfig(d_in=8, d_sae=8)
    with pytest.raises(ValueError, match="width 16, but the SAE has d_in = 8"):
        latents_on(tiny_lm, SAE(config, initial_weights(config, 0)), "a")
    monkeypatch.setattr(latents_on_text, "MOST_ENTRIES", 48)
    with pytest.raises(ValueError, match="with 24 latents at most 2 can be looked at"):
        latents_on(tiny_lm, sae, "where is my ball")
