"""One trained perceptron at any ranks, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib.network.opened import find_layers
from svdlib.ranks.front import front, layers_of
from svdlib.ranks.joint import joint_profile
from svdlib.study.running import inputs


class Cuts:
    """A perceptron (linear layers with ReLU between), decomposed once, and images to look at.

    With the first layer's W = U Σ Vᵀ, the numbers Vᵀ x of all images are computed once. A forward
    pass at ranks (r_1, r_2, …) starts from their first r_1, so that little is left to do.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        self.joint = joint_profile(model, x, y, progress=False)
        self.layers = layers_of(self.joint)
        self.best = front(self.joint).query("excess == 0").reset_index(drop=True)
        linear = find_layers(model).values()
        matrices = [layer.weight.double().cpu() for layer in linear]
        self.factors = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
        self.biases = [0 if layer.bias is None else layer.bias.double().cpu() for layer in linear]
        self.full = tuple(len(sigma) for _, sigma, _ in self.factors)
        self.x, self.y = x.cpu(), y.cpu()
        ranks = self.joint[self.layers].itertuples(index=False, name=None)
        self._places = {key: place for place, key in enumerate(ranks)}
        self._codes = self.x.double() @ self.factors[0][2].mT
        self._full_logits = self.logits(self.full)

    @torch.no_grad()
    def logits(self, ranks: Sequence[int]) -> Tensor:
        """The outputs (n, classes) for all images, in float64."""
        hidden = self.x
        layers = zip(ranks, self.factors, self.biases, strict=True)
        for number, (rank, (U, sigma, Vh), bias) in enumerate(layers):
            codes = hidden.relu() @ Vh[:rank].mT if number else self._codes[:, :rank]
            hidden = codes @ (U[:, :rank] * sigma[:rank]).mT + bias
        return hidden

    def weights(self, rank: int) -> Tensor:
        """The first layer's matrix (m, features) at this rank."""
        U, sigma, Vh = self.factors[0]
        return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]

    def at(self, ranks: Sequence[int]) -> pd.Series:
        """The row of the joint table for exactly these ranks."""
        return self.joint.iloc[self._places[tuple(ranks)]]

    def best_within(self, parameters: int) -> pd.Series:
        """The combination with the smallest loss among those with no more parameters."""
        count = np.searchsorted(self.best.parameters.to_numpy(), parameters, side="right")
        return self.best.iloc[max(int(count) - 1, 0)]

    def misread(self, ranks: Sequence[int], count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
        """Images that only the cut misreads, the clearest first, and logits before and after it.

        The margin sorts them: the correct class's logit minus the largest other, below 0 if misread.
        """
        logits, own = torch.stack([self._full_logits, self.logits(ranks)]), self.y[None, :, None]
        own = own.expand(2, -1, 1)
        others = logits.scatter(2, own, -torch.inf).amax(2)
        before, after = logits.gather(2, own)[..., 0] - others
        at = after.where(before > 0, torch.inf).argsort(stable=True)[:count]
        return at, logits[0, at], logits[1, at]


@inputs.refusing(whole="rank seeds epochs", widths="sizes")
def check(rank: int, sizes: Sequence[int]) -> None:
    """Refuse what 09_explorer could not use."""
    inputs.below_full(rank, sizes)
    inputs.few_combinations(sizes)
