"""Let a language model write its own text: stories sampled from it, as one parquet file with a column `text`.

A small language model such as stories260K was trained on a text that is not always at hand. What it writes itself has
the distribution that it knows, and there is as much of it as a long study needs:

    python scripts/write_stories.py --lm stories260K --n-tokens 16000000 --out stories.parquet

Every story begins with the model's BOS token and ends with its EOS token or after --max-tokens. Tokens are drawn at
temperature 1 from the model's whole distribution, from a seed that is said.
"""

import argparse
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Sample the stories and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", required=True, help="a folder in the Hugging Face layout, or a name on the hub")
    parser.add_argument("--n-tokens", type=int, default=16_000_000, help="the number of tokens to write")
    parser.add_argument("--max-tokens", type=int, default=128, help="the number of tokens at which a story is cut")
    parser.add_argument("--batch-size", type=int, default=1024, help="the number of stories written at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already")

    tokenizer = AutoTokenizer.from_pretrained(options.lm)
    model = AutoModelForCausalLM.from_pretrained(options.lm).eval()
    torch.manual_seed(options.seed)
    start = torch.full((options.batch_size, 1), tokenizer.bos_token_id)
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": options.max_tokens, "cache_implementation": "static"}
    partial = options.out.with_suffix(".part")
    n_tokens, began = 0, time.monotonic()
    with pq.ParquetWriter(partial, pa.schema({"text": pa.string()})) as writer:
        while n_tokens < options.n_tokens:
            with torch.inference_mode():
                tokens = model.generate(
                    start, attention_mask=torch.ones_like(start), pad_token_id=tokenizer.eos_token_id, **sampling
                )
            n_tokens += int((tokens != tokenizer.eos_token_id).sum())
            stories = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            writer.write_table(pa.table({"text": stories}))
            print(f"{n_tokens:,} tokens, {n_tokens / (time.monotonic() - began):,.0f} a second", flush=True)
    partial.rename(options.out)


if __name__ == "__main__":
    main()
