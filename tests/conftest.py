"""Small models, made here: nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Read when PyTorch is imported, also by the processes that tests start. A thread that waits for others sleeps, and does
# not spin: where other processes want the processor, spinning makes a training step a hundred times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported, which transformers does: without a GPU its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AutoConfig, AutoModelForCausalLM

from prolu import LanguageModel, load_blocks
from support.models import SHAPES, write_model, write_stories, write_tokenizer
from support.sweeps import HOOK, stream_over

THREADS = 1
"""Most tensors here are tiny: two threads would wait for each other longer than they compute. Tests of training steps
use more, see training/conftest.py; commands use as many as their --threads says.
"""

torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _threads_as_before():
    """A command sets the number of threads of its process, which here is that of all tests."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def every_format():
    """For tests of a report's figures: they are saved in all formats, which takes seconds a report."""


@pytest.fixture(autouse=True)
def _figures_as_svg(request, monkeypatch):
    """Elsewhere a report's figures are saved in one format."""
    from prolu.report import writer

    if "every_format" not in request.fixturenames:
        monkeypatch.setattr(writer, "ENDINGS", ("svg",))


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def stories_file(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("text") / "stories.txt")


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_folder):
    return LanguageModel(tiny_lm_folder, HOOK)


@pytest.fixture(scope="session")
def many_passes_lm(tiny_lm_folder):
    """The same model, which takes so few tokens at once that a window needs several passes."""
    return LanguageModel(tiny_lm_folder, HOOK, batch_tokens=256)


@pytest.fixture(scope="session")
def tiny_blocks(tiny_lm, stories_file):
    return load_blocks(str(stories_file), tiny_lm.tokenizer, ctx=32)


@pytest.fixture
def tiny_stream(tiny_lm, tiny_blocks):
    return stream_over(tiny_lm, tiny_blocks)


@pytest.fixture(scope="module", params=sorted(SHAPES))
def family_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    config = AutoConfig.for_model(request.param, **SHAPES[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
