"""One class per kind of layer that holds a matrix. A new kind is a new class and an entry of KINDS."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from svdlib.linalg.svd import SVD

# Vectors that are multiplied at a time: enough for a fast product, few enough for any memory.
BLOCK = 4096
# The settings of a convolution.
WINDOWS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class Layer:
    """A layer that multiplies by a matrix W, out × in, and adds a bias; (g, m, n) of g groups."""

    types: tuple[type[nn.Module], ...] = ()  # only these, not their subclasses, are replaced
    side_names = ("in_features", "out_features")
    settings: tuple[str, ...] = ()  # the other arguments that make such a layer
    transposed = False  # whether its weight holds the matrix as (in, out)
    feature_dim = -1  # the dimension of its output that has the features
    can_share = False  # whether a layer that shares its weight can be replaced along with it
    multiplies = True  # an Embedding looks its rows up
    overlaps = False  # whether outputs of several vectors are added up
    is_factorized = False
    own_factor = 0  # which of its two thin factors is of its own kind

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.groups: int = vars(module)["groups"] if "groups" in self.settings else 1

    @classmethod
    def includes(cls, module: nn.Module) -> bool:
        return isinstance(module, cls.types)

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters that its matrix is made of."""
        weight = self.module._parameters.get("weight")
        return () if weight is None else (weight,)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def sides(self) -> tuple[int, ...]:
        """The numbers of input and output features or channels."""
        return tuple(getattr(self.module, name) for name in self.side_names)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(m, n) of its matrix."""
        return tuple(self.to_matrix(self.weight.detach()).shape[-2:])

    @property
    def full_rank(self) -> int:
        return min(self.shape)

    @property
    def max_factor_rank(self) -> int:
        """The largest rank at which two factors store fewer numbers than the matrix."""
        m, n = self.shape
        return (m * n - 1) // (m + n)

    @property
    def max_rank(self) -> int:
        """The largest rank that its matrix can have: that of its factors, if it is factorized."""
        return self.full_rank

    def matrix(self) -> Tensor:
        """W, or a stack of its groups' matrices, in a type that can be decomposed."""
        weight = self.weight.detach()
        return self.to_matrix(weight if weight.element_size() >= 4 else weight.float())

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """U Σ, Σ and Vᵀ of its matrix, for `at_rank`."""
        U, S, Vh = torch.linalg.svd(self.matrix(), full_matrices=False)
        return U * S.unsqueeze(-2), S, Vh

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The matrix that a weight of such a layer holds."""
        A = weight.unflatten(0, (self.groups, -1)).flatten(2)
        A = A.mT if self.transposed else A
        return A[0] if self.groups == 1 else A

    def to_weight(self, A: Tensor) -> Tensor:
        A = A.mT if self.transposed else A
        return A.reshape(A[..., 0].numel(), -1, *self.weight.shape[2:])

    def at_rank(self, US: Tensor, Vh: Tensor, rank: int) -> Tensor:
        """The weight at a rank, from the factors U Σ and Vᵀ of its matrix."""
        return self.to_weight(US[..., :rank] @ Vh[..., :rank, :]).to(self.weight.dtype)

    def projected(self, svd: SVD) -> dict[Tensor, Tensor]:
        """The weight to change and its value for the approximation that an SVD of W gives."""
        return {self.weight: self.to_weight(svd.matrix())}

    def stored(self, rank: int) -> int:
        return self.groups * stored(rank, *self.shape)

    def obstacle(self, replace: bool) -> str | None:
        """What in the layer itself prevents another weight or, with ``replace``, two factors."""
        if "weight" not in self.module._parameters:
            return "its weight is computed from other parameters; remove the parametrization first"
        weight = self.weight
        if isinstance(weight, nn.UninitializedParameter):
            return "it has no weight before its first call; call the model once"
        if not weight.is_floating_point():
            return f"its type is {weight.dtype}"
        if weight.is_meta or weight.layout != torch.strided:
            return f"its weight has no numbers here (device {weight.device}, {weight.layout})"
        if type(weight).__torch_dispatch__ != Tensor.__torch_dispatch__:
            kind = type(weight).__name__
            return (
                f"its weight is a {kind}, which is no plain tensor; decompose it before it is made"
            )
        if weight.numel() == 0:
            return f"its weight has no numbers, shape {tuple(weight.shape)}"
        if replace and self.types and type(self.module) not in self.types:
            kind = type(self.module).__name__
            return f"a {kind} may do other things with its weight than a plain layer"
        if replace and "forward" in vars(self.module):
            return (
                "its forward is not its class's, as where accelerate or a patch replaced it; load "
                "the model without device_map, or undo the patch"
            )
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if replace and any(getattr(self.module, name) for name in hooks):
            return "its hooks would be lost; remove them first"
        return None

    # Making others like it. No random number is drawn for them.

    def new(self, kind: type[nn.Module], *sides: int, **more: object) -> nn.Module:
        """A module of another kind with its type, device, and mode, not yet filled."""
        place = {"device": self.weight.device, "dtype": self.weight.dtype}
        return skip_init(kind, *sides, **more, **place).train(self.module.training)

    def resized(self, ins: int, outs: int, bias: bool) -> nn.Module:
        """A module like it with other sides, not yet filled."""
        more = {name: getattr(self.module, name) for name in self.settings}
        return self.new(type(self.module), ins, outs, bias=bias, **more)

    def mixing(self, ins: int, outs: int, bias: bool) -> nn.Module:
        """The factor that mixes features or channels alone, not yet filled."""
        return self.new(nn.Linear, ins, outs, bias=bias)

    def thin(self, rank: int) -> tuple[nn.Module, nn.Module]:
        """Two factors of that rank, in each group, not yet filled."""
        (ins, outs), width, bias = self.sides, self.groups * rank, self.bias is not None
        if self.own_factor == 0:
            return self.resized(ins, width, False), self.mixing(width, outs, bias)
        return self.mixing(ins, width, False), self.resized(width, outs, bias)

    # What it is applied to.

    def has_code(self) -> bool:
        """Whether one matrix is applied to vectors of the input, so that `apply` knows them."""
        return self.groups == 1 and not self.overlaps

    def vectors(self, x: Tensor) -> Tensor:
        """The vectors (N, n) that W is applied to, or (N, g, n) of g groups, from the input x."""
        return x.reshape(-1, x.shape[-1])

    def apply(self, x: Tensor, V: Tensor) -> Tensor:
        """V (k, n) times the vectors of x, with the k products where the output has features."""
        return x.to(V.dtype) @ V.mT

    def output_square(self, g: Tensor) -> tuple[Tensor, int]:
        """Σ g gᵀ (…, m, m) and the number of vectors g, of a gradient at the output."""
        if self.feature_dim == 1 and g.ndim < self.weight.ndim:  # of one input alone
            g = g[None]
        g = g.detach().movedim(self.feature_dim, -1).flatten(0, -2)
        g = g if g.element_size() >= 4 else g.float()
        g = g if self.groups == 1 else g.unflatten(1, (self.groups, -1)).transpose(0, 1)
        return g.mT @ g, g.shape[-2]

    def is_centered(self) -> bool:
        """Whether a change of the bias can make up for a change of W at the mean input."""
        return self.bias is not None and not self.overlaps

    def vector_kind(self) -> tuple[object, ...]:
        """Layers for which this is equal have the same vectors of the same input."""
        settings = (getattr(self.module, name) for name in self.settings)
        return type(self.module), self.sides[0], *settings

    def is_masked(self, x: Tensor, keep: Tensor | None) -> bool:
        """Whether the places (n, T) to keep, of texts, are those of the input x."""
        if keep is None or self.feature_dim != -1:
            return False
        places = x.shape[:-1] if self.multiplies else x.shape
        return places[: keep.ndim] == keep.shape

    def blocks(self, x: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
        """The vectors, in float64, some thousand at a time."""
        x = x[keep.to(x.device)] if keep is not None and self.is_masked(x, keep) else x
        for block in self.vectors(x).split(BLOCK):
            yield block.double()

    def sums(self, block: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        """Σ x and Σ x xᵀ of a block of vectors; with other vectors y in turn, Σ y and Σ y xᵀ too."""
        x = block.movedim(0, -2)
        found = (block.sum(0), x.mT @ x)
        return found if other is None else (*found, other.sum(0), other.movedim(0, -2).mT @ x)


class Linear(Layer):
    types: tuple[type[nn.Module], ...] = (nn.Linear,)
    can_share = True

    def resized(self, ins: int, outs: int, bias: bool) -> nn.Module:
        return self.new(nn.Linear, ins, outs, bias=bias)


class TiedLinear(nn.Module):
    """A linear map whose weight is another layer's too, (out, in) or, ``transposed``, (in, out).

    The output layer of a tied model h ↦ P (Qᵀ h), factorized, shares both its factors with the
    embedding's rows i ↦ Q P_i, and Q, (in, rank), is its first. None of them is an nn.Linear: what
    merges adapters into those, one by one, would change the other layer as well.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        transposed: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.transposed = transposed
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.mT if self.transposed else self.weight, self.bias)

    def extra_repr(self) -> str:
        sides = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sides}, bias={self.bias is not None}, transposed={self.transposed}"


class OfTiedLinear(Linear):
    types = (TiedLinear,)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.transposed = bool(module.transposed)


class Conv1D(Layer):
    """Conv1D of the transformers library: a Linear whose weight is (in, out)."""

    side_names = ("nx", "nf")
    transposed = True
    own_factor = 1

    @classmethod
    def includes(cls, module: nn.Module) -> bool:
        weight, named = module._parameters.get("weight"), type(module).__name__ == "Conv1D"
        return named and weight is not None and weight.shape[1:] == (getattr(module, "nf", None),)

    @property
    def sides(self) -> tuple[int, ...]:
        """As `Layer`; an older Conv1D has no nx."""
        return tuple(self.weight.shape)

    def resized(self, ins: int, outs: int, bias: bool) -> nn.Module:
        """As `Layer`: a deep copy knows how to make one."""
        weight = nn.Parameter(self.weight.new_empty(ins, outs))
        resized = copy.deepcopy(self.module, {id(self.weight): weight})
        vars(resized).update(nx=ins, nf=outs)
        return resized


class Embedding(Layer):
    """nn.Embedding of V rows: W is (features × V), applied to vectors with a single one each."""

    types = (nn.Embedding,)
    side_names = ("num_embeddings", "embedding_dim")
    settings = ("padding_idx", "scale_grad_by_freq", "sparse")
    transposed = True
    can_share = True
    multiplies = False

    def obstacle(self, replace: bool) -> str | None:
        reason = super().obstacle(replace)
        if reason is None and replace and self.module.max_norm is not None:
            return "factors cannot reproduce max_norm"
        return reason

    def resized(self, ins: int, outs: int, bias: bool) -> nn.Module:
        more = {name: getattr(self.module, name) for name in self.settings}
        return self.new(nn.Embedding, ins, outs, **more)

    def vectors(self, x: Tensor) -> Tensor:
        """The places (N,) of the ones."""
        return x.flatten()

    def apply(self, x: Tensor, V: Tensor) -> Tensor:
        return F.embedding(x, V.mT)

    def sums(self, block: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        """As `Layer`; Σ x xᵀ is diagonal, (V,). What is looked up does not change with the network."""
        counts = block.long().bincount(minlength=self.module.num_embeddings).double()
        return counts, counts


class Convolution(Layer):
    """nn.Conv1d, 2d, 3d: W is (out × in·window) of each group, applied to windows."""

    types: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    side_names = ("in_channels", "out_channels")
    settings: tuple[str, ...] = WINDOWS
    feature_dim = 1

    def mixing(self, ins: int, outs: int, bias: bool) -> nn.Module:
        kind = Convolution.types[self.weight.ndim - 3]  # with windows of one place
        return self.new(kind, ins, outs, kernel_size=1, groups=self.groups, bias=bias)

    def vectors(self, x: Tensor) -> Tensor:
        module, x = self.module, self._batch(x)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        windows = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        for dim, (size, step, dilation) in enumerate(windows, 2):
            x = x.unfold(dim, dilation * (size - 1) + 1, step)[..., ::dilation]
        return self._by_group(x)

    def _batch(self, x: Tensor) -> Tensor:
        return x if x.ndim == self.weight.ndim else x[None]

    def _by_group(self, x: Tensor) -> Tensor:
        dims = len(self.module.kernel_size)
        x = x.movedim(1, 1 + dims).flatten(0, dims).unflatten(1, (self.groups, -1)).flatten(2)
        return x[:, 0] if self.groups == 1 else x

    def apply(self, x: Tensor, V: Tensor) -> Tensor:
        weight = V.view(-1, *self.weight.shape[1:])
        return self.module._conv_forward(x.to(V.dtype), weight, None)

    def blocks(self, x: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
        x = self._batch(x)
        for block in x.split(max(1, BLOCK // max(len(self.vectors(x[:1])), 1))):
            yield self.vectors(block).double()


class TransposedConvolution(Convolution):
    """nn.ConvTranspose1d, 2d, 3d: W is (out·window × in) of each group, applied to places."""

    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    settings = (*Convolution.settings, "output_padding")
    transposed = True
    overlaps = True
    own_factor = 1

    def vectors(self, x: Tensor) -> Tensor:
        return self._by_group(self._batch(x))

    def output_square(self, g: Tensor) -> tuple[Tensor, int]:
        """As `Layer`; the places of a window are taken to be alike, and independent."""
        square, count = super().output_square(g)
        window = math.prod(self.module.kernel_size)
        return torch.kron(square, torch.eye(window, dtype=square.dtype, device=g.device)), count


# The first that includes a module is its kind.
KINDS = (Linear, OfTiedLinear, Embedding, Convolution, TransposedConvolution, Conv1D)
# What layers call their sides and settings.
ATTRIBUTES = {name for kind in KINDS for name in (*kind.side_names, *kind.settings)}


def layer_of(module: nn.Module) -> Layer | None:
    """A module as a layer that holds a matrix; None if it is of no such kind."""
    return next((kind(module) for kind in KINDS if kind.includes(module)), None)


def stored(rank: int, m: int, n: int) -> int:
    """Numbers in an m × n matrix of that rank: as two factors, r (m + n), or whole if that is less."""
    return min(rank * (m + n), m * n)
