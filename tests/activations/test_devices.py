"""Where the language model runs, and where SAEs are trained: what is refused, what is recorded, and equal bits."""

import copy
import json

import pytest
import torch

from prolu import ActivationStream, LanguageModel, RunConfig
from prolu.activations import source as opening
from prolu.activations.source import Source, open_streams
from prolu.activations.store_writer import HarvestRequest
from prolu.cli import main
from prolu.runtime.devices import available_device, numbered
from support.commands import text_flags
from support.sweeps import contents, stream_over, sweep

SIZE = {"d_sae": 40, "n_tokens": 1280, "batch_size": 64, "eval_tokens": 320, "latent_pages": "none", "threads": 2}


@pytest.fixture
def two_gpus(monkeypatch):
    """As if this machine had two GPUs, of which this thread uses the second."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_a_device_is_the_one_that_this_thread_means(two_gpus):
    assert available_device("device", "cuda") == torch.device("cuda:1")
    assert available_device("lm_device", "cuda:0") == torch.device("cuda:0")
    assert available_device("lm_device", "cpu") == torch.device("cpu")
    assert numbered(torch.device("cuda:0")) == torch.device("cuda:0")
    with pytest.raises(ValueError, match="lm_device 'cuda:2': this machine has the GPUs 0 to 1"):
        available_device("lm_device", "cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tpu", "lm_device 'tpu': must be cpu, cuda, or cuda:N"),
        ("cuda:x", "lm_device 'cuda:x': must be cpu, cuda, or cuda:N"),
        ("cuda", "lm_device 'cuda': PyTorch finds no CUDA GPU on this machine; choose cpu"),
        ("cuda:1", "lm_device 'cuda:1': PyTorch finds no CUDA GPU on this machine; choose cpu"),
    ],
)
@pytest.mark.parametrize("command", ["train", "harvest"])
def test_what_is_not_there_is_refused_before_anything_is_written(
    command, name, words, tiny_lm_folder, stories_file, tmp_path, capsys
):
    size = SIZE if command == "train" else {"n_tokens": 1280}
    flags = text_flags(tiny_lm_folder, stories_file, **size, lm_device=name, out=tmp_path / "a")
    assert main([command, *flags]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_the_same_device_by_name_is_the_same_study_to_the_bit(tiny_lm_folder, stories_file, tmp_path):
    for name, named in (("plain", {}), ("named", {"lm_device": "cpu"})):
        flags = text_flags(tiny_lm_folder, stories_file, **SIZE, **named, out=tmp_path / name)
        assert main(["train", *flags]) == 0
    found = {
        name: {file: data for file, data in contents(tmp_path / name).items() if not file.startswith("report")}
        for name in ("plain", "named")
    }
    assert len(found["plain"]) > 4
    assert found["named"] == found["plain"]
    assert "lm_device" not in json.loads(found["plain"]["config.json"])["stream"]


def test_each_part_goes_to_its_own_device(tiny_lm_folder, stories_file, monkeypatch):
    # `meta` stands for a GPU: its tensors have a shape, and no memory.
    asked = []
    monkeypatch.setattr(
        opening, "available_device", lambda *one: asked.append(one) or torch.device(one[1].replace("cuda", "meta"))
    )
    options = {"lm": str(tiny_lm_folder), "data": (str(stories_file),), "hook": ("blocks.1.hook_resid_pre",), "ctx": 32}
    (stream,) = open_streams(Source(**options, device="cuda", lm_device="cpu"), 2560, 2560, 64)
    assert asked == [("device", "cuda"), ("lm_device", "cpu")]
    assert (stream.device.type, stream.lm.device.type) == ("meta", "cpu")
    assert stream[0].acts.device.type == "meta"
    described = stream.describe()
    assert (described["device"], described["lm_device"]) == ("meta", "cpu")


def test_a_study_is_not_continued_with_the_model_elsewhere(tiny_lm, tiny_blocks, tmp_path):
    runs = [RunConfig(d_sae=40, n_tokens=640)]
    sweep(runs, stream_over(tiny_lm, tiny_blocks), tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    config = json.loads(file.read_text())
    config["stream"]["lm_device"] = "cuda"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"stream\.lm_device is 'cuda' there, None here"):
        sweep(runs, stream_over(tiny_lm, tiny_blocks), tmp_path / "a")


def test_a_store_says_where_it_was_harvested_unless_on_the_cpu(tiny_lm, tiny_blocks, monkeypatch):
    assert "lm_device" not in HarvestRequest(tiny_lm, tiny_blocks, (), "fp16").made
    there = copy.copy(tiny_lm)
    there.device = torch.device("cuda:1")
    monkeypatch.setattr(LanguageModel, "at", lambda lm, hook: tiny_lm)  # the width of a hook is found by a pass
    assert HarvestRequest(there, tiny_blocks, (), "fp16").made["lm_device"] == "cuda"


def test_two_gpus_are_one_kind_of_device(tiny_lm, tiny_blocks):
    lm = copy.copy(tiny_lm)
    lm.device = torch.device("cuda:1")
    stream = ActivationStream(lm, tiny_blocks, 64, window_tokens=2048)
    assert stream.describe()["lm_device"] == "cuda"
    stream.device = torch.device("cuda:0")
    assert "lm_device" not in stream.describe()
