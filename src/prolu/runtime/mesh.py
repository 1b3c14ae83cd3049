"""One SAE on many processes (torch.distributed): which part is this one's, and the sums in which all take part.

    ranks          latent 0        latent 1
    data 0         rank 0          rank 1          rows of the batch are split along data,
    data 1         rank 2          rank 3          latents (both matrices, biases, moments) along latent

b_dec is on every rank. Without other processes (`ALONE`) nothing is sent and no bit differs.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Made = TypeVar("Made")

PATIENCE = timedelta(days=1)
"""How long ranks wait for one that evaluates or writes; one that has died is noticed at once."""


class MeshShape(NamedTuple):
    """How many ranks along each axis."""

    data: int = 1
    latent: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """The shape that `data=2,latent=4` says; an axis left out has 1.

        Raises:
            ValueError: it says something else.
        """
        found = dict(re.findall(r"(data|latent)=([1-9]\d*)(?:,|$)", text))
        if not found or ",".join(f"{axis}={n}" for axis, n in found.items()) != text:
            raise ValueError(f"mesh {text!r}: write data=D,latent=L, or one of the two, as in data=2,latent=4")
        return cls(**{axis: int(n) for axis, n in found.items()})


class Mesh:
    """A process's place among those that train one SAE together. All of them make every call together."""

    def __init__(self, shape: MeshShape, device: str = "cpu"):
        """Args: `device` is cpu (gloo) or cuda (nccl); the processes are those that torchrun started."""
        self.n_data, self.n_latent = shape
        self.bytes_sent: Counter[str] = Counter()
        """Bytes handed to collectives so far, by what for."""
        self.n_threads = 0
        """Threads of all ranks on a machine, if they were dealt out by `mesh_of`."""
        self._grid: DeviceMesh | None = None
        self.rank = self.data_rank = self.latent_rank = 0
        if self.n_ranks > 1:
            if not dist.is_initialized():
                dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
            self._grid = init_device_mesh(device, tuple(shape), mesh_dim_names=("data", "latent"))
            self.rank = dist.get_rank()
            self.data_rank, self.latent_rank = divmod(self.rank, self.n_latent)

    @property
    def n_ranks(self) -> int:
        """Processes."""
        return self.n_data * self.n_latent

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, evaluates and speaks."""
        return self.rank == 0

    def check(self, name: str, value: int, axis: str) -> None:
        """Raises ValueError unless a number can be split along an axis."""
        n = self.n_data if axis == "data" else self.n_latent
        if value % n:
            raise ValueError(f"{name} {value}: not divisible by the mesh's {axis}={n}")

    def latents(self, d_sae: int) -> slice:
        """The part of the latents that is here."""
        n = d_sae // self.n_latent
        return slice(self.latent_rank * n, (self.latent_rank + 1) * n)

    def slice_of_rank(self, n: int, rank: int | None = None) -> slice:
        """A rank's part of n things that are dealt to all ranks in runs of about equal length."""
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.n_ranks, n * (rank + 1) // self.n_ranks)

    def sum_over_latents_(self, t: Tensor, purpose: str) -> Tensor:
        """Sum over the ranks of one row of the grid, in place."""
        return self._sum_(t, "latent", purpose) if self.n_latent > 1 else t

    def sum_over_data_(self, t: Tensor, purpose: str) -> Tensor:
        """Sum over the ranks of one column of the grid, in place."""
        return self._sum_(t, "data", purpose) if self.n_data > 1 else t

    def sum_over_all_(self, t: Tensor, purpose: str) -> Tensor:
        """Sum over all ranks, in place."""
        return self._sum_(t, None, purpose) if self.n_ranks > 1 else t

    def least_of_all_(self, t: Tensor) -> Tensor:
        """The smallest of all ranks' values, in place."""
        return self._sum_(t, None, "scalars", dist.ReduceOp.MIN) if self.n_ranks > 1 else t

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank: what decides the way that all go."""
        return bool(self.sum_over_all_(torch.tensor(int(flag)), "scalars")) if self.n_ranks > 1 else flag

    def mean_over_latents(self, t: Tensor) -> Tensor:
        """Mean of all entries, on all ranks of a row."""
        if self.n_latent == 1:
            return t.mean()
        sums = torch.stack([t.sum(), t.new_tensor(float(t.numel()))])
        return self.sum_over_latents_(sums, "resampling")[0] / sums[1]

    def gathered_over_latents(self, t: Tensor, dim: int, purpose: str) -> Tensor:
        """All parts along one dimension, in order of latents, on all ranks of a row."""
        return self._gathered(t, "latent", dim, purpose) if self.n_latent > 1 else t

    def gathered_over_all(self, t: Tensor, purpose: str) -> Tensor:
        """All ranks' parts along the first dimension, on all ranks."""
        return self._gathered(t, None, 0, purpose) if self.n_ranks > 1 else t

    def whole(self, t: Tensor) -> Tensor | None:
        """A tensor split by latents, put together on the first rank, in ordinary memory; None on the others."""
        if self.n_latent == 1:
            return t if self.is_first else None
        if self.data_rank > 0:
            return None
        parts = [torch.empty_like(t) for _ in range(self.n_latent)] if self.is_first else None
        dist.gather(t.contiguous(), parts, dst=0, group=self._group("latent"))
        return torch.cat([part.cpu() for part in parts]) if parts else None

    def broadcast_(self, t: Tensor, source: int) -> Tensor:
        """What a rank has, on all of them, in place."""
        if self.n_ranks > 1:
            self._count(t, "resampling")
            dist.broadcast(t, source)
        return t

    def exchanged(self, rows: Tensor, n_sent: list[int], n_received: list[int]) -> Tensor:
        """Hands each rank its run of rows; gives those that came, in order of their ranks."""
        received = rows.new_empty(sum(n_received), *rows.shape[1:])
        self._count(rows, "rows")
        dist.all_to_all_single(received, rows, n_received, n_sent)
        return received

    def first_rank_first(self, work: Callable[[], Made]) -> Made:
        """Lets the first rank work, then the others on what it has left on the disk; what one refuses, all refuse."""
        if self.n_ranks == 1:
            return work()
        made, problem = None, ""
        for turn in (True, False):
            if self.is_first is turn and not problem:
                try:
                    made = work()
                except (ValueError, OSError) as refusal:
                    problem = str(refusal) or type(refusal).__name__
            told: list[str] = [""] * self.n_ranks
            dist.all_gather_object(told, problem)
            if any(told):
                raise ValueError(next(filter(None, told)))
        return made  # pyright: ignore[reportReturnType]

    def wait(self) -> None:
        """Until all are here."""
        if self.n_ranks > 1:
            dist.barrier()

    def _group(self, axis: str | None) -> dist.ProcessGroup | None:
        assert self._grid is not None
        return None if axis is None else self._grid.get_group(axis)

    def _sum_(self, t: Tensor, axis: str | None, purpose: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM):
        self._count(t, purpose)
        dist.all_reduce(t, op, self._group(axis))
        return t

    def _gathered(self, t: Tensor, axis: str | None, dim: int, purpose: str) -> Tensor:
        group = self._group(axis)
        parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
        self._count(t, purpose)
        dist.all_gather(parts, t.contiguous(), group)
        return torch.cat(parts, dim)

    def _count(self, t: Tensor, purpose: str) -> None:
        self.bytes_sent[purpose] += t.numel() * t.element_size()


ALONE = Mesh(MeshShape())
"""One process."""


def mesh_of(text: str, device: str, n_threads: int) -> Mesh:
    """The mesh that a command asks for, among the processes that torchrun started.

    Those on one machine share its `n_threads`, so that a study does not become another one on another mesh.

    Raises:
        ValueError: not a mesh, or not one of so many processes, or more of them than devices.
    """
    n_started = int(os.environ.get("WORLD_SIZE", "1"))
    shape = MeshShape.parse(text) if text else MeshShape()
    if not text and n_started > 1:
        raise ValueError(f"mesh: {n_started} processes were started; say how they share the SAE, as in --mesh latent=2")
    if shape.data * shape.latent != n_started:
        raise ValueError(
            f"mesh {text!r}: has {shape.data * shape.latent} ranks, and {n_started} processes were started; use "
            f"torchrun --nproc-per-node {shape.data * shape.latent}"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"mesh {text!r}: {here} ranks on this machine, which has {torch.cuda.device_count()} GPUs")
    if device == "cuda" and n_started > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if n_started == 1:
        return ALONE
    mesh = Mesh(shape, device)
    mesh.n_threads = n_threads
    torch.set_num_threads(max(1, n_threads // here))
    return mesh


def leave() -> None:
    """Parts with the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this is the process that speaks, mesh or none."""
    return os.environ.get("RANK", "0") == "0"


def bytes_per_step(
    shape: MeshShape, batch: int, d_in: int, d_sae: int, n_own: int, itemsize: int = 4
) -> dict[str, int]:
    """What one rank hands to all-reduces in one step, by purpose; of SAEs without selection, auxiliary term or clip.

    A ring of n ranks moves 2 (n - 1) / n of it over the wire. `n_own` is the number of a nonlinearity's parameters.
    """
    n_data, n_latent = shape
    sent = {"scalars": 4 * 8}
    if n_latent > 1:
        sent |= {"reconstruction": batch // n_data * d_in * itemsize, "b_dec": d_in * itemsize}
    if n_data > 1:
        per_rank = d_sae // n_latent
        sent |= {"gradients": (2 * per_rank * d_in + n_own * per_rank + d_in) * itemsize, "fired": per_rank * itemsize}
    return sent
