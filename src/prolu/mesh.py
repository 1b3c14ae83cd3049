"""Ranks in a rectangle, `data` shares of every batch by `latent` shares of the latents; all bytes between them counted.

    rank = data_rank * latent + latent_rank
    latent axis    latents lo .. hi of encoder, decoder, own parameters and moments; the same tokens
    data axis      rows lo .. hi of every batch; the same latents
    b_dec          on every rank

A collective along an axis of one rank is the identity, so code that is written for a mesh runs alone to the bit.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

Axis = Literal["latent", "data", "all"]

TIMEOUT = timedelta(hours=1)
"""So long ranks wait for one that is neither dead nor answering; the first one's evaluation takes less."""


class LostRankError(Exception):
    """Another rank is gone, so this one cannot go on."""


class RefusedElsewhereError(ValueError):
    """Another rank refused the request; the first one says why."""


class Shape(NamedTuple):
    """Ranks along each axis."""

    data: int = 1
    latent: int = 1


def parse_mesh(text: str) -> Shape:
    """`data=2,latent=4`, in any order; an axis that is not named has one rank.

    Raises:
        ValueError: written otherwise.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else []:
        axis, _, size = part.strip().partition("=")
        if axis not in Shape._fields or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: write it as data=2,latent=4, each at least 1")
        sizes[axis] = int(size)
    return Shape(**sizes)


def n_processes() -> int:
    """Processes that torchrun started together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this one speaks for all that torchrun started together; a process alone does."""
    return os.environ.get("RANK", "0") == "0"


def check_shape(text: str, shape: Shape, device: str) -> None:
    """Raises ValueError unless the processes that are there, and their devices, make up the mesh."""
    started, wanted = n_processes(), shape.data * shape.latent
    if wanted > 1 and started == 1:
        raise ValueError(
            f"mesh {text!r}: needs {wanted} processes; start it as torchrun --nproc-per-node {wanted} -m prolu ..."
        )
    if not text and started > 1:
        raise ValueError(
            f"mesh: torchrun started {started} processes; say how they share the work, as in --mesh latent={started}"
        )
    if wanted != started:
        raise ValueError(f"mesh {text!r}: {wanted} ranks, but torchrun started {started} processes; make them equal")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(started)))
    if device == "cuda" and started > 1 and here > torch.cuda.device_count():
        raise ValueError(
            f"mesh {text!r}: {here} ranks on a machine of {torch.cuda.device_count()} GPUs; each needs one of its own"
        )


def join(text: str, device: str = "cpu") -> "Mesh":
    """The mesh of the processes that torchrun started, `Mesh()` for a process alone.

    Raises:
        ValueError: it is written wrongly, or not of as many ranks as there are processes and GPUs.
        LostRankError: not all of them came.
    """
    shape = parse_mesh(text)
    check_shape(text, shape, device)
    if n_processes() == 1:
        return Mesh()
    start_processes()
    here = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else "cpu"
    return Mesh(*shape, device=here, is_led=True)


def start_processes() -> None:
    """Finds the other processes, unless that was done."""
    if dist.is_initialized():
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as problem:
        raise LostRankError(f"the processes did not find each other ({_first_line(problem)})") from None


class Mesh:
    """A rank's place, and what it can do with the others. All ranks call the same methods in the same order."""

    def __init__(self, data: int = 1, latent: int = 1, *, device: str = "cpu", is_led: bool = False):
        """Args: `device` is this rank's own; `is_led`: the first rank `tell`s the others what to do.

        With more than one rank, torch's process group is there already.
        """
        self.data, self.latent, self.device, self._is_led = data, latent, torch.device(device), is_led
        self.size = data * latent
        self.rank, self._groups = 0, {}
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            grid = init_device_mesh(self.device.type, (data, latent), mesh_dim_names=("data", "latent"))
            self._groups = {"data": grid.get_group("data"), "latent": grid.get_group("latent"), "all": dist.group.WORLD}
            self.rank = dist.get_rank()
        self.data_rank, self.latent_rank = divmod(self.rank, latent)
        self.sent: Counter[str] = Counter()
        """Bytes of the tensors in collectives over more than one rank, by axis; `told` are the first rank's words."""

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def ranks(self, axis: Axis) -> int:
        """So many along an axis."""
        return {"data": self.data, "latent": self.latent, "all": self.size}[axis]

    def latents(self, d_sae: int) -> slice:
        """Of so many latents, this rank's.

        Raises:
            ValueError: they cannot be shared out equally.
        """
        if d_sae % self.latent:
            raise ValueError(f"mesh latent={self.latent}: must divide d_sae, which is {d_sae}")
        n = d_sae // self.latent
        return slice(self.latent_rank * n, (self.latent_rank + 1) * n)

    def rows(self, batch_size: int) -> slice:
        """Of a batch of so many rows, this rank's.

        Raises:
            ValueError: they cannot be shared out equally.
        """
        if batch_size % self.data:
            raise ValueError(f"mesh data={self.data}: must divide batch_size, which is {batch_size}")
        n = batch_size // self.data
        return slice(self.data_rank * n, (self.data_rank + 1) * n)

    # What steps need.

    def once(self, tensor: Tensor) -> Tensor:
        """The tensor on the first share of latents, 0 on the others: what all of them know then counts once."""
        return tensor if self.latent_rank == 0 else torch.zeros_like(tensor)

    def sum_(self, tensor: Shaped[Tensor, "..."], axis: Axis) -> Shaped[Tensor, "..."]:
        """Sum over the ranks of an axis, in place; the same bits on each of them."""
        if self.ranks(axis) > 1:
            self._do(axis, tensor, lambda: dist.all_reduce(tensor, group=self._groups[axis]))
        return tensor

    def min_(self, tensor: Tensor, axis: Axis) -> Tensor:
        """The smallest, entry by entry, in place."""
        if self.ranks(axis) > 1:
            self._do(axis, tensor, lambda: dist.all_reduce(tensor, dist.ReduceOp.MIN, self._groups[axis]))
        return tensor

    def gathered(self, tensor: Tensor, axis: Axis = "latent", dim: int = 0) -> Tensor:
        """The ranks' tensors, of one shape, one behind the other."""
        if self.ranks(axis) == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.ranks(axis))]
        self._do(axis, tensor, lambda: dist.all_gather(parts, tensor, group=self._groups[axis]))
        return torch.cat(parts, dim)

    def nth_largest(self, largest: Tensor, n: int, axis: Axis) -> Tensor:
        """The n-th largest of all ranks' numbers along the last dimension, which is kept, of length 1.

        Args:
            largest: this rank's n largest, or all if it has fewer.
        """
        if self.ranks(axis) == 1:
            return largest.amin(-1, keepdim=True)
        missing = n - largest.shape[-1]
        padded = torch.nn.functional.pad(largest, (0, missing), value=-torch.inf)
        return self.gathered(padded, axis, -1).topk(n, dim=-1, sorted=False).values.amin(-1, keepdim=True)

    # What checkpoints and evaluation need.

    def whole(self, shard: Shaped[Tensor, "shard *rest"]) -> Shaped[Tensor, "whole *rest"]:
        """A tensor of all latents, in ordinary memory of the first rank; on the others the shard as it is."""
        if self.latent == 1 or self.data_rank > 0:
            return shard
        mine = shard.cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.latent)] if self.is_first else None
        self._do("latent", mine, lambda: dist.gather(mine, parts, 0, self._groups["latent"]))
        return torch.cat(parts) if parts else shard

    def hand_out_(self, shard: Shaped[Tensor, "..."], whole: Tensor | None, *, of_latents: bool) -> None:
        """Fills the shard from the tensor that the first rank has: its own latents, or all of it."""
        if self.size == 1:
            assert whole is not None
            shard.copy_(whole)
            return
        mine, parts = torch.empty_like(shard, device="cpu"), None
        if self.is_first:
            assert whole is not None
            parts = [part.cpu().contiguous() for part in whole.chunk(self.latent if of_latents else 1)]
            mine.copy_(parts[0])
        axis: Axis = "data" if of_latents else "all"
        if of_latents and self.latent > 1 and self.data_rank == 0:
            self._do("latent", mine, lambda: dist.scatter(mine, parts, 0, self._groups["latent"]))
        if self.ranks(axis) > 1:
            first = self.latent_rank if of_latents else 0
            self._do(axis, mine, lambda: dist.broadcast(mine, first, self._groups[axis]))
        shard.copy_(mine)

    # What the first rank decides.

    def any(self, *wishes: bool) -> tuple[bool, ...]:
        """Each of them, if any rank has it."""
        if self.size == 1:
            return wishes
        flags = torch.tensor(wishes, dtype=torch.uint8)
        self._do("all", flags, lambda: dist.all_reduce(flags, dist.ReduceOp.MAX))
        return tuple(bool(flag) for flag in flags)

    def text_of_first(self, text: str) -> str:
        """What the first rank says, on all."""
        if self.size == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self._broadcast(length)
        if not self.is_first:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(data)
        return bytes(data.tolist()[:-1]).decode()

    def tell(self, task: str, *tensors: Tensor) -> None:
        """On the first rank of a mesh that is led: the others' `told` gives this. Elsewhere nothing."""
        if not (self._is_led and self.is_first):
            return
        kinds = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        self.text_of_first(json.dumps([task, kinds]))
        for tensor in tensors:
            self._broadcast(tensor.to(self.device).contiguous())

    def told(self) -> tuple[str, list[Tensor]]:
        """What the first rank tells next; waits for it."""
        task, kinds = json.loads(self.text_of_first(""))
        tensors = [torch.empty(shape, dtype=getattr(torch, kind), device=self.device) for kind, shape in kinds]
        for tensor in tensors:
            self._broadcast(tensor)
        return task, tensors

    def together(self, work: Callable[[], Any]) -> Any:
        """What the work gives here, once it has succeeded on every rank.

        Raises:
            ValueError: as the work, here; of the work, on another rank: RefusedElsewhereError.
        """
        problem, found = None, None
        try:
            found = work()
        except (ValueError, OSError) as raised:
            problem = raised
        (failed,) = self.any(problem is not None)
        if not failed:
            return found
        sentences = self._sentences("" if problem is None else str(problem))
        if problem is not None:
            raise problem
        raise RefusedElsewhereError(next(sentence for sentence in sentences if sentence))

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What the work gives on the first rank, which alone does it; None on the others. Raises as `together`."""
        return self.together(lambda: work() if self.is_first else None)

    def _broadcast(self, tensor: Tensor) -> None:
        self._do("told", tensor, lambda: dist.broadcast(tensor, 0))

    def _sentences(self, sentence: str) -> list[str]:
        """Every rank's, cut to some length."""
        if self.size == 1:
            return [sentence]
        data = sentence.encode()[:1000].ljust(1000, b"\0")
        every = self.gathered(torch.frombuffer(bytearray(data), dtype=torch.uint8), "all").view(self.size, -1)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in every]

    def _do(self, axis: str, tensor: Tensor, collective: Callable[[], Any]) -> None:
        self.sent[axis] += tensor.nbytes
        try:
            collective()
        except RuntimeError as problem:
            raise LostRankError(f"another rank is gone ({_first_line(problem)})") from None


def _first_line(problem: Exception) -> str:
    return str(problem).strip().split("\n")[0][:200]


ALONE = Mesh()
"""One process, all latents, whole batches."""
