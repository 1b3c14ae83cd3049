"""`splice` with edits, and `steer`: to the bit what hooks written by hand compute, and nothing left behind."""

import math
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch

from prolu import SAE, LanguageModel, SAEConfig, splice, steer
from prolu.evaluation.edits import ablate, add, clamp, scale
from prolu.sae.nonlinearities import NONLINEARITIES
from prolu.training.starting_weights import initial_weights
from support.models import tokens

HOOK = "blocks.1.hook_resid_pre"
READ = "transformer.h.1.mlp.input"
WRITE = "blocks.1.hook_mlp_out"
EVERY = [*NONLINEARITIES, "topk(4)", "batchtopk(4)", "prolu(1,0,0.5)"]


def sae_of(nonlinearity="relu", seed=0, dtype=torch.float32, provenance=None, d_in=16, **config):
    """An SAE none of whose tensors is 0, so that none can be forgotten."""
    config = SAEConfig(d_in=d_in, d_sae=40, nonlinearity=nonlinearity, **config)
    sae = SAE(config, initial_weights(config, seed, dtype, initial_bias=-0.1), provenance)
    noise = torch.Generator().manual_seed(seed)
    for tensor in sae.weights.named().values():
        if not tensor.any():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=noise, dtype=torch.float64))
    return sae


def transcoder_of(skip, **config):
    return sae_of(d_out=16, skip=skip, **config)


@pytest.fixture(scope="module")
def own_lm(tiny_lm_folder):
    return LanguageModel(tiny_lm_folder, HOOK)


@pytest.fixture
def lm(own_lm):
    """Of a model of these tests' own, in which each leaves nothing behind."""
    yield own_lm
    assert n_hooks(own_lm.model) == 0


@pytest.fixture
def padded():
    """Two rows of different lengths, padded on the left."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": tokens(2, 9) * mask, "attention_mask": mask}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def encoded(sae, x, mean_back=False):
    """The latents of raw activations of a LayerNorm model, and what decodes latents of the same rows."""
    mean = x.mean(-1, keepdim=True)
    x = x - mean
    per_token = sae.config.normalisation == "per_token"
    norms = torch.linalg.vector_norm(x, dim=-1)[..., None]
    if per_token:
        x = x * (math.sqrt(16) / norms)
    scale_back = norms / math.sqrt(16) if per_token else 1.0

    def decode(latents):
        recon = latents @ sae.W_dec + (sae.b_out if sae.is_transcoder else sae.b_dec)
        offset = x @ sae.W_skip * scale_back if sae.config.skip else 0.0
        return recon * scale_back + (mean if mean_back else offset)

    return sae.encode_normalised(x), decode


def result_of(coded, y, change, keep_error):
    latents, decode = coded
    changed = decode(change(latents.clone()))
    return y + (changed - decode(latents)) if keep_error else changed


@contextmanager
def by_hand(model, sae, change, keep_error, block=1, mean_back=False):
    """The same at the input of a block."""

    def hook(_, args):
        return (result_of(encoded(sae, args[0], mean_back), args[0], change, keep_error), *args[1:])

    handle = model.transformer.h[block].register_forward_pre_hook(hook)
    yield
    handle.remove()


@contextmanager
def transcoder_by_hand(model, sae, change, keep_error):
    mlp, kept = model.transformer.h[1].mlp, []
    handles = [
        mlp.register_forward_pre_hook(lambda _, args: kept.append(encoded(sae, args[0]))),
        mlp.register_forward_hook(lambda _, __, y: result_of(kept.pop(), y, change, keep_error)),
    ]
    yield
    for handle in handles:
        handle.remove()


def ablate_and_more(latents):
    """What `EDITS` do, by hand."""
    latents[..., [3, 7]] = 0
    latents[..., 5] = 2.5
    latents[..., :3] *= -3
    latents[..., 11] += 0.75
    return latents


EDITS = [ablate([3, 7]), clamp(5, 2.5), scale(range(3), -3.0), add(np.int64(11), 0.75)]


def test_each_edit():
    latents = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0))
    before = latents.clone()
    for edit, column in (
        (ablate(4), torch.zeros(2, 3)),
        (clamp([4], 1.5), torch.full((2, 3), 1.5)),
        (scale(torch.tensor(4), 2), 2 * before[..., 4]),
        (add(np.array([4, 4]), -2), before[..., 4] - 2),
    ):
        expected = before.clone()
        expected[..., 4] = column
        assert torch.equal(edit(latents), expected)
        assert torch.equal(latents, before)
    assert torch.equal(ablate([])(latents), before)


@pytest.mark.parametrize("nonlinearity", EVERY)
@pytest.mark.parametrize("normalisation", ["per_token", "none"])
def test_equals_hooks_written_by_hand(lm, padded, nonlinearity, normalisation):
    sae = sae_of(nonlinearity, normalisation=normalisation)
    clean = logits(lm.model, padded)
    for keep_error in (True, False):
        with by_hand(lm.model, sae, ablate_and_more, keep_error):
            expected = logits(lm.model, padded)
        for edit in (EDITS, ablate_and_more, lambda f: ablate_and_more(f.double()).float()):
            with splice(lm.model, sae, HOOK, edit=edit, keep_error=keep_error):
                assert torch.equal(logits(lm.model, padded), expected)
        assert (expected - clean).abs().max() > 1e-2


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("normalisation", ["per_token", "none"])
def test_transcoders_equal_hooks_written_by_hand(lm, padded, skip, keep_error, normalisation):
    sae = transcoder_of(skip, normalisation=normalisation)
    with transcoder_by_hand(lm.model, sae, ablate_and_more, keep_error):
        expected = logits(lm.model, padded)
        said = lm.model.generate(**padded, max_new_tokens=8, do_sample=False)
    with splice(lm.model, sae, READ, hook_out=WRITE, edit=EDITS, keep_error=keep_error):
        assert torch.equal(logits(lm.model, padded), expected)
        assert torch.equal(lm.model.generate(**padded, max_new_tokens=8, do_sample=False), said)
    assert (expected - logits(lm.model, padded)).abs().max() > 1e-2


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_equals_hooks_written_by_hand(lm, padded, use_cache):
    sae, lengths = sae_of("topk(4)"), []
    options = padded | {
        "max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "output_logits": True, "min_new_tokens": 8,
        "return_dict_in_generate": True,
    }  # fmt: skip
    with by_hand(lm.model, sae, ablate_and_more, keep_error=True):
        expected = lm.model.generate(**options)
    with splice(lm.model, sae, HOOK, edit=[*EDITS, lambda f: (lengths.append(f.shape[1]), f)[1]]):
        said = lm.model.generate(**options)
    assert torch.equal(said.sequences, expected.sequences)
    assert torch.equal(torch.stack(said.logits), torch.stack(expected.logits))
    assert not torch.equal(said.sequences, lm.model.generate(**options).sequences)
    # With a cache every pass but the first has the newest token only.
    assert lengths == ([9] + [1] * 7 if use_cache else list(range(9, 17)))


def test_several_hooks_equal_hooks_written_by_hand(lm, padded):
    first, second, third = sae_of(seed=1), sae_of("prolu_ste", seed=2), transcoder_of(True, seed=3)
    with (
        by_hand(lm.model, first, ablate_and_more, keep_error=True),
        by_hand(lm.model, second, lambda f: f, keep_error=False, block=2),
        transcoder_by_hand(lm.model, third, ablate_and_more, keep_error=True),
    ):
        expected = logits(lm.model, padded)
        said = lm.model.generate(**padded, max_new_tokens=8, do_sample=False)
    with ExitStack() as all_hooks:
        all_hooks.enter_context(splice(lm.model, first, HOOK, edit=EDITS))
        all_hooks.enter_context(splice(lm.model, second, "blocks.2.hook_resid_pre"))
        all_hooks.enter_context(splice(lm.model, third, READ, hook_out=WRITE, edit=EDITS))
        assert torch.equal(logits(lm.model, padded), expected)
        assert torch.equal(lm.model.generate(**padded, max_new_tokens=8, do_sample=False), said)
    assert n_hooks(lm.model) == 0


def test_the_mean_that_a_centred_sae_removes_comes_back(lm, padded):
    """A trained SAE of a LayerNorm model says so in its provenance, and adds the mean again."""
    for normalisation in ("per_token", "none"):
        sae = sae_of(normalisation=normalisation, provenance={"centred": True, "hook": HOOK})
        raw = lm.uncentred().activations(padded["input_ids"])
        latents, _ = encoded(sae, raw)
        torch.testing.assert_close(sae.encode(raw).as_subclass(torch.Tensor), latents)
        with by_hand(lm.model, sae, ablate_and_more, keep_error=False, mean_back=True):
            expected = logits(lm.model, padded)
        with splice(lm.model, sae, edit=EDITS, keep_error=False):
            # The mean is removed twice, and the second one is a rounding.
            torch.testing.assert_close(logits(lm.model, padded), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of_sae", [torch.float32, torch.bfloat16, torch.float64])
def test_with_the_error_kept_and_nothing_edited_the_model_is_its_own_to_the_bit(tiny_lm_folder, of_model, of_sae):
    lm = LanguageModel(tiny_lm_folder, HOOK, dtype=of_model)
    sae = sae_of(dtype=of_sae)
    inputs = {"input_ids": tokens()}
    clean = logits(lm.model, inputs)
    for arguments in ({"edit": lambda f: f}, {"edit": scale(range(40), 1.0)}, {"keep_error": True}):
        with splice(lm.model, sae, HOOK, **arguments):
            assert torch.equal(logits(lm.model, inputs), clean)
    with splice(lm.model, transcoder_of(True), READ, hook_out=WRITE, keep_error=True):
        assert torch.equal(logits(lm.model, inputs), clean)


def test_the_error_is_kept_by_default_where_there_is_an_edit(lm, padded):
    sae = sae_of()
    found = {}
    for name, arguments in {
        "edit": {"edit": ablate(3)},
        "edit, kept": {"edit": ablate(3), "keep_error": True},
        "edit, dropped": {"edit": ablate(3), "keep_error": False},
        "none": {},
        "none, dropped": {"keep_error": False},
    }.items():
        with splice(lm.model, sae, HOOK, **arguments):
            found[name] = logits(lm.model, padded)
    assert torch.equal(found["edit"], found["edit, kept"])
    assert torch.equal(found["none"], found["none, dropped"])
    assert (found["edit"] - found["edit, dropped"]).abs().max() > 1e-2


@pytest.mark.parametrize("normalisation", ["per_token", "none"])
def test_steering_equals_a_hook_written_by_hand(lm, padded, normalisation):
    sae = sae_of(normalisation=normalisation, provenance={"hook": HOOK})
    transcoder = transcoder_of(False, provenance={"hook": READ, "hook_out": WRITE})
    entrance, mlp = lm.model.transformer.h[1], lm.model.transformer.h[1].mlp
    for steered, handle in (
        (sae, entrance.register_forward_pre_hook(lambda _, args: (args[0] + 6.5 * sae.W_dec[7], *args[1:]))),
        (transcoder, mlp.register_forward_hook(lambda _, __, y: y + 6.5 * transcoder.W_dec[7])),
    ):
        expected = logits(lm.model, padded)
        said = lm.model.generate(**padded, max_new_tokens=8, do_sample=False)
        handle.remove()
        clean = logits(lm.model, padded)
        for model in (lm, lm.model):
            with steer(model, steered, 7, 6.5):
                assert torch.equal(logits(lm.model, padded), expected)
                assert torch.equal(lm.model.generate(**padded, max_new_tokens=8, do_sample=False), said)
        assert torch.equal(logits(lm.model, padded), clean)
        assert (expected - clean).abs().max() > 1e-2


def test_a_language_model_is_as_good_as_its_model_and_knows_the_saes_hook(lm, padded):
    sae = sae_of(provenance={"hook": HOOK})
    with splice(lm.model, sae, HOOK, edit=EDITS):
        expected = logits(lm.model, padded)
        by_block = lm.logits(padded["input_ids"])
    with splice(lm, sae, edit=EDITS):
        assert torch.equal(logits(lm.model, padded), expected)
        assert torch.equal(lm.logits(padded["input_ids"]), by_block)
    transcoder = transcoder_of(False, provenance={"hook": READ, "hook_out": WRITE})
    with splice(lm, transcoder, READ, hook_out=WRITE):
        expected = logits(lm.model, padded)
    with splice(lm, transcoder):
        assert torch.equal(logits(lm.model, padded), expected)


def test_gradients_reach_what_an_edit_needs(lm, padded):
    """An edit may be trained: here a factor of one latent."""
    sae, factor = sae_of(), torch.tensor(1.0, requires_grad=True)
    with splice(lm.model, sae, HOOK, edit=lambda f: torch.cat([f[..., :3] * factor, f[..., 3:]], -1)):
        lm.model(**padded, labels=padded["input_ids"]).loss.backward()
    assert factor.grad is not None
    assert factor.grad.abs() > 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (ablate(40), r"latent 40: this SAE has the latents 0-39"),
        ([scale([3, -1], 2.0)], r"latent -1: this SAE has the latents 0-39"),
        (lambda f: f[..., :39], r"latents of shape \(6, 20, 40\), as it got, not a tensor of shape \(6, 20, 39\)"),
        (lambda f: f[:, :1], r"latents of shape \(6, 20, 40\)"),
        ([ablate(1), lambda f: None], r"latents of shape \(6, 20, 40\), as it got, not NoneType"),
        (lambda f: 1 / 0, "division by zero"),
    ],
)
def test_a_wrong_edit_is_named_and_nothing_is_left_hooked(lm, edit, message):
    inputs = {"input_ids": tokens()}
    clean = logits(lm.model, inputs)
    for place in ({"hook": HOOK, "sae": sae_of()}, {"hook": READ, "hook_out": WRITE, "sae": transcoder_of(True)}):
        with pytest.raises((ValueError, ZeroDivisionError), match=message), splice(lm.model, edit=edit, **place):
            logits(lm.model, inputs)
        assert n_hooks(lm.model) == 0
    assert torch.equal(logits(lm.model, inputs), clean)


def test_wrong_places_are_named_and_nothing_is_left_hooked(lm):
    inputs = {"input_ids": tokens()}
    narrow = "transformer.h.1.mlp.c_fc.output"  # 64 wide
    transcoder = transcoder_of(False)
    for context, message in (
        (splice(lm, sae_of(), narrow), rf"hook '{narrow}': its activations have width 64, but the SAE has d_in = 16"),
        (splice(lm, transcoder, READ, hook_out=narrow), r"its activations have width 64, but the SAE has d_out = 16"),
        (splice(lm, transcoder, WRITE, hook_out=READ), rf"hook_out '{READ}': the model reaches it before the hook"),
        (splice(lm, sae_of()), "hook: this SAE does not know where it was trained"),
        (splice(lm, sae_of(), HOOK, hook_out=WRITE), "an SAE has none"),
        (splice(lm, transcoder, READ), "a transcoder needs one"),
        (splice(lm, transcoder, READ, hook_out="blocks.9.hook_mlp_out"), "this model has blocks 0-2"),
        (steer(lm, sae_of(), 7, 1.0), "hook: this SAE does not know where it was trained"),
        (steer(lm, sae_of(), 40, 1.0, hook=HOOK), "latent 40: this SAE has the latents 0-39"),
        (steer(lm, sae_of(), 7, 1.0, hook=narrow), "its activations have width 64, but the SAE has d_in = 16"),
        (steer(lm, sae_of(), 7, 1.0, hook="blocks.1.hook_z"), "the site must be one of"),
    ):
        with pytest.raises(ValueError, match=message), context:
            logits(lm.model, inputs)
        assert n_hooks(lm.model) == 0
    for wrong in ("3", [1, None], torch.tensor([1.5])):
        with pytest.raises(ValueError, match="must be the number of a latent, or several of them"):
            ablate(wrong)
