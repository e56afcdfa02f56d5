"""Many perceptrons of one shape, held in stacked tensors, their layers dense or factorized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from svdlib import checks, threads
from svdlib.network.kinds import Linear
from svdlib.network.low_rank import LowRank, thin_twin


def perceptron(sizes: Sequence[int]) -> nn.Sequential:
    """``Linear, ReLU, Linear, …, Linear``, initialised by torch from its global generator.

    >>> perceptron((784, 15, 10))
    Sequential(
      (0): Linear(in_features=784, out_features=15, bias=True)
      (1): ReLU()
      (2): Linear(in_features=15, out_features=10, bias=True)
    )
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Layer(nn.Module):
    """One layer h ↦ W h + b of S networks: one matrix [W b], or two factors [U b] and V, W = U V.

    Attributes:
        factors: [[W b]] (S, out, in + 1), or V (S, r, in) and [U b] (S, out, r + 1), r being
            the largest rank; the factors of the other networks end in zeros, which stay zero
            while they train.
        ranks: of a factorized layer, each network's rank (S,), else None.
    """

    ranks: Tensor | None

    def __init__(self, weights: Sequence[Tensor], bias: Tensor, ranks: Tensor | None) -> None:
        super().__init__()
        *inner, outer = weights
        self.factors = nn.ParameterList([*inner, torch.cat([outer, bias.unsqueeze(-1)], -1)])
        self.register_buffer("ranks", ranks)

    @classmethod
    def of(cls, linears: Sequence[nn.Linear | LowRank]) -> Layer:
        """Copies of one layer of each network, all of them dense or all factorized.

        >>> Layer.of([nn.Linear(3, 2), nn.Linear(3, 2)]).factors[0].shape
        torch.Size([2, 2, 4])
        """
        parts = [linear.factors if isinstance(linear, LowRank) else (linear,) for linear in linears]
        weights = [
            stack_padded([factor.weight.detach() for factor in same])
            for same in zip(*parts, strict=True)
        ]
        ranks = [linear.rank for linear in linears if isinstance(linear, LowRank)]
        bias = torch.stack([_bias(linear).detach() for linear in linears])
        return cls(weights, bias, torch.tensor(ranks, device=bias.device) if ranks else None)

    @property
    def weights(self) -> list[Tensor]:
        """[W] or [V, U], views."""
        *inner, outer = self.factors
        return [*inner, outer[..., :-1]]

    @property
    def bias(self) -> Tensor:
        """b (S, out), a view."""
        return self.factors[-1][..., -1]

    def matrix(self) -> Tensor:
        """The weight W (S, out, in), a product where the layer is factorized."""
        *inner, outer = self.weights
        return outer @ inner[0] if inner else outer

    def linear(self, network: int) -> nn.Linear | LowRank:
        """The layer of one network as a module of its own, a copy."""
        outer = self.weights[-1]
        ins = self.weights[0].shape[-1]
        like = {"device": outer.device, "dtype": outer.dtype}
        linear: nn.Linear | LowRank = skip_init(nn.Linear, ins, outer.shape[1], **like)
        parts: Sequence[nn.Module] = [linear]
        if self.ranks is not None:
            linear = thin_twin(Linear(linear), int(self.ranks[network]))
            parts = linear.factors
        with torch.no_grad():
            for part, factor in zip(parts, self.weights, strict=True):
                weight = cast(nn.Linear, part).weight
                rows, columns = weight.shape  # without the padding of a lower rank
                weight.copy_(factor[network, :rows, :columns])
            _bias(linear).copy_(self.bias[network])
        return linear

    @torch.no_grad()
    def cut_(self, tail: float) -> None:
        """Cut a factorized layer to the smallest ranks that keep all but a tail, see `cut`.

        >>> V, U = torch.eye(3, 5)[None], torch.diag(torch.tensor([2.0, 1.0, 0.1]))[None]
        >>> layer = Layer([V, U], torch.zeros(1, 3), torch.tensor([3]))
        >>> layer.cut_(tail=0.1)
        >>> layer.ranks, [weight.shape for weight in layer.weights]
        (tensor([2]), [torch.Size([1, 2, 5]), torch.Size([1, 3, 2])])
        """
        V, U = self.weights
        V, U, self.ranks = cut(V, U, tail)
        rank = int(self.ranks.max())
        outer = torch.cat([U[..., :rank], self.bias.unsqueeze(-1)], -1)
        self.factors = nn.ParameterList([V[:, :rank].contiguous(), outer])


def cut(V: Tensor, U: Tensor, tail: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the best approximation of W = U V that keeps all but a tail.

    W = U V (m × r times r × n) is decomposed through U = Q_1 R_1 and Vᵀ = Q_2 R_2: the SVD of
    the r × r matrix R_1 R_2ᵀ = P Σ Oᵀ gives W = (Q_1 P) Σ (Q_2 O)ᵀ. Each network keeps the
    smallest rank j ≥ 1 with (Σ_{i>j} σ_i²)^½ ≤ tail · (Σ σ_i²)^½, its factors balanced, √Σ
    each (Schotthöfer et al. 2022, Algorithm 1, the truncation).

    Returns:
        V (S, r, n) and U (S, m, r), zero beyond each network's rank; and these ranks (S,).

    >>> V, U = torch.eye(2)[None], torch.diag(torch.tensor([2.0, 0.1]))[None]
    >>> cut(V, U, tail=0.1)[2]
    tensor([1])
    """
    Q1, R1 = torch.linalg.qr(U)
    Q2, R2 = torch.linalg.qr(V.mT)
    P, S, Oh = torch.linalg.svd(R1 @ R2.mT)
    square = S.double().square()
    beyond = square.flip(-1).cumsum(-1).flip(-1)  # the energy from the i-th on
    kept = beyond > tail**2 * square.sum(-1, keepdim=True)
    kept[:, 0] = True
    root = S.sqrt() * kept
    return (root.unsqueeze(-1) * Oh) @ Q2.mT, Q1 @ (P * root.unsqueeze(-2)), kept.sum(-1)


class MLPEnsemble(nn.Module):
    """S ReLU perceptrons of one shape, one for each seed.

    Layer l of all networks is one `Layer`, a tensor [W b] of shape (S, out, in + 1), so that a
    step of training is a handful of batched products, whatever S is. ``weights[l]`` (S, out, in)
    and ``biases[l]`` (S, out) are views of it. Network i starts bit for bit as

        torch.manual_seed(seeds[i]); nn.Sequential(nn.Linear(…), nn.ReLU(), …, nn.Linear(…))

    and ``ensemble[i]`` gives it as that ``nn.Sequential`` (a copy).

    Layers may be factorized (see `from_modules`): such a layer has two entries in ``weights``, of
    shapes (S, r, in) and (S, out, r), and one in ``biases``.

    Args:
        sizes: widths (in, hidden, …, out), at least two.
        seeds: S integers. The global random state is left alone.
        device: where the tensors live; ``"auto"`` is CUDA where there is one.

    Raises:
        ValueError: fewer than two sizes, a size below 1, or no seed.

    >>> nets = MLPEnsemble((784, 15, 15, 10), seeds=range(32), device="cpu")
    >>> nets.weights[0].shape
    torch.Size([32, 15, 784])
    >>> _ = torch.manual_seed(7)
    >>> torch.equal(nets[7][0].weight, nn.Linear(784, 15).weight)
    True
    """

    layers: Sequence[Layer]
    seeds: tuple[int, ...] | None

    @threads.making()
    def __init__(
        self,
        sizes: Sequence[int],
        seeds: Iterable[int] = (0,),
        device: str | torch.device = "auto",
    ) -> None:
        sizes = checks.several(sizes, "sizes", "(784, 15, 10)")
        sizes = tuple(checks.positive_int(size, "a layer size") for size in sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least (in, out), not {sizes}")
        seeds = checks.several(seeds, "seeds", "range(4)")
        seeds = tuple(checks.positive_int(seed, "a seed", least=0) for seed in seeds)
        if not seeds:
            raise ValueError("an ensemble needs at least one seed, none was given")
        modules = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed reaches the GPUs too
                with torch.device("cpu"):
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
        """An ensemble with copies of the weights of perceptrons ``Linear, ReLU, …, Linear``.

        A Linear may be a `LowRank` layer, as `factorize` makes them: then of all modules, but
        not necessarily of the same rank.

        Raises:
            ValueError: no module, another kind of layer, a Linear without bias, or shapes
                that differ.

        >>> nets = MLPEnsemble.from_modules([perceptron((4, 3, 2)) for _ in range(5)])
        >>> len(nets), nets.sizes
        (5, (4, 3, 2))
        """
        modules = list(checks.several(modules, "modules", "[net]"))
        if not modules:
            raise ValueError("an ensemble needs at least one module, none was given")
        shapes = []
        for module in modules:
            kinds = [(nn.Linear, LowRank) if i % 2 == 0 else (nn.ReLU,) for i in range(len(module))]
            if len(module) % 2 == 0 or any(
                type(layer) not in kind for layer, kind in zip(module, kinds, strict=True)
            ):
                raise ValueError(f"a perceptron is Linear, ReLU, …, Linear, not {module}")
            linear = _linears(module)
            if any(layer.bias is None for layer in linear):
                raise ValueError("every Linear of an ensemble needs a bias")
            if any(p.is_complex() for p in module.parameters()):
                raise ValueError("an ensemble holds real weights, not complex ones")
            shapes.append(
                tuple((type(layer).__name__, *_bias(layer).shape, _ins(layer)) for layer in linear)
            )
        if len(set(shapes)) > 1:
            raise ValueError(f"the modules must have one shape, not {sorted(set(shapes))}")
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble.seeds = None if seeds is None else tuple(seeds)
        if ensemble.seeds is not None and len(ensemble.seeds) != len(modules):
            raise ValueError(
                f"{len(modules)} modules need {len(modules)} seeds, not {len(ensemble.seeds)}"
            )
        ensemble.restack_(modules)
        return ensemble

    def restack_(self, modules: Sequence[nn.Sequential]) -> None:
        """Hold copies of these perceptrons instead, as many as there were, of the same shape."""
        stacks = zip(*(_linears(module) for module in modules), strict=True)
        self.layers = nn.ModuleList(Layer.of(linears) for linears in stacks)  # type: ignore[assignment]

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
        dense = [None] * len(self)
        columns = [dense if layer.ranks is None else layer.ranks.tolist() for layer in self.layers]
        return list(zip(*columns, strict=True))

    def matrices(self) -> list[Tensor]:
        """The weight of each layer (S, out, in): products, where it is factorized."""
        return [layer.matrix() for layer in self.layers]

    @threads.making()
    def truncate_(self, tail: float) -> None:
        """Cut each factorized layer by a tail, see `Layer.cut_`; the dense ones stay.

        >>> from svdlib import factorize
        >>> dense = MLPEnsemble((99, 50, 9), device="cpu")
        >>> nets = MLPEnsemble.from_modules([factorize(net, {"0": 20}) for net in dense])
        >>> nets.truncate_(tail=0.5)
        >>> nets.ranks[0][0] < 20
        True
        """
        for layer in self.layers:
            if layer.ranks is not None:
                layer.cut_(tail)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        """Take what older versions saved too: bias and weight apart, in 0.1.0 in two lists."""
        entry = 0
        for number, layer in enumerate(self.layers):
            here = f"{prefix}layers.{number}."
            names = [f"{here}factors.{factor}" for factor in range(len(layer.factors))]
            for name in names:
                if f"{prefix}weights.{entry}" in state:
                    state[name] = state.pop(f"{prefix}weights.{entry}")
                entry += 1
            bias = state.pop(f"{prefix}biases.{number}", None)
            bias = state.pop(f"{here}bias", bias)
            if bias is not None and names[-1] in state:
                state[names[-1]] = torch.cat([state[names[-1]], bias.unsqueeze(-1)], -1)
            if layer.ranks is not None and f"{here}ranks" not in state and names[0] in state:
                state[f"{here}ranks"] = (state[names[0]] != 0).any(-1).sum(-1).clamp(min=1)
        super()._load_from_state_dict(state, prefix, *rest)

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
        steps: list[nn.Module] = []
        for layer in self.layers:
            steps += [layer.linear(index), nn.ReLU()]
        return nn.Sequential(*steps[:-1])

    def __iter__(self) -> Iterator[nn.Sequential]:
        return (self[i] for i in range(len(self)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (S, n, out) for inputs of shape (n, in), the same for all networks."""
        return self.logits(x).mT

    def logits(self, x: Tensor) -> Tensor:
        """Logits, feature-first: shape (S, out, n) for inputs of shape (n, in)."""
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
        """Cross-entropy and correctness of every network on every image.

        Args:
            x, y: inputs (n, in) and labels (n,).
            chunk: images at a time, which bounds the memory.

        Returns:
            losses (S, n), and whether the largest logit is the label's (S, n).

        >>> nets = MLPEnsemble((4, 3, 2), seeds=(0, 1), device="cpu")
        >>> losses, correct = nets.losses(torch.rand(6, 4), torch.zeros(6, dtype=torch.long))
        >>> losses.shape, correct.dtype
        (torch.Size([2, 6]), torch.bool)
        """
        losses, correct = [], []
        for part, labels in zip(x.split(chunk), y.split(chunk), strict=True):
            found = scored(self.logits(part.to(self.weights[0].dtype)), labels)
            losses.append(found[0])
            correct.append(found[1])
        return torch.cat(losses, 1), torch.cat(correct, 1)

    @threads.plain()
    @torch.no_grad()
    def spectra(self) -> pd.DataFrame:
        """Singular values of every weight matrix: columns layer, network, index (from 1), sigma.

        >>> MLPEnsemble((4, 3, 2), seeds=range(5), device="cpu").spectra().shape
        (25, 4)
        """
        tables = []
        for layer, weight in enumerate(self.matrices()):
            values = torch.linalg.svdvals(weight).cpu()
            networks, indices = values.shape
            tables.append(
                pd.DataFrame(
                    {
                        "layer": f"layer {layer + 1}: {weight.shape[1]}×{weight.shape[2]}",
                        "network": np.repeat(np.arange(networks), indices),
                        "index": np.tile(np.arange(1, indices + 1), networks),
                        "sigma": values.flatten().numpy(),
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)


def scored(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and correctness (S, n) of logits (S, classes, n) for labels (n,).

    >>> scored(torch.tensor([[[0.0], [0.0]]]), torch.tensor([1]))
    (tensor([[0.6931]]), tensor([[False]]))
    """
    losses = z.logsumexp(1) - z.gather(1, y.expand(len(z), 1, -1)).squeeze(1)
    return losses, z.argmax(1) == y


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """A stack of tensors, those that are smaller filled up with zeros.

    >>> stack_padded([torch.ones(1, 2), torch.ones(2, 2)])[0]
    tensor([[1., 1.],
            [0., 0.]])
    """
    shape = torch.Size(map(max, *(tensor.shape for tensor in tensors), tensors[0].shape))
    stack = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(stack, tensors, strict=True):
        row[tuple(map(slice, tensor.shape))] = tensor
    return stack


def _linears(module: nn.Sequential) -> list[nn.Linear | LowRank]:
    return [cast(nn.Linear | LowRank, layer) for layer in module[::2]]


def _bias(layer: nn.Linear | LowRank) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _ins(layer: nn.Linear | LowRank) -> int:
    first = layer.factors[0] if isinstance(layer, LowRank) else layer
    return first.weight.shape[1]
