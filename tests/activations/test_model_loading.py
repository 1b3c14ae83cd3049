"""Models that transformers loads with a remark, or with another model in their place, are refused here."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2Model,
    GPTNeoXForCausalLM,
    LlamaModel,
)

from prolu import ActivationStream, HeldOut, LanguageModel, load_blocks
from prolu.cli.entry_point import main
from support.models import SHAPES, SMALL_LLAMA, tokens, write_model, write_tokenizer

HOOK = "blocks.1.hook_resid_pre"


def edited(folder, change):
    """Change the tensors in a saved model's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def headless_llama(folder):
    torch.manual_seed(0)
    LlamaModel(AutoConfig.for_model("llama", **SMALL_LLAMA, tie_word_embeddings=False)).save_pretrained(folder)


def without_one_matrix(folder):
    write_model(folder)
    edited(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))


def without_a_whole_block(folder):
    write_model(folder)
    edited(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".h.2." in name])


def of_another_width(folder):
    write_model(folder)
    edited(folder, lambda tensors: tensors.update({"transformer.wpe.weight": torch.zeros(32, 16)}))


def untied_without_head(folder):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox", **SHAPES["gpt_neox"], tie_word_embeddings=False)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    edited(
        folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(("embed_out", "lm_"))]
    )


@pytest.mark.parametrize(
    ("write", "missing"),
    [
        (headless_llama, "lm_head.weight"),
        (without_one_matrix, "transformer.h.1.mlp.c_fc.weight"),
        (without_a_whole_block, r"transformer.h.2.attn.c_attn.bias, .* and \d+ more"),
        (of_another_width, "transformer.wpe.weight"),
        (untied_without_head, "lm_head.weight|embed_out.weight"),
    ],
)
def test_a_parameter_that_is_not_in_the_files_is_an_error(tmp_path, write, missing, capsys):
    write(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=f"^lm '{tmp_path}': (its files do not hold|cannot be loaded).*({missing})"):
        LanguageModel(tmp_path, HOOK)
    assert main(["train", "--lm", str(tmp_path), "--hook", HOOK, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert "newly initialized" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [GPT2Model, GPT2ForSequenceClassification])
def test_tied_weights_need_no_head_of_their_own(tmp_path, tiny_lm_folder, kind):
    """Saved without its head, or with another one, a tied model is whole: its embedding is its head."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_lm_folder)
    other = kind(whole.config)
    other.base_model.load_state_dict(whole.base_model.state_dict())
    other.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    ids = tokens()
    found = LanguageModel(tmp_path, HOOK).cross_entropy(ids)
    assert torch.equal(found, LanguageModel(tiny_lm_folder, HOOK).cross_entropy(ids))


@pytest.mark.parametrize("with_model", [False, True])
def test_an_adapter_is_not_its_base_model(tmp_path, tiny_lm_folder, with_model):
    if with_model:
        write_model(tmp_path)
    facts = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_lm_folder), "r": 2, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    save_file(
        {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(2, 16)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=f"^lm '{tmp_path}': holds an adapter .* merge it into its base model first"):
        LanguageModel(tmp_path, HOOK)


def test_a_revision_is_asked_of_the_hub_only(tiny_lm_folder, tmp_path):
    with pytest.raises(ValueError, match=r"^revision 'step3000': only models on the hub have .* is a path"):
        LanguageModel(tiny_lm_folder, HOOK, revision="step3000")


def hub_cache(root, name, commits, write):
    """A model in the layout of the hub's cache: each revision's commit has a snapshot of its own."""
    place = root / f"models--{name.replace('/', '--')}"
    for number, (revision, commit) in enumerate(commits.items()):
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        write(snapshot, number)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)


def test_a_revision_in_the_hubs_cache(tmp_path, monkeypatch):
    def write(folder, number):
        write_model(folder)
        edited(folder, lambda tensors: tensors["transformer.wte.weight"].mul_(1 + number))

    commits = {"main": "a" * 40, "step3000": "b" * 40}
    hub_cache(tmp_path, "ann/pythia", commits, write)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    digests = set()
    for revision, commit in commits.items():
        lm = LanguageModel("ann/pythia", HOOK, revision="" if revision == "main" else revision)
        digests.add(lm.digest())
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "models--ann--pythia" / "snapshots" / commit)
        with torch.no_grad():
            state = plain(input_ids=tokens(), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(lm.activations(tokens()), state - state.mean(-1, keepdim=True))
    assert len(digests) == 2
    with pytest.raises(ValueError, match=r"^lm 'ann/pythia': cannot be loaded"):
        LanguageModel("ann/pythia", HOOK, revision="step1")


def test_the_context_of_a_model_that_also_reads_images(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", **SHAPES["gemma3"])).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    lm = LanguageModel(tmp_path, HOOK)
    assert (lm.max_ctx, lm.n_token_ids, lm.d_in) == (64, 300, 16)
    with pytest.raises(ValueError, match=r"there is model.language_model.layers.2$"):
        LanguageModel(tmp_path, "model.layers.2.output")


# Token ids against the rows of the embedding


def with_another_token(folder, n=1):
    """A tokenizer that has grown beyond its model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|extra {i}|>" for i in range(n)]})
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_ids_beyond_the_embedding_are_refused_before_anything_runs(tmp_path):
    folder = write_model(tmp_path / "lm")
    n = len(AutoTokenizer.from_pretrained(folder))
    with_another_token(folder, 301 - n)  # its last one has the id 300: the model has the rows 0-299
    rows = tmp_path / "rows.jsonl"
    ids = np.random.default_rng(0).integers(1, n, (60, 32))
    ids[7, 3] = 300
    rows.write_text("".join(json.dumps({"ids": row.tolist()}) + "\n" for row in ids))
    lm = LanguageModel(folder, HOOK)
    blocks = load_blocks(str(rows), lm.tokenizer, ctx=32, text_column="ids")
    words = r"^token id 300, its tokenizer's '<\|extra \d+\|>', is not one of .*, whose embedding has the rows 0-299$"
    with pytest.raises(ValueError, match=words):
        ActivationStream(lm, blocks, 64)
    with pytest.raises(ValueError, match="token id 300"):
        lm.activations(torch.tensor([[0, 300]]))
    with pytest.raises(ValueError, match="token id -100 is not one of"):
        lm.cross_entropy(torch.tensor([[0, -100]]))
    out = tmp_path / "out"
    flags = ["--lm", str(folder), "--data", str(rows), "--text-column", "ids", "--ctx", "32", "--hook", HOOK]
    assert main(["train", *flags, "--d-sae", "8", "--n-tokens", "640", "--batch-size", "64", "--out", str(out)]) == 2
    assert not out.exists()


def test_a_larger_tokenizer_whose_new_tokens_do_not_occur_is_no_obstacle(tmp_path, stories_file):
    folder = write_model(tmp_path)
    with_another_token(folder, 400)
    lm = LanguageModel(folder, HOOK)
    blocks = load_blocks(str(stories_file), lm.tokenizer, ctx=32)
    ActivationStream(lm, blocks, 64)
    HeldOut(lm, blocks, 64)


def test_ids_that_only_padded_rows_of_the_embedding_have_are_taken(tmp_path):
    """Models are padded to a round number of rows; a tokenizer may have fewer entries than its ids reach."""
    write_model(tmp_path)
    write_tokenizer(tmp_path, vocab_size=280)
    lm = LanguageModel(tmp_path, HOOK)
    assert len(lm.tokenizer) <= 280
    assert lm.activations(torch.tensor([[0, 299]])).shape == (1, 2, 16)
