"""Networks that really shrink: layers stored, and computed, as two thin factors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlib import checks
from svdlib.lowrank import truncated_svd
from svdlib.modules import (
    LowRank,
    Matrix,
    evaluating,
    low_rank_layers,
    matrices,
    replace_module,
    resized,
    thin_layers,
)


def factorize(
    model: nn.Module,
    ranks: float | Mapping[str, int],
    *,
    calibration: Tensor | None = None,
) -> nn.Module:
    """A copy of a model in which weight matrices W (m × n) are products of thin factors.

    Without ``calibration``, W_r = U_r Σ_r V_rᵀ, the best approximation of W in itself, and the
    output is that of `project_` with the same ranks. With it, the best approximation in what
    the layer puts out on such inputs x, of mean μ and covariance C: the minimum of
    E ‖(W − W_r) x + b − b_r‖² over all W_r of rank r and all b_r is at

        W_r = U_r U_rᵀ W,    b_r = b + (W − W_r) μ,

    with U_r the leading eigenvectors of W C Wᵀ (Zhang, Zou, He and Sun 2016, section 3.1). That is
    the truncated SVD of the whitened W C^½, whitening undone, without the inverse of C^½ that a
    rank-deficient C does not have. A layer without a bias takes the second moment for C.

    Either way the singular values are shared evenly, √σ to each factor. Factors keep the
    weight's type, device, mode and ``requires_grad``; the model is not changed.

    A layer is left as it was, with a warning that names it, where two factors would not store
    less, r (m + n) ≥ m n.

    Args:
        ranks: {layer: rank}, as `reveal_ranks` gives it; or one rank for all layers, or a
            fraction in (0, 1) of each layer's min(m, n).
        calibration: inputs of the model (some hundreds; no labels needed), on its device.

    Raises:
        ValueError: a model without matrices, an unknown layer, a rank that is not whole and
            positive (or a fraction), NaN or infinite weights, empty or non-finite calibration
            inputs. Also a layer that can't be factorized, if it is named: a grouped convolution,
            a subclass of Linear or Conv2d (such as in ``nn.MultiheadAttention``) or a
            parametrized layer, one with hooks, one whose weight others share. If it is not
            named, it is left as it was, with a warning.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 60))
    >>> small = factorize(model, {"0": 10, "2": 5})
    >>> sum(p.numel() for p in model.parameters()), sum(p.numel() for p in small.parameters())
    (12940, 2640)
    >>> small[0]
    LowRank(
      (0): Linear(in_features=100, out_features=10, bias=False)
      (1): Linear(in_features=10, out_features=80, bias=True)
    )
    """
    small = copy.deepcopy(model)
    layers = {name: cast(Matrix, small.get_submodule(name)) for name in matrices(small)}
    if not layers:
        raise ValueError("the model has no nn.Linear or nn.Conv2d to factorize")
    named = isinstance(ranks, Mapping)
    left = []
    chosen: dict[str, int] = {}
    for name, rank in _ranks(layers, ranks).items():
        reason = _refusal(small, layers[name])
        if reason and named:
            raise ValueError(f"layer {name!r} can't be factorized: {reason}")
        m, n = _matrix(layers[name]).shape
        stored = rank * (m + n)
        if not reason and stored >= m * n:
            reason = f"rank {rank} stores {stored:,} numbers as factors, {m * n:,} as a matrix"
        if reason:
            left.append(f"{name!r} ({reason})")
            continue
        checks.finite(layers[name].weight, f"the weight of layer {name!r}")
        chosen[name] = rank
    if left:
        warnings.warn(f"left as they were: {'; '.join(left)}", stacklevel=2)
    inputs = {}
    if calibration is not None:
        inputs = _input_moments(small, {name: layers[name] for name in chosen}, calibration)
    with torch.no_grad():
        for name, rank in chosen.items():
            small = replace_module(
                small, layers[name], _factors(layers[name], rank, inputs.get(name))
            )
    return small


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A copy of a model in which each `LowRank` layer is one dense layer again.

    >>> small = factorize(nn.Sequential(nn.Linear(100, 80)), 10)
    >>> merge(small)
    Sequential(
      (0): Linear(in_features=100, out_features=80, bias=True)
    )
    """
    dense = copy.deepcopy(model)
    for layer in low_rank_layers(dense).values():
        first, second = layer.factors
        outs = second.out_features if isinstance(second, nn.Linear) else second.out_channels
        whole = resized(first, outs=outs, bias=second.bias is not None)
        whole.weight.copy_(layer.weight).requires_grad_(first.weight.requires_grad)
        if second.bias is not None:
            whole.bias = second.bias
        dense = replace_module(dense, layer, whole)
    return dense


def _matrix(layer: Matrix) -> Tensor:
    """The weight as an m × n matrix, in a type that can be decomposed."""
    weight = layer.weight.detach().flatten(1)
    return weight if weight.dtype == torch.float64 else weight.float()


def _ranks(layers: Mapping[str, Matrix], ranks: float | Mapping[str, int]) -> dict[str, int]:
    if isinstance(ranks, Mapping):
        for name in ranks:
            checks.one_of(name, tuple(layers), "layer")
        wanted = {name: (rank, f"the rank of layer {name!r}") for name, rank in ranks.items()}
        return {name: checks.positive_int(*rank) for name, rank in wanted.items()}
    if isinstance(ranks, float):
        if not 0 < ranks < 1:
            raise ValueError(f"a fraction of the ranks must be between 0 and 1, not {ranks}")
        full = {name: min(_matrix(layer).shape) for name, layer in layers.items()}
        return {name: max(1, round(ranks * rank)) for name, rank in full.items()}
    return dict.fromkeys(layers, checks.positive_int(ranks, "rank"))


def _refusal(model: nn.Module, layer: Matrix) -> str | None:
    """Why a layer can't be replaced by two, if so."""
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"a {type(layer).__name__} may do other things with its weight than a plain layer"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"its {layer.groups} groups of channels have no common factor"
    if not layer.weight.is_floating_point():
        return f"its type is {layer.weight.dtype}"
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    if any(hooks):
        return "its hooks would be lost; remove them first"
    owners = [
        part
        for part in model.modules()
        if any(p is layer.weight for p in part._parameters.values())
    ]
    if len(owners) > 1:
        return "its weight is shared with another layer"
    return None


def _factors(layer: Matrix, rank: int, inputs: tuple[Tensor, Tensor] | None) -> LowRank:
    A = _matrix(layer)
    thin = thin_layers(layer, rank)
    first, second = thin.factors
    if inputs is None:
        U, S, Vh = truncated_svd(A, rank)
    else:
        mean, moment = inputs
        left = torch.linalg.eigh(A.double() @ moment @ A.double().mT).eigenvectors[:, -rank:]
        inner, S, Vh = truncated_svd(left.mT.to(A.dtype) @ A, rank)
        U = left.to(A.dtype) @ inner
        if layer.bias is not None:
            lost = A.double() @ mean - (U * S).double() @ (Vh.double() @ mean)
    root = S.sqrt()
    first.weight.copy_((root[:, None] * Vh).view_as(first.weight))
    second.weight.copy_((U * root).view_as(second.weight))
    for factor in (first, second):
        factor.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None and second.bias is not None:
        shift = 0 if inputs is None else lost.to(layer.bias.dtype)
        second.bias.copy_(layer.bias + shift).requires_grad_(layer.bias.requires_grad)
    return thin


@torch.no_grad()
def _input_moments(
    model: nn.Module, layers: Mapping[str, Matrix], calibration: Tensor, batch: int = 16
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean (n,) and covariance (n, n) of what each layer's matrix is applied to, in float64.

    For a layer without bias the second moment takes the covariance's place.
    """
    if len(calibration) == 0:
        raise ValueError("calibration is empty; some hundreds of inputs would do")
    checks.finite(calibration, "calibration")
    counts = dict.fromkeys(layers, 0)
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    with evaluating(model), _watching(layers) as seen:
        for part in calibration.split(batch):
            model(part)
            for name, rows in seen.items():
                rows = rows.double()
                counts[name] += len(rows)
                sums[name] = sums.get(name, 0) + rows.sum(0)
                squares[name] = squares.get(name, 0) + rows.mT @ rows
            seen.clear()
    unused = [name for name in layers if not counts[name]]
    if unused:
        raise ValueError(f"calibration does not reach layer {unused[0]!r}")
    moments = {}
    for name, layer in layers.items():
        mean, moment = sums[name] / counts[name], squares[name] / counts[name]
        if layer.bias is not None:
            moment = moment - torch.outer(mean, mean)
        moments[name] = (mean, moment)
    return moments


@contextmanager
def _watching(layers: Mapping[str, Matrix]) -> Iterator[dict[str, Tensor]]:
    """The rows (…, n) that each layer's matrix is applied to, as the model is called."""
    seen: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, x: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            pad = layer._reversed_padding_repeated_twice
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, pad, mode=mode)
            x = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).mT
        rows = x.flatten(0, -2)
        seen[name] = torch.cat([seen[name], rows]) if name in seen else rows

    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: note(name, layer, inputs[0])
        )
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
