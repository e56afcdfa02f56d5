"""The matrices of any module, dense or as two thin factors, and ways to put them in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

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


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a module's Linear and Conv2d layers, by layer name.

    >>> list(matrices(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))))
    ['0', '2']
    """
    return {
        name: layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


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


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The factorized layers of a model by name.

    >>> list(low_rank_layers(nn.Sequential(nn.ReLU(), thin_layers(nn.Linear(100, 80), 10))))
    ['1']
    """
    return {name: part for name, part in model.named_modules() if isinstance(part, LowRank)}


def thin_layers(layer: Matrix, rank: int) -> LowRank:
    """Two thin layers of that rank in place of one, as torch initialises them.

    >>> thin_layers(nn.Conv2d(3, 8, 5, stride=2, padding=2), 4)
    LowRank(
      (0): Conv2d(3, 4, kernel_size=(5, 5), stride=(2, 2), padding=(2, 2), bias=False)
      (1): Conv2d(4, 8, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    first, bias, weight = resized(layer, rank, bias=False), layer.bias is not None, layer.weight
    second: Matrix
    if isinstance(layer, nn.Linear):
        second = nn.Linear(rank, layer.out_features, bias, weight.device, weight.dtype)
    else:
        second = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
        second = second.to(weight.device, weight.dtype)
    return LowRank(first, second).train(layer.training)


def resized(layer: Matrix, outs: int, bias: bool) -> Matrix:
    """A new layer like ``layer``, with another number of outputs.

    >>> resized(nn.Linear(3, 2), outs=5, bias=False)
    Linear(in_features=3, out_features=5, bias=False)
    """
    like: Matrix
    if isinstance(layer, nn.Linear):
        like = nn.Linear(layer.in_features, outs, bias)
    else:
        window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        like = nn.Conv2d(layer.in_channels, outs, *window, 1, bias, layer.padding_mode)  # type: ignore[arg-type]
    return like.to(layer.weight.device, layer.weight.dtype).train(layer.training)


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
