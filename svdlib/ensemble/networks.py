"""Many perceptrons of one shape, held in stacked tensors, their layers dense or factorized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.linalg.factors import truncated
from svdlib.network.chain import is_relu_perceptron
from svdlib.network.kinds import Layer
from svdlib.network.low_rank import LowRank
from svdlib.network.opened import find_layers


def perceptron(sizes: Sequence[int]) -> nn.Sequential:
    """``Linear, ReLU, …, Linear`` in float32, initialized by torch from its global generator."""
    linear = partial(nn.Linear, dtype=torch.float32)
    modules = [part for sides in pairwise(sizes) for part in (linear(*sides), nn.ReLU())]
    return nn.Sequential(*modules[:-1])


class StackedLayer(nn.Module):
    """One layer h ↦ W h + b of S networks, dense, or factorized as W = U V.

    ``factors`` are [W b] (S, out, in + 1), or V (S, r, in) and [U b] (S, out, r + 1) with the
    largest of the ``ranks`` (S,): zeros pad those of lower rank, and stay zero in training.
    """

    ranks: Tensor | None

    def __init__(self, weights: Sequence[Tensor], bias: Tensor, ranks: Tensor | None) -> None:
        super().__init__()
        *inner, outer = weights
        self.factors = nn.ParameterList([*inner, torch.cat([outer, bias.unsqueeze(-1)], -1)])
        self.register_buffer("ranks", ranks)

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> StackedLayer:
        """A copy of one layer of each network, all of them dense or all factorized."""
        factors = zip(*(layer.weights for layer in layers), strict=True)
        weights = [_padded(stack) for stack in factors]
        bias = torch.stack([cast(Tensor, layer.bias).detach() for layer in layers])
        ranks = [layer.max_rank for layer in layers if layer.is_factorized]
        return cls(weights, bias, torch.tensor(ranks, device=bias.device) if ranks else None)

    @property
    def weights(self) -> list[Tensor]:
        """[W] or [V, U], views."""
        *inner, outer = self.factors
        return [*inner, outer[..., :-1]]

    @property
    def bias(self) -> Tensor:
        return self.factors[-1][..., -1]

    def matrix(self) -> Tensor:
        *inner, outer = self.weights
        return outer @ inner[0] if inner else outer

    def module(self, network: int) -> nn.Linear | LowRank:
        if self.ranks is None:
            return _linear(self.weights[0][network], self.bias[network])
        rank = int(self.ranks[network])
        V, U = (factor[network] for factor in self.weights)
        return LowRank(_linear(V[:rank], None), _linear(U[:, :rank], self.bias[network]))

    @torch.no_grad()
    def truncate_(self, tail: float) -> None:
        V, U = self.weights
        V, U, self.ranks = truncated(V, U, tail)
        rank = int(self.ranks.max())
        outer = torch.cat([U[..., :rank], self.bias.unsqueeze(-1)], -1)
        self.factors = nn.ParameterList([V[:, :rank].contiguous(), outer])


class MLPEnsemble(nn.Module):
    """S ReLU perceptrons of one shape, one for each seed.

    Layer l of all networks is one tensor [W b] (S, out, in + 1), so that a step of training is a
    handful of batched products. ``ensemble[i]`` is a copy of network i, which starts bit for bit as

        torch.manual_seed(seeds[i]); nn.Sequential(nn.Linear(…), nn.ReLU(), …, nn.Linear(…))

    in float32, whatever torch's default type is.

    Args:
        sizes: widths (in, hidden, …, out), at least two.
        seeds: S integers. The global random state is left alone.
        device: where the tensors live; "auto" is CUDA if available.

    >>> nets = MLPEnsemble((784, 15, 15, 10), seeds=range(32), device="cpu")
    >>> nets.weights[0].shape
    torch.Size([32, 15, 784])
    """

    layers: Sequence[StackedLayer]
    seeds: tuple[int, ...] | None

    @threads.making()
    def __init__(
        self, sizes: Sequence[int], seeds: Iterable[int] = (0,), device: str | torch.device = "auto"
    ) -> None:
        sizes = checks.several(sizes, "sizes", "(784, 15, 10)")
        sizes = [checks.positive_int(size, "a layer size") for size in sizes]
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least (in, out), not {tuple(sizes)}")
        seeds = checks.several(seeds, "seeds", "range(4)")
        seeds = tuple(checks.positive_int(seed, "a seed", least=0) for seed in seeds)
        if not seeds:
            raise ValueError("an ensemble needs at least one seed, none was given")
        modules = []
        with threads.same_random(), torch.device("cpu"):
            for seed in seeds:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed reaches the GPUs too
                modules.append(perceptron(sizes))
        super().__init__()
        self.seeds = seeds
        self.restack_(modules)
        self.to(checks.device(device))

    @classmethod
    @threads.making()
    def from_modules(
        cls, modules: Iterable[nn.Sequential], seeds: Iterable[int] | None = None
    ) -> MLPEnsemble:
        """An ensemble of copies of perceptrons ``Linear, ReLU, …, Linear`` of one shape.

        All need biases. A layer may be a `LowRank`, if it is one in all; ranks may differ.
        """
        modules = checks.several(modules, "modules", "[net]")
        _check_perceptrons(modules)
        seeds = None if seeds is None else tuple(seeds)
        if seeds is not None and len(seeds) != len(modules):
            raise ValueError(f"{len(modules)} modules need as many seeds, not {len(seeds)}")
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble.seeds = seeds
        ensemble.restack_(modules)
        return ensemble

    def restack_(self, modules: Sequence[nn.Sequential]) -> None:
        stacks = zip(*(find_layers(module).values() for module in modules), strict=True)
        self.layers = nn.ModuleList(map(StackedLayer.of, stacks))  # type: ignore[assignment]

    @property
    def weights(self) -> list[Tensor]:
        """Each layer's matrix (S, out, in), or its two factors, the inner one first; views."""
        return [weight for layer in self.layers for weight in layer.weights]

    @property
    def biases(self) -> list[Tensor]:
        """Each layer's bias (S, out), a view."""
        return [layer.bias for layer in self.layers]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths (in, hidden, …, out)."""
        return (self.weights[0].shape[2], *(bias.shape[1] for bias in self.biases))

    @property
    def factorized(self) -> bool:
        """Whether any layer is held as two factors."""
        return any(layer.ranks is not None for layer in self.layers)

    @property
    def ranks(self) -> list[tuple[int | None, ...]]:
        """For each network, the rank of each factorized layer, and None for a dense one."""
        none = [None] * len(self)
        columns = (none if layer.ranks is None else layer.ranks.tolist() for layer in self.layers)
        return list(zip(*columns, strict=True))

    def matrices(self) -> list[Tensor]:
        """The weight of each layer (S, out, in), a product if it is factorized."""
        return [layer.matrix() for layer in self.layers]

    @threads.making()
    def truncate_(self, tail: float) -> None:
        """Lower the ranks of factorized layers as `train` does with a ``tail``."""
        for layer in self.layers:
            if layer.ranks is not None:
                layer.truncate_(tail)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.weights[0].device

    def __len__(self) -> int:
        return self.weights[0].shape[0]

    @threads.making()
    def __getitem__(self, index: int) -> nn.Sequential:
        """Network ``index`` as an ordinary ``nn.Sequential``, a copy."""
        if not hasattr(index, "__index__"):
            raise TypeError(f"networks are taken one at a time, by a whole number, not {index!r}")
        index = range(len(self))[index]
        modules = [part for layer in self.layers for part in (layer.module(index), nn.ReLU())]
        return nn.Sequential(*modules[:-1])

    def __iter__(self) -> Iterator[nn.Sequential]:
        return (self[i] for i in range(len(self)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (S, n, out) for inputs (n, in), the same for all networks."""
        return self.logits(x).mT

    def logits(self, x: Tensor) -> Tensor:
        """Logits (S, out, n), feature-first."""
        hidden = x.mT
        for layer in self.layers:
            for weight in layer.weights:
                if hidden.ndim == 2:  # one product for all networks: they see the same inputs
                    hidden = (weight.flatten(0, 1) @ hidden).unflatten(0, weight.shape[:2])
                else:
                    hidden = weight @ hidden
            z = hidden + layer.bias.unsqueeze(-1)
            hidden = z.relu()
        return z

    @threads.plain()
    @torch.no_grad()
    def losses(self, x: Tensor, y: Tensor, chunk: int = 2000) -> tuple[Tensor, Tensor]:
        """Cross-entropy (S, n) of each network on each image, and whether its answer is right."""
        dtype = self.weights[0].dtype
        logits = (self.logits(part.to(dtype)) for part in x.split(chunk))
        losses, hits = zip(*map(losses_and_hits, logits, y.split(chunk)), strict=True)
        return torch.cat(losses, 1), torch.cat(hits, 1)

    @threads.plain()
    @torch.no_grad()
    def spectra(self) -> pd.DataFrame:
        """Singular values of every weight matrix: columns layer, network, index (from 1), sigma."""
        tables = []
        for number, weight in enumerate(self.matrices(), start=1):
            sigma = torch.linalg.svdvals(weight).cpu().numpy()
            network, index = (axis.ravel() for axis in np.indices(sigma.shape))
            layer = f"layer {number}: {weight.shape[1]}×{weight.shape[2]}"
            table = {"layer": layer, "network": network, "index": index + 1, "sigma": sigma.ravel()}
            tables.append(pd.DataFrame(table))
        return pd.concat(tables, ignore_index=True)


def losses_and_hits(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (S, n) of logits (S, classes, n) for labels (n,), and where they are right."""
    losses = z.logsumexp(1) - z.gather(1, y.expand(len(z), 1, -1)).squeeze(1)
    return losses, z.argmax(1) == y


def _padded(matrices: Sequence[Tensor]) -> Tensor:
    """A stack of copies of the matrices, the smaller ones padded with zeros."""
    rows, columns = (max(sizes) for sizes in zip(*(W.shape for W in matrices), strict=True))
    missing = [(0, columns - W.shape[1], 0, rows - W.shape[0]) for W in matrices]
    return torch.stack(list(map(F.pad, matrices, missing))).detach()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with copies of these."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _check_perceptrons(modules: Sequence[nn.Sequential]) -> None:
    if not modules:
        raise ValueError("an ensemble needs at least one module, none was given")
    shapes = set()
    for module in modules:
        if not is_relu_perceptron(module):
            raise ValueError(f"a perceptron is Linear, ReLU, …, Linear, not {module}")
        layers = find_layers(module).values()
        complex_ = any(p.is_complex() for p in module.parameters())
        if complex_ or any(layer.bias is None for layer in layers):
            raise ValueError(f"every Linear needs a bias and real weights, not so in {module}")
        shapes.add(tuple((type(layer.module).__name__, *layer.sides[::-1]) for layer in layers))
    if len(shapes) > 1:
        raise ValueError(f"the modules must have one shape, not {sorted(shapes)}")
