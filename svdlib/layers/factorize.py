"""Networks that really shrink: layers stored, and computed, as two thin factors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from types import MappingProxyType

import torch
from torch import nn

from svdlib import checks, threads
from svdlib.bars import bar
from svdlib.layers.calibrate import (
    BATCH,
    Calibration,
    Gradients,
    calibration_of,
    call_order,
    fit,
    fits_of,
    paired_sums,
)
from svdlib.network.attention import pack_
from svdlib.network.calls import Batches, batches, refuse_generator
from svdlib.network.kinds import Layer
from svdlib.network.low_rank import Approximations, LowRank, low_rank_layers, thin_twins
from svdlib.network.opened import READ, Network, duplicate, finished, merge_


@threads.making()
def factorize(
    model: nn.Module,
    ranks: float | Mapping[str, int],
    *,
    calibration: Batches | Calibration | None = None,
    progress: bool = True,
) -> nn.Module:
    """A copy of a model in which weight matrices W (m × n) are products of thin factors.

    Without ``calibration``, W_r = U_r Σ_r V_rᵀ is the best approximation of W itself. With it, W_r
    and b_r are best for the layer's outputs on inputs x of mean μ and covariance C: the minimum of
    E ‖(W − W_r) x + b − b_r‖² over all W_r of rank r and all b_r is at

        W_r = U_r U_rᵀ W,    b_r = b + (W − W_r) μ,

    with U_r the leading eigenvectors of W C Wᵀ (Zhang, Zou, He and Sun 2016, section 3.1). C is the
    second moment for a layer without a bias and for a transposed convolution, whose windows
    overlap. Layers that share a weight share the factors of W itself.

    With ``Calibration(…, sequential=True)``, layers are cut in the order of their calls. Each is
    fitted on the inputs that the cut layers before it leave to the dense layer's outputs on its own
    inputs (reduced-rank regression, Izenman 1975), and so makes up for their errors.

    The singular values are shared evenly, √σ per factor. An ``nn.MultiheadAttention`` has the
    layers q_proj, k_proj, v_proj and out_proj. A `LowRank` layer gets lower ranks only.

    Args:
        ranks: {layer: rank}, as from `reveal_ranks`; one rank for all layers; or a fraction in
            (0, 1) of each layer's min(m, n).
        calibration: a few hundred inputs of the model, as in `Calibration`, or a `Calibration`.

    Raises:
        ValueError: a model without matrices, an unknown layer or impossible rank, NaN or infinite
            weights, calibration that is empty, not finite, or reaches no layer; a named layer that
            cannot be factorized, as with hooks or a weight that the model reads itself. Unless
            named, it is left dense with a warning, as one that calibration does not reach.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 60))
    >>> factorize(model, {"0": 10, "2": 5})[0]
    LowRank(
      (0): Linear(in_features=100, out_features=10, bias=False)
      (1): Linear(in_features=10, out_features=80, bias=True)
    )
    """
    inputs = None if calibration is None else calibration_of(calibration)
    if inputs is not None and inputs.data is None:
        raise ValueError("calibration has no data, got Calibration(data=None); give it the inputs")
    if inputs is not None and inputs.sequential:
        refuse_generator(inputs.data, "calibration of one layer after the other")
    net, named = Network.copy_of(model), isinstance(ranks, Mapping)
    earlier = low_rank_layers(duplicate(model)) if low_rank_layers(model) else {}
    chosen = _chosen(net, ranks, earlier)
    fits: Fits = dict.fromkeys(net.untied(chosen)).items()
    with threads.same_random():  # a DataLoader draws random numbers
        if inputs is not None:
            data = batches(inputs.data, BATCH)
            first = next(data)
            for name in net.weights_read(chosen, first, inputs.call):
                if named:
                    raise ValueError(f"can't factorize layer {name!r}: {READ}; leave it out")
                net.leave(name, READ)
            chosen = {name: rank for name, rank in chosen.items() if name not in net.left}
            untied = net.untied(chosen)
            if inputs.sequential:
                dense = Network.copy_of(model)
                fits = one_after_another(net, dense, untied, inputs, progress=progress)
            else:
                inputs = replace(inputs, data=chain([first], data))
                fits = fits_of(net, untied, inputs, progress=progress)
        for name, layer in earlier.items():
            if name not in chosen:
                net.put(name, layer)
        small = factorized(net, chosen, fits)
    net.warn()
    return small


# Layers' fits, None for the truncated SVD. Each layer is replaced before the next is asked for.
Fits = Iterable[tuple[str, Approximations | None]]


def _chosen(
    net: Network, ranks: float | Mapping[str, int], earlier: Mapping[str, LowRank]
) -> dict[str, int]:
    """The ranks of layers to factorize; why others are not is in ``net.left``."""
    layers = net.choose(ranks if isinstance(ranks, Mapping) else None, "factorize", replace=True)
    wanted = _ranks(layers, ranks)
    net.check_ties(wanted, "factorize")
    chosen: dict[str, int] = {}
    for name, rank in wanted.items():
        layer, size = layers[name], layers[name].weight.numel()
        if name in earlier and rank >= earlier[name].rank:
            net.left[name] = f"it has rank {earlier[name].rank} already"
        elif layer.stored(rank) == size:
            factors = layer.groups * rank * sum(layer.shape)
            reason = f"rank {rank} stores {factors:,} numbers as factors, {size:,} as a matrix"
            net.left[name] = reason
        else:
            checks.finite(layer.weight, f"the weight of layer {name!r}")
            chosen[name] = rank
    return chosen


def _ranks(layers: Mapping[str, Layer], ranks: float | Mapping[str, int]) -> dict[str, int]:
    if isinstance(ranks, Mapping):
        return {
            name: checks.positive_int(rank, f"the rank of layer {name!r}")
            for name, rank in ranks.items()
        }
    if not isinstance(ranks, float):
        return dict.fromkeys(layers, checks.positive_int(ranks, "rank"))
    if not 0 < ranks < 1:
        raise ValueError(f"a fraction of the ranks must be between 0 and 1, not {ranks}")
    return {name: max(1, round(ranks * layer.full_rank)) for name, layer in layers.items()}


@torch.no_grad()
def factorized(net: Network, ranks: Mapping[str, int], fits: Fits) -> nn.Module:
    """The opened copy of a model, closed, with factors of these ranks by these fits."""
    layers = {name: net.layers[name] for name in ranks}
    twins = thin_twins(layers, ranks)
    own = net.untied(layers)
    shared = [(name, None) for name in layers if name not in own]
    unseen = dict.fromkeys(own)
    for name, found in chain(shared, fits):
        twins[name].fill_(layers[name], found)
        net.put(name, twins[name])
        unseen.pop(name, None)
    if unseen and len(unseen) == len(layers):
        raise ValueError(f"calibration does not reach layer {own[0]!r}, nor any other")
    net.left |= dict.fromkeys(unseen, "calibration does not reach it")
    return net.closed()


def one_after_another(
    net: Network,
    dense: Network,
    names: Collection[str],
    calibration: Calibration,
    gradients: Mapping[str, Gradients] = MappingProxyType({}),
    progress: bool = False,
) -> Iterator[tuple[str, Approximations]]:
    """Fits in the order of the calls, each on the inputs that the layers cut before it leave."""
    order, once = call_order(net, names, calibration)
    for group in bar(order, progress=progress, desc="factors", delay=3, leave=False):
        sums = paired_sums(dense, net, group, calibration, once.issuperset(group))
        for name in sums:
            yield name, fit(net.layers[name], sums[name], gradients.get(name))


@threads.making()
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A copy of a model in which each `LowRank` layer is one dense layer again.

    >>> merge(factorize(nn.Sequential(nn.Linear(100, 80)), 10))[0]
    Linear(in_features=100, out_features=80, bias=True)
    """
    return finished(pack_(merge_(duplicate(model))))
