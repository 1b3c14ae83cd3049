"""Train the built-in language model on the source of Python's standard library: `make builtin-lm`.

This writes the Hugging Face folder `src/prolu/activations/builtin/model` (weights, tokenizer, card). Neither the
tokenizer nor the model sees the modules that are held out (`prolu.activations.documents.is_held_out` of their path).
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from prolu.activations.builtin import MODEL_DIR
from prolu.activations.builtin.corpus import digest, stdlib_documents
from prolu.activations.documents import HELD_OUT_FRACTION, is_held_out
from prolu.activations.packing import load_blocks

CTX = 128
BATCH_BLOCKS = 64
VOCAB = 3072
BOS = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCAB` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[BOS], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, clean_up_tokenization_spaces=False
    )


def next_token_losses(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy in nats of each token after the first of its block, [n_blocks * (ctx - 1)]."""
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def train(model: GPT2LMHeadModel, tokens: np.ndarray, minutes: float, peak_lr: float, seed: int) -> int:
    """Train for `minutes` with AdamW on rows cut at random offsets, and return the number of tokens seen.

    The learning rate rises over 100 steps and then falls along a cosine over the time, not over a number of steps.
    """
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses_of = torch.compile(lambda rows: next_token_losses(model, rows))
    draws = np.random.default_rng(seed)
    start = time.monotonic()
    step = 0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        starts = draws.integers(0, len(tokens) - CTX, BATCH_BLOCKS)
        rows = torch.from_numpy(tokens[starts[:, None] + np.arange(CTX)].astype(np.int64))
        rows[:, 0] = 0  # the beginning-of-text token, as every block of the stream has it
        for group in optimiser.param_groups:
            group["lr"] = peak_lr * min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses_of(rows).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}  {done:.0%}  loss {loss.item():.3f} nats/token", flush=True)
    return step * BATCH_BLOCKS * CTX


@torch.no_grad()
def score(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, blocks: np.ndarray) -> dict[str, float]:
    """Return the held-out cross-entropy in nats per token and bits per byte, and the unigram entropy of the tokens."""
    rows = torch.from_numpy(blocks.astype(np.int64))
    losses = torch.cat([next_token_losses(model, part) for part in rows.split(64)])
    predicted = rows[:, 1:].flatten()
    frequencies = torch.bincount(predicted).double() / len(predicted)
    # Byte-level BPE writes every byte as one character, so the length of this text is its number of bytes.
    text = "".join(tokenizer.convert_ids_to_tokens(predicted[predicted != 0].tolist()))
    return {
        "n_tokens": len(predicted),
        "nats_per_token": losses.double().mean().item(),
        "bits_per_byte": losses.double().sum().item() / math.log(2) / len(text),
        "unigram_nats_per_token": -(frequencies * frequencies.clamp(min=1e-30).log()).sum().item(),
    }


@torch.no_grad()
def complete(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Sample a continuation of a prompt, for the card."""
    torch.manual_seed(0)
    ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    out = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=40, pad_token_id=0)
    return tokenizer.decode(out[0, 1:])


def main() -> None:
    """Train the tokenizer and the model, score it, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45, help="training time")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    documents = stdlib_documents()
    tokenizer = train_tokenizer([text for path, text in documents if not is_held_out(path)])
    blocks = load_blocks("builtin", tokenizer, CTX)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CTX, n_embd=128, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    n_seen = train(model, blocks.train.reshape(-1), options.minutes, options.lr, options.seed)
    model.eval()
    figures = score(model, tokenizer, blocks.held_out)
    n_held_out = sum(is_held_out(path) for path, _ in documents)
    figures |= {
        "python": sys.version.split()[0],
        "corpus_sha256": digest(documents),
        "n_modules": len(documents),
        "n_held_out_modules": n_held_out,
        "n_train_tokens": blocks.train.size,
        "n_tokens_seen": n_seen,
        "n_parameters": model.num_parameters(),
        "minutes": options.minutes,
        "lr": options.lr,
        "seed": options.seed,
        "held_out_fraction": HELD_OUT_FRACTION,
    }
    print(json.dumps(figures, indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    samples = [complete(model, tokenizer, p) for p in ("def read(self, ", "import os\n", "class Queue:\n")]
    (options.out / "README.md").write_text(card(figures, samples))


def card(figures: dict, samples: list[str]) -> str:
    """Return the model card, made from the measured figures."""
    completions = "\n\n".join(f"```python\n{sample}\n```" for sample in samples)
    return f"""---
license: mit
library_name: transformers
---
# The built-in language model

A GPT-2 of {figures["n_parameters"]:,} parameters (4 layers, d_model 128, 4 heads, context {CTX}, byte-level BPE of
{VOCAB} tokens), small enough to ship, trained so that a sparse autoencoder has something real to explain.

| | | |---|---| | data | source of the standard library of Python {figures["python"]}: {figures["n_modules"]} modules,
without tests, idlelib, encodings and other generated tables; SHA-256 `{figures["corpus_sha256"][:16]}` | | split | by
SHA-256 of the module's path: {figures["n_held_out_modules"]} modules ({figures["n_tokens"]:,} tokens) held out, seen
neither by the tokenizer nor in training | | training | {figures["n_tokens_seen"]:,} tokens drawn at random offsets
from {figures["n_train_tokens"]:,}; AdamW, peak learning rate {figures["lr"]:g}, cosine over {figures["minutes"]:g}
minutes on 2 CPU cores, bfloat16 autocast, seed {figures["seed"]} | | held-out cross-entropy |
{figures["nats_per_token"]:.3f} nats per token, {figures["bits_per_byte"]:.3f} bits per byte | | unigram entropy of the
same tokens | {figures["unigram_nats_per_token"]:.3f} nats per token |

Retrain with `make builtin-lm`: another interpreter holds other source, and the time decides the number of
steps, so weights and figures will differ a little. All figures above are in `training.json`.

The text it learned from is the Python Software Foundation's (PSF licence); none of it is in this folder.

## What it writes

Sampled at temperature 0.7 after `def read(self, `, `import os` and `class Queue:`.

{completions}
"""


if __name__ == "__main__":
    main()
