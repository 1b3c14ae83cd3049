"""Names that the settings of a run choose from, in a file without PyTorch: the command line needs them for its help."""

from typing import Literal, get_args

StepKind = Literal["dense", "sparse", "sparse_torch"]
"""How a training step is computed."""
STEP_KINDS = get_args(StepKind)

Precision = Literal["fp32", "tf32", "bf16"]
"""The inputs of matmuls: unchanged, cut to 10 bits of mantissa by the GPU (a CPU computes fp32), or rounded to bf16."""
PRECISIONS = get_args(Precision)

SecondMoment = Literal["mean", "zero"]
"""What Adam's second moment of a resampled latent is set to: its mean over living latents, or 0."""

Freeze = Literal["none", "decoder", "encoder", "soft_decoder"]
"""Which matrix of an SAE stays as it started, or nearly so."""

FROZEN = {
    "none": "",
    "decoder": ", frozen decoder",
    "encoder": ", frozen encoder",
    "soft_decoder": ", soft-frozen decoder",
}
"""The words that the name of a family has for each choice of `Freeze`."""
