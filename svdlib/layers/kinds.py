"""The one place that knows layers: their matrices, their thin twins, what stands in the way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from svdlib import checks

Matrix = nn.Linear | nn.Conv2d


class LowRank(nn.Sequential):
    """A Linear or Conv2d layer of rank r as two thin ones, ``self[0]`` and then ``self[1]``.

    A Linear m × n becomes one r × n without bias and one m × r with the bias. A Conv2d becomes r
    convolutions with its kernel size, stride and padding, and a 1 × 1 convolution (Zhang, Zou,
    He and Sun 2016, section 3.1). ``weight`` and ``bias`` read as those of the layer replaced.
    """

    @property
    def factors(self) -> tuple[Matrix, Matrix]:
        """The two thin layers, in the order in which they are applied."""
        first, second = self
        return cast(Matrix, first), cast(Matrix, second)

    @property
    def rank(self) -> int:
        """The number r of terms."""
        return len(self.factors[0].weight)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, in the shape of the weight that they replace."""
        first, second = (factor.weight for factor in self.factors)
        product = second.flatten(1) @ first.flatten(1)
        return product.view(len(second), *first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second factor."""
        return self.factors[1].bias


def matrix_layers(model: nn.Module) -> dict[str, Matrix]:
    """The layers of a module that hold a matrix, by name: every Linear and Conv2d.

    >>> list(matrix_layers(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))))
    ['0', '2']
    """
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Matrix)}


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The factorized layers of a model by name.

    >>> list(low_rank_layers(nn.Sequential(nn.ReLU(), thin_twin(nn.Linear(100, 80), 10))))
    ['1']
    """
    return {name: part for name, part in model.named_modules() if isinstance(part, LowRank)}


def whole_layers(model: nn.Module) -> dict[str, Matrix | LowRank]:
    """Layers that hold a matrix, dense or factorized, the latter without their factors.

    >>> list(whole_layers(nn.Sequential(nn.Linear(9, 9), thin_twin(nn.Linear(9, 9), 2))))
    ['0', '1']
    """
    inner = {id(factor) for layer in low_rank_layers(model).values() for factor in layer}
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Matrix | LowRank) and id(layer) not in inner
    }


def matrix(layer: Matrix) -> Tensor:
    """A layer's matrix W, out × in or out × (in·kh·kw), in a type that can be decomposed.

    >>> matrix(nn.Conv2d(3, 8, 5).bfloat16()).shape
    torch.Size([8, 75])
    """
    weight = layer.weight.detach().flatten(1)
    return weight if weight.element_size() >= 4 else weight.float()


def apply_rows(layer: Matrix, x: Tensor, V: Tensor) -> Tensor:
    """V times what the layer's matrix is applied to, V (k, n): k in the features' place.

    >>> import torch
    >>> layer, x = nn.Conv2d(3, 8, 5, padding=2, bias=False), torch.rand(1, 3, 9, 9)
    >>> torch.allclose(apply_rows(layer, x, matrix(layer)), layer(x), atol=1e-5)
    True
    """
    if isinstance(layer, nn.Linear):
        return x @ V.mT
    return layer._conv_forward(x, V.view(-1, *layer.weight.shape[1:]), None)


def rows(layer: Matrix, x: Tensor) -> Tensor:
    """The vectors (…, n) that the layer's matrix is applied to, from the layer's input x.

    >>> import torch
    >>> rows(nn.Conv2d(3, 8, 5, padding=2), torch.rand(2, 3, 9, 9)).shape
    torch.Size([162, 75])
    """
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        x = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).mT
    return x.flatten(0, -2)


def stored(rank: int, m: int, n: int) -> int:
    """Numbers in an m × n matrix of that rank: as two factors, r (m + n), or whole if that is less.

    >>> stored(2, 10, 10), stored(6, 10, 10)
    (40, 100)
    """
    return min(rank * (m + n), m * n)


def obstacle(model: nn.Module, layer: Matrix, *, twin: bool) -> str | None:
    """What stands in the way of giving a layer another weight, if anything does.

    With ``twin``, of putting another layer in its place too: then it must be its matrix and
    bias, and nothing else.

    >>> obstacle(nn.Sequential(), nn.Conv2d(4, 4, 3, groups=2), twin=True)
    'its 2 groups of channels have no common factor'
    """
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
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"a {type(layer).__name__} may do other things with its weight than a plain layer"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"its {layer.groups} groups of channels have no common factor"
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    if any(hooks):
        return "its hooks would be lost; remove them first"
    owners = [m for m in model.modules() if any(p is layer.weight for p in m._parameters.values())]
    if len(owners) > 1:
        return "its weight is shared with another layer"
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


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps results of its last call, or pruned weights.

    ``copy.deepcopy`` refuses tensors that have a history; they are copied without it.

    >>> model = nn.Linear(2, 2)
    >>> model.kept = 2 * model.weight
    >>> duplicate(model).kept.requires_grad
    False
    """
    held = [part for module in model.modules() for part in _inside(list(module.__dict__.values()))]
    past = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(model, cast(dict[int, object], past))


def choose(
    model: nn.Module, names: Iterable[str] | None, verb: str, *, twin: bool = False
) -> tuple[dict[str, Matrix], dict[str, str]]:
    """The layers of these names, or all that can be changed, and why the others can't.

    Raises:
        ValueError: a model without matrices, an unknown name, a named layer with an `obstacle`.

    >>> choose(nn.Sequential(nn.Linear(3, 2)), None, "project")
    ({'0': Linear(in_features=3, out_features=2, bias=True)}, {})
    """
    known = matrix_layers(model)
    if not known:
        raise ValueError(f"the model has no nn.Linear or nn.Conv2d to {verb}")
    chosen = list(known if names is None else names)
    if not chosen:
        raise ValueError(f"no layers are named to {verb}; known: {', '.join(known)}")
    for name in chosen:
        checks.one_of(name, tuple(known), "layer")
    found = {name: obstacle(model, known[name], twin=twin) for name in chosen}
    left = {name: reason for name, reason in found.items() if reason}
    if names is not None:
        for name, reason in left.items():
            raise ValueError(f"can't {verb} layer {name!r}: {reason}")
    return {name: known[name] for name in chosen if name not in left}, left


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
    kind = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    kind["bias"] = layer.bias is not None
    if isinstance(layer, nn.Linear):
        second = skip_init(nn.Linear, rank, layer.out_features, **kind)
    else:
        second = skip_init(nn.Conv2d, rank, layer.out_channels, 1, **kind)
    return LowRank(_resized(layer, rank, bias=False), second).train(layer.training)


def dense_twin(layer: LowRank) -> Matrix:
    """One layer in place of two thin ones, its tensors not yet filled.

    >>> dense_twin(thin_twin(nn.Linear(100, 80), 10))
    Linear(in_features=100, out_features=80, bias=True)
    """
    first, second = layer.factors
    return _resized(first, len(second.weight), bias=second.bias is not None)


def _resized(layer: Matrix, outs: int, bias: bool) -> Matrix:
    """A layer like ``layer`` with another number of outputs. No random number is drawn for it."""
    kind = {"bias": bias, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        like = skip_init(nn.Linear, layer.in_features, outs, **kind)
    else:
        window = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        kind |= {name: getattr(layer, name) for name in window}
        like = skip_init(nn.Conv2d, layer.in_channels, outs, **kind)
    return cast(Matrix, like.train(layer.training))


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
    every call; in training mode, and without it, the layers are called.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
    >>> layer.linear1 = thin_twin(layer.linear1, 2)
    >>> take_no_fused_way(layer)
    >>> layer.activation_relu_or_gelu
    0
    """
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoderLayer) and low_rank_layers(part):
            part.activation_relu_or_gelu = 0  # torch's mark of an activation that it can't fuse
        if isinstance(part, nn.TransformerEncoder) and low_rank_layers(part):
            part.use_nested_tensor = False
