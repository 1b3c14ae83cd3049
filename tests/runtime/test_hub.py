"""Whether the hub answers, on a hub of this machine."""

import time

import pytest
import torch
from huggingface_hub import constants

from prolu.activations.model_loading import load_model
from prolu.runtime.hub import is_reachable
from prolu.studies.model_sizes import outline
from support.fake_hub import FakeHub


@pytest.fixture(autouse=True)
def _asked_anew():
    is_reachable.cache_clear()
    yield
    is_reachable.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_is_reachable_and_is_asked_once(hub):
    assert is_reachable()
    assert is_reachable()
    assert [method for method, *_ in hub.requests] == ["HEAD"]


def test_a_hub_that_does_not_answer_is_not(hub):
    hub.shutdown()
    hub.server_close()
    assert not is_reachable()


def test_nor_is_one_that_must_not_be_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not is_reachable()
    assert hub.requests == []


def test_a_model_that_only_the_hub_has_is_refused_at_once(hub, monkeypatch):
    """huggingface_hub by itself would ask five times, with longer and longer breaks."""
    hub.shutdown()
    hub.server_close()
    breaks = []
    monkeypatch.setattr(time, "sleep", breaks.append)
    with pytest.raises(ValueError, match=r"^lm 'nobody/model': cannot be loaded \(the hub does not answer, so only"):
        load_model("nobody/model", torch.device("cpu"), None, torch.float32)
    with pytest.raises(ValueError, match=r"^lm 'nobody/model': its config is not on this machine, and the hub does"):
        outline("nobody/model", "blocks.0.hook_resid_pre")
    assert breaks == []
