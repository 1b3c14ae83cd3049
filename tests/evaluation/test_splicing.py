"""`prolu.splice`: inside it a model computes what an evaluation splices in; after it, what it did before."""

import pytest
import torch

from prolu import SAE, LanguageModel, SAEConfig, splice
from prolu.activations.hooks import SITES
from prolu.training.starting_weights import initial_weights
from support.models import tokens

HOOK = "blocks.1.hook_resid_pre"


def sae_of(d_in=16, seed=0, dtype=torch.float32, **config):
    weights = initial_weights(SAEConfig(d_in=d_in, d_sae=40, **config), seed, dtype, initial_bias=-0.1)
    return SAE(SAEConfig(d_in=d_in, d_sae=40, **config), weights)


@pytest.fixture
def lm(tiny_lm_folder):
    """Of a model of its own, so that nothing is left in another test's."""
    return LanguageModel(tiny_lm_folder, HOOK)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("site", SITES)
def test_inside_the_model_computes_what_an_evaluation_splices(family_folder, site):
    lm, ids, sae = LanguageModel(family_folder, f"blocks.1.hook_{site}"), tokens(), sae_of()
    with torch.no_grad():
        recon = sae(lm.activations(ids))
    clean = logits(lm.model, ids)
    with splice(lm.model, sae, lm.hook):
        inside = logits(lm.model, ids)
    torch.testing.assert_close(inside, lm.logits(ids, recon), rtol=1e-5, atol=1e-5 * clean.abs().max().item())
    assert (inside - clean).abs().max() > 1e-2
    assert torch.equal(logits(lm.model, ids), clean)


def test_a_modules_path_will_do_and_every_nonlinearity(lm):
    ids, clean = tokens(), logits(lm.model, tokens())
    for nonlinearity in ("relu", "prolu_relu", "gated", "jumprelu", "topk(4)", "batchtopk(4)"):
        sae = sae_of(nonlinearity=nonlinearity, normalisation="none")
        with torch.no_grad():
            expected = lm.at("transformer.h.1.input").logits(ids, sae(lm.activations(ids)))
        with splice(lm.model, sae, "transformer.h.1.input"):
            torch.testing.assert_close(logits(lm.model, ids), expected)
    assert torch.equal(logits(lm.model, ids), clean)


def test_generate_is_greedy_on_the_spliced_logits_with_and_without_its_cache(lm):
    ids, sae = tokens(2, 5), sae_of()
    clean = lm.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    by_hand = ids
    with splice(lm.model, sae, HOOK):
        for _ in range(12):
            by_hand = torch.cat([by_hand, logits(lm.model, by_hand)[:, -1:].argmax(-1)], 1)
        for use_cache in (True, False):
            said = lm.model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=0)
            assert torch.equal(said, by_hand[:, : said.shape[1]])
    assert not torch.equal(by_hand[:, : clean.shape[1]], clean)


def test_nothing_is_left_behind(lm):
    ids, sae = tokens(), sae_of()
    clean = logits(lm.model, ids)
    with splice(lm.model, sae, HOOK):
        assert n_hooks(lm.model) == 1
    with pytest.raises(KeyError), splice(lm.model, sae, HOOK):
        raise KeyError
    with pytest.raises(ValueError, match="blocks 0-2"), splice(lm.model, sae, "blocks.3.hook_resid_pre"):
        pass
    with pytest.raises(ValueError, match="d_in = 8"), splice(lm.model, sae_of(8), HOOK):
        logits(lm.model, ids)
    assert n_hooks(lm.model) == 0
    assert torch.equal(logits(lm.model, ids), clean)


@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of_sae", [torch.float32, torch.bfloat16, torch.float64])
def test_what_goes_on_has_the_models_number_format(tiny_lm_folder, of_model, of_sae):
    lm, ids, seen = LanguageModel(tiny_lm_folder, HOOK, dtype=of_model), tokens(), []
    sae = sae_of(dtype=of_sae)
    with splice(lm.model, sae, HOOK), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae, "encode", lambda x: (seen.append(x.dtype), SAE.encode(sae, x))[1])
        assert logits(lm.model, ids).dtype == of_model
    assert seen == [of_sae]
    assert {p.dtype for p in sae.parameters()} == {of_sae}


def test_with_its_error_kept_the_model_is_the_clean_one_and_gradients_go_through_the_sae(lm):
    ids, sae = tokens(), sae_of()
    clean = logits(lm.model, ids)
    with splice(lm.model, sae, HOOK, keep_error=True):
        loss = lm.model(input_ids=ids, labels=ids).loss
        assert torch.equal(logits(lm.model, ids), clean)
    loss.backward()
    with splice(lm.model, sae, HOOK):
        assert (logits(lm.model, ids) - clean).abs().max() > 1e-2
    assert sae.W_dec.grad.abs().sum() > 0
    assert sae.W_enc.grad.abs().sum() > 0


def test_several_at_several_hooks(lm):
    ids, first, second = tokens(), sae_of(seed=1), sae_of(seed=2)
    above = lm.at("blocks.2.hook_mlp_out")
    with splice(lm.model, first, HOOK):
        with torch.no_grad():
            there = second(above.activations(ids))
        expected = above.logits(ids, there, above.restart_points(ids))
    with splice(lm.model, first, lm.hook), splice(lm.model, second, above.hook):
        both = logits(lm.model, ids)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    with splice(lm.model, second, above.hook):
        assert (both - logits(lm.model, ids)).abs().max() > 1e-3
