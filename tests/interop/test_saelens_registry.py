"""SAEs by their names in SAELens's registry; a module stands for SAELens, which checks/saelens_registry.py runs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from prolu import SAE
from prolu.cli.entry_point import main
from prolu.interop import import_sae
from prolu.interop.saelens_registry import import_registered
from prolu.sae.saved_sae import read_provenance
from support.foreign_saes import write_saelens

NAME = "saelens:some-res/blocks.1.hook_resid_pre/width_40"


class Loaded(torch.nn.Module):
    """An SAE that SAELens has loaded: its matrix is a view, as some of its loaders make them."""

    config = ()

    def __init__(self, release, sae_id):
        super().__init__()
        assert (release, sae_id) == tuple(NAME.removeprefix("saelens:").split("/", 1))
        self.b_dec = torch.nn.Parameter(torch.randn(12))
        self.W_enc = torch.nn.Parameter(torch.randn(40, 12).T)

    def save_model(self, folder):
        file = write_saelens(Path(folder), self.config) / "sae_weights.safetensors"
        save_file(load_file(file) | {"W_enc": self.W_enc.data}, file)


@pytest.fixture
def installed(monkeypatch):
    """SAELens's names that are used, with a registry of two releases."""
    releases = {
        "some-res": SimpleNamespace(saes_map={NAME.split("/", 1)[1]: "a", "layer_2": "b"}, repo_id="user/repo"),
        "another": SimpleNamespace(saes_map={}, repo_id="user/repo"),
    }
    top = ModuleType("sae_lens")
    top.__version__, top.SAE = "6.99.0", SimpleNamespace(from_pretrained=Loaded)
    directory = ModuleType("sae_lens.loading.pretrained_saes_directory")
    directory.get_pretrained_saes_directory = lambda: releases
    for module in (top, ModuleType("sae_lens.loading"), directory):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_is_saved_by_saelens_and_imported_with_its_name(installed, tmp_path):
    assert main(["import", NAME, "--out", str(tmp_path / "out")]) == 0
    made = read_provenance(tmp_path / "out")
    assert made["hook"] == "blocks.1.hook_resid_pre"
    assert {name: made["origin"][name] for name in ("format", "name", "sae_lens")} == {
        "format": "saelens", "name": NAME, "sae_lens": "6.99.0",
    }  # fmt: skip
    by_hand, _ = import_sae(write_saelens(tmp_path / "by_hand"))
    ours = SAE.load(tmp_path / "out")
    assert torch.equal(ours.W_dec, by_hand.W_dec)
    assert not torch.equal(ours.W_enc, by_hand.W_enc)  # which is that of the loaded SAE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "saelens:some-ras/layer_2",
            "release 'some-ras': not one of the 2 in SAELens's registry; near it are some-res",
        ),
        ("saelens:some-res/layer_3", "SAE 'layer_3': not one of the 2 of release some-res; near it are layer_2"),
        ("saelens:some-res", "SAE '': not one of the 2 of release some-res; near it are"),
    ],
)
def test_wrong_names_are_answered_with_near_ones(installed, tmp_path, capsys, name, words):
    assert main(["import", name, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_ours_cannot_compute_is_refused_under_its_name(installed, monkeypatch):
    monkeypatch.setattr(Loaded, "config", {"normalize_activations": "layer_norm"})
    with pytest.raises(ValueError, match=rf"^{NAME}/cfg.json: normalize_activations is 'layer_norm'"):
        import_registered(NAME)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--format", "sparsify"], "format 'sparsify': choose one of auto, saelens"),
        (["--revision", "v1"], "revision 'v1': SAELens loads the last one"),
    ],
)
def test_options_that_saelens_does_not_take_are_refused(installed, tmp_path, capsys, option, words):
    assert main(["import", NAME, *option, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="SAELens is installed here")
def test_without_saelens_the_command_to_install_it_is_said(tmp_path, capsys):
    assert main(["import", NAME, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"prolu: {NAME}: needs SAELens, which is not installed; pip install 'prolu[saelens]'\n"
    )
    assert not list(tmp_path.iterdir())
