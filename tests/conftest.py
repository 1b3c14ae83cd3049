"""Small models, made here: nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

torch.set_num_threads(2)

STORY = "Lily had a red ball. The ball went up and up, and Lily said: where is my ball? Tom saw it in the tree.\n"


def write_tokenizer(folder, vocab_size=300):
    """A byte-level BPE that knows `STORY`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([STORY], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)


def write_model(folder):
    """A randomly initialised GPT-2 of width 16 and 3 blocks, in the hub's layout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_stories(file):
    """200 documents of a few sentences, no two alike."""
    words = STORY.split()
    stories = (" ".join(words[(7 * i + j * (1 + i % 5)) % len(words)] for j in range(90)) for i in range(200))
    file.write_text("\n<|endoftext|>\n".join(f"{i} {story}" for i, story in enumerate(stories)))
    return file


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def stories_file(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("text") / "stories.txt")


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_folder):
    from prolu import LanguageModel

    return LanguageModel(tiny_lm_folder, "blocks.1.hook_resid_pre")


@pytest.fixture(scope="session")
def tiny_blocks(tiny_lm, stories_file):
    from prolu import load_blocks

    return load_blocks(str(stories_file), tiny_lm.tokenizer, ctx=32)


@pytest.fixture
def tiny_stream(tiny_lm, tiny_blocks):
    from prolu import ActivationStream

    return ActivationStream(tiny_lm, tiny_blocks, batch_size=64, seed=3, window_tokens=2048)
