"""What TransformerLens computes of a GPT-2 in a folder; run by its own environment's Python.

    python transformer_lens_reference.py MODEL_FOLDER DTYPE QUESTIONS ANSWERS

QUESTIONS and ANSWERS are safetensors. Asked: `tokens` [n, ctx], and `HOOK/NAME` [n, ctx, d_model], what to put in
place of the activations at HOOK. Answered: `HOOK` the activations [n, ctx, d_model], `clean` the next-token
cross-entropy [n, ctx - 1], and `HOOK/NAME` the same of the spliced model.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM


def main(folder: str, dtype: str, questions: str, answers: str) -> None:
    """Loads with the default processing, reads every hook asked about, and splices."""
    # The weights are handed over, since TransformerLens guesses the class from words anywhere in the path.
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = HookedTransformer.from_pretrained(folder, hf_model=hf_model, device="cpu", dtype=dtype)
    assert model.cfg.normalization_type == "LNPre", "the LayerNorms are not folded"
    assert model.W_pos.mean(-1).abs().max() < 1e-6, "what is written to the residual stream is not centred"
    splices = load_file(questions)
    tokens = splices.pop("tokens")
    hooks = {key.partition("/")[0] for key in splices}
    with torch.no_grad():
        clean, cache = model.run_with_cache(
            tokens, return_type="loss", loss_per_token=True, names_filter=lambda name: name in hooks
        )
        results = {"clean": clean} | {hook: cache[hook] for hook in hooks}
        for key, splice in splices.items():
            results[key] = model.run_with_hooks(
                tokens, return_type="loss", loss_per_token=True,
                fwd_hooks=[(key.partition("/")[0], lambda acts, hook, splice=splice: splice.to(acts))],
            )  # fmt: skip
    save_file({key: value.contiguous() for key, value in results.items()}, Path(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
