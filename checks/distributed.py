"""One SAE on several processes against one process, in figures: `make distributed`.

Fifty updates in fp64 with a resampling in their middle and one update in fp32, of every family, on every mesh; what is
handed to collectives against the formula, and what the machine sends itself against a ring's share of that. The last
line sums up, with what `ray_cluster.py` found.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from prolu.runtime.mesh import MeshShape, bytes_per_step
from support.mesh_cases import CASES
from support.mesh_worker import Case, largest_difference, on_mesh

WIRE = Case("wire", {"nonlinearity": "prolu_ste", "step": "sparse", "resample_fractions": ()}, "float32", 40, 128, 2048)
"""Large enough that headers and rendezvous do not count."""

BOUNDS = {"float64": 1e-10, "float32": 1e-5}
"""Of a norm-relative difference."""

MESHES = ("latent=2", "data=2", "data=2,latent=2", "latent=3")


def of_a_ring(shape: MeshShape, sent: dict[str, int]) -> float:
    """Bytes over the wire, of all ranks together, of one step."""
    along = {"reconstruction": shape.latent, "b_dec": shape.latent, "gradients": shape.data, "fired": shape.data}
    ranks = math.prod(shape)
    return sum(ranks * 2 * (n - 1) / n * sent[what] for what, n in along.items() if what in sent)


def main() -> int:
    """A line per mesh; returns 0 if all holds."""
    folder = Path(tempfile.mkdtemp(prefix="prolu-mesh-"))
    alone = on_mesh("", folder / "alone", CASES)
    in_bounds = formulas = 0
    print(
        f"{'mesh':16} {'fp64, 50 steps':>15} {'fp32, 1 step':>13} {'bytes/step':>11} {'formula':>9} {'wire / ring':>12}"
    )
    for mesh in MESHES:
        found, shape = on_mesh(mesh, folder / mesh, [*CASES, WIRE]), MeshShape.parse(mesh)
        misses = [(case.dtype, largest_difference(found[case.name][0], alone[case.name][0])) for case in CASES]
        worst = {dtype: max(miss for kind, miss in misses if kind == dtype) for dtype in BOUNDS}
        in_bounds += sum(miss <= BOUNDS[dtype] for dtype, miss in misses)
        facts, case = found[WIRE.name][1], WIRE
        sent = sum(n for what, n in facts["sent"].items() if what != "curve") / case.n_steps
        said = bytes_per_step(shape, case.batch, case.d_in, case.run_config().d_sae, n_own=1)
        formulas += sent == sum(said.values())
        wire = facts["loopback"] / case.n_steps / of_a_ring(shape, said)
        print(
            f"{mesh:16} {worst['float64']:15.1e} {worst['float32']:13.1e} {sent:11,.0f} {sum(said.values()):9,} "
            f"{wire:12.2f}",
            flush=True,
        )
    n, total = len(MESHES), len(MESHES) * len(CASES)
    ray = "; Ray: " + json.loads(Path(sys.argv[1]).read_text())["summary"] if sys.argv[1:] else ""
    print(f"one SAE on {n} meshes: {in_bounds}/{total} equal one process, bytes by the formula {formulas}/{n}{ray}")
    return int(in_bounds < total or formulas < n)


if __name__ == "__main__":
    sys.exit(main())
