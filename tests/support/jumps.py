"""JumpReLU's pseudo-gradients and losses, written out for autograd."""

import torch

BAND = 0.4


def kernel(z, theta):
    return ((z - theta) / BAND).abs().lt(0.5).to(z.dtype)


class Step(torch.autograd.Function):
    """H(z - theta) with the pseudo-gradient of Rajamanoharan 2024b, eq. 12: -(1 / e) K((z - theta) / e) in theta.

    If `reaches_all`, its negative in z too, as in Anthropic's update of January 2025.
    """

    @staticmethod
    def forward(ctx, z, theta, reaches_all):
        ctx.save_for_backward(z, theta)
        ctx.reaches_all = reaches_all
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        pseudo = kernel(z, theta) / BAND * g
        return pseudo if ctx.reaches_all else None, -pseudo.sum(0), None


class Jump(torch.autograd.Function):
    """Z H(z - theta), eq. 11: -(theta / e) K((z - theta) / e) in theta."""

    @staticmethod
    def forward(ctx, z, theta, reaches_all):
        ctx.save_for_backward(z, theta)
        ctx.reaches_all = reaches_all
        return z * (z > theta)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        pseudo = theta / BAND * kernel(z, theta) * g
        return g * (z > theta) + (pseudo if ctx.reaches_all else 0), -pseudo.sum(0), None


def theta_of(own):
    return own["threshold"] if "threshold" in own else own["log_threshold"].exp()


def jumped(name, z, own):
    """The latents and the penalty of each, of one of the JumpReLUs of `BASELINES`."""
    theta = theta_of(own)
    reaches_all = "ste" in name
    f = Jump.apply(z, theta, reaches_all)
    if name.endswith("l1"):
        return f, f
    if name.endswith("tanh"):
        return f, torch.tanh(4 * f)
    return f, Step.apply(z, theta, reaches_all)


def pre_activation_loss(z, own, dead, width):
    """3e-6 sum_i ReLU(theta - z) over dead latents, in our scale: the squared error is a mean over the width."""
    return 3e-6 * torch.relu(theta_of(own) - z)[:, dead].sum(-1).mean() / width
