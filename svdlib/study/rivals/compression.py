"""Other people's formulas for the factors of a trained layer, and ours, at all ranks at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from svdlib.layers.calibrate import Calibration, fits_of, input_sums
from svdlib.layers.factorize import factorized
from svdlib.network.calls import Batch, Objective, run
from svdlib.network.chain import task_of
from svdlib.network.kinds import Layer
from svdlib.network.low_rank import Approximations
from svdlib.network.modes import evaluating
from svdlib.network.opened import Network
from svdlib.ranks.sensitivity import gradients as output_gradients
from svdlib.study.evidence.cutting import widest
from svdlib.study.running import inputs

Names = Collection[str]
Factors = Mapping[str, Approximations | None]  # None: the truncated SVD


@dataclass(frozen=True)
class Product:
    """Factors of all ranks: the leading columns and rows of two matrices (m, k) and (k, n)."""

    left: Tensor
    right: Tensor

    def at(self, rank: int) -> tuple[Tensor, Tensor, None]:  # None: the bias stays
        return self.left[:, :rank], self.right[:rank], None


def cut(model: nn.Module, ranks: Mapping[str, int], factors: Factors) -> nn.Module:
    """A copy of a model with these factors at these ranks."""
    return factorized(Network.copy_of(model), ranks, ((name, factors[name]) for name in ranks))


def truncated(model: nn.Module, names: Names) -> dict[str, Product]:
    """The truncated SVD of each matrix."""
    net = Network.copy_of(model)
    return {name: _weighted(net.layers[name]) for name in names}


def svd_llm(model: nn.Module, names: Names, data: Sequence[Batch]) -> dict[str, Product]:
    """SVD-LLM's data whitening (Wang et al. 2024, section 3.1): the SVD of W S, X Xᵀ = S Sᵀ."""
    net = Network.copy_of(model)
    sums, products = input_sums(net, names, Calibration(data)), {}
    for name in names:
        W = net.layers[name].matrix().double()
        C = cast(Tensor, sums[name].square) / sums[name].count
        ridge = 1e-10 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        S = torch.linalg.cholesky(C + ridge)
        U, s, Vh = torch.linalg.svd(W @ S, full_matrices=False)
        right = torch.linalg.solve_triangular(S.mT, Vh.mT, upper=True).mT
        products[name] = _product(net.layers[name], U * s, right)
    return products


def asvd(
    model: nn.Module, names: Names, data: Sequence[Batch], alpha: float = 0.5
) -> dict[str, Product]:
    """ASVD (Yuan et al. 2023, section 3.2): the SVD of W D, D the inputs' mean sizes to the α."""
    net = Network.copy_of(model)
    sizes: dict[str, Any] = dict.fromkeys(names, 0)

    def add_sizes(name: str, inputs: tuple[Tensor, ...]) -> None:
        sizes[name] += inputs[0].flatten(0, -2).double().abs().sum(0)

    with torch.no_grad(), net.hooked(names, before=add_sizes):
        for batch in data:
            run(net.model, batch, None)
    columns = {name: (sizes[name] / sizes[name].mean()).clamp(min=1e-6) ** alpha for name in names}
    return {name: _weighted(net.layers[name], columns=columns[name]) for name in names}


def fisher(
    model: nn.Module, names: Names, data: Iterable[Batch], loss: Objective
) -> dict[str, Product]:
    """FWSVD (Hsu et al. 2022, section 3.2): the SVD of D W, D the roots of each row's Fisher sum."""
    net = Network.copy_of(model)
    weights = {name: net.layers[name].weight for name in names}
    sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    with torch.enable_grad(), evaluating(net.model):
        for batch in data:
            total = loss(net.model, batch).sum()
            slopes = torch.autograd.grad(total, list(weights.values()))
            for name, slope in zip(weights, slopes, strict=True):
                sums[name] += slope.double().square()
    rows = {name: sums[name].sum(1, keepdim=True).sqrt() for name in names}
    rows = {name: (D / D.mean()).clamp(min=1e-6) for name, D in rows.items()}
    return {name: _weighted(net.layers[name], rows[name]) for name in names}


def _weighted(layer: Layer, rows: Tensor | float = 1.0, columns: Tensor | float = 1.0) -> Product:
    """The SVD of a matrix whose rows (m, 1) and columns (n,) are weighted, without the weights."""
    U, s, Vh = torch.linalg.svd(rows * layer.matrix().double() * columns, full_matrices=False)
    return _product(layer, U * s / rows, Vh / columns)


def _product(layer: Layer, left: Tensor, right: Tensor) -> Product:
    return Product(left.to(layer.weight), right.to(layer.weight))


def calibrated(
    model: nn.Module, names: Names, data: Sequence[Batch], loss: Objective | None = None
) -> Factors:
    """Factors that are best for each layer's output or, with a loss, for its gradients there."""
    net, slopes = Network.copy_of(model), {}
    with net.measuring():
        if loss is not None:
            task = task_of(net, data, None, loss, None)
            task.measure()
            slopes = output_gradients(task, {name: net.layers[name] for name in names}, (), False)
        return dict(fits_of(net, names, Calibration(data), slopes))


@inputs.refusing(
    whole="validation paper_seeds paper_epochs paper_more seeds epochs finetune start_rank narrow_rank",
    from_zero="first_seed",
    wholes="paper_ranks budgets",
    wholes_or_none="dense_budgets",
    widths="paper_sizes wide narrow",
    shares="tails",
    switch="everything",
)
def check(
    paper_sizes: Sequence[int],
    paper_ranks: Sequence[int],
    wide: Sequence[int],
    budgets: Sequence[int],
    start_rank: int,
    narrow: Sequence[int],
    narrow_rank: int,
    dense_budgets: Sequence[int] = (),
) -> None:
    """Refuse what 08_compression could not use."""
    _check_thin("each of paper_ranks", max(paper_ranks), paper_sizes[:2], "paper_sizes")
    _check_thin("start_rank", start_rank, wide[:-1], "wide")
    _check_thin("narrow_rank", narrow_rank, narrow[:-1], "narrow")
    for budget in dense_budgets:
        widest(wide, budget)
    layers = list(pairwise(wide))
    full = sum(n * m + m for n, m in layers)
    smallest = full - sum(n * m - (m + n) for n, m in layers[:-1])
    for budget in budgets:
        if not smallest <= budget < full:
            raise ValueError(
                f"each of budgets must be at least {smallest:,}, what {list(wide)} has at rank 1, and "
                f"below its own {full:,}, not {budget:,}"
            )


def _check_thin(name: str, rank: int, widths: Sequence[int], of: str) -> None:
    largest, m, n = min(((m * n - 1) // (m + n), m, n) for n, m in pairwise(widths))
    why = f"where two factors of the {m} × {n} matrix store less than it does"
    inputs.at_most(name, rank, largest, why, f"{of} = {list(widths)}")
