"""GPT-2 as TransformerLens processes it, shown equal: activations, and cross-entropy with a splice."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import write_tokenizer
from prolu import LanguageModel

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-transformer-lens"
VERSION = "3.9.0"
"""Of transformer_lens: the last with HookedTransformer, which the paper used. Its pins are not ours."""

pytestmark = pytest.mark.slow  # makes an environment and loads two more libraries


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment that has TransformerLens, made once."""
    done, python = ENVIRONMENT / VERSION, ENVIRONMENT / "bin" / "python"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        wanted = ["--constraint", ROOT / "constraints.txt", f"transformer-lens=={VERSION}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, timeout=1200)
        done.touch()
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small GPT-2 whose norms and biases are not those of an initialisation, so that folding matters."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"  # a name that TransformerLens knows
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_ctx=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".ln_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"])
def test_activations_and_spliced_cross_entropy_are_the_same(python, folder, tmp_path, site):
    hook = f"blocks.2.{site}"
    lm = LanguageModel(folder, hook)
    tokens = np.random.default_rng(0).integers(1, 300, (6, 48))
    tokens[:, 0] = lm.bos
    ours = lm.activations(tokens)
    splice = ours + 0.3 * ours.std() * torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    save_file({"tokens": torch.from_numpy(tokens), "splice": splice}, tmp_path / "request.safetensors")
    files = [tmp_path / "request.safetensors", tmp_path / "answer.safetensors"]
    script = ROOT / "tests" / "transformer_lens_reference.py"
    subprocess.run([python, script, folder.name, hook, *files], cwd=folder.parent, check=True, timeout=600)
    theirs = load_file(files[1])
    assert torch.linalg.vector_norm(ours - theirs["acts"]) < 1e-5 * torch.linalg.vector_norm(theirs["acts"])
    worst = torch.linalg.vector_norm(ours - theirs["acts"], dim=-1) / torch.linalg.vector_norm(theirs["acts"], dim=-1)
    assert worst.max() < 1e-5
    clean, spliced = lm.cross_entropy(tokens), lm.cross_entropy(tokens, splice, lm.restart_points(tokens))
    assert (spliced - clean).abs().mean() > 0.01  # the splice is felt
    for ce, reference in ((clean, theirs["clean"]), (spliced, theirs["spliced"])):
        torch.testing.assert_close(ce, reference, rtol=1e-5, atol=1e-5)
