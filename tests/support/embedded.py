"""ProLU and our SAEs inside other machinery, without the checks of shapes that pytest puts on every function.

python tests/support/embedded.py compile
python tests/support/embedded.py rank RANK RENDEZVOUS OUT     one of two processes of DistributedDataParallel
"""

import sys
from pathlib import Path

import torch

import prolu
from prolu.sae.nonlinearities import GeneralisedProLU
from prolu.training.starting_weights import initial_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from own_module import Autoencoder

FAMILIES = ["relu", "prolu_relu", "prolu_ste", "gated", "jumprelu", "topk(4)", "batchtopk(4)"]


def gradients(f, *tensors):
    """The value, and gradients of a weighted sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*leaves)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def same(f, compiled, *tensors):
    """Fails unless both give the same, up to the order of sums."""
    for a, b in zip(gradients(f, *tensors), gradients(compiled, *tensors), strict=True):
        torch.testing.assert_close(a, b)


def check_compile():
    """fullgraph=True: a graph break is an error. Inductor for ProLU, tracing alone for whole SAEs of every family."""
    torch.manual_seed(0)
    m, b = torch.randn(7, 33), torch.randn(33)
    for gradient in ("relu", "ste"):

        def f(m, b, gradient=gradient):
            return prolu.prolu(m, b, gradient)

        compiled = torch.compile(f, fullgraph=True)
        same(f, compiled, m, b)
        same(f, compiled, torch.randn(12, 33), b)  # another batch: dynamic shapes
        same(f, compiled, torch.randn(2, 3, 33).double(), b.double())
    for gradient in (GeneralisedProLU(0.3, 0.7, 0.5), GeneralisedProLU(1.0, 1.0, 1.0, torch.exp)):

        def g(m, b, gradient=gradient):
            return prolu.prolu(m, b, gradient)

        same(g, torch.compile(g, fullgraph=True, backend="aot_eager"), m, b)
    model = Autoencoder(8, 33)
    x = torch.randn(5, 8)
    same(lambda x: model(x)[0], torch.compile(lambda x: model(x)[0], fullgraph=True), x)
    for family in FAMILIES:
        config = prolu.SAEConfig(d_in=8, d_sae=33, nonlinearity=family)
        sae = prolu.SAE(config, initial_weights(config, 0))
        same(sae, torch.compile(sae, fullgraph=True, backend="aot_eager"), x)
    print("compiled")


def batch_and_model():
    """64 rows and a model, the same in every process."""
    torch.manual_seed(0)
    return torch.randn(64, 8, dtype=torch.float64), Autoencoder(8, 33).double()


def loss_of(model, x):
    """A mean over rows, so that the mean of two halves is that of the whole."""
    recon, latents = model(x)
    return (recon - x).square().mean() + 0.1 * latents.sum(-1).mean()


def rank(number: int, rendezvous: str, out: str):
    """Gradients of half of the batch, averaged by DistributedDataParallel; rank 0 writes them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=2)
    x, model = batch_and_model()
    shared = torch.nn.parallel.DistributedDataParallel(model)
    loss_of(shared, x[number::2]).backward()
    if number == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    check_compile() if sys.argv[1] == "compile" else rank(int(sys.argv[2]), *sys.argv[3:])
