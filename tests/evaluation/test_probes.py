"""Labels of Python source, and probes by their laws: what can be told is told, and what cannot is at chance."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from prolu import SAE, LanguageModel, SAEConfig
from prolu.evaluation import probes
from prolu.evaluation.probes import ProbeTask, fitted_probe, held_out_modules, probe_figures, python_tasks
from prolu.evaluation.python_labels import LABELS, is_python, python_labels
from prolu.training.starting_weights import initial_weights

SOURCE = '''def f(x):
    if x:
        return "a b" + 'c'  # note 12
  # out of place
    y = 0x1F + 3.5
class A:
    def g(self):
        """Doc
string."""
        return 7
'''


def marked(name, source=SOURCE):
    inside = python_labels(source).inside[name]
    return [part for part in "".join(c if m else "\0" for c, m in zip(source, inside, strict=True)).split("\0") if part]


def test_labels_are_what_pythons_tokenizer_says():
    assert marked("string") == ['"a b"', "'c'", '"""Doc\nstring."""']
    assert marked("comment") == ["# note 12", "# out of place"]
    assert marked("number") == ["0x1F", "3.5", "7"]
    deep = "        return \"a b\" + 'c'  # note 12\n"
    assert marked("indented") == [deep, '        """Doc\nstring."""\n        return 7\n']


def test_source_with_odd_ends_of_lines_keeps_its_places():
    assert marked("number", "a = 1\x0c\nb = 2\r\nc = 3") == ["1", "2", "3"]
    assert python_labels("x = (1,") is None
    assert python_labels("  x\n y\n") is None


def test_a_token_is_of_a_label_wholly_or_not_at_all():
    labels = python_labels(SOURCE)

    def of(*texts):
        spans = [(SOURCE.index(text), SOURCE.index(text) + len(text)) for text in texts]
        return {name: values.tolist() for name, values in labels.of_tokens(np.array(spans)).items()}

    found = of(' "a', " ", "a b", 'b" +', " out", "7", "        return")
    assert found["string"] == [1, 0, 1, -1, 0, 0, 0]
    assert found["comment"] == [0, 0, 0, 0, 1, 0, 0]
    assert found["number"] == [0, 0, 0, 0, 0, 1, 0]
    assert found["indented"] == [1, 0, 1, 1, -1, 1, 1]
    assert labels.of_tokens(np.array([[3, 3]]))["string"].tolist() == [-1]


def test_only_what_does_something_is_python():
    assert is_python(SOURCE)
    assert is_python("import os\n")
    assert is_python('x = "\\d"')  # an odd escape, of which Python warns
    assert not any(map(is_python, ("Hello", "A sentence.", "12", "x = (1,", "null\0byte", "# a comment")))


KINDS = ("1", "5", "all", "acts")


@pytest.fixture(scope="module")
def tasks():
    """Tasks on directions of 12 dimensions: one that one latent tells, one that no input tells."""
    g = torch.Generator().manual_seed(0)
    acts = torch.randn(4000, 12, generator=g)
    is_test = torch.arange(4000) % 2 == 1
    told = acts[:, 3] > 0.2
    untold = torch.rand(4000, generator=g) < 0.5
    return {name: ProbeTask(acts, labels, is_test) for name, labels in (("told", told), ("untold", untold))}


def identity_sae(d_in=12):
    config = SAEConfig(d_in=d_in, d_sae=2 * d_in, nonlinearity="relu", normalisation="none")
    sae = SAE(config, initial_weights(config, 0, initial_bias=0.0))
    eye = torch.eye(d_in)
    sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], 1), torch.cat([eye, -eye])
    return sae


def test_what_one_latent_tells_is_told_and_noise_is_at_chance(tasks):
    figures = probe_figures(identity_sae(), tasks)
    assert set(figures) == {f"probe_{name}_{kind}" for name in (*tasks, "mean") for kind in KINDS}
    assert figures["probe_mean_1"] == pytest.approx((figures["probe_told_1"] + figures["probe_untold_1"]) / 2)
    assert figures["probe_told_1"] > 0.9
    assert figures["probe_told_all"] > 0.95 < figures["probe_told_acts"]
    # Four standard errors of 2,000 guesses.
    assert all(abs(figures[f"probe_untold_{kind}"] - 0.5) < 4 * 0.5 / 2000**0.5 for kind in ("1", "5", "all", "acts"))


def test_order_and_lengths_of_latents_change_nothing(tasks):
    sae, other = identity_sae(), identity_sae()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    scales = 0.5 + torch.rand(24, generator=torch.Generator().manual_seed(2))
    other.W_enc.data = (sae.W_enc * scales)[:, order]
    found = probe_figures(other, {"told": tasks["told"]})
    assert found == pytest.approx(probe_figures(sae, {"told": tasks["told"]}), abs=0.002)


def test_a_probe_is_the_minimum_of_its_loss(tasks):
    task = tasks["told"]
    x, labels = task.acts[:300, :4], task.labels[:300]
    signs = np.where(labels, 1.0, -1.0)

    def loss(w):
        z = signs * (x.double().numpy() @ w[:-1] + w[-1])
        return np.logaddexp(0, -z).mean() + probes.RIDGE / 2 * (w[:-1] ** 2).sum()

    best = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8})
    ours = fitted_probe(x, labels).double().numpy()
    assert loss(ours) == pytest.approx(best.fun, rel=1e-5)
    assert ours == pytest.approx(best.x, rel=0.02, abs=0.02)


@pytest.fixture(scope="module")
def lm():
    return LanguageModel("builtin", hook="blocks.2.hook_resid_pre")


def test_tasks_of_the_built_in_text_are_balanced_and_of_two_parts(lm, monkeypatch):
    monkeypatch.setattr(probes, "PER_CLASS", 200)
    texts = held_out_modules(200_000)
    assert 200_000 <= sum(map(len, texts)) < 2_000_000
    found = python_tasks(lm, texts)
    assert set(found) <= set(LABELS)
    assert {"string", "comment", "indented"} <= set(found)
    for task in found.values():
        assert task.acts.shape == (len(task.labels), lm.d_in)
        for part in (task.is_test, ~task.is_test):
            assert probes.FEWEST <= int(task.labels[part].sum()) == int((~task.labels[part]).sum()) <= 200


def test_too_little_text_is_refused(lm):
    with pytest.raises(ValueError, match="give more text"):
        python_tasks(lm, [SOURCE * 20])
    with pytest.raises(ValueError, match="none is Python source of at least one token block"):
        python_tasks(lm, ["not python ("])
