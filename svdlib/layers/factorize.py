"""Networks that really shrink: layers stored, and computed, as two thin factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import nn

from svdlib import checks, threads
from svdlib.bars import bar
from svdlib.layers.calibrate import Mask, call_order, fit, fits_of, paired_sums
from svdlib.network.attention import pack_
from svdlib.network.batches import Batches, batches, refuse_generator
from svdlib.network.calls import Call
from svdlib.network.kinds import Layer
from svdlib.network.low_rank import Approximations, LowRank, low_rank_layers, thin_twins
from svdlib.network.opened import READ, Network, duplicate, merge_

# Inputs of a call, where calibration is a single batch.
BATCH = 128


@threads.making()
def factorize(
    model: nn.Module,
    ranks: float | Mapping[str, int],
    *,
    calibration: Batches | None = None,
    call: Call | None = None,
    mask: Mask | None = None,
    sequential: bool = False,
    progress: bool = True,
) -> nn.Module:
    """A copy of a model in which weight matrices W (m × n) are products of thin factors.

    Without ``calibration``, W_r = U_r Σ_r V_rᵀ, the best approximation of W in itself, and the
    output is that of `project_` with the same ranks. With it, the best approximation in what
    the layer puts out on such inputs x, of mean μ and covariance C: the minimum of
    E ‖(W − W_r) x + b − b_r‖² over all W_r of rank r and all b_r is at

        W_r = U_r U_rᵀ W,    b_r = b + (W − W_r) μ,

    with U_r the leading eigenvectors of W C Wᵀ (Zhang, Zou, He and Sun 2016, section 3.1). That is
    the truncated SVD of the whitened W C^½, whitening undone, without the inverse of C^½ that a
    rank-deficient C does not have. A layer without a bias takes the second moment for C, and so
    does a transposed convolution, whose windows overlap. Layers that share a weight, such as an
    embedding and an output layer, share its factors, and take the best approximation in itself.

    With ``sequential``, layers are cut in the order in which they are called, each fitted on the
    inputs x̃ that the layers cut before it leave, to what the dense network's layer puts out on
    its own inputs x, see `calibrate.Fit`: later layers make up for the errors of earlier ones. It
    takes two passes a layer, and is worth it where much is cut.

    Either way the singular values are shared evenly, √σ to each factor. Factors keep the
    weight's type, device, mode and ``requires_grad``; the model is not changed.

    An ``nn.MultiheadAttention`` has the layers q_proj, k_proj, v_proj and out_proj. In the copy
    these are layers of their own where one of them is factorized, in a subclass of the same
    arguments and outputs, without torch's fused ways.

    A layer is left as it was, with a warning that names it, where two factors would not store
    less, r (m + n) ≥ m n. One that is factorized already is factorized anew from the product of
    its factors, where the rank is lower.

    Args:
        ranks: {layer: rank}, as `reveal_ranks` gives it; or one rank for all layers, or a
            fraction in (0, 1) of each layer's min(m, n).
        calibration: inputs of the model (some hundreds; no labels needed): a tensor (n, …), a
            tuple or mapping of such, or an iterable of batches, such as a DataLoader, looked at
            once. By default the last of a tuple is left out where the model takes one less, and
            "labels" of a mapping, whose values are keyword arguments.
        call: ``call(model, batch)`` calls the model on a batch in another way.
        mask: ``mask(batch)`` gives the places (n, T) that count where the others are padding. By
            default a mapping's "attention_mask", if it has one.
        sequential: calibrate one layer after the other; the data are looked at many times.
        progress: show a progress bar where calibration takes longer than some seconds.

    Raises:
        ValueError: a model without matrices, an unknown layer, a rank that is not whole and
            positive (or a fraction), NaN or infinite weights, empty or non-finite calibration
            inputs. Also a layer that can't be factorized, if it is named: a subclass of a plain
            layer or a parametrized one, one with hooks, a parameter that a module reads itself (an
            LSTM's; `project_` takes these), an Embedding with ``max_norm``, one whose weight is
            shared with a layer of which the same rank is not asked, or which is no Linear or
            Embedding. If it is not named, it is left as it was, with a warning. So is a layer that
            calibration does not reach, and one, where calibration inputs show it, whose weight
            the model reads without calling the layer: its factors would be multiplied at every
            call. Calibration that reaches no layer.

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
    if calibration is None and (sequential or mask is not None):
        raise ValueError("sequential=True and mask are about calibration, which is not given")
    if torch.is_tensor(calibration) and len(calibration) == 0:
        raise ValueError("calibration is empty; some hundreds of inputs would do")
    if sequential:
        refuse_generator(calibration, "calibration of one layer after the other")
    net, named = Network.copy_of(model), isinstance(ranks, Mapping)
    earlier = low_rank_layers(duplicate(model))
    chosen = _chosen(net, ranks, earlier)
    fits: Fits = dict.fromkeys(net.untied(chosen)).items()
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws random numbers
        if calibration is not None:
            data = batches(calibration, BATCH)
            few = next(data)
            for name in net.weights_read(chosen, few, call):
                if named:
                    raise ValueError(
                        f"can't factorize layer {name!r}: {READ}; leave it out of the ranks"
                    )
                net.leave(name, READ)
            chosen = {name: rank for name, rank in chosen.items() if name not in net.left}
            if sequential:
                dense, own = Network.copy_of(model), net.untied(chosen)
                fits = one_after_another(net, dense, own, calibration, call, mask, progress)
            else:
                own = net.untied(chosen)
                fits = fits_of(net, own, chain([few], data), call, mask, progress)
        for name, layer in earlier.items():
            if name not in chosen:
                net.put(name, layer)
        small = factorized(net, chosen, fits)
    net.warn()
    return small


# Layers' fits, None where it is the truncated SVD. Each layer is replaced before the next is asked
# for; a layer without a fit is one that calibration does not reach.
Fits = Iterable[tuple[str, Approximations | None]]


def _chosen(
    net: Network, ranks: float | Mapping[str, int], earlier: Mapping[str, LowRank]
) -> dict[str, int]:
    """The ranks at which layers are to be factorized; why the others are not is in ``net.left``."""
    named = ranks if isinstance(ranks, Mapping) else None
    layers = net.choose(named, "factorize", replace=True)
    wanted = _ranks(layers, ranks)
    net.check_ties(wanted, "factorize")
    chosen: dict[str, int] = {}
    for name, rank in wanted.items():
        layer = layers[name]
        if name in earlier and rank >= earlier[name].rank:
            net.left[name] = f"it has rank {earlier[name].rank} already"
        elif layer.stored(rank) == layer.weight.numel():
            factors = layer.groups * rank * sum(layer.shape)
            net.left[name] = (
                f"rank {rank} stores {factors:,} numbers as factors, {layer.weight.numel():,} as a "
                "matrix"
            )
        else:
            checks.finite(layer.weight, f"the weight of layer {name!r}")
            chosen[name] = rank
    return chosen


@torch.no_grad()
def factorized(net: Network, ranks: Mapping[str, int], fits: Fits) -> nn.Module:
    """The opened copy of a model, given away with factors of these ranks, by these fits.

    Raises:
        ValueError: calibration that reaches no layer.
    """
    layers = {name: net.layers[name] for name in ranks}
    twins = thin_twins(layers, ranks)
    own = net.untied(layers)
    unseen = set(own)
    shared = dict.fromkeys(name for name in layers if name not in unseen)
    for name, found in chain(shared.items(), fits):
        twins[name].fill_(layers[name], found)
        net.put(name, twins[name])
        unseen.discard(name)
    if unseen and len(unseen) == len(layers):
        raise ValueError(f"calibration does not reach layer {own[0]!r}, nor any other")
    net.left |= {name: "calibration does not reach it" for name in own if name in unseen}
    return net.closed()


def one_after_another(
    net: Network,
    dense: Network,
    names: Iterable[str],
    calibration: Batches,
    call: Call | None,
    mask: Mask | None,
    progress: bool,
) -> Iterator[tuple[str, Approximations]]:
    """Fits in the order of the calls, each on the inputs that those cut before it leave."""
    order, once = call_order(net, names, batches(calibration, BATCH), call, mask)
    for group in bar(order, progress=progress, desc="layers", delay=3, leave=False):
        alone = once.issuperset(group)
        data = batches(calibration, BATCH)
        sums = paired_sums(dense, net, group, data, call, mask, alone)
        for name in sums:
            yield name, fit(net.layers[name], sums[name])


@threads.making()
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A copy of a model in which each `LowRank` layer is one dense layer again.

    >>> small = factorize(nn.Sequential(nn.Linear(100, 80)), 10)
    >>> merge(small)
    Sequential(
      (0): Linear(in_features=100, out_features=80, bias=True)
    )
    """
    return pack_(merge_(duplicate(model)))


def _ranks(layers: Mapping[str, Layer], ranks: float | Mapping[str, int]) -> dict[str, int]:
    if isinstance(ranks, Mapping):
        wanted = {name: (rank, f"the rank of layer {name!r}") for name, rank in ranks.items()}
        return {name: checks.positive_int(*rank) for name, rank in wanted.items()}
    if isinstance(ranks, float):
        if not 0 < ranks < 1:
            raise ValueError(f"a fraction of the ranks must be between 0 and 1, not {ranks}")
        return {name: max(1, round(ranks * layer.full_rank)) for name, layer in layers.items()}
    return dict.fromkeys(layers, checks.positive_int(ranks, "rank"))
