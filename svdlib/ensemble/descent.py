"""A step of training: all networks of an ensemble at once, by hand-derived gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Generator, Tensor

from svdlib.ensemble.networks import MLPEnsemble, losses_and_hits

threshold_backward_ = torch.ops.aten.threshold_backward.grad_input  # of max(·, 0)
log_softmax_ = torch.ops.aten._log_softmax.out


class Affine:
    """The maps h ↦ W h + b of S networks, each one matrix, [W b; 0 1] [h; 1] = [W h + b; 1].

    ``factor`` is [W b] (S, out, in + 1), copied, or the inner V (S, r, in) of a layer, which is not
    ``outer``, keeps b = 0, and has no max(·, 0) after it. The ``last`` matrix has no last row.
    """

    def __init__(self, factor: Tensor, outer: bool, last: bool) -> None:
        networks, out, columns = factor.shape
        ins = columns - outer
        # Rows are whole cache lines, 16 floats.
        padded = factor.new_zeros(networks, out + (not last), -(-(ins + 1) // 16) * 16)
        padded[:, :out, :columns] = factor
        if not last:
            padded[:, out, ins] = 1
        self.padded, self.out, self.outer = padded, out, outer
        self.matrix, self.weight = padded[..., : ins + 1], padded[:, :out, :ins]
        self.trained = padded[..., :columns]  # what a step changes: without an inner bias


def descent(
    maps: list[Affine],
    target: list[Tensor],
    dropout: float,
    generator: Generator | None,
    batch: int,
) -> Callable[[Tensor, Tensor, float, Tensor], None]:
    """A function that adds a multiple of the gradient of S perceptrons' loss to ``target``.

    Forward, with activations h_l of shape (S, out + 1, B) that end in a row of ones, h_0 = xᵀ,
    and the matrices A_l = [W_l b_l; 0 1]:

        z_l = A_l h_{l−1},   h_l = max(z_l, 0),   p = softmax(z_L).

    Backward, for the mean cross-entropy L = −(1/B) Σ log p_y:

        δ_L = p − y,   δ_{l−1} = (W_lᵀ δ_l) ⊙ [h_{l−1} > 0],   ∂L/∂[W_l b_l] = δ_l h_{l−1}ᵀ / B.

    All networks share x, so the first layer's products are single ones of an (S·out) × in matrix.
    The function takes x (B, in + 1), the last column ones; minus the one-hot labels, class by
    class (classes · B,); the scale; and a tensor (S,) for each network's summed loss on the batch.
    """
    above = range(1, len(maps))
    zeros = maps[0].matrix.new_zeros
    A = [map.matrix for map in maps]
    h = [zeros(*matrix.shape[:2], batch) for matrix in A]
    delta = [zeros(activations.shape) for activations in h]  # zero under the row of ones
    log_p = delta[-1].flatten(1)
    features = [a[:, : map.out] for a, map in zip(h, maps, strict=True)]
    back = {l: A[l][:, :, : maps[l - 1].out].mT for l in above}
    onto_features = {l: delta[l - 1][:, : maps[l - 1].out] for l in above}
    below = {l: h[l - 1][:, : target[l].shape[-1]].mT for l in above}
    flat = [tensors[0].flatten(0, 1) for tensors in (A, h, delta, target)]
    first_A, first_h, first_delta, first_target = flat
    all_columns = first_target.shape[-1] == first_A.shape[-1]
    dropped = zeros(batch, A[0].shape[-1])
    dropped[:, -1] = 1

    def descend(x: Tensor, y: Tensor, scale: float, loss: Tensor) -> None:
        scale /= batch
        if dropout:
            torch.mul(x[:, :-1], _mask(x[:, :-1], dropout, generator), out=dropped[:, :-1])
            x = dropped
        torch.mm(first_A, x.t(), out=first_h)
        for l in above:
            if maps[l - 1].outer:
                h[l - 1].relu_()
                if dropout:
                    features[l - 1].mul_(_mask(features[l - 1][0], dropout, generator))
            torch.bmm(A[l], h[l - 1], out=h[l])
        log_softmax_(h[-1], 1, False, out=delta[-1])
        torch.mv(log_p, y, out=loss)
        log_p.exp_().add_(y)
        for l in reversed(above):
            torch.bmm(back[l], delta[l], out=onto_features[l])
            target[l].baddbmm_(delta[l], below[l], alpha=scale)
            if maps[l - 1].outer:
                threshold_backward_(delta[l - 1], h[l - 1], 0, grad_input=delta[l - 1])
                if dropout:
                    delta[l - 1].div_(1 - dropout)
        first_target.addmm_(first_delta, x if all_columns else x[:, :-1], alpha=scale)

    return descend


def _mask(like: Tensor, dropout: float, generator: Generator | None) -> Tensor:
    """Zeros with probability d, else 1/(1−d), the same for all networks."""
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


class Step:
    """Steps of training for some networks of an ensemble, on copies that `store` puts back."""

    def __init__(
        self,
        nets: MLPEnsemble,
        networks: slice = slice(None),
        optimizer: str = "sgd",
        dropout: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        layers = [layer.factors for layer in nets.layers]
        outer = [factor is factors[-1] for factors in layers for factor in factors]
        self.factors = [factor.detach()[networks] for factors in layers for factor in factors]
        last = [factor is self.factors[-1] for factor in self.factors]
        self.maps = list(map(Affine, self.factors, outer, last))
        self.weights = [affine.weight for affine in self.maps]  # views
        self.adam: torch.optim.Adam | None = None
        target = [affine.trained for affine in self.maps]
        if optimizer == "adam":
            padded = [affine.padded for affine in self.maps]
            self.adam = torch.optim.Adam(padded, fused=True)
            for position, matrix in enumerate(padded):
                matrix.grad = torch.zeros_like(matrix)
                target[position] = matrix.grad[..., : target[position].shape[-1]]
        self.descent = cache(partial(descent, self.maps, target, dropout, generator))

    def take(self, x: Tensor, y: Tensor, rate: float, loss: Tensor) -> None:
        """One step on a batch, in place; see `descent` for x, y and loss."""
        if self.adam is None:
            self.descent(len(x))(x, y, -rate, loss)
        else:
            self.adam.zero_grad(set_to_none=False)
            self.descent(len(x))(x, y, 1.0, loss)
            self.adam.param_groups[0]["lr"] = rate
            self.adam.step()

    def store(self) -> None:
        for factor, affine in zip(self.factors, self.maps, strict=True):
            factor.copy_(affine.trained[:, : affine.out])

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy (S,) and number of right answers (S,); x (n, in + 1), y (n,)."""
        first = self.maps[0].matrix
        loss = torch.zeros(len(first), dtype=torch.float64, device=x.device)
        right = torch.zeros_like(loss)
        for images, labels in zip(x.split(2000), y.split(2000), strict=True):
            h = (first.flatten(0, 1) @ images.t()).unflatten(0, first.shape[:2])
            for lower, map in pairwise(self.maps):
                h = map.matrix @ (h.relu_() if lower.outer else h)
            losses, hits = losses_and_hits(h, labels)
            loss += losses.double().sum(1)
            right += hits.sum(1)
        return loss, right
