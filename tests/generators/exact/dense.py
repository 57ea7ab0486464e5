"""Small modules as layers, and what rules are compared with: autograd, and matrices made column by column."""

import torch
from torch.func import functional_call, grad, vmap

from gitlight.architecture import Architecture


def layer_of(module, shape):
    """The only operation of a module, for one input of this shape."""
    (layer,) = Architecture.of(module, shape, 1).layers
    return layer


def backward(module, inputs, delta):
    """∂L/∂weight and ∂L/∂input of each example for a given ∂L/∂output, by autograd."""

    def loss(weight, one, its_delta):
        return (functional_call(module, {"weight": weight}, (one.unsqueeze(0),))[0] * its_delta).sum()

    return vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(module.weight.detach(), inputs, delta)


def units(shape):
    size = torch.Size(shape).numel()
    return torch.eye(size, dtype=torch.float64).view(size, *shape)


def gradient_matrix(module, delta, shape):
    """K(δ), ``(weight entries, input entries)``: its columns are the weight gradients of the unit inputs."""
    basis = units(shape)
    return backward(module, basis, delta.expand(len(basis), *delta.shape))[0].flatten(1).T


def forward_matrix(module, shape):
    """W, ``(output entries, input entries)``: its columns are the outputs of the unit inputs, less the bias."""
    basis = units(shape)
    with torch.no_grad():
        return (module(basis) - module(torch.zeros_like(basis[:1]))).flatten(1).T


def null_space(matrix):
    """An orthonormal basis of it, in columns, by a full SVD."""
    values, right = torch.linalg.svd(matrix)[1:]
    rank = int((values > max(matrix.shape) * torch.finfo(torch.float64).eps * values[0]).sum())
    return right[rank:].T


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()
