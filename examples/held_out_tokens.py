"""Rebuild the tokens that a study was scored on, from its text and its config.json: nothing of prolu is imported.

    python examples/held_out_tokens.py STUDY TOKENS.npy [--data PLACE] [--lm FOLDER_OR_NAME]

The rule is in docs/reference/format.md. Text is read with the datasets library: JSON lines, parquet, a folder in the
hub's layout, or one that `save_to_disk` wrote. TOKENS.npy [n, ctx] is what `evaluate_saved_run.py` takes.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, ReadInstruction, load_dataset, load_from_disk
from transformers import AutoTokenizer


def rows_of(place, config, split):
    """Return the rows of a split, or of a slice of it such as train[0:40%]."""
    files = place if isinstance(place, list) else [place]
    if Path(files[0]).is_file():
        splits = load_dataset("parquet" if files[0].endswith(".parquet") else "json", data_files=files)
    elif any((Path(place) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        splits = load_from_disk(place)
    else:
        splits = load_dataset(place, config or None)
    splits = {"train": splits} if isinstance(splits, Dataset) else splits
    name = split.partition("[")[0]
    (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(splits[name])})
    return splits[name].select(range(part.from_, part.to))


def held_out_ids(stream, tokenizer, bos):
    """Yield the ids of the held-out documents, and whether they are cut into blocks by themselves."""
    column = stream["text_column"]
    mask = column.replace("input_ids", "attention_mask") if "input_ids" in column else "attention_mask"
    for row in rows_of(stream["data"], stream["data_config"], stream["eval_split"] or stream["split"]):
        content = row[column]
        if content is None or (isinstance(content, str) and not content.strip()):
            continue
        if isinstance(content, str):
            key = content.encode()
        else:
            kept = [1] * len(content) if row.get(mask) is None else row[mask]
            content = np.array(content, "<i8")[np.array(kept, bool)]
            key = content.tobytes()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
        if not stream["eval_split"] and number >= stream["held_out_fraction"] * 2**64:
            continue  # it is trained on
        if isinstance(content, str):
            as_text = stream["special_tokens"] == "text"
            yield [bos, *tokenizer(content, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]], False
        elif len(content) % stream["ctx"] == 0:
            yield content.tolist(), True
        else:
            yield content.tolist() if content[0] == bos else [bos, *content.tolist()], False


def scored_blocks(stream, eval_tokens, tokenizer):
    """Return the scored blocks, [n, ctx]."""
    ctx = stream["ctx"]
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    size = -(-max(stream["held_out_pool"], eval_tokens) // ctx)  # blocks in the pool, rounded up
    pool, tail = [], []
    for ids, by_itself in held_out_ids(stream, tokenizer, bos):
        joined = ids if by_itself else tail + ids
        whole = len(joined) // ctx * ctx
        pool += [joined[i : i + ctx] for i in range(0, whole, ctx)]
        tail = tail if by_itself else joined[whole:]
        if len(pool) >= size:
            break
    blocks = np.array(pool[:size])
    blocks[:, 0] = bos
    seed = int.from_bytes(hashlib.sha256(b"('held-out',)").digest()[:8], "big")
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    return blocks[sorted(order[: -(-eval_tokens // ctx)])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--lm", default="")
    request = parser.parse_args()
    facts = json.loads((request.study / "config.json").read_text())
    described = facts["stream"] | ({"data": request.data} if request.data else {})
    place, in_gguf = Path(request.lm or described["lm"]), {}
    if place.suffix == ".gguf":
        place, in_gguf = place.parent, {"gguf_file": place.name}
    names = AutoTokenizer.from_pretrained(str(place), **in_gguf)
    found = scored_blocks(described, facts["eval_tokens"], names)
    np.save(request.tokens, found)
    digest = hashlib.sha256(repr(found.shape).encode() + np.ascontiguousarray(found, "<u4").tobytes()).hexdigest()
    print(f"{found.size} tokens in {len(found)} blocks")
    if digest != facts["held_out_digest"]:
        raise SystemExit(f"{request.study}: was scored on other tokens, of digest {facts['held_out_digest']}")
