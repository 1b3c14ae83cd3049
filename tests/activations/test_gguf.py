"""Language models in GGUF files: the same numbers as the folder that they were made from, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prolu import LanguageModel
from prolu.cli import main
from prolu.studies.model_sizes import outline
from prolu.studies.results import Results
from support.models import SMALL_LLAMA, STORY, tokens, write_tokenizer

gguf = pytest.importorskip("gguf")

EXAMPLES = Path(__file__).parents[2] / "examples"
HOOK = "blocks.1.hook_resid_post"
WIDTH = 32  # a row of a quantised matrix is a multiple of 32 numbers


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of three blocks in the hub's layout."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = SMALL_LLAMA | heads | {"hidden_size": WIDTH, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def as_llama_cpp_orders(weight, n_heads):
    """The rows of a query or key matrix in llama.cpp's order: both halves of a head's rotation interleaved."""
    n_rows, n_columns = weight.shape
    return weight.reshape(n_heads, 2, n_rows // n_heads // 2, n_columns).swapaxes(1, 2).reshape(n_rows, n_columns)


def write_gguf(file, folder, quantised=False):
    """Write a Llama of the hub's layout as a GGUF file."""
    model = LlamaForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(bpe["vocab"]) - 1))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for i, block in enumerate(model.model.layers):
        tensors |= {f"blk.{i}.{short}": block.get_submodule(name).weight for name, short in names.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in tensors.items():
        data = weight.detach().numpy()
        if n_heads := heads.get(name.rpartition(".")[2]):
            data = as_llama_cpp_orders(data, n_heads)
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantised and data.ndim == 2:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", data.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf_file(llama, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", llama)


def test_it_is_the_model_it_was_made_from(llama, gguf_file):
    ours = LanguageModel(gguf_file, HOOK)
    wanted = LanguageModel(llama, HOOK)
    assert torch.equal(ours.activations(tokens()), wanted.activations(tokens()))
    assert torch.equal(ours.cross_entropy(tokens()), wanted.cross_entropy(tokens()))
    assert ours.digest() == wanted.digest()
    assert ours.name == str(gguf_file)
    assert ours.tokenizer(STORY)["input_ids"] == AutoTokenizer.from_pretrained(llama)(STORY)["input_ids"]
    assert ours.bos == wanted.bos
    assert outline(str(gguf_file), HOOK) == outline(str(llama), HOOK)


def test_quantised_weights_are_the_numbers_that_they_stand_for(llama, tmp_path):
    file = write_gguf(tmp_path / "small.Q8_0.gguf", llama, quantised=True)
    ours = LanguageModel(file, HOOK)
    plain = LanguageModel(llama, HOOK)
    kind = gguf.GGMLQuantizationType.Q8_0
    weight = plain.model.model.layers[2].mlp.down_proj.weight.numpy()
    meant = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind))
    assert torch.equal(ours.model.model.layers[2].mlp.down_proj.weight, meant)
    assert not torch.equal(meant, torch.from_numpy(weight))
    assert ours.digest() != plain.digest()


def test_a_run_by_command(gguf_file, tmp_path, capsys):
    assert main(["sweep", "demo", "--lm", str(gguf_file), "--hook", HOOK, "--dry-run"]) == 0
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i}. {STORY}"}) + "\n" for i in range(200)))
    command = [
        "train", "--lm", str(gguf_file), "--hook", HOOK, "--data", str(text), "--d-sae", "64",
        "--n-tokens", "2048", "--batch-size", "256", "--ctx", "32", "--eval-tokens", "512", "--normalisation", "none",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(command) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["stream"]["lm"] == str(gguf_file)
    capsys.readouterr()
    # The scripts that import nothing of this library open the file too.
    (run,) = Results.load(tmp_path / "run").runs
    ids = str(tmp_path / "tokens.npy")
    subprocess.run([sys.executable, EXAMPLES / "held_out_tokens.py", tmp_path / "run", ids], check=True)
    command = [sys.executable, EXAMPLES / "evaluate_saved_run.py", run.folder, ids]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert said["l0"] == pytest.approx(run.record["l0"], rel=1e-4)
    assert said["degradation"] == pytest.approx(run.record["degradation"], abs=1e-5)
    in_bf16 = json.loads(subprocess.run([*command, "--lm-dtype", "bfloat16"], check=True, capture_output=True).stdout)
    assert said["ce_clean"] == pytest.approx(in_bf16["ce_clean"], abs=1e-2)
    assert said["ce_clean"] != in_bf16["ce_clean"]


@pytest.mark.parametrize("command", [("train",), ("sweep", "demo", "--dry-run")])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.gguf", None, "no such file"),
        ("text.gguf", b"this is no model", "cannot be"),
        ("cut.gguf", b"GGUF\x03\x00\x00\x00", "cannot be"),
    ],
)
def test_files_that_hold_no_model(tmp_path, capsys, name, content, words, command):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "run"
    assert main([*command, "--lm", str(tmp_path / name), "--hook", HOOK, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"lm '{tmp_path / name}': " in said
    assert words in said
    assert "Traceback" not in said
    assert not out.exists()


def test_missing_packages_and_revisions_are_said(gguf_file, monkeypatch):
    with pytest.raises(ValueError, match="only models on the hub have revisions"):
        LanguageModel(gguf_file, HOOK, revision="main")
    monkeypatch.setattr("prolu.activations.model_loading.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ValueError, match=r"pip install 'prolu\[gguf\]'\), and gguf cannot be imported"):
        LanguageModel(gguf_file, HOOK)
