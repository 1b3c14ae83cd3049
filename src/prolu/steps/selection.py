"""Selections on a mesh: the k largest of a token are the k largest of what each rank's latents offer."""

from jaxtyping import Bool, Float
from torch import Tensor

from prolu.mesh import Mesh
from prolu.nonlinearities import Nonlinearity, Parameters, Selection, distance


def token_bounds(
    code: Nonlinearity, selection: Selection, m: Float[Tensor, "n d_sae"], own: Parameters, mesh: Mesh
) -> Float[Tensor, "n 1"]:
    """How far above its threshold a latent of each token must lie, given all ranks' latents; 0 at least."""
    above = distance(code, m, own)
    largest = above.topk(min(selection.k, above.shape[-1]), dim=-1, sorted=False).values
    return mesh.nth_largest(largest, selection.k, "latent").clamp(min=0)


def on_with_bound(
    code: Nonlinearity, m: Float[Tensor, "n d_sae"], own: Parameters, bound: Float[Tensor, "..."] | None
) -> Bool[Tensor, "n d_sae"]:
    """The support, cut down to what lies as far above its threshold as the bound says, if there is one."""
    support = code.support(m, own)
    return support if bound is None else support & (distance(code, m, own) >= bound)


def on_across(code: Nonlinearity, m: Float[Tensor, "n d_sae"], own: Parameters, mesh: Mesh) -> Bool[Tensor, "n d_sae"]:
    """What is on among this rank's latents, where a selection looks at one token."""
    selection = code.selection
    assert selection is None or not selection.over_batch, "a selection over a batch needs all its chunks"
    return on_with_bound(code, m, own, None if selection is None else token_bounds(code, selection, m, own, mesh))
