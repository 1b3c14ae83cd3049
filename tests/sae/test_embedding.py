"""ProLU in other people's code: autocast, vmap, meta tensors, torch.compile, DistributedDataParallel."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prolu
from prolu.sae.nonlinearities import GeneralisedProLU
from support.embedded import batch_and_model, loss_of

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parents[1] / "support" / "embedded.py"
GRADIENTS = ["relu", "ste", GeneralisedProLU(0.3, 0.7, 0.5)]


def examples(*shape):
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randn(shape[-1], generator=g).double()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_vmap_is_one_call_for_all(gradient):
    m, b = examples(5, 3, 7)
    one_by_one = torch.stack([prolu.prolu(row, b, gradient) for row in m])
    assert torch.equal(torch.func.vmap(lambda row: prolu.prolu(row, b, gradient))(m), one_by_one)
    biases = b * torch.linspace(-1, 1, 5)[:, None]
    both = torch.func.vmap(lambda row, bias: prolu.prolu(row, bias, gradient))(m, biases)
    assert torch.equal(both, torch.stack([prolu.prolu(*pair, gradient) for pair in zip(m, biases, strict=True)]))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradients_of_each_example_under_vmap_are_those_of_backward(gradient, chunk_size):
    m, b = examples(5, 3, 7)

    def loss(row, bias):
        return prolu.prolu(row, bias, gradient).square().sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None), chunk_size=chunk_size)(m, b)
    for i, row in enumerate(m):
        row_, b_ = row.clone().requires_grad_(), b.clone().requires_grad_()
        loss(row_, b_).backward()
        assert torch.equal(each[0][i], row_.grad)
        torch.testing.assert_close(each[1][i], b_.grad, rtol=1e-14, atol=1e-14)


def test_a_whole_module_under_functional_call_and_vmap():
    x, model = batch_and_model()
    parameters = dict(model.named_parameters())

    def loss(parameters, row):
        return loss_of(lambda x: torch.func.functional_call(model, parameters, x), row[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    loss_of(model, x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(each[name].mean(0), parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_latents_have_its_format_and_gradients_that_of_the_weights(dtype):
    torch.manual_seed(0)
    encoder, activation, x = torch.nn.Linear(16, 40, bias=False), prolu.ProLU(40, initial_bias=-0.1), torch.randn(9, 16)
    with torch.autocast("cpu", dtype):
        m = encoder(x)
        latents = activation(m)
    assert latents.dtype == m.dtype == dtype
    gate = (m.float() > 0.1) & (m > 0)
    assert torch.equal(latents, torch.where(gate, m, 0))
    latents.float().sum().backward()
    for parameter in (encoder.weight, activation.bias):
        assert parameter.grad.dtype == torch.float32
    torch.testing.assert_close(activation.bias.grad, torch.where(gate, m, 0).float().sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_module_follows_to_and_survives_its_state_dict(dtype):
    activation = prolu.ProLU(7, initial_bias=-0.2).to(dtype)
    m = torch.randn(4, 7, dtype=dtype, requires_grad=True)
    activation(m).sum().backward()
    assert activation(m).dtype == m.grad.dtype == activation.bias.grad.dtype == dtype
    other = prolu.ProLU(7).to(dtype)
    other.load_state_dict(activation.state_dict())
    assert torch.equal(other(m), activation(m))


def test_on_meta_tensors_shapes_and_formats_come_out_forward_and_backward():
    with torch.device("meta"):
        activation, m = prolu.ProLU(7), torch.empty(2, 3, 7, requires_grad=True)
        latents = activation(m)
        latents.sum().backward()
    assert (latents.device.type, latents.shape, latents.dtype) == ("meta", (2, 3, 7), torch.float32)
    assert m.grad.shape == m.shape
    assert activation.bias.grad.shape == (7,)
    config = prolu.SAEConfig(d_in=8, d_sae=24)
    sae = prolu.SAE(config, prolu.training.starting_weights.initial_weights(config, 0)).to("meta")
    assert sae(torch.empty(5, 8, device="meta")).shape == (5, 8)


def test_the_example_trains(capsys):
    runpy.run_path(str(ROOT / "examples/own_module.py"), run_name="__main__")
    first, *_, last = (float(line.split()[3].rstrip(",")) for line in capsys.readouterr().out.splitlines())
    assert last < first / 5


@pytest.mark.slow  # compiles
def test_torch_compile_makes_one_graph_of_it():
    done = subprocess.run([sys.executable, SCRIPT, "compile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow  # two more processes
def test_distributed_data_parallel_gives_the_gradients_of_one_process(tmp_path):
    command = [sys.executable, SCRIPT, "rank"]
    ranks = [subprocess.Popen([*command, str(n), tmp_path / "meet", tmp_path / "out"]) for n in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    x, model = batch_and_model()
    loss_of(model, x).backward()
    found = torch.load(tmp_path / "out", weights_only=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-12)
