"""What cutting a layer will cost, predicted from its gradients, without cutting it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.network.calls import Batch, batches, class_losses, copied
from svdlib.network.chain import CACHED, task_of
from svdlib.network.kinds import Layer
from svdlib.network.opened import Network
from svdlib.network.task import MEMORY, check_data
from svdlib.ranks.profile import profiled_layers

METHODS = ("output", "gradient", "fisher")
Factors = tuple[Tensor, Tensor, Tensor]


def predicted_profile(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    by: str = "fisher",
    *,
    memory: int = MEMORY,
) -> pd.DataFrame:
    """A loss profile that is predicted, for layers of any module: no rank is tried.

    Cutting W = Σ σ_i u_i v_iᵀ to rank j takes Σ_{i>j} σ_i u_i (v_iᵀ h) from the layer's output z.
    With δ = ∂ℓ/∂z, an image's loss changes to first order by −Σ_{i>j} t_i, where
    t_i = σ_i (u_iᵀ δ)(v_iᵀ h), summed over the places of a layer that is applied at several and
    over the layers that share the weight. One forward and backward pass gives all t_i.

    - ``"output"``: E‖Σ_{i>j} σ_i u_i v_iᵀ h‖² / E‖W h‖², the part of the output's square that is
      cut (Yuan et al. 2023, ASVD; exact for a cut at the layer's own singular vectors), no loss.
    - ``"gradient"``: |E Σ_{i>j} t_i|, the first order (Molchanov et al. 2017 for channels).
    - ``"fisher"``: ½ E (Σ_{i>j} t_i)², the second order with the empirical Fisher matrix for the
      Hessian (Theis et al. 2018; LeCun et al. 1990 with its diagonal).

    Args:
        model: as in `loss_profile`; a warning names grouped and transposed convolutions, left out.
        x, y, memory: as in `loss_profile`, inputs (n, …) and labels (n,); no batches.
        by: one of the names above.

    Returns:
        the columns of `loss_profile` but accuracy, for `reveal_ranks`: increase is the prediction,
        se its standard error over images (0 for "output"), loss the network's own plus increase.

    Raises:
        ValueError: as `loss_profile`; an unknown method.

    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> profile = predicted_profile(net, torch.rand(20, 8), torch.arange(20) % 3)
    >>> profile.groupby("layer").increase.min().tolist()
    [0.0, 0.0]
    """
    checks.one_of(by, METHODS, "method")
    if y is None or not isinstance(x, Tensor):
        raise ValueError(
            "predicted_profile takes inputs and labels as two tensors, predicted_profile(model, x, "
            "y); loss_profile takes batches too"
        )
    check_data(x, y)
    net = Network.to_measure(model)
    layers = profiled_layers(net, None)
    net.left |= {name: "it has no one matrix" for name in layers if not layers[name].has_code()}
    layers = {name: layer for name, layer in layers.items() if name not in net.left}
    if not layers:
        raise ValueError("no layer can be predicted; loss_profile measures convolutions too")
    net.warn()
    with net.measuring(), threads.making():
        task = task_of(net, x, y, memory=memory)
        shared = net.first_of_ties(layers)
        owners = {name: shared.get(name, name) for name in layers}
        factors: dict[str, Factors] = {}
        for name, layer in layers.items():
            if (first := owners[name]) == name:
                factors[name] = tuple(torch.linalg.svd(layer.matrix(), full_matrices=False))
                continue
            U, S, Vh = factors[first]
            is_turned = layer.transposed != layers[first].transposed
            factors[name] = (Vh.mT, S, U.mT) if is_turned else (U, S, Vh)
        loss = task.measure()
        size = task.size if task.mixes else min(task.size or 1, max(1, CACHED // task.width))
        terms: dict[str, list[Tensor]] = {name: [] for name in layers}
        for batch in batches((x, y), size):
            for name, found in _terms(net, layers, factors, batch, by):
                terms[name].append(found)
    totals: dict[str, Tensor] = {}
    for name, first in owners.items():
        found = torch.cat(terms[name]).double()
        totals[first] = totals[first] + found if first in totals else found
    tables = [_table(name, factors[name], totals[owners[name]], by, loss) for name in layers]
    profile = pd.concat(tables, ignore_index=True)
    if shared:
        profile["shared"] = profile.layer.replace(shared)
    profile.attrs["loss"] = loss
    return profile


def _terms(
    net: Network, layers: Mapping[str, Layer], factors: Mapping[str, Factors], batch: Batch, by: str
) -> Iterator[tuple[str, Tensor]]:
    """Each layer's t_i of each image (b, k), or the squares of its terms' outputs for "output"."""
    codes: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor:
        if name in codes:
            raise ValueError(f"layer {name!r} is called more than once")
        codes[name] = layers[name].apply(inputs[0].detach(), factors[name][2])
        outputs[name] = z if z.requires_grad else z.requires_grad_()
        return z

    with torch.set_grad_enabled(by != "output"), net.hooked(layers, after=note):
        losses = class_losses(net.model, copied(batch))[0].sum()
    if by != "output":
        found = torch.autograd.grad(losses, list(outputs.values()))
        gradients = dict(zip(outputs, found, strict=True))
    for name, code in codes.items():
        (U, S, _), dim = factors[name], layers[name].feature_dim
        code = code.movedim(dim, -1)
        if by == "output":
            terms = (code * S).square()
        else:
            terms = code * (gradients[name].movedim(dim, -1).to(U.dtype) @ (U * S))
        yield name, terms.flatten(1, -2).sum(1) if terms.ndim > 2 else terms


def _table(name: str, factors: Factors, terms: Tensor, by: str, loss: float) -> pd.DataFrame:
    U, S, Vh = factors
    tails = F.pad(terms.flip(1).cumsum(1).flip(1), (0, 1))  # Σ_{i>j} for j = 0 … k
    n, se = len(tails), torch.zeros(tails.shape[1])
    if by == "output":
        mean = tails.mean(0)
        mean = mean / mean[0].clamp(min=1e-300)
    else:
        changes = tails.square() / 2 if by == "fisher" else -tails
        mean = changes.mean(0).abs()
        se = changes.std(0) / math.sqrt(n) if n > 1 else se
    numbers = {"loss": loss + mean, "increase": mean, "se": se}
    columns = {column: values.tolist() for column, values in numbers.items()}
    matrix = {"rows": len(U), "columns": Vh.shape[1], "sigma": [math.nan, *S.tolist()]}
    return pd.DataFrame({"layer": name, "rank": range(tails.shape[1]), **columns, **matrix})
