"""A mesh of processes that train one SAE together: which part each one has, and the sums that all take part in.

    ranks          latent 0        latent 1
    data 0         rank 0          rank 1          the rows of a batch are divided along the data axis,
    data 1         rank 2          rank 3          the latents (their weights and moments) along the latent axis

Every rank holds b_dec whole. A "row" of the mesh is the ranks that share the rows of a batch, a "column" the ranks that
share latents. In one process (`ALONE`) nothing is sent and a sum returns its argument as it is, so steps, trainers and
streams have one version, which always asks its mesh.
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

from prolu.runtime.devices import available_device

Made = TypeVar("Made")

PATIENCE = timedelta(days=1)
"""The longest time that ranks wait for one that evaluates or writes. If a rank has died, the others notice at once."""


class MeshShape(NamedTuple):
    """The number of ranks along each axis of a mesh."""

    data: int = 1
    """The number of parts that a batch is divided into."""
    latent: int = 1
    """The number of parts that the latents are divided into."""

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Return the shape that a text such as `data=2,latent=4` describes; an axis that it leaves out has 1 rank.

        Raises:
            ValueError: The text describes no mesh.
        """
        found = dict(re.findall(r"(data|latent)=([1-9]\d*)(?:,|$)", text))
        # The result is written out again and compared, because the pattern skips text that it does not match.
        if not found or ",".join(f"{axis}={n}" for axis, n in found.items()) != text:
            raise ValueError(f"mesh {text!r}: write data=D,latent=L, or one of the two, as in data=2,latent=4")
        return cls(**{axis: int(n) for axis, n in found.items()})


class Mesh:
    """The place of this process among those that train one SAE together.

    Every method that communicates is a collective: all ranks must call it, in the same order, or they wait for each
    other. `purpose` names what is sent; it only sorts the counts in `bytes_sent`.
    """

    def __init__(self, shape: MeshShape, device: str = "cpu"):
        """Join the other processes, if the shape has more than one rank.

        Args:
            shape: The number of ranks along each axis. Their product is the number of processes that torchrun started.
            device: cpu, on which gloo communicates, or cuda, on which nccl does.
        """
        self.n_data, self.n_latent = shape
        self.bytes_sent: Counter[str] = Counter()
        """The number of bytes given to collectives so far, by purpose."""
        self.n_threads = 0
        """The number of threads of all ranks on this machine together, where `mesh_of` has divided them; else 0."""
        self._grid: DeviceMesh | None = None
        self.rank = self.data_rank = self.latent_rank = 0
        if self.n_ranks > 1:
            if not dist.is_initialized():
                # nccl moves tensors on GPUs only; refusals and flags travel in CPU memory, by gloo, on either device.
                dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
            self._grid = init_device_mesh(device, tuple(shape), mesh_dim_names=("data", "latent"))
            self.rank = dist.get_rank()
            self.data_rank, self.latent_rank = divmod(self.rank, self.n_latent)

    @property
    def n_ranks(self) -> int:
        """The number of processes."""
        return self.n_data * self.n_latent

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, evaluates and prints."""
        return self.rank == 0

    def check(self, name: str, value: int, axis: str) -> None:
        """Raise ValueError unless a number, which is called `name`, can be divided evenly along an axis."""
        n = self.n_data if axis == "data" else self.n_latent
        if value % n:
            raise ValueError(f"{name} {value}: not divisible by the mesh's {axis}={n}")

    def latents(self, d_sae: int) -> slice:
        """Return which of the latents this rank holds."""
        n = d_sae // self.n_latent
        return slice(self.latent_rank * n, (self.latent_rank + 1) * n)

    def slice_of_rank(self, n: int, rank: int | None = None) -> slice:
        """Return which of n things a rank has (by default this one), if all ranks have about equally many."""
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.n_ranks, n * (rank + 1) // self.n_ranks)

    def sum_over_latents_(self, t: Tensor, purpose: str) -> Tensor:
        """Sum a tensor over the ranks that hold the other latents, in place."""
        return self._sum_(t, "latent", purpose) if self.n_latent > 1 else t

    def sum_over_data_(self, t: Tensor, purpose: str) -> Tensor:
        """Sum a tensor over the ranks that see the other rows of the batch, in place."""
        return self._sum_(t, "data", purpose) if self.n_data > 1 else t

    def sum_over_all_(self, t: Tensor, purpose: str) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        return self._sum_(t, None, purpose) if self.n_ranks > 1 else t

    def least_of_all_(self, t: Tensor) -> Tensor:
        """Replace each entry by the smallest that any rank has there, in place."""
        return self._sum_(t, None, "scalars", dist.ReduceOp.MIN) if self.n_ranks > 1 else t

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank, for decisions that all ranks must take alike."""
        # A rank that stopped or saved on its own would leave the others waiting in the next collective.
        return bool(self.sum_over_all_(torch.tensor(int(flag)), "scalars")) if self.n_ranks > 1 else flag

    def mean_over_latents(self, t: Tensor) -> Tensor:
        """Return the mean of all entries of a tensor that is divided by latents, over all its parts."""
        if self.n_latent == 1:
            return t.mean()
        # Sums and counts, not means: the ranks may have different numbers of entries.
        sums = torch.stack([t.sum(), t.new_tensor(float(t.numel()))])
        return self.sum_over_latents_(sums, "resampling")[0] / sums[1]

    def gathered_over_latents(self, t: Tensor, dim: int, purpose: str) -> Tensor:
        """Return all parts of a tensor that is divided by latents along `dim`, joined in the order of the latents."""
        return self._gathered(t, "latent", dim, purpose) if self.n_latent > 1 else t

    def gathered_over_all(self, t: Tensor, purpose: str) -> Tensor:
        """Return the tensors of all ranks, joined along the first dimension in the order of the ranks."""
        return self._gathered(t, None, 0, purpose) if self.n_ranks > 1 else t

    def whole(self, t: Tensor) -> Tensor | None:
        """Return a tensor that is divided by latents, whole and on the CPU, on the first rank; None on the others."""
        if self.n_latent == 1:
            return t if self.is_first else None
        if self.data_rank > 0:
            return None  # every row of the mesh holds all latents, so one row is enough
        parts = [torch.empty_like(t) for _ in range(self.n_latent)] if self.is_first else None
        dist.gather(t.contiguous(), parts, dst=0, group=self._group("latent"))
        # Joined on the CPU: beside the parts, a GPU may have no room for the whole.
        return torch.cat([part.cpu() for part in parts]) if parts else None

    def broadcast_(self, t: Tensor, source: int) -> Tensor:
        """Replace a tensor by that of the rank `source`, in place."""
        if self.n_ranks > 1:
            self._count(t, "resampling")
            dist.broadcast(t, source)
        return t

    def exchanged(self, rows: Tensor, n_sent: list[int], n_received: list[int]) -> Tensor:
        """Send each rank its run of rows, and return the rows that came from all ranks, in the order of the ranks.

        Args:
            rows: The rows to send, in the order of the ranks that they go to.
            n_sent: The number of rows that go to each rank.
            n_received: The number of rows that come from each rank.
        """
        received = rows.new_empty(sum(n_received), *rows.shape[1:])
        self._count(rows, "rows")
        dist.all_to_all_single(received, rows, n_received, n_sent)
        return received

    def first_rank_first(self, work: Callable[[], Made]) -> Made:
        """Do work on the first rank, then on the others, and return its result.

        The first rank may leave files (token blocks, a study's folder) that the others then find.

        Raises:
            ValueError: The work was refused on some rank. All ranks raise it, so that none goes on alone.
        """
        if self.n_ranks == 1:
            return work()
        made = None
        problem = ""
        for first_ranks_turn in (True, False):
            if self.is_first is first_ranks_turn and not problem:
                try:
                    made = work()
                except (ValueError, OSError) as refusal:
                    problem = str(refusal) or type(refusal).__name__
            # This gathering is also what makes the other ranks wait for the first.
            problems: list[str] = [""] * self.n_ranks
            dist.all_gather_object(problems, problem)
            if any(problems):
                raise ValueError(next(filter(None, problems)))
        return made  # pyright: ignore[reportReturnType]

    def wait(self) -> None:
        """Wait until all ranks have come here."""
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
"""The mesh of one process."""


def mesh_of(text: str, device: str, n_threads: int) -> Mesh:
    """Return the mesh that a command asks for, made of the processes that torchrun started.

    Args:
        text: The shape, as in data=2,latent=4; empty for one process.
        device: cpu or cuda.
        n_threads: The number of CPU threads of all ranks on one machine together. They are divided among these ranks,
            so that a study with a given number of threads is the same study on every mesh.

    Raises:
        ValueError: The text describes no mesh, another number of processes was started, or there are too few GPUs.
    """
    n_started = int(os.environ.get("WORLD_SIZE", "1"))
    shape = MeshShape.parse(text) if text else MeshShape()
    if not text and n_started > 1:
        raise ValueError(f"mesh: {n_started} processes were started; say how they share the SAE, as in --mesh latent=2")
    if shape.data * shape.latent != n_started:
        raise ValueError(
            f"mesh {text!r}: needs {shape.data * shape.latent} processes, and {n_started} "
            f"{'was' if n_started == 1 else 'were'} started; start them with "
            f"torchrun --nproc-per-node {shape.data * shape.latent}"
        )
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if n_here == 1:
        available_device("device", device)
    if device == "cuda" and n_here > torch.cuda.device_count():
        raise ValueError(f"mesh {text!r}: {n_here} ranks on this machine, which has {torch.cuda.device_count()} GPUs")
    if device == "cuda" and n_started > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if n_started == 1:
        return ALONE
    mesh = Mesh(shape, device)
    mesh.n_threads = n_threads
    torch.set_num_threads(max(1, n_threads // n_here))
    return mesh


def leave() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Return whether this process is the one that prints: the first that torchrun started, or the only one."""
    # From the environment, since a wrong request must be reported before there is a mesh.
    return os.environ.get("RANK", "0") == "0"


def bytes_per_step(
    shape: MeshShape, batch: int, d_in: int, d_sae: int, n_own: int, itemsize: int = 4
) -> dict[str, int]:
    """Return the number of bytes that one rank gives to all-reduces in one step, by purpose.

    The SAE has no selection of latents, no auxiliary term and no clip of gradients, which would send more. A ring of n
    ranks moves 2 (n - 1) / n times these bytes over the wire.

    Args:
        shape: The number of ranks along each axis.
        batch: The number of tokens per step, over all ranks.
        d_in: The width of the activations.
        d_sae: The number of latents, over all ranks.
        n_own: The number of parameters of the nonlinearity per latent.
        itemsize: The number of bytes per number.
    """
    n_data, n_latent = shape
    sent = {"scalars": 4 * 8}
    if n_latent > 1:
        sent |= {"reconstruction": batch // n_data * d_in * itemsize, "b_dec": d_in * itemsize}
    if n_data > 1:
        per_rank = d_sae // n_latent
        # Both matrices, the nonlinearity's parameters and b_dec.
        sent |= {"gradients": (2 * per_rank * d_in + n_own * per_rank + d_in) * itemsize, "fired": per_rank * itemsize}
    return sent
