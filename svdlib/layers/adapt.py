"""Ranks that follow the singular values while a factorized model trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.linalg.factors import balanced, ranks_within
from svdlib.network.low_rank import Factorized, low_rank_layers, ranks_of
from svdlib.network.opened import finished

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Layers that share their factors, by name; most share with none. The first stands for all.
Tied = list[tuple[str, Factorized]]


@threads.making()
@torch.no_grad()
def truncate_(
    model: nn.Module,
    tail: float = 0.0,
    *,
    max_rank: int | None = None,
    parameters: int | None = None,
) -> dict[str, int]:
    """Lower the ranks of a model's `LowRank` layers to what their singular values need, in place.

    Each layer W = U V keeps the smallest rank j ≥ 1 with

        (Σ_{i>j} σ_i²)^½ ≤ tail · (Σ σ_i²)^½

    (Schotthöfer et al. 2022, Algorithm 1). A layer whose rank falls gets balanced factors, √Σ each.
    With a budget of ``parameters``, every layer starts at rank 1 and singular values are added one
    by one: the next is the one that raises log E_r, E_r = Σ_{i≤r} σ_i², most per number stored.
    Groups of a convolution keep one rank, the largest that any of them needs. Parameters stay the
    same objects with other shapes, so an optimizer keeps them. Its momentum must start anew, as
    `LowRankTraining` sees to.

    Args:
        model: with `LowRank` layers, as from `factorize`.
        tail: the relative norm to discard, 0 ≤ tail < 1.
        max_rank: a limit on every rank.
        parameters: a limit on the numbers in the whole model.

    Returns:
        {layer: its rank now}.

    Raises:
        ValueError: no such layer, a tail or limit out of range, a budget below what rank 1 needs,
            NaN or infinite weights.

    >>> from svdlib import factorize
    >>> _ = torch.manual_seed(0)
    >>> model = factorize(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64)), 20)
    >>> truncate_(model, tail=0.5)
    {'0': 13, '2': 13}
    >>> truncate_(model, parameters=2000)
    {'0': 8, '2': 8}
    """
    plan = LowRankTraining(tail, max_rank=max_rank, parameters=parameters)
    _check_budget(model, plan)
    _lower_(model, plan)
    finished(model)
    return ranks_of(model)


def singular_values(model: nn.Module) -> pd.DataFrame:
    """The singular values of every `LowRank` layer: columns layer, group, index (from 1), sigma.

    Raises:
        ValueError: no such layer, NaN or infinite weights.
    """
    tables = []
    for name, layer in _layers(model):
        V, U = _factors(name, layer)
        for group, sigma in enumerate(balanced(V.double(), U.double())[-1].tolist()):
            columns = {"index": range(1, len(sigma) + 1), "sigma": sigma}
            tables.append(pd.DataFrame({"layer": name, "group": group, **columns}))
    return pd.concat(tables, ignore_index=True)


@threads.plain()
def spectral_decay(model: nn.Module) -> Tensor:
    """Σ ‖U V‖² over a model's `LowRank` layers, to add to a loss: weight decay of the products.

    Decay of the factors, ‖U‖² + ‖V‖², is twice the nuclear norm of a balanced product. This is
    Σ σ_i² instead (Khodak et al. 2021), by two products r × r.

    >>> from svdlib import factorize
    >>> model = factorize(nn.Linear(64, 48), 20)
    >>> torch.isclose(spectral_decay(model), model.weight.square().sum()).item()
    True
    """
    pairs = (_grams(tied) for tied in _tied(model))
    return torch.stack([(inner * outer).sum() for inner, outer in pairs]).sum()


@threads.plain()
def orthogonality(model: nn.Module) -> Tensor:
    """How far a model's factors are from orthogonal columns of one length, to add to a loss.

    Σ ‖G / tr(G) − I / r‖² over the Gram matrices G (r × r) of both factors of each `LowRank` layer.
    """
    penalties = []
    for gram in (gram for tied in _tied(model) for gram in _grams(tied)):
        r = gram.shape[-1]
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        even = torch.eye(r, device=gram.device, dtype=gram.dtype) / r
        penalties.append((gram / trace - even).square().sum())
    return torch.stack(penalties).sum()


@dataclass(frozen=True)
class LowRankTraining:
    """Training of a factorized model whose ranks fall, and may rise, with its singular values.

    Args:
        tail: the relative norm that a layer may discard, see `truncate_`.
        every: steps of the optimizer between two changes of the ranks.
        grow: directions added to each layer after a change, along the gradient (Ceruti, Kusch, and
            Lubich 2022, section 3). Adding them does not change the product. The next change
            discards those that stayed below the tail.
        max_rank: a limit on every rank, added directions included.
        parameters: a limit on the numbers in the whole model, added directions included. See
            `truncate_`.
        within: steps in which this limit falls, geometrically, from the model's size to its value.
            The last of them changes the ranks too. A network that is cut hard before it has learned
            something may never recover.
    """

    tail: float = 0.0
    every: int = 100
    grow: int = 0
    max_rank: int | None = None
    parameters: int | None = None
    within: int = 0

    def __post_init__(self) -> None:
        if not 0 <= checks.number(self.tail, "tail") < 1:
            raise ValueError(f"tail must be at least 0 and below 1, got {self.tail}")
        checks.positive_int(self.every, "every")
        checks.positive_int(self.grow, "grow", least=0)
        checks.positive_int(self.within, "within", least=0)
        if self.within and self.parameters is None:
            raise ValueError(
                f"within needs parameters, the limit that falls; got within={self.within} alone"
            )
        for name in ("max_rank", "parameters"):
            if getattr(self, name) is not None:
                checks.positive_int(getattr(self, name), name)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Adaptation:
        """Change a model's ranks after steps of its optimizer, in a training loop of your own.

        Parameters stay the same objects. Where a layer's factors change, the optimizer's state for
        them, such as momentum, starts anew. A compiled model is compiled again for new shapes, by
        default eight times at most (``torch._dynamo.config.recompile_limit``).

        Raises:
            ValueError: no `LowRank` layer, an optimizer that does not step all their factors,
                L-BFGS, whose state is one vector for all parameters, or DistributedDataParallel,
                whose buckets keep the first shapes.

        >>> from svdlib import factorize
        >>> model = factorize(nn.Linear(64, 48), 20)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> adaptation = LowRankTraining(tail=0.1).attach(model, optimizer)
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # as the library accelerate wraps it
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("L-BFGS cannot step factors whose shapes change; use SGD or Adam")  # noqa: TRY004
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("DistributedDataParallel keeps the first shapes; train on one device")  # noqa: TRY004
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in _layers(model):
            if not set(map(id, layer.weights)) <= stepped:
                raise ValueError(
                    f"the optimizer does not have the factors of layer {name!r}; factorize the "
                    "model first, then make its optimizer"
                )
        _check_budget(model, self)
        return Adaptation(self, model, optimizer)


class Adaptation:
    """What `LowRankTraining.attach` returns: the ranks so far, and the means to stop or go on."""

    def __init__(
        self, plan: LowRankTraining, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self._plan, self._model, self._optimizer = plan, model, optimizer
        self._steps, self._size = 0, _size(model)
        self._rows: list[dict[str, object]] = []
        for tied in _tied(model):
            self._note(tied, tied[0][1].module.rank)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @property
    def history(self) -> pd.DataFrame:
        """A row per change and layer: step, layer, rank (needed), and stored (with what was added)."""
        return pd.DataFrame(self._rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each layer's rank by the optimizer's steps."""
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(7, 4))[1] if ax is None else ax
        for name, part in self.history.groupby("layer", sort=False):
            ax.step(part.step, part["rank"], where="post", label=name)
        ax.set(xlabel="steps of the optimizer", ylabel="rank", ylim=(0, None))
        ax.legend(title="layer")
        return ax

    def remove(self) -> None:
        """End the changes. Directions that were added last stay; `truncate_` discards them."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, the first size, and the history. The ranks are in the model."""
        return {"steps": self._steps, "size": self._size, "rows": list(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._steps, self._size, self._rows = state["steps"], state["size"], list(state["rows"])

    @threads.making()
    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        self._steps += 1
        if self._steps % self._plan.every and self._steps != self._plan.within:
            return
        groups = _tied(self._model)
        gradients = [_gradient(tied) for tied in groups]  # gone once the factors change
        lowered = _lower_(self._model, self._now())
        for tied, along, changed in zip(groups, gradients, lowered, strict=True):
            needed = tied[0][1].module.rank
            if along is not None:
                changed |= _grow_(tied, along, self._plan.grow, self._plan.max_rank)
            for weight in tied[0][1].weights if changed else ():
                self._optimizer.state.pop(weight, None)
            self._note(tied, needed)
        finished(self._model)

    def _now(self) -> LowRankTraining:
        """The plan with the limit on parameters at this step."""
        plan, left = self._plan, 1 - self._steps / max(self._plan.within, 1)
        if plan.parameters is None or left <= 0:
            return plan
        ratio = max(1.0, self._size / plan.parameters)
        return replace(plan, parameters=int(plan.parameters * ratio**left))

    def _note(self, tied: Tied, needed: int) -> None:
        for name, layer in tied:
            row = {"layer": name, "rank": needed, "stored": layer.module.rank}
            self._rows.append({"step": self._steps, **row})


def _layers(model: nn.Module) -> Iterator[tuple[str, Factorized]]:
    return chain.from_iterable(_tied(model))


def _tied(model: nn.Module) -> list[Tied]:
    groups: dict[frozenset[int], Tied] = {}
    for name, module in low_rank_layers(model).items():
        layer = Factorized(module)
        groups.setdefault(frozenset(map(id, layer.weights)), []).append((name, layer))
    if not groups:
        raise ValueError("the model has no LowRank layer; make some with factorize")
    return list(groups.values())


def _factors(name: str, layer: Factorized) -> list[Tensor]:
    """V (g, r, n) and U (g, m, r) of each group."""
    for weight in layer.weights:
        checks.finite(weight, f"a factor of layer {name!r}")
    matrices = (part.matrix() for part in layer.factors)
    return [A if A.ndim == 3 else A[None] for A in matrices]


def _grams(tied: Tied) -> tuple[Tensor, Tensor]:
    """V Vᵀ and Uᵀ U, which gradients reach."""
    V, U = (part.to_matrix(part.weight) for part in tied[0][1].factors)
    return V @ V.mT, U.mT @ U


def _gradient(tied: Tied) -> Tensor | None:
    outer = tied[0][1].factors[1]
    return None if outer.weight.grad is None else outer.to_matrix(outer.weight.grad)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _sizes(model: nn.Module) -> tuple[list[int], int]:
    """The numbers that each `_tied` layer has per unit of rank, and those of the rest."""
    layers = [tied[0][1] for tied in _tied(model)]
    stored = [sum(weight.numel() for weight in layer.weights) for layer in layers]
    rest = _size(model) - sum(stored)
    sizes = [n // layer.module.rank for n, layer in zip(stored, layers, strict=True)]
    return sizes, rest


def _check_budget(model: nn.Module, plan: LowRankTraining) -> None:
    if plan.parameters is None:
        return
    sizes, rest = _sizes(model)
    if (smallest := rest + sum(sizes) * (1 + plan.grow)) > plan.parameters:
        raise ValueError(
            f"parameters must be at least {smallest:,}, what the model has at rank "
            f"{1 + plan.grow}, got {plan.parameters:,}"
        )


def _lower_(model: nn.Module, plan: LowRankTraining) -> list[bool]:
    """Lower ranks as planned; for each `_tied` layer, whether it had a higher one."""
    groups = _tied(model)
    found = [balanced(*_factors(*tied[0])) for tied in groups]
    ranks = [int(ranks_within(S, plan.tail).max()) for *_, S in found]
    if plan.max_rank is not None:
        ranks = [min(rank, plan.max_rank) for rank in ranks]
    if plan.parameters is not None:
        sizes, rest = _sizes(model)
        room = plan.parameters - rest - plan.grow * sum(sizes)
        ranks = _within(room, sizes, ranks, [S for *_, S in found])
    changed = []
    for tied, (V, U, _), rank in zip(groups, found, ranks, strict=True):
        changed.append(rank < tied[0][1].module.rank)
        if changed[-1]:
            _put_(tied, V[:, :rank], U[..., :rank])
    return changed


def _within(room: int, sizes: list[int], most: list[int], spectra: list[Tensor]) -> list[int]:
    """Ranks of at least 1 that need ``room`` numbers at most.

    Each next term is the one of the largest log(E_{r+1} / E_r) per number stored.
    """
    terms = []
    for layer, (size, rank, S) in enumerate(zip(sizes, most, spectra, strict=True)):
        energy = S.double().square().sum(0).cumsum(0)[:rank].clamp(min=1e-300).log()
        terms += [(gain / size, layer) for gain in energy.diff().tolist()]
    ranks, room = [1] * len(sizes), room - sum(sizes)
    for _, layer in sorted(terms, key=itemgetter(0), reverse=True):
        if sizes[layer] <= room:
            ranks[layer] += 1
            room -= sizes[layer]
    return ranks


def _grow_(tied: Tied, along: Tensor, count: int, max_rank: int | None) -> bool:
    """Add columns to U, along its gradient and orthogonal to it, and as many zero rows to V."""
    name, layer = tied[0]
    V, U = _factors(name, layer)
    along = along.to(U.dtype).reshape(*U.shape[:2], -1)
    limit = min(layer.max_factor_rank, max_rank or layer.max_factor_rank)
    count = min(count, limit - V.shape[1], along.shape[-1])
    if count < 1:
        return False
    Q = torch.linalg.qr(U).Q
    new = torch.linalg.svd(along - Q @ (Q.mT @ along), full_matrices=False).U[..., :count]
    length = torch.linalg.matrix_norm(U, 2)[:, None, None]
    zeros = V.new_zeros(len(V), new.shape[-1], V.shape[-1])
    _put_(tied, torch.cat([V, zeros], 1), torch.cat([U, length * new], 2))
    return True


def _put_(tied: Tied, V: Tensor, U: Tensor) -> None:
    """Give layers factors of another rank, in the parameters that they have."""
    _, first = tied[0]
    width = len(V) * V.shape[1]
    for part, matrix in zip(first.factors, (V, U), strict=True):
        value = part.to_weight(matrix[0] if first.groups == 1 else matrix)
        value = value.to(part.weight.dtype).clone(memory_format=torch.contiguous_format)
        part.weight.grad = None
        # While a graph is alive, as that of the last loss, autograd remembers a parameter's old
        # shape. It forgets it when the type changes, so the type changes there and back.
        part.weight.data = value.to(
            torch.float64 if value.dtype != torch.float64 else torch.float32
        )
        part.weight.data = value
    for _, layer in tied:
        inner, outer = layer.factors
        setattr(inner.module, inner.side_names[1], width)
        setattr(outer.module, outer.side_names[0], width)
