"""Compute the L0, MSE and CE increase of a saved run from its files alone: nothing of prolu is imported.

    python examples/evaluate_saved_run.py RUN TOKENS.npy [--lm FOLDER_OR_NAME_OR_GGUF_FILE] [--lm-dtype bfloat16]

RUN is the folder of a run, TOKENS.npy its held-out token blocks [n, ctx], as `held_out_tokens.py` writes them.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# The module with the blocks, of models with LayerNorm, which removes the mean of activations: their SAEs never saw it.
LAYER_NORM = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def latents(x, sae, nonlinearity):
    """Return the latents of scaled activations: ReLU(m + b), or ProLU(m, b) = m where m + b > 0 and m > 0."""
    m, b = (x - sae["b_dec"]) @ sae["W_enc"], sae["b_enc"]
    return torch.relu(m + b) if nonlinearity == "relu" else torch.where((m + b > 0) & (m > 0), m, 0)


def cross_entropy(logits, tokens):
    """Return the cross-entropy in nats, summed in float64 over every token after the first, and over the vocabulary."""
    return torch.nn.CrossEntropyLoss(reduction="sum")(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model, layer, sae, config, tokens):
    """Return the figures, each a sum over tokens that is divided once."""
    block = model.get_submodule(f"{LAYER_NORM.get(model.config.model_type, 'model.layers')}.{layer}")
    state = {"splice": False, "l0": 0.0, "squared": 0.0}

    def at_the_hook(_, args, kwargs):
        acts = args[0] if args else kwargs["hidden_states"]
        if not state["splice"]:
            return args, kwargs
        raw = acts.float()
        raw = raw - raw.mean(-1, keepdim=True) if model.config.model_type in LAYER_NORM else raw
        norms = raw.norm(dim=-1, keepdim=True).clamp(min=1e-30)  # an activation of 0 stays 0
        scale = raw.shape[-1] ** 0.5 / norms if config["normalisation"] == "per_token" else 1.0
        f = latents(raw * scale, sae, config["nonlinearity"])
        x_hat = f @ sae["W_dec"] + sae["b_dec"]
        state["l0"] += (f > 0).sum().item()
        state["squared"] += (raw * scale - x_hat).double().square().sum().item()
        spliced = (x_hat / scale).to(acts.dtype)
        return ((spliced, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": spliced})

    block.register_forward_pre_hook(at_the_hook, with_kwargs=True)
    nats = {False: 0.0, True: 0.0}  # without and with the SAE's reconstruction
    for part in tokens.split(max(1, 4096 // tokens.shape[1])):
        for state["splice"] in nats:
            nats[state["splice"]] += cross_entropy(model(part, use_cache=False).logits.float(), part).item()
    clean, recon = (nats[splice] / tokens[:, 1:].numel() for splice in (False, True))
    figures = {"l0": state["l0"] / tokens.numel(), "mse": state["squared"] / (tokens.numel() * config["d_in"])}
    return figures | {"ce_clean": clean, "ce_recon": recon, "degradation": recon - clean}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--lm", default="")
    parser.add_argument("--lm-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    request = parser.parse_args()
    facts = json.loads((request.run / "config.json").read_text())
    site = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", facts["provenance"]["hook"])
    if site is None:
        parser.error(f"hook {facts['provenance']['hook']}: blocks.L.hook_resid_pre or hook_resid_post only")
    lm = Path(request.lm or facts["provenance"]["lm"])
    place, in_gguf = (lm.parent, {"gguf_file": lm.name}) if lm.suffix == ".gguf" else (lm, {})
    model = AutoModelForCausalLM.from_pretrained(str(place), dtype=getattr(torch, request.lm_dtype), **in_gguf).eval()
    ids = torch.from_numpy(np.load(request.tokens).astype(np.int64))
    sae_tensors, block_number = load_file(request.run / "sae.safetensors"), int(site[1]) + (site[2] == "post")
    print(json.dumps(evaluate(model, block_number, sae_tensors, facts["sae"], ids)))
