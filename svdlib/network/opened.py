"""A model opened once: its layers by name, what they share, and what stands in their way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import filter as filter_names
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.network.attention import HELD, Made, pack_, projections, unpack_
from svdlib.network.batches import Batch
from svdlib.network.calls import Call, run
from svdlib.network.kinds import Layer, Linear, layer_of
from svdlib.network.low_rank import Factorized, LowRank, low_rank_layers, tied
from svdlib.network.modes import (
    After,
    Before,
    avoid_fused_,
    evaluating,
    hooked,
    is_compiled,
    uncompiled,
    unfused,
)

# Where a module keeps its parts: what it holds elsewhere, it does not know as its own.
REGISTERED = ("_modules", "_parameters", "_buffers")

# Networks of fewer numbers repeat small operations, which more threads only hold up.
SMALL = 100_000

READ = "the model reads its weight without calling it, which would multiply the factors each time"


class Network:
    """A model and its layers that hold a matrix, dense or factorized, by name.

    Of an ``nn.MultiheadAttention`` these are q_proj, k_proj, v_proj and out_proj, the first three
    with views of its tensors. `copy_of` and `to_measure` open a model in which they are layers.

    Attributes:
        model: what is called.
        layers: by name, a factorized one without its factors; named parameters join them.
        left: why others are left as they are, for `warn`.

    >>> list(Network(nn.Sequential(nn.Linear(9, 9), nn.MultiheadAttention(8, 2))).layers)
    ['0', '1.q_proj', '1.k_proj', '1.v_proj', '1.out_proj']
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = find_layers(model)
        self.left: dict[str, str] = {}

    @classmethod
    @threads.making()
    @torch.no_grad()
    def copy_of(cls, model: nn.Module, *, merge: bool = True) -> Network:
        """A deep copy, without factorized layers, to be changed and given away by `closed`."""
        model = unpack_(duplicate(model))
        return cls(merge_(model) if merge else model)

    @classmethod
    @threads.making()
    @torch.no_grad()
    def to_measure(cls, model: nn.Module, *, merge: bool = True) -> Network:
        """The model itself, or a copy with its parameters where a layer has to be opened."""
        if merge and low_rank_layers(model):
            model = unpack_(merge_(duplicate(model)))
        elif any(type(part) is nn.MultiheadAttention for part in model.modules()):
            model = unpack_(duplicate(model, shared=True))
        return cls(model)

    def closed(self) -> nn.Module:
        """The model, to be given away: attention whose projections are dense is packed again."""
        model = pack_(self.model)
        avoid_fused_(model)
        return model

    # What can be changed, and what can't.

    def choose(
        self, names: Iterable[str] | None, verb: str, *, replace: bool = False
    ) -> dict[str, Layer]:
        """The layers of these names, or all that can be changed; why others can't is in ``left``.

        Args:
            replace: whether they are to be replaced. If not, parameters can be named, too.

        Raises:
            ValueError: a model without matrices, an unknown name, a named layer with an obstacle.
        """
        known, chosen = self.layers, list(self.layers if names is None else names)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        named = parameters.keys() & set(chosen) - known.keys()
        if not known and not named:
            raise ValueError(f"the model has no nn.Linear, convolution or nn.Embedding to {verb}")
        if not chosen:
            raise ValueError(f"no layers are named to {verb}; known: {', '.join(known)}")
        for name in chosen:
            if name in named:
                known[name] = self._parameter(parameters[name], name, verb, replace)
            checks.one_of(name, tuple(known), "layer")
        found = {name: self.obstacle(name, replace) for name in chosen}
        left = {name: reason for name, reason in found.items() if reason}
        for name, reason in left.items() if names is not None else ():
            raise ValueError(f"can't {verb} layer {name!r}: {reason}")
        self.left |= left
        return {name: known[name] for name in chosen if name not in left}

    def _parameter(self, parameter: nn.Parameter, name: str, verb: str, replace: bool) -> Layer:
        """A parameter that a module reads itself as a layer's weight: its rows by all the rest.

        Such as an LSTM's ``weight_hh_l0``, its gates' matrices under one another.
        """
        place, _, own = name.rpartition(".")
        refused = f"can't {verb} parameter {name!r}"
        if replace:
            owner = type(self.model.get_submodule(place)).__name__
            raise ValueError(
                f"{refused}: a {owner} reads it itself and takes no two factors for it; project_ "
                "cuts it in place"
            )
        for other, layer in self.layers.items():
            packed = own in HELD and other == f"{place}.q_proj".lstrip(".")
            if packed or any(parameter is each for each in layer.module.parameters()):
                raise ValueError(f"{refused}: it is in layer {other!r}; name that")
        if parameter.ndim < 2:
            raise ValueError(f"{refused}: a vector has no rank to lower")
        module = nn.Linear(1, 1, False, device="meta")
        module.weight = parameter
        return Linear(module)

    def obstacle(self, name: str, replace: bool) -> str | None:
        """What stands in the way of giving a layer another weight, if anything does.

        With ``replace``, of putting another layer in its place too: then it must be its matrix
        and bias, and nothing else, and so must the layers that share its weight.
        """
        layer = self.layers[name]
        reason = layer.obstacle(replace)
        if reason or not replace or isinstance(layer, Factorized):
            return reason
        for place, module in self._owners.get(id(layer.weight), ()):
            other = layer_of(module)
            if module is layer.module:
                continue
            if other is None or not (layer.can_share and other.can_share):
                return f"its weight is shared with {place!r}"
            if reason := other.obstacle(replace=True):
                return f"its weight is shared with {place!r}, which can't be replaced: {reason}"
        if part := self._compiled.get(id(layer.module)):
            return f"{part!r} is compiled with it; factorize first, then compile"
        if holder := self._held.get(id(layer.module)):
            return f"{holder!r} holds it besides, where a factorized one would not be seen"
        return None

    @cached_property
    def _owners(self) -> dict[int, list[tuple[str, nn.Module]]]:
        """The modules that have each parameter, by its id."""
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in self.model.named_modules():
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), []).append((name, module))
        return owners

    @cached_property
    def _compiled(self) -> dict[int, str]:
        """The compiled part that each module is in, by its id."""
        parts = [(n, part) for n, part in self.model.named_modules() if is_compiled(part)]
        return {id(inner): n or "the model" for n, part in parts for inner in part.modules()}

    @cached_property
    def _held(self) -> dict[int, str]:
        """Where modules are held besides, by their ids."""
        found: dict[int, str] = {}
        for name, part in self.model.named_modules():
            for attribute, value in part.__dict__.items():
                for each in _inside(value) if attribute not in REGISTERED else ():
                    if isinstance(each, nn.Module):
                        found.setdefault(id(each), f"{name}.{attribute}".lstrip("."))
        return found

    @cached_property
    def ties(self) -> list[list[str]]:
        """The names of layers that share one weight, a list for each such weight."""
        return tied(self.layers)

    def first_of_ties(self, names: Collection[str]) -> dict[str, str]:
        """For each of these layers that shares its weight with another of them, the first that does."""
        groups = [[name for name in group if name in names] for group in self.ties]
        return {name: group[0] for group in groups if len(group) > 1 for name in group}

    def is_shared(self, layer: Layer) -> bool:
        """Whether another module has the layer's weight too."""
        owners = self._owners.get(id(layer.weight), ())
        return any(module is not layer.module for _, module in owners)

    def matching(self, include: Iterable[str] | None, exclude: Iterable[str]) -> list[str]:
        """The names of layers that fit one of the patterns to include, and none to exclude.

        Raises:
            ValueError: a pattern that fits no layer.
        """
        wanted = ["*"] if include is None else checks.several(include, "include", '["encoder.*"]')
        barred = checks.several(exclude, "exclude", '["encoder.*"]')
        for pattern in (*wanted, *barred) if self.layers else ():
            if not isinstance(pattern, str) or not filter_names(self.layers, pattern):
                raise ValueError(
                    f"include and exclude name layers; {pattern!r} fits none of "
                    f"{', '.join(self.layers)}"
                )
        chosen = {name for pattern in wanted for name in filter_names(self.layers, pattern)}
        left = {name for pattern in barred for name in filter_names(self.layers, pattern)}
        return [name for name in self.layers if name in chosen - left]

    def replaceable(
        self, names: Iterable[str], batch: Batch, call: Call | None
    ) -> dict[str, Layer]:
        """Those of the layers that can be replaced, as a call shows; why others can't is in ``left``.

        Raises:
            ValueError: there is none.
        """
        names = list(names)
        layers = self.choose(None, "compress", replace=True)
        self.left |= dict.fromkeys(self.weights_read(layers, batch, call), READ)
        for group in self.ties:
            if not set(group) <= set(names) - self.left.keys():
                others = [name for name in group if name not in self.left]
                self.left |= dict.fromkeys(others, "its weight is shared with a layer that is left")
        self.left = {name: why for name, why in self.left.items() if name in names}
        found = {n: layers[n] for n in names if n in layers and n not in self.left}
        if not found:
            raise ValueError("the model has no layer that could be factorized, of those asked for")
        return found

    def check_ties(self, ranks: Mapping[str, int], verb: str) -> None:
        """Refuse ranks for only one of layers that share a weight, or different ones."""
        for names in self.ties:
            given = {name: ranks.get(name) for name in names}
            if len(set(given.values())) > 1:
                name = next(name for name in names if given[name])
                others = ", ".join(repr(other) for other in names if other != name)
                raise ValueError(
                    f"can't {verb} layer {name!r} by itself: its weight is shared with {others}; "
                    "give all of them the same rank, or none"
                )

    def warn(self) -> None:
        """Name the layers that are left as they were, and why, to the library's caller."""
        if self.left:
            reasons = "; ".join(f"{name!r} ({reason})" for name, reason in self.left.items())
            checks.warn(f"left as they were: {reasons}")

    def leave(self, name: str, reason: str) -> None:
        """Leave a layer as it is, and those that share its weight."""
        groups = [names for names in self.ties if name in names]
        self.left |= dict.fromkeys(groups[0] if groups else [name], reason)

    def untied(self, names: Iterable[str]) -> list[str]:
        """Those of the layers that share no weight."""
        shared = {name for group in self.ties for name in group}
        return [name for name in names if name not in shared]

    # Changing it.

    def put(self, name: str, module: nn.Module) -> None:
        """Put a module wherever the layer of that name is."""
        old = self.layers[name].module
        self.model = replace_module(self.model, old, module)
        found = layer_of(module)
        self.layers[name] = found or Factorized(cast(LowRank, module))

    @contextmanager
    def with_modules(self, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
        """The model with other modules of these names, for a while."""
        own = {name: self.layers[name].module for name in modules}
        try:
            for name, module in modules.items():
                self.put(name, module)
            yield self.model
        finally:
            for name, module in own.items():
                self.put(name, module)

    # Calling it.

    @contextmanager
    def measuring(self, *others: nn.Module) -> Iterator[None]:
        """Evaluation mode, no gradients, none of the caller's autocast, for others beside it too.

        Random numbers that models, an objective or a DataLoader draw leave the caller's state.
        """
        parameters = list(self.model.parameters())
        small = sum(parameter.numel() for parameter in parameters) < SMALL
        cuda = {parameter.get_device() for parameter in parameters if parameter.is_cuda}
        with (
            torch.no_grad(),
            threads.plain(),
            threads.inside(1 if small else torch.get_num_threads()),
            torch.random.fork_rng(devices=sorted(cuda)),
            unfused(self.model),
            evaluating(self.model, *others),
        ):
            yield

    @contextmanager
    def hooked(
        self, names: Iterable[str], after: After | None = None, before: Before | None = None
    ) -> Iterator[None]:
        """As `hooked`, at every call of the layers of these names, in evaluation mode."""
        modules = {name: self.layers[name].module for name in names}
        with evaluating(self.model), hooked(modules, after, before), uncompiled(self.model):
            yield

    def watch(
        self,
        names: Iterable[str],
        data: Iterable[Batch],
        call: Call | None,
        note: Callable[[str, Tensor], None],
        start: Callable[[Batch], bool | None],
    ) -> None:
        """Run it on batches, with ``note(name, x)`` wherever one of the layers gets an input x.

        Args:
            start: called before each batch; where it is true, no more are run.
        """
        before = lambda name, inputs: note(name, inputs[0])
        with torch.no_grad(), self.hooked(names, before=before):
            for batch in data:
                if start(batch):
                    break
                run(self.model, batch, call)

    def weights_read(self, names: Iterable[str], batch: Batch, call: Call | None) -> list[str]:
        """Those of the layers whose weight a call of the model reads without calling them.

        >>> linear = nn.Linear(3, 2)
        >>> reads = lambda model, x: x @ model.weight.mT
        >>> Network(linear).weights_read([""], torch.rand(1, 3), reads)
        ['']
        """
        found: set[str] = set()
        inside: list[str] = []
        kinds = {name: type(self.layers[name].module) for name in names}

        def watched(name: str, kind: Any) -> type[nn.Module]:
            def weight(module: nn.Module) -> Any:
                if name not in inside:
                    found.add(name)
                return module._parameters["weight"]

            return type(kind.__name__, (kind,), {"weight": property(weight)})

        def enter(name: str, inputs: object) -> None:
            inside.append(name)

        def leave(name: str, inputs: object, output: object) -> None:
            inside.remove(name)

        with torch.no_grad(), unfused(self.model), self.hooked(kinds, leave, enter):
            try:
                for name, kind in kinds.items():
                    self.layers[name].module.__class__ = watched(name, kind)
                run(self.model, batch, call)
            finally:
                for name, kind in kinds.items():
                    self.layers[name].module.__class__ = kind
        return [name for name in kinds if name in found]


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """A model's layers that hold a matrix by name, see `Network`."""
    inner = {id(factor) for layer in low_rank_layers(model).values() for factor in layer}
    made: Made = {}
    layers: dict[str, Layer] = {}
    for name, part in model.named_modules():
        if type(part) is nn.MultiheadAttention:
            own = projections(part, made)
            layers |= {f"{name}.{each}".lstrip("."): Linear(layer) for each, layer in own.items()}
        elif isinstance(part, LowRank):
            layers[name] = Factorized(part)
        elif id(part) not in inner and (layer := layer_of(part)):
            layers[name] = layer
    return layers


def _inside(value: object) -> Iterator[object]:
    """A value and, of lists, tuples, sets and dictionaries, what they hold."""
    yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for part in value:
            yield from _inside(part)


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


def merge_(model: nn.Module) -> nn.Module:
    """Make each `LowRank` layer one dense layer again, in place."""
    layers = low_rank_layers(model)
    dense = {name: Factorized(layer).dense() for name, layer in layers.items()}
    for name, layer in layers.items():
        weight = dense[name].weight
        weight.copy_(layer.weight).requires_grad_(layer.factors[0].weight.requires_grad)
        if layer.bias is not None:
            dense[name].bias = layer.bias
    for first, *others in tied({name: Factorized(layer) for name, layer in layers.items()}):
        for name in others:
            dense[name].weight = dense[first].weight
    for name, layer in layers.items():
        model = replace_module(model, layer, dense[name])
    return model


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is; a layer may have several places. Returns the root."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new if root is old else root
