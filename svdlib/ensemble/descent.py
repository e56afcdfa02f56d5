"""A step of training: all networks of an ensemble at once, by hand-derived gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdlib.ensemble.networks import MLPEnsemble


class Step:
    """A step of training on the tensors of an ensemble, as they are now.

    Attributes:
        weights: the tensors of `MLPEnsemble.weights`, detached.
        biases: one for each of them, (S, out, 1); None for the inner factor of a layer.
    """

    def __init__(self, nets: MLPEnsemble, optimizer: str, dropout: float) -> None:
        self.dropout = dropout
        self.weights: list[Tensor] = []
        self.biases: list[Tensor | None] = []
        for layer in nets.layers:
            self.weights += [factor.detach() for factor in layer.factors]
            self.biases += [None] * (len(layer.factors) - 1) + [layer.bias.detach()[..., None]]
        self.adam: torch.optim.Adam | None = None
        if optimizer == "adam":
            given = [*self.weights, *(b for b in self.biases if b is not None)]
            for tensor in given:
                tensor.grad = torch.zeros_like(tensor)
            self.gradients = (
                [w.grad for w in self.weights],
                [None if b is None else b.grad for b in self.biases],
            )
            self.adam = torch.optim.Adam(given, fused=True)

    def take(
        self, x: Tensor, y: Tensor, rate: float, loss: Tensor, generator: torch.Generator
    ) -> None:
        """One step on a batch, in place; ``loss`` receives the losses before it."""
        given = (self.weights, self.biases, x, y)
        if self.adam is None:
            descend_(*given, -rate, loss, dropout=self.dropout, generator=generator)
            return
        self.adam.zero_grad(set_to_none=False)
        descend_(*given, 1.0, loss, self.gradients, self.dropout, generator)  # type: ignore[arg-type]
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()


def descend_(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    x: Tensor,
    y: Tensor,
    scale: float,
    loss: Tensor,
    onto: tuple[Sequence[Tensor], Sequence[Tensor | None]] | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Add ``scale`` times the gradient of S perceptrons' loss on one batch to tensors, in place.

    Forward, with activations h_l of shape (S, out, B) and h_0 = xᵀ:

        z_l = W_l h_{l−1} + b_l,   h_l = max(z_l, 0),   p = softmax(z_L).

    Backward, for the mean cross-entropy L = −(1/B) Σ log p_y:

        δ_L = p − y,   δ_{l−1} = (W_lᵀ δ_l) ⊙ [h_{l−1} > 0],
        ∂L/∂W_l = δ_l h_{l−1}ᵀ / B,   ∂L/∂b_l = Σ_batch δ_l / B.

    No gradient need be stored: onto the weights themselves, with a negative scale, this is a
    step of gradient descent. All networks share x, so the first layer's products are single ones
    of an (S·out) × in matrix. A factorized layer is two, the inner one without bias and
    max(·, 0). Dropout with probability d multiplies an h by 1/(1−d) or by 0, the same for all
    networks.

    Args:
        weights, biases: a layer each, of shapes (S, out, in) and (S, out, 1); the bias of an
            inner factor is None.
        x, y: inputs (B, in) and one-hot labels, feature-first (classes, B).
        loss: receives each network's loss on the batch before the step, summed, (S,).
        onto: tensors like weights and biases that the products are added to; by default they
            themselves.
        dropout, generator: d, and the source of its randomness on the weights' device.

    >>> W, b = [torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 1)]
    >>> loss = torch.empty(1)
    >>> descend_(W, b, torch.ones(1, 3), torch.tensor([[1.0], [0.0]]), scale=-1.0, loss=loss)
    >>> loss, W[0]
    (tensor([0.6931]), tensor([[[ 0.5000,  0.5000,  0.5000],
             [-0.5000, -0.5000, -0.5000]]]))
    """
    to_weights, to_biases = onto or (weights, biases)
    if dropout:
        x = _drop_(x.clone(), dropout, generator)
    flat = weights[0].flatten(0, 1)
    z = _affine(biases[0], flat, x).view(*weights[0].shape[:2], -1)
    hidden = []
    for weight, bias, below in zip(weights[1:], biases[1:], biases[:-1], strict=True):
        if below is not None:
            z = z.relu_()
            if dropout:
                _drop_(z, dropout, generator)
        hidden.append(z)
        z = torch.bmm(weight, z) if bias is None else torch.baddbmm(bias, weight, z)
    log_p = z.log_softmax(1)
    torch.mv(log_p.flatten(1), y.flatten(), out=loss).neg_()
    delta = log_p.exp_().sub_(y)
    scale /= len(x)
    for layer in range(len(weights) - 1, 0, -1):
        below, bias = hidden[layer - 1], to_biases[layer]
        back = torch.bmm(weights[layer].mT, delta)
        to_weights[layer].baddbmm_(delta, below.mT, alpha=scale)
        if bias is not None:
            bias.add_(delta.sum(-1, keepdim=True), alpha=scale)
        if biases[layer - 1] is None:
            delta = back
        else:
            delta = torch.ops.aten.threshold_backward(back, below, 0)
            if dropout:
                delta.div_(1 - dropout)
    to_weights[0].flatten(0, 1).addmm_(delta.view(-1, len(x)), x, alpha=scale)
    bias = to_biases[0]
    if bias is not None:
        bias.add_(delta.sum(-1, keepdim=True), alpha=scale)


def _affine(bias: Tensor | None, flat: Tensor, x: Tensor) -> Tensor:
    """The first layer of all networks at once: (S·out, in) × (in, B)."""
    return flat @ x.t() if bias is None else torch.addmm(bias.view(-1, 1), flat, x.t())


def _drop_(x: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """Dropout of x (…, features, B) in place, the same for all networks: they stay comparable."""
    chance = torch.rand(x.shape[-2:], dtype=x.dtype, device=x.device, generator=generator)
    return x.mul_((chance >= dropout).to(x.dtype).div_(1 - dropout))
