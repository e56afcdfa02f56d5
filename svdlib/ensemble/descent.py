"""A step of training: all networks of an ensemble at once, by hand-derived gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from svdlib.ensemble import thin
from svdlib.ensemble.affine import Affine
from svdlib.ensemble.networks import MLPEnsemble, losses_and_hits
from svdlib.ensemble.traced import traced

threshold_backward_ = torch.ops.aten.threshold_backward.grad_input  # of max(·, 0)
log_softmax_ = torch.ops.aten._log_softmax.out


class Upper(NamedTuple):
    """What the second layer and later ones need."""

    A: Tensor  # [W b; 0 1]
    back: Tensor  # Wᵀ
    onto: Tensor  # where the deltas of the layer below go
    below: Tensor  # that layer's activations, transposed
    target: Tensor


def descent(
    maps: list[Affine],
    target: list[Tensor],
    dropout: float,
    generator: Generator | None,
    first: thin.Layer | None,
    batch: int,
) -> Callable[..., Tensor]:
    """A function that adds a multiple of the gradient of S perceptrons' loss to ``target``.

    Forward, with activations h_l of shape (S, out + 1, B) that end in a row of ones, h_0 = xᵀ,
    and the matrices A_l = [W_l b_l; 0 1]:

        z_l = A_l h_{l−1},   h_l = max(z_l, 0),   p = softmax(z_L).

    Backward, for c times the summed cross-entropy L = −Σ log p_y:

        δ_L = c (p − y),   δ_{l−1} = (W_lᵀ δ_l) ⊙ [h_{l−1} > 0],   c ∂L/∂[W_l b_l] = δ_l h_{l−1}ᵀ.

    All networks share x, so the first layer's products are single ones of an (S·out) × in matrix.
    The function takes x (B, in + 1), the last column ones; minus the one-hot labels, class by
    class (classes · B,); c; a tensor (S,) for each network's summed loss on the batch; and for a
    thin ``first`` layer what `thin.Layer.more` returns.
    """
    zeros = maps[0].matrix.new_zeros
    A = [map.matrix for map in maps]
    h = [zeros(*matrix.shape[:2], batch) for matrix in A]
    delta = [zeros(activations.shape) for activations in h]  # zero under the row of ones
    above = tuple(
        Upper(
            A[l],
            A[l][:, :, : maps[l - 1].out].mT,
            delta[l - 1][:, : maps[l - 1].out],
            h[l - 1][:, : target[l].shape[-1]].mT,
            target[l],
        )
        for l in range(1, len(maps))
    )
    flat = tuple(tensors[0].flatten(0, 1) for tensors in (A, h, delta, target))
    tensors: list[Any] = [flat, tuple(zip(h, delta, strict=True)), above]
    outer = tuple(map.outer for map in maps)
    if dropout:
        return partial(_descend, *tensors, outer=outer, dropout=dropout, generator=generator)
    columns, more, settings = A[0].shape[-1], [], {}
    if first:
        tensors[0] = first.tensors(batch)
        columns, more, settings = first.C.shape[-1] + 1, first.like(batch), first.settings
    like = zeros(batch, columns), zeros(h[-1][0].numel()), zeros(()), zeros(len(A[0]))
    return traced(_descend, tuple(tensors), *like, *more, outer=outer, **settings)


def _descend(
    first: Any,
    layers: tuple[tuple[Tensor, ...], ...],
    above: tuple[Upper, ...],
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    loss: Tensor,
    *more: Tensor,
    outer: tuple[bool, ...],
    dropout: float = 0.0,
    generator: Generator | None = None,
    **settings: Any,
) -> Tensor:
    """`descent` on its tensors: the ``first`` layer's, flat; each layer's; what later ones need.

    ``more`` and the ``settings`` belong to a thin first layer.
    """
    if more:
        thin.forward_(first[0], x, out=layers[0][0])
    else:
        A, h, _, _ = first
        if dropout:
            x = torch.cat([x[:, :-1] * _mask(x[:, :-1], dropout, generator), x[:, -1:]], 1)
        torch.mm(A, x.t(), out=h)
    for l, upper in enumerate(above):
        h, z = layers[l][0], layers[l + 1][0]
        if outer[l]:
            h.relu_()
            if dropout:
                features = h[:, : upper.onto.shape[1]]
                features.mul_(_mask(features[0], dropout, generator))
        torch.bmm(upper.A, h, out=z)
    z, delta = layers[-1]
    log_softmax_(z, 1, False, out=delta)
    log_p = delta.flatten(1)
    torch.mv(log_p, y, out=loss)
    log_p.exp_().add_(y).mul_(scale)
    for l in reversed(range(len(above))):
        (h, below), (_, delta) = layers[l : l + 2]
        torch.bmm(above[l].back, delta, out=above[l].onto)
        above[l].target.baddbmm_(delta, above[l].below)
        if outer[l]:
            threshold_backward_(below, h, 0, grad_input=below)
            if dropout:
                below.div_(1 - dropout)
    if more:
        return thin.step_(first[0], first[1:], x, layers[0][1], *more, **settings)
    A, _, delta, target = first
    return target.addmm_(delta, x.narrow(1, 0, target.shape[1]))


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
        self.thin: thin.Layer | None = None
        self.adam: torch.optim.Adam | None = None
        target = [affine.trained for affine in self.maps]
        if optimizer == "adam":
            padded = [affine.padded for affine in self.maps]
            self.adam = torch.optim.Adam(padded, fused=True)
            for position, matrix in enumerate(padded):
                matrix.grad = torch.zeros_like(matrix)
                target[position] = matrix.grad[..., : target[position].shape[-1]]
        self.scale = lru_cache(4)(partial(torch.tensor, dtype=self.factors[0].dtype))
        self.settings = dropout, generator
        self.descent = cache(partial(descent, self.maps, target, *self.settings, None))

    def hold(self, first: thin.Layer) -> None:
        """Train a thin first layer in place of the dense one, by plain gradient descent."""
        self.thin, maps = first, [first.outer, *self.maps[1:]]
        target = [affine.trained for affine in maps]
        self.descent = cache(partial(descent, maps, target, *self.settings, first))

    def dense(self) -> list[Affine]:
        """The maps, a thin one as one matrix."""
        return [self.thin.dense(), *self.maps[1:]] if self.thin else self.maps

    def take(
        self, x: Tensor, y: Tensor, rate: float, loss: Tensor, gram: Tensor | None = None
    ) -> None:
        """One step on a batch, in place; see `descent` for x, y and loss; ``gram`` is x xᵀ."""
        descend, adam = self.descent(len(x)), self.adam
        if adam is None:
            more = self.thin.more(gram) if self.thin and gram is not None else ()
            descend(x, y, self.scale(-rate / len(x)), loss, *more)
        else:
            adam.zero_grad(set_to_none=False)
            descend(x, y, self.scale(1 / len(x)), loss)
            adam.param_groups[0]["lr"] = rate
            adam.step()

    def store(self) -> None:
        for factor, affine in zip(self.factors, self.dense(), strict=True):
            factor.copy_(affine.trained[:, : affine.out])

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy (S,) and number of right answers (S,); x (n, in + 1), y (n,)."""
        maps = self.dense()
        first = maps[0].matrix
        loss = torch.zeros(len(first), dtype=torch.float64, device=x.device)
        right = torch.zeros_like(loss)
        for images, labels in zip(x.split(2000), y.split(2000), strict=True):
            h = (first.flatten(0, 1) @ images.t()).unflatten(0, first.shape[:2])
            for lower, map in pairwise(maps):
                h = map.matrix @ (h.relu_() if lower.outer else h)
            losses, hits = losses_and_hits(h, labels)
            loss += losses.double().sum(1)
            right += hits.sum(1)
        return loss, right
