"""The one place that knows layers: their matrices, their thin twins, what stands in the way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import skip_init

from svdlib import checks
from svdlib.layers.attention import HELD, Attention, Made, projections, unpack_

Matrix = nn.Linear | _ConvNd | nn.Embedding

# An entry a kind of layer: how its weight holds W, out × in, and which of its thin factors has
# its window. Only these types are replaced; a subclass may do other things with its weight.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PLAIN = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding)

# What these layers call their sides, and what else makes one.
INS = ("in_features", "in_channels", "num_embeddings", "nx")
OUTS = ("out_features", "out_channels", "embedding_dim", "nf")
WINDOW = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
ROWS = ("padding_idx", "scale_grad_by_freq", "sparse")


class Turned(nn.Linear):
    """A linear map without bias whose weight (in, out) is held the other way round.

    The output layer of a tied model h ↦ P (Qᵀ h), factorized, shares both its factors with the
    embedding's rows i ↦ Q P_i, and Q, (in, rank), is turned there.

    >>> Turned(3, 2).weight.shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, False, device, dtype)
        self.weight = nn.Parameter(self.weight.detach().mT.contiguous())

    def forward(self, input: Tensor) -> Tensor:
        """The input times the weight."""
        return input @ self.weight


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
        """What the layer replaced has besides, of the factor that knows it."""
        if name in (*INS, *OUTS, *WINDOW, *ROWS, "output_padding") and hasattr(self.main, name):
            first, second = self.factors
            sides = _sides(first)[0], _sides(second)[1]
            return sides[name in OUTS] if name in INS + OUTS else getattr(self.main, name)
        return super().__getattr__(name)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As `Sequential`; ``output_size`` is the transposed convolution's."""
        code = self[0](input)
        if torch.jit.is_scripting():
            return self[1](code)
        return self[1](code) if output_size is None else self[1](code, output_size)

    @property
    def factors(self) -> tuple[Matrix, Matrix]:
        """The two thin layers, in the order in which they are applied."""
        first, second = self
        return cast(Matrix, first), cast(Matrix, second)

    @property
    def main(self) -> Matrix:
        """The factor that is of the kind of the layer replaced, and has its window."""
        first, second = self.factors
        later = isinstance(second, TRANSPOSED) or is_conv1d(second) or isinstance(first, Turned)
        return second if later else first

    @property
    def rank(self) -> int:
        """The number r of terms."""
        first = self.factors[0]
        return as_matrix(first, first.weight).shape[-2]

    @property
    def weight(self) -> Tensor:
        """The product of the factors, in the shape of the weight that they replace."""
        first, second = (as_matrix(factor, factor.weight) for factor in self.factors)
        return as_weight(self.main, second @ first)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second factor."""
        return bias(self.factors[1])


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is a Conv1D of the transformers library, a Linear whose weight is (in, out).

    >>> is_conv1d(nn.Conv1d(3, 2, 1))
    False
    """
    weight = layer._parameters.get("weight")
    outs = getattr(layer, "nf", None)
    return type(layer).__name__ == "Conv1D" and weight is not None and weight.shape[1:] == (outs,)


def is_matrix(layer: nn.Module) -> bool:
    """Whether a layer is of a kind that holds a matrix.

    >>> is_matrix(nn.Embedding(10, 3)), is_matrix(nn.BatchNorm1d(3))
    (True, False)
    """
    return isinstance(layer, Matrix) or is_conv1d(layer)


def matrix_layers(model: nn.Module) -> dict[str, Matrix]:
    """The layers of a module that hold a matrix, by name, see `LowRank` for their kinds.

    >>> list(matrix_layers(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))))
    ['0', '2']
    """
    found = {name: layer for name, layer in model.named_modules() if is_matrix(layer)}
    return cast(dict[str, Matrix], found)


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The factorized layers of a model by name.

    >>> list(low_rank_layers(nn.Sequential(nn.ReLU(), thin_twin(nn.Linear(100, 80), 10))))
    ['1']
    """
    return {name: part for name, part in model.named_modules() if isinstance(part, LowRank)}


def whole_layers(model: nn.Module) -> dict[str, Matrix | LowRank]:
    """Layers that hold a matrix, dense or factorized, the latter without their factors.

    Of an ``nn.MultiheadAttention``, q_proj, k_proj and v_proj too, with views of its tensors.

    >>> list(whole_layers(nn.Sequential(nn.Linear(9, 9), thin_twin(nn.Linear(9, 9), 2))))
    ['0', '1']
    >>> list(whole_layers(nn.MultiheadAttention(8, 2)))
    ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """
    inner = {id(factor) for layer in low_rank_layers(model).values() for factor in layer}
    made: Made = {}
    layers: dict[str, Matrix | LowRank] = {}
    for name, part in model.named_modules():
        if type(part) is nn.MultiheadAttention:
            own = projections(part, made)
            layers |= {f"{name}.{each}".lstrip("."): layer for each, layer in own.items()}
        elif isinstance(part, LowRank) or (is_matrix(part) and id(part) not in inner):
            layers[name] = cast(Matrix | LowRank, part)
    return layers


def matrix(layer: Matrix | LowRank) -> Tensor:
    """A layer's matrix W, out × in, in a type that can be decomposed; (g, m, n) of g groups.

    "In" are a Linear's features, a convolution's in·kh·kw (of one group), an Embedding's rows;
    "out" of a transposed convolution are its out·kh·kw.

    >>> matrix(nn.Conv2d(3, 8, 5).bfloat16()).shape, matrix(nn.Conv1d(6, 8, 5, groups=2)).shape
    (torch.Size([8, 75]), torch.Size([2, 4, 15]))
    >>> matrix(nn.Embedding(100, 7)).shape, matrix(nn.ConvTranspose2d(3, 8, 5)).shape
    (torch.Size([7, 100]), torch.Size([200, 3]))
    """
    weight = layer.weight.detach()
    kind = layer.main if isinstance(layer, LowRank) else layer
    return as_matrix(kind, weight if weight.element_size() >= 4 else weight.float())


def as_matrix(layer: Matrix, weight: Tensor) -> Tensor:
    """A weight of such a layer as its matrix, see `matrix`.

    >>> as_matrix(nn.Linear(3, 2), torch.ones(5, 4)).shape
    torch.Size([5, 4])
    """
    A = weight.unflatten(0, (groups(layer), -1)).flatten(2)
    A = A.mT if is_turned(layer) else A
    return A[0] if groups(layer) == 1 else A


def as_weight(layer: Matrix, A: Tensor) -> Tensor:
    """A matrix in the shape of a weight of such a layer: `as_matrix` undone.

    >>> layer = nn.Conv1d(6, 8, 5, groups=2)
    >>> torch.equal(as_weight(layer, matrix(layer)), layer.weight)
    True
    """
    A = A.mT if is_turned(layer) else A
    return A.reshape(A[..., 0].numel(), -1, *layer.weight.shape[2:])


def is_turned(layer: Matrix) -> bool:
    """Whether the weight holds the matrix the other way round, inputs first.

    >>> is_turned(nn.Embedding(10, 3))
    True
    """
    return isinstance(layer, (*TRANSPOSED, nn.Embedding, Turned)) or is_conv1d(layer)


def groups(layer: Matrix) -> int:
    """The number of matrices in a layer: a convolution's groups, or one.

    >>> groups(nn.Conv1d(6, 8, 5, groups=2))
    2
    """
    return layer.groups if isinstance(layer, _ConvNd) else 1


def bias(layer: Matrix) -> Tensor | None:
    """A layer's bias, which an Embedding does not have.

    >>> bias(nn.Embedding(10, 3))
    """
    return getattr(layer, "bias", None)


def has_code(layer: Matrix) -> bool:
    """Whether one matrix is applied to vectors of the input, so that `apply_rows` knows them.

    >>> has_code(nn.Linear(3, 2)), has_code(nn.Conv1d(6, 8, 5, groups=2))
    (True, False)
    """
    return groups(layer) == 1 and not isinstance(layer, TRANSPOSED)


def apply_rows(layer: Matrix, x: Tensor, V: Tensor) -> Tensor:
    """V times what the layer's matrix is applied to, V (k, n): k in the features' place.

    Of layers that `has_code`.

    >>> import torch
    >>> layer, x = nn.Conv2d(3, 8, 5, padding=2, bias=False), torch.rand(1, 3, 9, 9)
    >>> torch.allclose(apply_rows(layer, x, matrix(layer)), layer(x), atol=1e-5)
    True
    """
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, V.mT)
    if isinstance(layer, CONVOLUTIONS):
        weight = V.view(-1, *layer.weight.shape[1:])
        found: Tensor = layer._conv_forward(x.to(V.dtype), weight, None)
        return found
    return x.to(V.dtype) @ V.mT


def rows(layer: Matrix, x: Tensor) -> Tensor:
    """The vectors (N, n) that the layer's matrix is applied to, or (N, g, n) of g groups.

    From the layer's input x. Of an Embedding, whose vectors have a single one each, the places
    (N,) of these.

    >>> import torch
    >>> rows(nn.Conv2d(3, 8, 5, padding=2), torch.rand(2, 3, 9, 9)).shape
    torch.Size([162, 75])
    """
    if isinstance(layer, nn.Embedding):
        return x.flatten()
    if not isinstance(layer, _ConvNd):
        return x.flatten(0, -2)
    sizes = layer.kernel_size
    x = x if x.ndim == 2 + len(sizes) else x[None]
    if isinstance(layer, CONVOLUTIONS):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        for i, (size, step, apart) in enumerate(
            zip(sizes, layer.stride, layer.dilation, strict=True)
        ):
            x = x.unfold(2 + i, apart * (size - 1) + 1, step)[..., ::apart]
    x = x.movedim(1, 1 + len(sizes)).flatten(0, len(sizes))  # (N, in, window)
    x = x.unflatten(1, (layer.groups, -1)).flatten(2)
    return x[:, 0] if layer.groups == 1 else x


def stored(rank: int, m: int, n: int) -> int:
    """Numbers in an m × n matrix of that rank: as two factors, r (m + n), or whole if that is less.

    >>> stored(2, 10, 10), stored(6, 10, 10)
    (40, 100)
    """
    return min(rank * (m + n), m * n)


def obstacle(
    model: nn.Module, layer: Matrix | LowRank, *, twin: bool, shared: bool = True
) -> str | None:
    """What stands in the way of giving a layer another weight, if anything does.

    With ``twin``, of putting another layer in its place too: then it must be its matrix and
    bias, and nothing else. With ``shared``, so must the layers that share its weight, which are
    replaced along with it; Linear and Embedding layers can be.

    >>> obstacle(nn.Sequential(), nn.Embedding(9, 9, max_norm=1.0), twin=True)
    'its rows are kept to max_norm, which factors have none of'
    """
    if isinstance(layer, LowRank):
        return next(filter(None, (obstacle(model, f, twin=twin) for f in layer.factors)), None)
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters; remove the parametrization first"
    if isinstance(layer.weight, nn.UninitializedParameter):
        return "it has no weight before its first call; call the model once"
    if not layer.weight.is_floating_point():
        return f"its type is {layer.weight.dtype}"
    if layer.weight.is_meta or layer.weight.layout != torch.strided:
        return (
            f"its weight has no numbers here (device {layer.weight.device}, {layer.weight.layout})"
        )
    if not twin:
        return None
    if type(layer) not in PLAIN and not is_conv1d(layer):
        return f"a {type(layer).__name__} may do other things with its weight than a plain layer"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its rows are kept to max_norm, which factors have none of"
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    if any(hooks):
        return "its hooks would be lost; remove them first"
    for name, other in model.named_modules() if shared else ():
        if other is layer or all(p is not layer.weight for p in other._parameters.values()):
            continue
        if {type(layer), type(other)} - {nn.Linear, nn.Embedding}:
            return f"its weight is shared with {name!r}"
        reason = obstacle(model, cast(Matrix, other), twin=True, shared=False)
        if reason:
            return f"its weight is shared with {name!r}, which can't be replaced: {reason}"
    for name, part in model.named_modules():
        if is_compiled(part) and any(layer is inner for inner in part.modules()):
            return f"{name or 'the model'!r} is compiled with it; factorize first, then compile"
        for attribute, value in part.__dict__.items():
            if attribute not in REGISTERED and any(layer is each for each in _inside(value)):
                where = f"{name}.{attribute}".lstrip(".")
                return f"{where!r} holds it besides, where a factorized one would not be seen"
    return None


# Where a module keeps its parts: what it holds elsewhere, it does not know as its own.
REGISTERED = ("_modules", "_parameters", "_buffers")


def _inside(value: object) -> Iterator[object]:
    """A value and, of lists, tuples, sets and dictionaries, what they hold."""
    yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for part in value:
            yield from _inside(part)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made this module, or its own ``compile`` was called."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def duplicate(model: nn.Module, *, shared: bool = False) -> nn.Module:
    """A deep copy, also of a model that keeps results of its last call, or pruned weights.

    ``copy.deepcopy`` refuses tensors that have a history; they are copied without it. With
    ``shared``, the copy has the model's own parameters.

    >>> model = nn.Linear(2, 2)
    >>> model.kept = 2 * model.weight
    >>> duplicate(model).kept.requires_grad
    False
    """
    held = [part for module in model.modules() for part in _inside(list(module.__dict__.values()))]
    past = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    kept = {id(parameter): parameter for parameter in model.parameters()} if shared else {}
    return copy.deepcopy(model, cast(dict[int, object], {**past, **kept}))


def apart(model: nn.Module) -> nn.Module:
    """A model whose attentions' projections are layers: a copy, but of the same other parameters.

    The model itself where it has no ``nn.MultiheadAttention``.

    >>> list(dict(apart(nn.MultiheadAttention(8, 2)).named_children()))
    ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """
    if not any(type(part) is nn.MultiheadAttention for part in model.modules()):
        return model
    model = unpack_(duplicate(model, shared=True))
    take_no_fused_way(model)
    return model


def choose(
    model: nn.Module, names: Iterable[str] | None, verb: str, *, twin: bool = False
) -> tuple[dict[str, Matrix | LowRank], dict[str, str]]:
    """The layers of these names, or all that can be changed, and why the others can't.

    Without ``twin`` a parameter can be named too, see `of_parameter`.

    Raises:
        ValueError: a model without matrices, an unknown name, a named layer with an `obstacle`.

    >>> choose(nn.Sequential(nn.Linear(3, 2)), None, "project")
    ({'0': Linear(in_features=3, out_features=2, bias=True)}, {})
    """
    known = whole_layers(model)
    chosen = list(known if names is None else names)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = parameters.keys() & set(chosen) - known.keys()
    if not known and not named:
        raise ValueError(f"the model has no nn.Linear, convolution or nn.Embedding to {verb}")
    if not chosen:
        raise ValueError(f"no layers are named to {verb}; known: {', '.join(known)}")
    for name in chosen:
        if name in named:
            if twin:
                owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
                raise ValueError(
                    f"can't {verb} parameter {name!r}: a {owner} reads it itself and takes no two "
                    "factors for it; project_ cuts it in place"
                )
            known[name] = of_parameter(parameters[name], name, known, verb)
        checks.one_of(name, tuple(known), "layer")
    found = {name: obstacle(model, known[name], twin=twin) for name in chosen}
    left = {name: reason for name, reason in found.items() if reason}
    if names is not None:
        for name, reason in left.items():
            raise ValueError(f"can't {verb} layer {name!r}: {reason}")
    return {name: known[name] for name in chosen if name not in left}, left


def of_parameter(
    parameter: nn.Parameter, name: str, layers: Mapping[str, Matrix | LowRank], verb: str
) -> nn.Linear:
    """A parameter that is read without a layer, as the weight of one: its rows by all the rest.

    Such as an LSTM's ``weight_hh_l0``, its gates' matrices under one another, or a Bilinear's
    ``weight``, out × (in · in).

    Raises:
        ValueError: a vector, or one that is in a layer that can be named.

    >>> of_parameter(nn.Bilinear(4, 5, 3).weight, "weight", {}, "project").weight.shape
    torch.Size([3, 4, 5])
    """
    place, _, own = name.rpartition(".")
    for each, layer in layers.items():
        packed = own in HELD and each == f"{place}.q_proj".lstrip(".")
        if packed or any(parameter is other for other in layer.parameters()):
            raise ValueError(f"can't {verb} parameter {name!r}: it is in layer {each!r}; name that")
    if parameter.ndim < 2:
        raise ValueError(f"can't {verb} parameter {name!r}: a vector has no rank to lower")
    layer = nn.Linear(1, 1, False, device="meta")
    layer.weight = parameter
    return layer


def warn_of(left: Mapping[str, str], depth: int) -> None:
    """Name the layers that are left as they were, and why, to a caller ``depth`` calls above."""
    if left:
        told = "; ".join(f"{name!r} ({reason})" for name, reason in left.items())
        warnings.warn(f"left as they were: {told}", stacklevel=1 + depth)


def thin_twin(layer: Matrix, rank: int) -> LowRank:
    """Two thin layers of that rank in place of one, their tensors not yet filled.

    >>> thin_twin(nn.Conv2d(3, 8, 5, stride=2, padding=2), 4)
    LowRank(
      (0): Conv2d(3, 4, kernel_size=(5, 5), stride=(2, 2), padding=(2, 2), bias=False)
      (1): Conv2d(4, 8, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    count, with_bias = groups(layer) * rank, bias(layer) is not None
    ins, outs = _sides(layer)
    first: nn.Module
    second: nn.Module
    if isinstance(layer, CONVOLUTIONS):
        first = _resized(layer, ins, count, bias=False)
        second = _pointwise(layer, count, outs, bias=with_bias)
    elif isinstance(layer, TRANSPOSED):
        first = _pointwise(layer, ins, count, bias=False)
        second = _resized(layer, count, outs, bias=with_bias)
    elif is_conv1d(layer):
        first = _made(nn.Linear, layer, ins, count, bias=False)
        second = _resized(layer, count, outs, bias=True)
    else:
        first = _resized(layer, ins, count, bias=False)
        second = _made(nn.Linear, layer, count, outs, bias=with_bias)
    return LowRank(first, second).train(layer.training)


def thin_twins(layers: Mapping[str, Matrix], ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """A `thin_twin` of each layer; those of layers that share their weight share its factors.

    Of one weight W = P Qᵀ (V × d, P V × r), an Embedding looks up rows of P and multiplies them by
    Qᵀ, a Linear multiplies by Qᵀ and then by P.

    >>> model = nn.Sequential(nn.Embedding(30, 20), nn.Linear(20, 30))
    >>> model[1].weight = model[0].weight
    >>> twins = thin_twins(matrix_layers(model), {"0": 2, "1": 2})
    >>> twins["0"][0].weight is twins["1"][1].weight, twins["0"][1].weight is twins["1"][0].weight
    (True, True)
    """
    twins = {name: thin_twin(layer, ranks[name]) for name, layer in layers.items()}
    for names in ties(layers):
        first, *others = sorted(names, key=lambda name: not isinstance(layers[name], nn.Embedding))
        one = twins[first]
        for twin in (twins[name] for name in others):
            if type(one[0]) is type(twin[0]):
                twin[0].weight, twin[1].weight = one[0].weight, one[1].weight
            else:
                twin[0] = _made(Turned, twin.factors[0], *_sides(twin.factors[0]))
                twin[0].weight, twin[1].weight = one[1].weight, one[0].weight
    return twins


def ties(layers: Mapping[str, Matrix | LowRank]) -> list[list[str]]:
    """The names of those layers that share one weight, or both its factors.

    >>> ties({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    []
    """
    owners: dict[frozenset[int], list[str]] = {}
    for name, layer in layers.items():
        parts = layer.factors if isinstance(layer, LowRank) else (layer,)
        held = [part._parameters.get("weight") for part in parts]
        if None not in held:
            owners.setdefault(frozenset(map(id, held)), []).append(name)
    return [names for names in owners.values() if len(names) > 1]


def is_tied(model: nn.Module, layer: Matrix) -> bool:
    """Whether another module of the model has the layer's weight too.

    >>> is_tied(nn.Linear(3, 3), nn.Linear(3, 3))
    False
    """
    own = (part._parameters.values() for part in model.modules() if part is not layer)
    return any(weight is layer.weight for each in own for weight in each)


def check_ties(model: nn.Module, ranks: Mapping[str, int], verb: str) -> None:
    """Refuse ranks for only one of layers that share a weight, or different ones.

    Raises:
        ValueError: as above.

    >>> shared = nn.Linear(3, 3)
    >>> check_ties(nn.Sequential(shared, shared), {"0": 2}, "project")
    """
    for names in ties(whole_layers(model)):
        given = {name: ranks.get(name) for name in names}
        if len(set(given.values())) > 1:
            name = next(name for name in names if given[name])
            others = ", ".join(repr(other) for other in names if other != name)
            raise ValueError(
                f"can't {verb} layer {name!r} by itself: its weight is shared with {others}; give "
                f"all of them the same rank, or none"
            )


def dense_twin(layer: LowRank) -> Matrix:
    """One layer in place of two thin ones, its tensors not yet filled.

    >>> dense_twin(thin_twin(nn.Linear(100, 80), 10))
    Linear(in_features=100, out_features=80, bias=True)
    """
    first, second = layer.factors
    return _resized(layer.main, _sides(first)[0], _sides(second)[1], layer.bias is not None)


def _sides(layer: Matrix) -> tuple[int, int]:
    """How many features or channels go in, and how many come out."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, _ConvNd):
        return layer.in_channels, layer.out_channels
    ins, outs = layer.weight.shape  # a Conv1D
    return ins, outs


def _made(kind: type[nn.Module], layer: Matrix, *sides: int, **more: object) -> nn.Module:
    """A layer of that kind, with another's type and mode. No random number is drawn for it."""
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    return skip_init(kind, *sides, **more, **place).train(layer.training)


def _pointwise(layer: Matrix, ins: int, outs: int, bias: bool) -> nn.Module:
    """A convolution that looks at one place at a time, in as many dimensions as another."""
    kind = CONVOLUTIONS[layer.weight.ndim - 3]
    return _made(kind, layer, ins, outs, kernel_size=1, groups=groups(layer), bias=bias)


def _resized(layer: Matrix, ins: int, outs: int, bias: bool) -> Matrix:
    """A layer like ``layer`` with other numbers of inputs and outputs, not yet filled."""
    if is_conv1d(layer):
        # A deep copy knows how to make one, without importing the library that it is from.
        weight = nn.Parameter(layer.weight.new_empty(ins, outs))
        copied = copy.deepcopy(layer, {id(layer.weight): weight})
        vars(copied).update(nx=ins, nf=outs)
        return copied
    if isinstance(layer, nn.Linear):
        return cast(Matrix, _made(nn.Linear, layer, ins, outs, bias=bias))
    if isinstance(layer, nn.Embedding):
        more = {name: getattr(layer, name) for name in ROWS}
        return cast(Matrix, _made(nn.Embedding, layer, ins, outs, **more))
    names = (*WINDOW, "output_padding") if isinstance(layer, TRANSPOSED) else WINDOW
    more = {name: getattr(layer, name) for name in names}
    return cast(Matrix, _made(type(layer), layer, ins, outs, bias=bias, **more))


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is; a layer may have several places. Returns the root.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> replace_module(model, model[1], nn.Tanh())[1]
    Tanh()
    """
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new if root is old else root


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards, whatever happens.

    >>> model = nn.Dropout()
    >>> with evaluating(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def hooked(
    layers: Mapping[str, nn.Module],
    after: Callable[[str, tuple[Tensor, ...], Tensor], Tensor | None] | None = None,
    before: Callable[[str, tuple[Tensor, ...]], None] | None = None,
) -> Iterator[None]:
    """``before(name, inputs)`` and ``after(name, inputs, output)`` at every call of these layers.

    Keyword arguments come behind the others. What ``after`` returns, if anything, takes the output's place.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> with hooked({"0": model[0]}, after=lambda name, inputs, output: output.new_zeros(1, 2)):
    ...     model(torch.rand(1, 3)).tolist()
    [[0.0, 0.0]]
    """
    handles = []
    try:
        for name, layer in layers.items():
            if before:
                handles.append(
                    layer.register_forward_pre_hook(
                        lambda _, x, more, name=name: before(name, (*x, *more.values())),
                        with_kwargs=True,
                    )
                )
            if after:
                handles.append(
                    layer.register_forward_hook(
                        lambda _, x, more, z, name=name: after(name, (*x, *more.values()), z),
                        with_kwargs=True,
                    )
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Compiled parts run as they are written: compiled code heeds no hooks.

    >>> with as_written(nn.ReLU()):
    ...     pass
    """
    if not any(map(is_compiled, model.modules())):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def take_no_fused_way(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from reading the weights of its factorized layers.

    Its fused operation for evaluation wants dense matrices, and would multiply the factors at
    every call; in training mode, and without it, the layers are called. So it is where its
    attention's projections are layers.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
    >>> layer.linear1 = thin_twin(layer.linear1, 2)
    >>> take_no_fused_way(layer)
    >>> layer.activation_relu_or_gelu
    0
    """
    for part in model.modules():
        if not any(isinstance(inner, LowRank | Attention) for inner in part.modules()):
            continue
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # torch's mark of an activation that it can't fuse
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
