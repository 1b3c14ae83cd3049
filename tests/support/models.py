"""Small language models and their text, made here: nothing is downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from prolu.activations.hooks import ARCHITECTURES

SMALL = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

SMALL_LLAMA = SMALL | {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.4,
}  # fmt: skip

SHAPES = dict.fromkeys(ARCHITECTURES, SMALL_LLAMA) | {
    "gpt2": SMALL | {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, "initializer_range": 0.4},
    "gpt_neox": SMALL
    | {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 64, "initializer_range": 0.4,
    },
    "gpt_neo": SMALL
    | {
        "hidden_size": 16, "num_layers": 3, "num_heads": 2, "max_position_embeddings": 64, "window_size": 8,
        "attention_types": [[["global", "local"], 1], [["global"], 1]], "initializer_range": 0.4,
    },
    "gemma2": SMALL_LLAMA | {"sliding_window": 8},
    "gemma3": {
        "text_config": SMALL_LLAMA | {"sliding_window": 8},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_index": 299, "boi_token_index": 297, "eoi_token_index": 298,
    },
    "gemma3_text": SMALL_LLAMA | {"sliding_window": 8},
}  # fmt: skip

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


def tokens(n=6, ctx=20):
    return torch.randint(1, 300, (n, ctx), generator=torch.Generator().manual_seed(0))


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '<|sep|>' + message['content'] | trim + '<|end|>' }}{% endfor %}"
)
"""A chat template in the manner of ChatML: markers, the role and the content, which it trims."""


def write_chat_model(folder):
    """The model of `write_model` with a chat template, and embeddings for its three markers."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=303, n_positions=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<|start|>", "<|sep|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
