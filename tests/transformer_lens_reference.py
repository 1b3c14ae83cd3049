"""TransformerLens's activations and spliced cross-entropies for a model on the disk; runs in its own environment.

python transformer_lens_reference.py MODEL_FOLDER HOOK REQUEST.safetensors ANSWER.safetensors
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, hook, request_file, answer_file = sys.argv[1:]
request = load_file(request_file)
tokens, splice = request["tokens"], request["splice"]
hf_model = AutoModelForCausalLM.from_pretrained(folder)
model = HookedTransformer.from_pretrained(
    folder, hf_model=hf_model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
)
with torch.no_grad():
    _, cache = model.run_with_cache(tokens, names_filter=hook)
    clean = model(tokens, return_type="loss", loss_per_token=True)
    spliced = model.run_with_hooks(
        tokens, return_type="loss", loss_per_token=True, fwd_hooks=[(hook, lambda acts, hook: splice.to(acts))]
    )
save_file({"acts": cache[hook].contiguous(), "clean": clean.contiguous(), "spliced": spliced.contiguous()}, answer_file)
