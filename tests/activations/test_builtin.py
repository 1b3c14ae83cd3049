"""The built-in language model has learned, and its card says what it is."""

import json

import torch

from prolu import LanguageModel, load_blocks
from prolu.activations.builtin import HOOK, MODEL_DIR


def test_it_loads_reads_and_has_learned():
    lm = LanguageModel("builtin", HOOK)
    blocks = load_blocks("builtin", lm.tokenizer, max_train_tokens=1_000_000)
    tokens = blocks.held_out[:64]
    shares = torch.bincount(torch.from_numpy(blocks.held_out[:, 1:].astype("int64")).flatten()).double()
    shares = shares[shares > 0] / shares.sum()
    unigram = -(shares * shares.log()).sum().item()
    assert lm.d_in == 128
    assert lm.cross_entropy(tokens).mean().item() < 0.6 * unigram
    # Its own held-out figure, on the interpreter it was trained on, is below half:
    facts = json.loads((MODEL_DIR / "training.json").read_text())
    assert facts["nats_per_token"] < 0.5 * facts["unigram_nats_per_token"]


def test_it_is_small_and_has_a_card():
    assert sum(p.stat().st_size for p in MODEL_DIR.iterdir()) < 12e6
    card = (MODEL_DIR / "README.md").read_text()
    for word in ("bits per byte", "unigram", "held out", "make builtin-lm", "SHA-256"):
        assert word in card


def test_words_are_whole_in_its_tokenizer():
    tokenizer = LanguageModel("builtin", HOOK).tokenizer
    assert 2000 <= len(tokenizer) <= 4096
    text = "def read(self, size=-1):\n    return None\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) < len(text) / 2
