"""Tests of what a language model takes, and of the strings beside its activations."""

import numpy as np
import pytest
import torch

from prolu import SAE, LanguageModel, SAEConfig
from prolu.training.starting_weights import initial_weights

TEXTS = ["def read(self):", "a", "x = [1, 2]  # two"]
SIGNS = "read(\u05e9\u05dc\u05d5\u05dd) \U0001f469\u200d\U0001f467 \u65e5\u672c"


@pytest.fixture(scope="module")
def lm():
    return LanguageModel("builtin", "blocks.2.hook_resid_pre")


@pytest.mark.parametrize("text", [*TEXTS, SIGNS, ""])
def test_tokens_are_the_strings_beside_the_activations(lm, text):
    strings = lm.tokens(text)
    assert len(strings) == len(lm.activations(text))
    assert strings[0] == lm.tokenizer.decode([lm.bos])
    assert "".join(strings[1:]) == text


def test_every_form_of_token_ids_gives_the_same(lm):
    ids = torch.randint(1, 3000, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = lm.activations(ids)
    for same in (ids.numpy(), ids.numpy().astype(np.uint16), ids.int(), ids.tolist()):
        assert torch.equal(lm.activations(same), expected)
    for row in (ids[1], ids[1].numpy(), ids[1].tolist()):
        torch.testing.assert_close(lm.activations(row), expected[1])
    assert lm.activations(ids[1]).shape == (7, lm.d_in)


def test_a_list_of_texts_gives_a_list(lm):
    found = lm.activations(TEXTS)
    assert [len(acts) for acts in found] == [len(lm.tokens(text)) for text in TEXTS]
    assert all(torch.equal(acts, lm.activations(text)) for acts, text in zip(found, TEXTS, strict=True))


@pytest.mark.parametrize(
    "tokens",
    [[[1, 2], [3]], [], ["a", 1], np.zeros((2, 3)), np.zeros((2, 2, 2), int), torch.zeros(0, 3, dtype=torch.long)],
    ids=["ragged", "nothing", "mixed", "floats", "three dimensions", "no rows"],
)
def test_what_is_no_text_and_no_ids_is_refused(lm, tokens):
    with pytest.raises(ValueError, match=r"tokens: a \w+.*must be a text, a list of texts, or token ids"):
        lm.activations(tokens)


def test_hidden_states_of_transformers_give_the_latents_of_our_activations(lm, tmp_path):
    # The built-in model has LayerNorms, so what we hand out is centred, and what transformers hands out is not.
    config = SAEConfig(d_in=lm.d_in, d_sae=512, nonlinearity="prolu_ste")
    SAE(config, initial_weights(config, 0)).save(tmp_path, {"centred": lm.centred})
    sae = SAE.load(tmp_path)
    ids = torch.randint(1, 3000, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        assert hidden.mean(-1).abs().max() > 0.01
        torch.testing.assert_close(sae.encode(hidden), sae.encode(lm.activations(ids)), rtol=1e-4, atol=1e-5)
        # Their reconstruction has the mean of their activations, and lies as far from them as ours from ours.
        theirs = hidden - sae(hidden)
        torch.testing.assert_close(theirs, lm.activations(ids) - sae(lm.activations(ids)), rtol=1e-4, atol=1e-4)
