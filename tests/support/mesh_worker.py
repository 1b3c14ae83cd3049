"""One rank of a mesh that trains small SAEs on made-up activations: started by torchrun, or alone, from `on_mesh`.

python mesh_worker.py MESH OUT CASE...              a case is the JSON of a `Case`
python mesh_worker.py MESH OUT stream FOLDER        a model and its text
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prolu import ActivationStream, LanguageModel, load_blocks
from prolu.runtime.mesh import MeshShape, leave, mesh_of
from prolu.sae.scaling import normalise
from prolu.training.config import RunConfig
from prolu.training.trainer import Trainer

D_IN, D_SAE, BATCH = 23, 96, 52


@dataclass(frozen=True)
class Case:
    """What to train."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    n_steps: int = 50
    d_in: int = D_IN
    batch: int = BATCH
    d_out: int | None = None
    """The width of the targets, for a transcoder."""
    start: str | None = None
    """A file of an earlier case's state to go on from."""

    def run_config(self) -> RunConfig:
        """Half of the latents, about, are dead when it resamples."""
        settings = {"d_sae": D_SAE, "coeff": 0.01, "resample_fractions": (0.5,), "resample_count_fraction": 0.3}
        settings |= {"resample_dead_below": 0.3, "resample_candidates": 300, "resample_encoder_norm": 0.2}
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in (settings | self.config).items()}
        return RunConfig(n_tokens=50 * self.batch, **settings)


def activations(case: Case, key: int) -> torch.Tensor:
    """A batch."""
    generator = torch.Generator().manual_seed(key)
    factors = torch.randn(3 * case.d_in, case.d_in, generator=torch.Generator().manual_seed(99))
    code = torch.randn(case.batch, 3 * case.d_in, generator=generator).relu() ** 3
    return normalise((code @ factors).to(getattr(torch, case.dtype)))[0]


def targets(case: Case, acts: torch.Tensor) -> torch.Tensor | None:
    """What a transcoder is to give for a batch."""
    if case.d_out is None:
        return None
    weights = torch.randn(case.d_in, case.d_out, generator=torch.Generator().manual_seed(98), dtype=torch.float64)
    return (acts.double() @ weights).relu().to(acts)


def train(case: Case, mesh: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The whole state afterwards, and what was seen; only on the first rank."""
    dtype = getattr(torch, case.dtype)
    trainer = Trainer(case.run_config(), case.d_in, case.batch, d_out=case.d_out, dtype=dtype, mesh=mesh)
    if case.start is not None:
        held = {name: t for name, t in load_file(f"{case.start}.safetensors").items() if name != "recon"}
        trainer.restore_(held, json.loads(Path(f"{case.start}.json").read_text())["counters"])
        back = trainer.whole_state()
        assert all(torch.equal(t, held[name]) for name, t in back.items()), "a state is not what was saved"
    rows = case.batch // mesh.n_data
    own = slice(mesh.data_rank * rows, (mesh.data_rank + 1) * rows)
    seen, resampled = [], []
    for step in range(trainer.state.n_updates, case.n_steps):
        if trainer.resamples_now:
            resampler = trainer.resampler()
            for key in range(7):
                fresh = activations(case, 1000 + key)
                resampler.offer(fresh, torch.linalg.vector_norm(fresh, dim=1), targets(case, fresh))
            resampled.append(trainer.resample_(resampler)._asdict())
        acts = activations(case, step)[own].clone()
        report = trainer.step(acts, targets(case, acts))
        seen.append(
            [float(v) for v in (report.stats.mse, report.stats.penalty, report.stats.auxiliary, report.n_active)]
        )
    line = trainer.summary(report)
    state = {name: t.clone() for name, t in trainer.whole_state().items()}
    sae = trainer.whole_sae()
    if sae is not None:
        acts = activations(case, 5)
        state["recon"] = sae.reconstruct_normalised(sae.encode_normalised(acts), acts).detach()
    facts = {"seen": seen, "resampled": resampled, "line": line, "counters": trainer.state.counters()}
    return state, facts | {"sent": dict(mesh.bytes_sent)}


def main() -> None:
    """Trains all cases; the first rank writes what came out."""
    mesh, out = mesh_of(sys.argv[1], "cpu", 1), Path(sys.argv[2])
    torch.set_num_threads(1)
    if sys.argv[3] == "stream":
        write_batches(mesh, out, Path(sys.argv[4]))
    for text in sys.argv[3:] if sys.argv[3] != "stream" else []:
        case = Case(**json.loads(text))
        mesh.bytes_sent.clear()
        before = loopback_bytes()
        state, facts = train(case, mesh)
        mesh.wait()
        if mesh.is_first:
            save_file({name: t.contiguous() for name, t in state.items()}, out / f"{case.name}.safetensors")
            (out / f"{case.name}.json").write_text(json.dumps(facts | {"loopback": loopback_bytes() - before}))
    leave()


def write_batches(mesh: Any, out: Path, folder: Path) -> None:
    """Batches of a stream over three windows of two epochs, one of them short, and fresh activations: of each rank."""
    lm = LanguageModel(folder / "lm", "blocks.1.hook_resid_pre", batch_tokens=96)
    blocks = load_blocks(str(folder / "stories.txt"), lm.tokenizer, ctx=32)
    stream = ActivationStream(lm, blocks, batch_size=60, seed=3, window_tokens=2048, train_on_bos=False, mesh=mesh)
    n = stream.batches_per_epoch
    batches = {str(i): stream[i] for i in (0, 1, n // 2, n - 1, n + 2)}
    batches |= {f"fresh {i}": batch for i, batch in enumerate(stream.fresh(500, "resample", 7))}
    save_file({name: torch.cat([b.acts, b.raw_norm[:, None]], 1) for name, b in batches.items()}, out / f"{mesh.rank}")


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def torchrun(n_ranks: int, *args: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command on so many processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def start(mesh: str, out: Path, *args: str) -> None:
    """This file on a mesh; the empty mesh is one process without torchrun."""
    out.mkdir(parents=True)
    command = [__file__, mesh, str(out), *args]
    if mesh:
        done = torchrun(math.prod(MeshShape.parse(mesh)), *command)
    else:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def on_mesh(mesh: str, out: Path, cases: list[Case]) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """What comes out of each case on a mesh."""
    start(mesh, out, *(json.dumps(asdict(case)) for case in cases))
    return {
        case.name: (load_file(out / f"{case.name}.safetensors"), json.loads((out / f"{case.name}.json").read_text()))
        for case in cases
    }


def largest_difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Norm-relative, over all tensors of a state."""
    assert ours.keys() == reference.keys()
    norms = {name: torch.linalg.vector_norm(t.double()) for name, t in reference.items()}
    misses = {name: torch.linalg.vector_norm(ours[name].double() - t.double()) for name, t in reference.items()}
    return max(float(misses[name] / norm) if norm else float(misses[name]) for name, norm in norms.items())


if __name__ == "__main__":
    main()
