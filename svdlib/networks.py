"""Many perceptrons of one shape, held in stacked tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks
from svdlib.modules import LowRank, thin_layers


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


class MLPEnsemble(nn.Module):
    """S ReLU perceptrons of one shape, one for each seed.

    Layer l of all networks is one weight tensor ``weights[l]`` of shape (S, out, in) and one
    bias tensor ``biases[l]`` of shape (S, out), so that a step of training is a handful of
    batched products, whatever S is. Network i starts bit for bit as

        torch.manual_seed(seeds[i]); nn.Sequential(nn.Linear(…), nn.ReLU(), …, nn.Linear(…))

    and ``ensemble[i]`` gives it as that ``nn.Sequential`` (a copy).

    Layers may be factorized (see `from_modules`): such a layer has two entries in ``weights``, of
    shapes (S, r, in) and (S, out, r), and one in ``biases``. r is the largest rank of the
    networks; the factors of the others end in zeros, which stay zero while they train.

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

    def __init__(
        self,
        sizes: Sequence[int],
        seeds: Iterable[int] = (0,),
        device: str | torch.device = "auto",
    ) -> None:
        sizes = tuple(checks.positive_int(size, "a layer size") for size in sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least (in, out), not {sizes}")
        seeds = tuple(checks.positive_int(seed, "a seed", least=0) for seed in seeds)
        if not seeds:
            raise ValueError("an ensemble needs at least one seed, none was given")
        modules = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                modules.append(perceptron(sizes))
        super().__init__()
        self._stack(modules, seeds)
        self.to(checks.device(device))

    @classmethod
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
        modules = list(modules)
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
            shapes.append(
                tuple((type(layer).__name__, *_bias(layer).shape, _ins(layer)) for layer in linear)
            )
        if len(set(shapes)) > 1:
            raise ValueError(f"the modules must have one shape, not {sorted(set(shapes))}")
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble._stack(modules, None if seeds is None else tuple(seeds))
        return ensemble

    def _stack(self, modules: Sequence[nn.Sequential], seeds: tuple[int, ...] | None) -> None:
        if seeds is not None and len(seeds) != len(modules):
            raise ValueError(f"{len(modules)} modules need as many seeds, not {len(seeds)}")
        self.seeds = seeds
        layers = list(zip(*(_linears(module) for module in modules), strict=True))
        weights, self.inner = [], []
        for layer in layers:
            factors = [part.factors if isinstance(part, LowRank) else (part,) for part in layer]
            for same in zip(*factors, strict=True):
                weights.append(stack_padded([factor.weight.detach() for factor in same]))
                self.inner.append(len(factors[0]) == 2 and same[0] is factors[0][0])
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(
            torch.stack([_bias(linear).detach() for linear in layer]) for layer in layers
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths (in, hidden, …, out)."""
        return (self.weights[0].shape[2], *(bias.shape[1] for bias in self.biases))

    @property
    def factorized(self) -> bool:
        """Whether any layer is held as two factors."""
        return any(self.inner)

    @property
    def ranks(self) -> list[tuple[int | None, ...]]:
        """For each network, the rank of each factorized layer, and None for a dense one."""
        columns: list[list[int | None]] = []
        for entry, weight in enumerate(self.weights):
            if self.inner[entry]:
                columns.append((weight != 0).any(-1).sum(-1).clamp(min=1).tolist())
            elif not (entry and self.inner[entry - 1]):
                columns.append([None] * len(self))
        return list(zip(*columns, strict=True))

    def links(self) -> list[tuple[Tensor, Tensor | None]]:
        """Each of ``weights`` and its bias, None for the inner factor of a factorized layer."""
        biases = iter(self.biases)
        return [
            (weight, None if inner else next(biases))
            for weight, inner in zip(self.weights, self.inner, strict=True)
        ]

    def matrices(self) -> list[Tensor]:
        """The weight of each layer (S, out, in): products, where it is factorized."""
        found: list[Tensor] = []
        for entry, weight in enumerate(self.weights):
            if entry and self.inner[entry - 1]:
                found.append(weight @ self.weights[entry - 1])
            elif not self.inner[entry]:
                found.append(weight)
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.weights[0].device

    def __len__(self) -> int:
        return self.weights[0].shape[0]

    def __getitem__(self, index: int) -> nn.Sequential:
        """Network ``index`` as an ordinary ``nn.Sequential``, a copy."""
        index = range(len(self))[index]
        with torch.random.fork_rng(devices=[]):
            module = perceptron(self.sizes)
            for layer, rank in enumerate(self.ranks[index]):
                if rank is not None:
                    module[2 * layer] = thin_layers(cast(nn.Linear, module[2 * layer]), rank)
        module.to(self.weights[0])
        flat = [linear for linear in module.modules() if isinstance(linear, nn.Linear)]
        with torch.no_grad():
            for linear, (weight, bias) in zip(flat, self.links(), strict=True):
                rows, columns = linear.weight.shape  # without the padding of a lower rank
                linear.weight.copy_(weight[index, :rows, :columns])
                if bias is not None:
                    linear.bias.copy_(bias[index])
        return module

    def __iter__(self) -> Iterator[nn.Sequential]:
        return (self[i] for i in range(len(self)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (S, n, out) for inputs of shape (n, in), the same for all networks."""
        return self.logits(x).mT

    def logits(self, x: Tensor) -> Tensor:
        """Logits, feature-first: shape (S, out, n) for inputs of shape (n, in)."""
        hidden = x.mT
        for entry, (weight, bias) in enumerate(self.links()):
            if entry == 0:  # one product for all networks: they see the same inputs
                z = (weight.flatten(0, 1) @ hidden).unflatten(0, weight.shape[:2])
            else:
                z = weight @ hidden
            if bias is None:
                hidden = z
            else:
                z = z + bias.unsqueeze(-1)
                hidden = z.relu()
        return z

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
            z = self.logits(part)
            target = labels.expand(len(self), 1, -1)
            losses.append(z.logsumexp(1) - z.gather(1, target).squeeze(1))
            correct.append(z.argmax(1) == labels)
        return torch.cat(losses, 1), torch.cat(correct, 1)

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
