"""`attribute`: exact where the model is linear, a derivative where it is not, and its parts sum to the whole."""

from types import SimpleNamespace

import pytest
import torch

from evaluation.test_interventions import EVERY, HOOK, READ, WRITE, n_hooks, sae_of, transcoder_of
from prolu import SAE, LanguageModel, SAEConfig, attribute, logit_difference, splice
from prolu.sae.weights import Weights
from support.models import STORY, tokens


@pytest.fixture(scope="module")
def lm64(tiny_lm_folder):
    return LanguageModel(tiny_lm_folder, HOOK, dtype=torch.float64)


def whole_numbers(*shape, seed):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


class Linear(torch.nn.Module):
    """A "language model" that sums its tokens' vectors, and whose numbers are whole, so that all sums are exact."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="linear")
        self.embedding = torch.nn.Embedding(9, 5, dtype=torch.float64)
        self.middle = torch.nn.Linear(5, 5, dtype=torch.float64)
        self.unembedding = torch.nn.Linear(5, 9, dtype=torch.float64)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = whole_numbers(*parameter.shape, seed=i)

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.unembedding(self.middle(self.embedding(input_ids)).cumsum(1)))


def linear_sae(transcoder):
    config = SAEConfig(d_in=5, d_sae=7, normalisation="none", **({"d_out": 5, "skip": True} if transcoder else {}))
    more = {"b_out": whole_numbers(5, seed=8), "skip": whole_numbers(5, 5, seed=9)} if transcoder else {}
    shared = {"encoder": whole_numbers(7, 5, seed=5), "decoder": whole_numbers(7, 5, seed=6)}
    own = {"b_enc": whole_numbers(7, seed=4)}
    return SAE(config, Weights(**shared, b_dec=whole_numbers(5, seed=7), own=own, **more))


@pytest.mark.parametrize("transcoder", [False, True])
def test_it_is_exact_in_a_linear_model(transcoder):
    model, sae, ids = Linear(), linear_sae(transcoder), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    place = {"hook": "middle.input", "hook_out": "middle.output"} if transcoder else {"hook": "embedding.output"}
    metric = logit_difference(torch.tensor([2, 3]), 4)
    with torch.no_grad():
        clean = metric(model(ids).logits)
    found = attribute(model, sae, ids, metric, **place)
    assert torch.equal(found.value, clean)
    assert (found.latents != 0).sum() > 20

    def change(edit, keep_error=True):
        with torch.no_grad(), splice(model, sae, edit=edit, keep_error=keep_error, **place):
            return clean - metric(model(ids).logits)

    # What each latent gives, and what all give together, is what ablating them takes away.
    assert torch.equal(change(torch.zeros_like), found.latents.sum((1, 2)))
    for position in range(4):
        for latent in range(7):

            def without(f, at=(position, latent)):
                f[:, at[0], at[1]] = 0
                return f

            assert torch.equal(change(without), found.latents[:, position, latent])
    # Nothing but the error is lost where the SAE's own reconstruction goes on, and nothing at all is left without bias.
    assert torch.equal(change(lambda f: f, keep_error=False), found.error.sum(1))
    site = model.middle if transcoder else model.embedding
    handle = site.register_forward_hook(lambda _, __, y: torch.zeros_like(y))
    assert torch.equal(clean - metric(model(ids).logits).detach(), found.total.sum(1))
    handle.remove()
    assert found.parts["total"] == sum(found.parts[name] for name in ("latents", "bias", "error"))


def perturbed(lm, sae, ids, metric, place, at, by):
    def more(f):
        f[(slice(None), *at)] += by
        return f

    with torch.no_grad(), splice(lm.model, sae, edit=more, **place):
        return metric(lm.model(input_ids=ids).logits)


PLACES = {
    "sae": (sae_of, {"hook": HOOK}),
    "transcoder": (lambda **c: transcoder_of(False, **c), {"hook": READ, "hook_out": WRITE}),
    "skip": (lambda **c: transcoder_of(True, **c), {"hook": READ, "hook_out": WRITE}),
}


@pytest.mark.parametrize("nonlinearity", EVERY)
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("normalisation", ["per_token", "none"])
def test_it_is_the_derivative_by_finite_differences(lm64, nonlinearity, kind, normalisation):
    make, place = PLACES[kind]
    sae = make(nonlinearity=nonlinearity, normalisation=normalisation, dtype=torch.float64)
    ids, metric = tokens(2, 7), logit_difference(5, torch.tensor([6, 7]))
    found = attribute(lm64, sae, ids, metric, **place)
    latents = []
    with torch.no_grad(), splice(lm64, sae, edit=lambda f: (latents.append(f.clone()), f)[1], **place):
        clean = lm64.model(input_ids=ids).logits
    assert torch.equal(found.value, metric(clean))
    assert torch.equal(found.latents != 0, latents[0] != 0)
    strongest = found.latents.abs().sum(0).flatten().topk(5).indices
    for position, latent in ((i // 40, i % 40) for i in strongest.tolist()):
        at = (position, latent)
        up, down = (perturbed(lm64, sae, ids, metric, place, at, by) for by in (1e-5, -1e-5))
        slope = (up - down) / 2e-5
        expected = latents[0][:, position, latent] * slope
        torch.testing.assert_close(found.latents[:, position, latent], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", PLACES)
def test_its_parts_sum_to_activations_times_gradient(lm64, kind):
    """Checked against a plain hook and autograd."""
    make, place = PLACES[kind]
    sae, ids, metric = make(dtype=torch.float64), tokens(2, 7), logit_difference(5, 6, position=3)
    block = lm64.model.transformer.h[1]
    site = block.mlp if "hook_out" in place else lm64.model.transformer.h[0]
    seen = []

    def leaf(_, __, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = site.register_forward_hook(leaf)
    metric(lm64.model(input_ids=ids).logits).sum().backward()
    handle.remove()
    found = attribute(lm64, sae, ids, metric, **place)
    torch.testing.assert_close(found.total, (seen[0] * seen[0].grad).sum(-1))
    assert found.error.abs().sum() > 0
    assert found.bias.abs().sum() > 0
    assert torch.equal(found.total[:, 4:], torch.zeros(2, 3).double())  # what comes after the position


def test_inputs_of_every_kind(tiny_lm_folder):
    lm, sae = LanguageModel(tiny_lm_folder, HOOK), sae_of(provenance={"hook": HOOK})
    metric = logit_difference(5, 6)
    text = STORY[:12]
    ids = lm.token_ids(text)
    found = attribute(lm, sae, text, metric)
    assert (found.value.shape, found.latents.shape, found.error.shape) == ((), (len(ids), 40), (len(ids),))
    for model, given in ((lm, ids), (lm.model, ids.tolist())):
        again = attribute(model, sae, given, metric)
        assert torch.equal(again.latents, found.latents)
    # Beside a longer row, padded on the left.
    longer = torch.cat([torch.tensor([0, 4, 9]), ids])
    mask = torch.ones(2, len(longer), dtype=torch.long)
    mask[1, :3] = 0
    rows = torch.stack([longer, torch.cat([torch.zeros(3, dtype=torch.long), ids])])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": rows, "attention_mask": mask, "position_ids": positions}
    both = attribute(lm.model, sae, inputs, metric)
    torch.testing.assert_close(both.latents[1, 3:], found.latents, rtol=1e-3, atol=1e-5)
    assert torch.equal(both.latents[1, :3], torch.zeros(3, 40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_models_own_logits_are_explained_and_nothing_is_left(tiny_lm_folder, dtype):
    lm, sae = LanguageModel(tiny_lm_folder, HOOK, dtype=dtype), sae_of()
    ids, seen = tokens(2, 7), []
    with torch.no_grad():
        clean = lm.model(input_ids=ids).logits
        found = attribute(lm, sae, ids, lambda logits: (seen.append(logits), logits[:, -1, 3].sum())[1], hook=HOOK)
    assert torch.equal(seen[0], clean)
    assert torch.equal(found.value, clean[:, -1, 3].sum())
    assert not found.latents.requires_grad
    assert all(p.grad is None for p in [*lm.model.parameters(), *sae.parameters()])
    assert n_hooks(lm.model) == 0


def test_what_does_not_fit_is_refused(tiny_lm_folder):
    lm, sae, ids = LanguageModel(tiny_lm_folder, HOOK), sae_of(), tokens(2, 7)
    metric = logit_difference(5, 6)
    for arguments, message in (
        ((lm.model, sae, "a text", metric), "tokens: a text needs a LanguageModel"),
        ((lm, sae, [[1, 2], [3]], metric), "token ids"),
        ((lm, sae, [[1, 300]], metric), "token id 300"),
        ((lm, sae, ids, lambda logits: logits.argmax()), "metric: it must be differentiable"),
        ((lm, sae, ids, lambda logits: torch.zeros(())), "metric: it must be differentiable"),
        ((lm, sae_of(d_in=8), ids, metric), "d_in = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(*arguments, hook=HOOK)
        assert n_hooks(lm.model) == 0
    with pytest.raises(ZeroDivisionError):
        attribute(lm, sae, ids, lambda logits: 1 / 0, hook=HOOK)
    with pytest.raises(ValueError, match="never reaches it"):
        attribute(Beside(), linear_sae(False), torch.tensor([[1, 2]]), metric, hook="unused.output")
    assert n_hooks(lm.model) == 0


class Beside(Linear):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(5, 5)
