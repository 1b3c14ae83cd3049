"""Small models, made here: nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

from support.models import SHAPES, write_model, write_stories, write_tokenizer

torch.set_num_threads(2)


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


@pytest.fixture(scope="module", params=sorted(SHAPES))
def family_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(request.param, **SHAPES[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
