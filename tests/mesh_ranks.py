"""What each rank of tests/test_mesh.py does: trains the same SAE on a mesh, and the first one also alone."""

import json
import math
import sys

import torch

from prolu import RunConfig, Trainer
from prolu.mesh import ALONE, Mesh, start_processes
from synthetic import sparse_activations

D_IN, D_SAE, BATCH = 16, 64, 32


def trained(case, mesh, n_steps=None):
    """A trainer after all steps of a case, and what the mesh sent in the last of them."""
    dtype = getattr(torch, case["dtype"])
    run = {name: tuple(value) if isinstance(value, list) else value for name, value in case["run"].items()}
    config = RunConfig(**{"d_sae": D_SAE, "n_tokens": case["n_steps"] * BATCH, "init_seed": 1} | run)
    trainer = Trainer(config, D_IN, BATCH, dtype=dtype, mesh=mesh)
    if case.get("family"):
        trainer.steps = {trainer.state.step: trainer.steps[case["family"]]}
    go_on(trainer, case, n_steps or case["n_steps"])
    return trainer


def go_on(trainer, case, n_steps):
    while (step := trainer.state.n_updates) < n_steps:
        if trainer.resamples_now:
            rebirth = trainer.rebirth()
            case["n_dead"] = rebirth.n_dead
            fresh = sparse_activations(200, D_IN, seed=10_000, dtype=trainer.state.weights.b_dec.dtype)
            rebirth.offer(fresh, fresh.norm(dim=1))
            trainer.resample_(rebirth)
        before = dict(trainer.mesh.sent)
        report = trainer.step(sparse_activations(BATCH, D_IN, seed=step, dtype=trainer.state.weights.b_dec.dtype))
        case["sent"] = {axis: n - before.get(axis, 0) for axis, n in trainer.mesh.sent.items()}
        case["figures"] = trainer.summary(report)


def difference(found, expected):
    """Largest norm-relative difference of a tensor."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, a in found.items():
        b = expected[name]
        assert a.shape == b.shape, name
        worst = max(worst, float((a.double() - b.double()).norm() / max(float(b.double().norm()), 1e-30)))
    return worst


def check(case):
    mesh = Mesh(*case["mesh"])
    whole = trained(case, mesh).tensors()
    figures, sent = case["figures"], case["sent"]
    if not mesh.is_first:
        return {}
    alone = trained(case, ALONE)
    pairs = zip(figures.values(), case["figures"].values(), strict=True)
    apart = max(abs(a - b) / (abs(b) or 1) for a, b in pairs)
    apart_weights = difference(whole, alone.tensors())
    return {"difference": apart_weights, "figures": apart, "sent": sent, "n_dead": case.get("n_dead")}


def resume(case):
    """Half on one mesh and half on another, and to the bit the same state between them."""
    n, worlds = case["n_steps"], [Mesh(*shape) if math.prod(shape) > 1 else ALONE for shape in case["meshes"]]
    first = trained(case, worlds[0], n // 2)
    kept, counters = first.tensors(), first.state.counters()
    if worlds[1].size == 1 and torch.distributed.get_rank() > 0:
        return {}
    second = Trainer(first.config, D_IN, BATCH, dtype=torch.float64, mesh=worlds[1])
    second.restore_(kept, counters)
    between = second.tensors()
    same = torch.distributed.get_rank() > 0 or all(torch.equal(t, kept[name]) for name, t in between.items())
    go_on(second, case, n)
    whole = second.tensors()
    if torch.distributed.get_rank() > 0:
        return {}
    return {"difference": difference(whole, trained(case, ALONE).tensors()), "same": same}


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_processes()
    found = [(resume if "meshes" in case else check)(case) for case in json.loads(sys.argv[1])]
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
