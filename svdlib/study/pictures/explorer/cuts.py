"""One trained perceptron at any ranks, in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib.ranks.front import front, layers_of
from svdlib.ranks.joint import joint_profile
from svdlib.study.running import inputs


@dataclass(frozen=True, eq=False)
class Cuts:
    """A perceptron, linear layers with ReLU between, decomposed once, and images to look at.

    With W_l = U Σ Vᵀ the first layer's V_rᵀ x are the first r numbers of Vᵀ x, known for all
    images; what is left of a forward pass at ranks (r_1, r_2, …) is small.

    Attributes:
        layers: the names of its layers.
        factors: the singular value decomposition (U, σ, Vᵀ) of each.
        biases: of each.
        x, y: images (n, features) and labels (n,).
        joint: what `joint_profile` finds on them: the loss at every combination of ranks.
    """

    layers: list[str]
    factors: list[tuple[Tensor, Tensor, Tensor]]
    biases: list[Tensor]
    x: Tensor
    y: Tensor
    joint: pd.DataFrame

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Sequential, x: Tensor, y: Tensor) -> Cuts:
        """Decompose a model, and measure it at every combination of ranks.

        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> cuts = Cuts.of(net, torch.rand(20, 9), torch.arange(20) % 3)
        >>> cuts.layers, cuts.full, len(cuts.joint)
        (['0', '2'], (4, 3), 20)
        """
        joint = joint_profile(model, x, y, progress=False)
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        return cls(
            layers=layers_of(joint),
            factors=[
                torch.linalg.svd(layer.weight.double().cpu(), full_matrices=False)
                for layer in layers
            ],
            biases=[
                torch.zeros(len(layer.weight)).double()
                if layer.bias is None
                else layer.bias.double().cpu()
                for layer in layers
            ],
            x=x.cpu(),
            y=y.cpu(),
            joint=joint,
        )

    @property
    def full(self) -> tuple[int, ...]:
        """The full rank of each layer."""
        return tuple(len(sigma) for _, sigma, _ in self.factors)

    @property
    def combinations(self) -> int:
        """How many choices of ranks there are, none and full included."""
        return math.prod(rank + 1 for rank in self.full)

    @cached_property
    def best(self) -> pd.DataFrame:
        """The front of the best combinations, in the order of their parameters."""
        best = front(self.joint)
        return best[best.excess == 0].reset_index(drop=True)

    @cached_property
    def _places(self) -> dict[tuple[int, ...], int]:
        ranks = self.joint[self.layers].itertuples(index=False, name=None)
        return {each: place for place, each in enumerate(ranks)}

    @cached_property
    def _codes(self) -> Tensor:
        return self.x.double() @ self.factors[0][2].mT

    @cached_property
    def _dense(self) -> Tensor:
        return self.logits(self.full)

    @torch.no_grad()
    def logits(self, ranks: Sequence[int]) -> Tensor:
        """The outputs (n, classes) for all images, in float64.

        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3)), torch.rand(20, 9)
        >>> cuts = Cuts.of(net, x, torch.arange(20) % 3)
        >>> torch.allclose(cuts.logits((4, 3)).float(), net(x), atol=1e-6)
        True
        """
        hidden = self._codes[:, : ranks[0]]
        for number, (rank, (U, sigma, Vh), bias) in enumerate(
            zip(ranks, self.factors, self.biases, strict=True)
        ):
            if number:
                hidden = hidden.relu() @ Vh[:rank].mT
            hidden = hidden @ (U[:, :rank] * sigma[:rank]).mT + bias
        return hidden

    def weights(self, rank: int) -> Tensor:
        """The first layer's matrix (m, features) of that rank."""
        U, sigma, Vh = self.factors[0]
        return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]

    def at(self, ranks: Sequence[int]) -> pd.Series:
        """The row of the joint table for exactly these ranks."""
        return self.joint.iloc[self._places[tuple(ranks)]]

    def best_within(self, parameters: int) -> pd.Series:
        """The combination with the least loss among those with no more parameters."""
        able = np.searchsorted(self.best.parameters.to_numpy(), parameters, side="right")
        return self.best.iloc[max(int(able) - 1, 0)]

    def misread(self, ranks: Sequence[int], count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
        """Images that the network reads rightly and this cut most clearly misreads, or nearly.

        In the order of the margin that the cut leaves: the logit of the right class less the
        largest other. Below zero the image is misread.

        Returns:
            their indices (count,), and the logits (count, classes) before and after the cut.

        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> x = torch.rand(20, 9)
        >>> cuts = Cuts.of(net, x, net(x).argmax(1))
        >>> at, before, after = cuts.misread((1, 1), count=3)
        >>> bool((before.argmax(1) == cuts.y[at]).all()), after.shape
        (True, torch.Size([3, 3]))
        """
        after, before = self.logits(ranks), self._dense
        margin = _margin(after, self.y)
        margin[_margin(before, self.y) <= 0] = torch.inf
        at = margin.argsort(stable=True)[:count]
        return at, before[at], after[at]


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    own = logits.gather(1, y[:, None])[:, 0]
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(1)


@inputs.refusing(whole="rank seeds epochs", widths="sizes")
def check(rank: int, sizes: Sequence[int]) -> None:
    """Refuse what 09_explorer could not use."""
    inputs.below_full(rank, sizes)
    inputs.few_combinations(sizes)
