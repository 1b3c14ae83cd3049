"""Reading and splicing, for every family: hooks are what a plain forward pass computes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prolu import LanguageModel
from prolu.activations.hooks import ARCHITECTURES, SITES, skipped
from support.models import SMALL, tokens, write_tokenizer


def plain_activations(model, architecture, site, layer, ids):
    """By a plain forward hook on the whole model."""
    seen = []
    block = model.get_submodule(f"{architecture.blocks}.{layer}")
    if site == "resid_pre":
        handle = block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    else:
        module = block if site == "resid_post" else block.get_submodule(getattr(architecture, site))
        handle = module.register_forward_hook(
            lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("site", SITES)
def test_hook_is_what_the_whole_forward_pass_computes(family_folder, site):
    lm = LanguageModel(family_folder, f"blocks.1.hook_{site}", batch_tokens=60)
    model = AutoModelForCausalLM.from_pretrained(family_folder)
    architecture = ARCHITECTURES[model.config.model_type]
    expected = plain_activations(model, architecture, site, 1, tokens())
    if architecture.layer_norm:
        expected = expected - expected.mean(-1, keepdim=True)
    assert lm.d_in == 16
    torch.testing.assert_close(lm.activations(tokens()), expected, rtol=1e-5, atol=1e-5)
    if site == "resid_pre":
        with torch.no_grad():
            state = model(input_ids=tokens(), output_hidden_states=True).hidden_states[1]
        state = state - state.mean(-1, keepdim=True) if architecture.layer_norm else state
        torch.testing.assert_close(expected, state)


@pytest.mark.parametrize("site", SITES)
def test_splicing_what_was_read_changes_nothing_and_zeros_act_as_zeros(family_folder, site):
    lm = LanguageModel(family_folder, f"blocks.1.hook_{site}", batch_tokens=60)
    ids = tokens()
    clean, acts, restart = lm.cross_entropy(ids), lm.activations(ids), lm.restart_points(ids)
    assert clean.shape == (6, 19)
    assert abs(lm.cross_entropy(ids, acts, restart) - clean).mean() < 1e-6
    zeros = torch.zeros_like(acts)
    # By the whole model, its output at the site replaced in a plain hook:
    model = AutoModelForCausalLM.from_pretrained(family_folder)
    architecture = ARCHITECTURES[model.config.model_type]
    block = model.get_submodule(f"{architecture.blocks}.1")
    if site == "resid_pre":
        block.register_forward_pre_hook(lambda _, args: (0 * args[0], *args[1:]))
    else:
        module = block if site == "resid_post" else block.get_submodule(getattr(architecture, site))
        module.register_forward_hook(lambda _, args, out: (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    zeroed = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(lm.cross_entropy(ids, zeros, restart), zeroed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_splicing_what_was_read_gives_the_logits_of_the_model(family_folder, site, layer):
    lm = LanguageModel(family_folder, f"blocks.{layer}.hook_{site}", batch_tokens=60)
    model, ids = AutoModelForCausalLM.from_pretrained(family_folder), tokens()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(lm.logits(ids), whole, rtol=1e-5, atol=1e-5)
    acts = lm.activations(ids)
    for restart in (None, lm.restart_points(ids)):
        spliced = lm.logits(ids, acts, restart)
        torch.testing.assert_close(spliced, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
        assert (lm.logits(ids, acts.roll(1, 0), restart) - whole).abs().max() > 1e-2
    raw = lm._read(ids, [lm._site])[0]  # as the model has them: nothing is removed, so nothing changes at all
    assert torch.equal(lm.logits(ids, raw), lm.logits(ids))


@pytest.mark.parametrize("site", SITES)
def test_a_pass_that_stops_early_reads_what_the_full_one_does(family_folder, site):
    hook = f"blocks.0.hook_{site}"
    lm = LanguageModel(family_folder, hook)
    early = lm.activations(tokens())
    late, _ = lm.activations_at([hook, "blocks.2.hook_resid_post"], tokens())
    assert torch.equal(early, late)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_number_format_and_device_pass_through(family_folder, dtype):
    lm = LanguageModel(family_folder, "blocks.1.hook_mlp_out", dtype=dtype, device=torch.device("cpu"))
    model, ids = AutoModelForCausalLM.from_pretrained(family_folder, dtype=dtype), tokens()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    assert {p.dtype for p in lm._model.parameters()} == {lm.dtype} == {dtype}
    assert {p.device for p in lm._model.parameters()} == {torch.device("cpu")}
    assert lm.logits(ids).dtype == dtype
    assert torch.equal(lm.logits(ids), whole)
    assert lm.activations(ids).dtype == torch.float32
    raw = lm._read(ids, [lm._site])[0]
    if dtype != torch.float64:  # float32 holds every bfloat16
        assert torch.equal(lm.logits(ids, raw), whole)


def test_a_device_map_passes_through(tiny_lm_folder, monkeypatch):
    """accelerate, which transformers needs for it, is not required here; what it would be given is."""
    asked = {}
    plain = AutoModelForCausalLM.from_pretrained

    def load(name, *, device_map, **rest):
        asked["device_map"] = device_map
        return plain(name, **rest)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(torch.nn.Module, "to", None)  # a model that lies on several devices is not moved
    device_map = {"": "cpu"}
    lm = LanguageModel(tiny_lm_folder, "blocks.1.hook_resid_pre", device_map=device_map)
    assert asked == {"device_map": device_map}
    assert lm.activations(tokens()).shape == (6, 20, 16)


def test_the_pass_stops_at_the_hook(tiny_lm_folder):
    lm = LanguageModel(tiny_lm_folder, "blocks.1.hook_resid_pre")
    ran = []
    for i, block in enumerate(lm._model.transformer.h):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    lm.activations(tokens())
    assert set(ran) == {0}
    ran.clear()
    lm.cross_entropy(tokens(), torch.zeros(6, 20, 16))
    assert set(ran) == {0, 1, 2}


def test_a_splice_leaves_the_model_as_it_was(tiny_lm):
    before = tiny_lm.cross_entropy(tokens())
    tiny_lm.cross_entropy(tokens(), torch.zeros(6, 20, 16))
    assert torch.equal(tiny_lm.cross_entropy(tokens()), before)


def test_text_gets_a_bos(tiny_lm):
    acts = tiny_lm.activations("Lily had a ball")
    ids = [0, *tiny_lm.tokenizer("Lily had a ball")["input_ids"]]
    assert torch.equal(acts, tiny_lm.activations(torch.tensor([ids]))[0])


def test_any_module_can_be_named(tiny_lm_folder):
    by_path = LanguageModel(tiny_lm_folder, "transformer.h.0.output").activations(tokens())
    by_name = LanguageModel(tiny_lm_folder, "blocks.0.hook_resid_post").activations(tokens())
    assert torch.equal(by_path, by_name)
    named = LanguageModel(tiny_lm_folder, "transformer.h.0.mlp.output")
    clean = named.cross_entropy(tokens())
    torch.testing.assert_close(named.cross_entropy(tokens(), named.activations(tokens())), clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("blocks.7.hook_resid_pre", "blocks 0-2"), ("blocks.1.hook_nothing", "hook_resid_pre, hook_resid_post"),
        ("resid", "blocks.L.hook_SITE"), ("transformer.h.9.output", "no module 'transformer.h.9'"),
    ],
)  # fmt: skip
def test_wrong_hooks_name_the_valid_ones(tiny_lm_folder, hook, words):
    with pytest.raises(ValueError, match=words):
        LanguageModel(tiny_lm_folder, hook)


def test_an_unknown_architecture_says_how_to_name_the_module(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt",
        **SMALL
        | {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="name a module and its side"):
        LanguageModel(tmp_path, "blocks.1.hook_resid_pre")
    lm = LanguageModel(tmp_path, "model.decoder.layers.0.output")
    assert lm.activations(tokens()).shape == (6, 20, 16)


def test_missing_models_are_named(tmp_path):
    for name in (str(tmp_path / "nothing"), "./nothing", str(tmp_path)):
        with pytest.raises(ValueError, match=r"no such folder with a config.json"):
            LanguageModel(name, "blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match="cannot be loaded"):
        LanguageModel("no-such-model-anywhere", "blocks.0.hook_resid_pre")


@pytest.mark.parametrize("gives_tuple", [False, True])
def test_blocks_that_are_passed_over_answer_in_their_own_form(gives_tuple):
    """Those of GPT-2 gave tuples up to transformers 5.0."""

    class Block(torch.nn.Module):
        def forward(self, hidden_states, scale):
            return (hidden_states * scale, None) if gives_tuple else hidden_states * scale

    blocks, x = [Block(), Block()], torch.randn(2, 3, 4)
    with skipped(blocks):
        for block in blocks:
            given = block(x, scale=2.0)
            assert isinstance(given, tuple) is gives_tuple
            assert (given[0] if gives_tuple else given) is x
    given = blocks[0](x, scale=2.0)
    assert torch.equal(given[0] if gives_tuple else given, 2 * x)
