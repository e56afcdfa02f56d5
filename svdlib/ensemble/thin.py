"""A first layer that is projected after every step, held as two thin factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svdlib.ensemble.affine import Affine
from svdlib.ensemble.stacks import LayerStack, follow_, follow_randomly_
from svdlib.linalg.subspace import turn_


class Held(NamedTuple):
    """A thin layer's tensors, and buffers for B images."""

    C: Tensor  # UᵀW (S, k, n)
    H: Tensor  # C Cᵀ
    U: Tensor
    V: Tensor
    Vb: Tensor  # [V b; 0 1] (S, m + 1, k + 1)
    V_there: Tensor  # V's place in it, and b's
    b: Tensor
    code: Tensor  # C xᵀ (S, k, B)
    coded: Tensor  # the same over a row of ones
    code_there: Tensor  # its place there
    UD: Tensor  # of UᵀD (S, k, B)


class Layer:
    """The first layers of S networks at rank k, W = V C, whose product is never formed.

    C = UᵀW (S, k, n), so that k rows meet the images instead of m, and V = U (UᵀU)⁻¹ (S, m, k) in
    the map ``outer``, [V b]; U and V are the first bases of the first stack. See `step_`.

    Args:
        dense: the layer, just projected.
        stacks: of the layers that are projected in its steps, the layer itself being the first.
    """

    def __init__(self, dense: Affine, stacks: list[LayerStack]) -> None:
        self.stacks = stacks
        self.settings = {
            "power_iters": stacks[0].power_iters,
            "random": tuple(not stack.exact for stack in stacks),
        }
        W = stacks[0].sides.pop(0)
        U = stacks[0].U[: len(W)]
        self.C = U.mT @ W
        self.H = self.C @ self.C.mT
        bias = dense.matrix[:, : dense.out, -1:]
        self.outer = Affine(torch.cat([U, bias], -1), outer=True, last=dense.last)

    def tensors(self, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        """What `forward_` and `step_` work on: the layer, and the stacks."""
        stacks = [stack.tensors() for stack in self.stacks]
        U, V = (basis[: len(self.C)] for basis in stacks[0][:2])
        code, UD = self.C.new_zeros(2, *self.C.shape[:2], batch)
        coded, Vb = F.pad(code, (0, 0, 0, 1), value=1.0), self.outer.matrix
        places = self.outer.weight, Vb[:, : self.outer.out, -1]
        return Held(self.C, self.H, U, V, Vb, *places, code, coded, coded[:, :-1], UD), *stacks

    def like(self, batch: int) -> list[Tensor]:
        """Zeros like what `more` returns."""
        sketches = [stack.no_sketch() for stack in self.stacks if not stack.exact]
        return [self.C.new_zeros(batch, batch), *sketches]

    def more(self, gram: Tensor) -> list[Tensor]:
        """What else `step_` needs in the next step; ``gram`` is x xᵀ (B, B)."""
        for stack in self.stacks:
            R = stack.renew_()
            if stack is self.stacks[0] and R is not None:
                R = R[: len(self.C)]
                self.C.copy_(torch.linalg.solve_triangular(R.mT, self.C, upper=False))
                torch.bmm(self.C, self.C.mT, out=self.H)
                self.outer.weight.copy_(stack.V[: len(R)])
        return [gram, *(sketch for stack in self.stacks for sketch in stack.sketch())]

    def dense(self) -> Affine:
        """The layer as one matrix."""
        V, bias = self.outer.weight, self.outer.matrix[:, : self.outer.out, -1:]
        return Affine(torch.cat([V @ self.C, bias], -1), outer=True, last=self.outer.last)


def forward_(held: Held, x: Tensor, out: Tensor) -> None:
    """V C xᵀ + b (S, m, B) of the batch x (B, n + 1), whose last column is ones."""
    n = held.C.shape[-1]
    torch.mm(held.C.flatten(0, 1), x.narrow(1, 0, n).t(), out=held.code.flatten(0, 1))
    held.code_there.copy_(held.code)
    torch.bmm(held.Vb, held.coded, out=out)


def step_(
    held: Held,
    stacks: tuple[tuple[Tensor, ...], ...],
    x: Tensor,
    D: Tensor,
    gram: Tensor,
    *sketches: Tensor,
    random: tuple[bool, ...],
    power_iters: int,
) -> Tensor:
    """A step from W = V C to P (W + D x), with the projection P onto the new range(U), in place.

    With the scaled deltas D (S, m, B) and the batch x (B, n), of which mostly K = x xᵀ is needed:

        A = UᵀD,   C′ = C + A x = Uᵀ(W + D x),   W + D x = V C′ + N,   N = (D − V A) x.

    So C′xᵀ = C xᵀ + A K, C′C′ᵀ = C Cᵀ + A (C xᵀ)ᵀ + (C′xᵀ) Aᵀ, and N C′ᵀ = (D − V A)(C′xᵀ)ᵀ are
    small products, and `turn_` takes them. As UᵀV = I after U has turned, too, C becomes
    Uᵀ(W + D x) = C + UᵀD x: only added to, by a product with k rows. The other layers of the
    ``stacks`` are projected as well.
    """
    C, H, U, V, code, UD = held.C, held.H, held.U, held.V, held.code, held.UD
    D = D.narrow(1, 0, U.shape[1]).contiguous()
    torch.bmm(U.mT, D, out=UD)
    new_code = torch.mm(UD.flatten(0, 1), gram).view_as(code).add_(code)
    DC = torch.bmm(D, new_code.mT)
    UDC = torch.bmm(U.mT, DC)
    H.baddbmm_(UD, code.mT).add_(UDC.mT)
    X = torch.baddbmm(DC, V, UDC, alpha=-1)
    remaining = iter(sketches)
    if random[0]:
        N = torch.baddbmm(D, V, UD, alpha=-1)
        NN = torch.bmm(torch.mm(N.flatten(0, 1), gram).view_as(N), N.mT)
        E = follow_randomly_(stacks[0], next(remaining), (H, X, NN), power_iters)[: len(C)]
        H.baddbmm_(X.mT, E).baddbmm_(E.mT, torch.baddbmm(X, NN, E))
    else:
        turn_(U, V, H, X)
        follow_(stacks[0][0][len(C) :], *stacks[0][2:])
    for stack, is_random in zip(stacks[1:], random[1:], strict=True):
        if is_random:
            follow_randomly_(stack, next(remaining), power_iters=power_iters)
        else:
            follow_(stack[0], *stack[2:])
    torch.bmm(U.mT, D, out=UD)
    held.V_there.copy_(V)
    held.b.add_(D.sum(-1))
    return C.flatten(0, 1).addmm_(UD.flatten(0, 1), x.narrow(1, 0, C.shape[-1]))
