"""What TransformerLens computes of a GPT-2 in a folder; run by another environment's Python.

    cd PARENT_OF_gpt2 && python transformer_lens_reference.py QUESTIONS ANSWERS

TransformerLens takes only names that it knows, and finds the folder `gpt2` where it runs before it asks the hub.
QUESTIONS and ANSWERS are safetensors. Asked: `tokens` [n, ctx], and `HOOK/NAME` [n, ctx, d_model], what to put in
place of the activations at HOOK. Answered: `HOOK` the activations [n, ctx, d_model], `clean` the next-token
cross-entropy [n, ctx - 1], and `HOOK/NAME` the same of the spliced model. All float32.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer


def main(questions: str, answers: str) -> None:
    """Loads with the default processing, reads every hook asked about, and splices."""
    assert Path("gpt2/config.json").is_file(), "no folder gpt2 here"
    model = HookedTransformer.from_pretrained("gpt2", device="cpu")
    assert model.cfg.normalization_type == "LNPre", "the LayerNorms are not folded"
    assert model.W_pos.mean(-1).abs().max() < 1e-6, "what is written to the residual stream is not centred"
    splices = load_file(questions)
    tokens = splices.pop("tokens")
    hooks = {key.partition("/")[0] for key in splices}
    per_token = {"return_type": "loss", "loss_per_token": True}
    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens, names_filter=lambda name: name in hooks, **per_token)
        results = {"clean": clean} | {hook: cache[hook] for hook in hooks}
        for key, splice in splices.items():
            replaced = (key.partition("/")[0], lambda acts, hook, splice=splice: splice)
            results[key] = model.run_with_hooks(tokens, fwd_hooks=[replaced], **per_token)
    # One block's output is the next one's input, the same memory, which safetensors refuses.
    save_file({key: value.clone() for key, value in results.items()}, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
