"""Layers of rank r as two thin ones, and what makes them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from svdlib.linalg.svd import SVD, truncated_svd
from svdlib.network.kinds import ATTRIBUTES, KINDS, Layer, TiedLinear, layer_of


class Approximations(Protocol):
    """Factors of any rank of a layer's matrix, and a change of its bias, see `layers.calibrate`."""

    def at(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]: ...


class Product(nn.Parameter):
    """The weight of a `LowRank` layer, made anew at each reading: to be read, not written to.

    A kind of parameter, as which torch's own functions compare and report it.

    >>> layer = thin_twin(layer_of(nn.Linear(9, 8)), 2)
    >>> layer.weight.mul_(2)
    Traceback (most recent call last):
    ...
    RuntimeError: mul_ would change a product that is thrown away; change layer[0].weight and \
layer[1].weight, the factors, or give the model to svdlib.merge
    """

    _is_hf_initialized = True  # so that the transformers library's initializers pass it by

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        first = args[0] if args else next(iter(kwargs.values()), None)
        changed = first if WRITING.fullmatch(name) else kwargs.get("out")
        if isinstance(changed, Product):
            raise RuntimeError(  # noqa: TRY004  # as torch's own of writes
                f"{name} would change a product that is thrown away; change layer[0].weight and "
                "layer[1].weight, the factors, or give the model to svdlib.merge"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        view = func == DATA or name == "detach" or (isinstance(found, Tensor) and found._is_view())
        return found.as_subclass(Product) if view and isinstance(first, Product) else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))


# Names of operations that change their first argument, and the getter of a tensor's data.
WRITING = re.compile(r"(?!_|requires_grad_$).*[^_]_|__(i(?!n)[a-z]+|set|setitem)__")
DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class LowRank(nn.Sequential):
    """A layer of rank r as two thin ones, ``self[0]`` and then ``self[1]``.

    - A Linear m × n is one r × n without bias and one m × r with the bias; so is a Conv1D of
      the transformers library.
    - A Conv1d, 2d or 3d is r convolutions with its kernel size, stride and padding, and a
      1 × 1 convolution (Zhang, Zou, He and Sun 2016, section 3.1); r for each of its groups.
    - A ConvTranspose1d, 2d or 3d is a 1 × 1 convolution to r channels, and a transposed one.
    - An Embedding of V rows is one of r columns, and a Linear that makes all columns of them.
    - Of an ``nn.MultiheadAttention``, q_proj, k_proj, v_proj and out_proj are Linear.

    It stands in for the layer replaced: ``weight``, ``bias``, ``in_features``, ``kernel_size``
    and the like read as that layer's. The weight is multiplied out at each reading.
    """

    # A scripted layer has its two factors alone.
    __jit_unused_properties__ = ("factors", "main", "rank", "weight", "bias")

    def __getattr__(self, name: str) -> Any:
        """Sides and settings of the layer replaced, from the factor that knows them."""
        if name not in ATTRIBUTES or not hasattr(self.main, name):
            return super().__getattr__(name)
        first, second = map(readable, self.factors)
        sides = (first.sides[0], second.sides[1])
        names = zip(readable(self.main).side_names, sides, strict=True)
        return dict(names).get(name, getattr(self.main, name))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The second factor of the first; ``output_size`` is the transposed convolution's."""
        code = self[0](input)
        if torch.jit.is_scripting():
            return self[1](code)
        return self[1](code) if output_size is None else self[1](code, output_size)

    @property
    def factors(self) -> tuple[Any, Any]:
        """The two thin layers, in the order in which they are applied."""
        return self[0], self[1]

    @property
    def main(self) -> nn.Module:
        """The factor that is of the kind of the layer replaced, and has its window."""
        first, second = map(plain, self.factors)
        later = getattr(layer_of(second), "own_factor", 0) == 1
        turned = isinstance(first, TiedLinear) and first.transposed
        return second if later or turned else first

    @property
    def rank(self) -> int:
        """The number r of terms."""
        first, names = plain(self.factors[0]), (kind.side_names[1] for kind in KINDS)
        # By its sides, as the weight of a quantized factor is no matrix.
        width = next(getattr(first, name) for name in names if hasattr(first, name))
        return int(width) // getattr(first, "groups", 1)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, in the shape of the weight that they replace.

        Adapters on the factors are not in it, as they are in no weight of PEFT's layers.
        """
        first, second = (layer.to_matrix(layer.weight) for layer in map(readable, self.factors))
        product = readable(self.main).to_weight(second @ first)
        return product.as_subclass(Product) if type(product) is Tensor else product

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second factor."""
        return readable(self.factors[1]).bias

    def fill_(self, layer: Layer, found: Approximations | None) -> None:
        """Take the factors of a layer's matrix, the best in itself or by a fit."""
        A, shift = layer.matrix(), None
        if found is None:
            U, S, Vh = truncated_svd(A, self.rank)
        else:
            left, right, shift = found.at(self.rank)
            inner, S, Vh = truncated_svd(right.to(A.dtype), self.rank)
            U = left.to(A.dtype) @ inner
        root = S.sqrt()
        parts = (root.unsqueeze(-1) * Vh, U * root.unsqueeze(-2))
        for factor, part in zip(self.factors, parts, strict=True):
            factor.weight.copy_(as_layer(factor).to_weight(part))
            factor.weight.requires_grad_(layer.weight.requires_grad)
        if layer.bias is not None and self.bias is not None:
            moved = 0.0 if shift is None else shift.flatten().to(layer.bias.dtype)
            self.bias.copy_(layer.bias + moved).requires_grad_(layer.bias.requires_grad)


def as_layer(factor: nn.Module) -> Layer:
    """A factor as the layer that it is.

    Raises:
        ValueError: it has become another module, as by quantization or an adapter.
    """
    if (found := layer_of(factor)) is None:
        kind = type(factor)
        raise ValueError(
            f"a factor is a {kind.__module__}.{kind.__name__}, which has no plain weight to multiply "
            "out; call svdlib before you quantize, or merge adapters into the factors first"
        )
    return found


def plain(factor: nn.Module) -> nn.Module:
    """A factor without the adapters that PEFT puts around it."""
    return cast(nn.Module, getattr(factor, "base_layer", factor))


def readable(factor: nn.Module) -> Layer:
    """A factor as a layer to read: without adapters, and with the numbers that int8 stands for."""
    factor = plain(factor)
    if not callable(getattr(factor, "weight", None)):
        return as_layer(factor)
    quantized: Any = factor  # torch's nn.Linear in int8 has methods where a layer has tensors
    linear = nn.Linear(quantized.in_features, quantized.out_features, False, device="meta")
    linear.weight = nn.Parameter(quantized.weight().dequantize(), requires_grad=False)
    if quantized.bias() is not None:
        linear.bias = nn.Parameter(quantized.bias().detach(), requires_grad=False)
    return as_layer(linear)


class Factorized(Layer):
    """A `LowRank` layer as one that holds the product of its factors."""

    types = (LowRank,)
    is_factorized = True

    def __init__(self, module: LowRank) -> None:
        super().__init__(module)
        self.main = as_layer(module.main)
        self.groups = self.main.groups
        self.factors = [as_layer(factor) for factor in module]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return tuple(weight for factor in self.factors for weight in factor.weights)

    @property
    def max_rank(self) -> int:
        return self.module.rank

    def to_matrix(self, weight: Tensor) -> Tensor:
        return self.main.to_matrix(weight)

    def obstacle(self, replace: bool) -> str | None:
        return self.factors[0].obstacle(replace) or self.factors[1].obstacle(replace)

    def projected(self, svd: SVD) -> dict[Tensor, Tensor]:
        """As `Layer`: of W = B A, U Uᵀ W = (U Uᵀ B) A."""
        second = self.factors[1]
        return {second.weight: second.to_weight(svd.U @ (svd.U.mT @ second.matrix()))}

    def dense(self) -> Any:
        """One layer in place of two thin ones, its tensors not yet filled."""
        first, second = self.factors
        return self.main.resized(first.sides[0], second.sides[1], self.bias is not None)


def thin_twin(layer: Layer, rank: int) -> LowRank:
    """Two thin layers of that rank in place of one, their tensors not yet filled."""
    return LowRank(*layer.thin(rank)).train(layer.module.training)


def thin_twins(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """A `thin_twin` of each layer; those of layers that share their weight share its factors.

    Of one weight W = P Qᵀ (V × d, P V × r), an Embedding looks up rows of P and multiplies them by
    Qᵀ, a Linear multiplies by Qᵀ and then by P.
    """
    twins = {name: thin_twin(layer, ranks[name]) for name, layer in layers.items()}
    for names in tied(layers):
        first, *others = (
            twins[name] for name in sorted(names, key=lambda name: layers[name].multiplies)
        )
        turned = [type(twin[0]) is not type(first[0]) for twin in others]
        share_(first, False)
        for twin, transposed in zip(others, turned, strict=True):
            share_(twin, transposed)
            weights = [factor.weight for factor in first]
            twin[0].weight, twin[1].weight = weights[::-1] if transposed else weights
    return twins


def share_(twin: LowRank, transposed: bool) -> None:
    """Make the linear factors of a twin `TiedLinear`, the first one ``transposed`` or not."""
    for place, factor in enumerate(twin):
        if type(factor) is nn.Linear:
            layer, turned = as_layer(factor), transposed and place == 0
            more = {"bias": layer.bias is not None, "transposed": turned}
            twin[place] = layer.new(TiedLinear, *layer.sides, **more)


def tied(layers: Mapping[str, Layer]) -> list[list[str]]:
    """The names of those layers that share one weight, or both its factors."""
    owners: dict[frozenset[int], list[str]] = {}
    for name, layer in layers.items():
        if layer.weights:
            owners.setdefault(frozenset(map(id, layer.weights)), []).append(name)
    return [names for names in owners.values() if len(names) > 1]


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The factorized layers of a model by name.

    >>> list(low_rank_layers(nn.Sequential(nn.ReLU(), thin_twin(layer_of(nn.Linear(9, 8)), 2))))
    ['1']
    """
    return {name: part for name, part in model.named_modules() if isinstance(part, LowRank)}


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The ranks of a model's factorized layers by name."""
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}
