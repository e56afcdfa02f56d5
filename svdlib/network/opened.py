"""A model opened once: its layers by name, what they share, and what stands in their way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from svdlib import checks, clock, threads
from svdlib.network import modes
from svdlib.network.attention import HELD, Made, pack_, projections, unpack_
from svdlib.network.calls import Batch, Call, copied_to, prepared, run, tensors
from svdlib.network.held import fixed, held
from svdlib.network.kinds import Layer, Linear, layer_of
from svdlib.network.low_rank import Factorized, LowRank, low_rank_layers, tied
from svdlib.network.modes import After, Before

# What other libraries' models need when they are given away, or when their ranks have changed.
FINISHERS: list[Callable[[nn.Module], nn.Module]] = []
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
    """

    def __init__(self, model: nn.Module, original: nn.Module | None = None) -> None:
        self.model, self._original = model, original
        self.layers = find_layers(model)
        self.left: dict[str, str] = {}

    @classmethod
    @threads.making()
    @torch.no_grad()
    def copy_of(cls, model: nn.Module) -> Network:
        """A deep copy, without factorized layers, to be changed and given away by `closed`."""
        return cls(merge_(unpack_(duplicate(model))), model)

    @classmethod
    @threads.making()
    @torch.no_grad()
    def to_measure(cls, model: nn.Module, *, merge: bool = True) -> Network:
        """A copy with the model's numbers, so that others may call the model meanwhile.

        A model is measured itself if it can't be copied, is compiled, or holds modules besides, as
        a function in a copy would call those of the original.
        """
        if merge and low_rank_layers(model):
            return cls(unpack_(merge_(duplicate(model))))
        if fixed(model):
            return cls(model)
        try:
            twin = duplicate(model, shared=True)
        except (TypeError, RuntimeError, AttributeError, NotImplementedError):
            return cls(model)
        return cls(unpack_(twin))

    def closed(self) -> nn.Module:
        """The model, to be given away: attention whose projections are dense is packed again."""
        return finished(modes.avoid_fused_(pack_(self.model)))

    # What can be changed, and what can't.

    def choose(
        self, names: Iterable[str] | None, verb: str, *, replace: bool = False
    ) -> dict[str, Layer]:
        """The layers of these names, or all that can be changed; why others can't is in ``left``.

        Unless they are to be replaced, parameters can be named, too.
        """
        known, chosen = self.layers, list(self.layers if names is None else names)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in chosen:
            if name in parameters and name not in known:
                known[name] = self._parameter(parameters[name], name, verb, replace)
        if not known:
            raise ValueError(f"the model has no nn.Linear, convolution or nn.Embedding to {verb}")
        if not chosen:
            raise ValueError(f"no layers are named to {verb}; known: {', '.join(known)}")
        for name in chosen:
            checks.one_of(name, tuple(known), "layer")
        reasons = {name: self.obstacle(name, replace) for name in chosen}
        left = {name: reason for name, reason in reasons.items() if reason}
        for name, reason in left.items() if names is not None else ():
            raise ValueError(f"can't {verb} layer {name!r}: {reason}")
        self.left |= left
        return {name: known[name] for name in chosen if name not in left}

    def _parameter(self, parameter: nn.Parameter, name: str, verb: str, replace: bool) -> Layer:
        """A parameter that a module reads itself, such as an LSTM's, as a layer's weight."""
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
            if packed or id(parameter) in map(id, layer.module.parameters()):
                raise ValueError(f"{refused}: it is in layer {other!r}; name that")
        if parameter.ndim < 2:
            raise ValueError(f"{refused}: a vector has no rank to lower")
        module = nn.Linear(1, 1, False, device="meta")
        module.weight = parameter
        return Linear(module)

    def obstacle(self, name: str, replace: bool) -> str | None:
        """What prevents giving a layer another weight or, with ``replace``, replacing the layer.

        To be replaced, it and the layers that share its weight must be matrix and bias alone.
        """
        layer = self.layers[name]
        reason = layer.obstacle(replace)
        if reason or not replace or isinstance(layer, Factorized):
            return reason
        for place, other in self._others(layer):
            shared, kind = f"its weight is shared with {place!r}", layer_of(other)
            if kind is None or not (layer.can_share and kind.can_share):
                return shared
            if reason := kind.obstacle(replace=True):
                return f"{shared}, which can't be replaced: {reason}"
        return self._fixed.get(name)

    @cached_property
    def _owners(self) -> dict[int, list[tuple[str, nn.Module]]]:
        """The modules that have each parameter, by its id."""
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in self.model.named_modules():
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), []).append((name, module))
        return owners

    def _others(self, layer: Layer) -> list[tuple[str, nn.Module]]:
        owners = self._owners.get(id(layer.weight), [])
        return [(name, module) for name, module in owners if module is not layer.module]

    @cached_property
    def _fixed(self) -> dict[str, str]:
        """Why modules can't be replaced, by name. Functions in a copy hold the original's modules."""
        found = {} if self._original is None else fixed(self._original)
        return found | fixed(self.model)

    @cached_property
    def ties(self) -> list[list[str]]:
        """The names of layers that share one weight, a list for each such weight."""
        return tied(self.layers)

    def first_of_ties(self, names: Collection[str]) -> dict[str, str]:
        """The first of the layers that share a weight, for each of these that shares its own."""
        groups = [[name for name in group if name in names] for group in self.ties]
        return {name: group[0] for group in groups if len(group) > 1 for name in group}

    def embeddings(self) -> set[str]:
        """The layers that look rows up, and those that share a weight with one."""
        found = {name for name, layer in self.layers.items() if not layer.multiplies}
        return found.union(*(group for group in self.ties if found & set(group)))

    def is_shared(self, layer: Layer) -> bool:
        return bool(self._others(layer))

    def matching(self, include: Iterable[str] | None, exclude: Iterable[str]) -> list[str]:
        """The names of layers that match a pattern to include, and none to exclude."""
        wanted = ["*"] if include is None else checks.several(include, "include", '["encoder.*"]')
        barred = checks.several(exclude, "exclude", '["encoder.*"]')
        fits = lambda name, patterns: any(fnmatchcase(name, pattern) for pattern in patterns)
        for pattern in (*wanted, *barred) if self.layers else ():
            if not isinstance(pattern, str) or not any(fits(n, [pattern]) for n in self.layers):
                known = ", ".join(self.layers)
                raise ValueError(f"include or exclude: {pattern!r} fits none of {known}")
        return [name for name in self.layers if fits(name, wanted) and not fits(name, barred)]

    def replaceable(
        self, names: Collection[str], batch: Batch, call: Call | None
    ) -> dict[str, Layer]:
        """Those of the layers that can be replaced, as a call shows; why others can't is in ``left``."""
        layers = self.choose(None, "compress", replace=True)
        self.left |= dict.fromkeys(self.weights_read(layers, batch, call), READ)
        for group in self.ties:
            if not set(group) <= set(names) - self.left.keys():
                reason = "its weight is shared with a layer that is left"
                self.left |= {name: reason for name in group if name not in self.left}
        self.left = {name: why for name, why in self.left.items() if name in names}
        found = {n: layers[n] for n in names if n in layers and n not in self.left}
        if not found:
            raise ValueError("the model has no layer that could be factorized, of those asked for")
        return found

    def check_ties(self, ranks: Mapping[str, int], verb: str) -> None:
        """Refuse ranks for only one of layers that share a weight, or different ones."""
        for names in self.ties:
            if len({ranks.get(name) for name in names}) > 1:
                name = next(name for name in names if ranks.get(name))
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
        group = next((names for names in self.ties if name in names), [name])
        self.left |= dict.fromkeys(group, reason)

    def untied(self, names: Iterable[str]) -> list[str]:
        """Those of the layers that share no weight."""
        return [name for name in names if not any(name in group for group in self.ties)]

    # Changing it.

    def put(self, name: str, module: nn.Module) -> None:
        """Put a module wherever the layer of that name is."""
        old = self.layers[name].module
        for parent, place in self._places.get(id(old), []):
            parent._modules[place] = module
        self._places[id(module)] = self._places.pop(id(old), [])
        self.model = module if self.model is old else self.model
        self.layers[name] = layer_of(module) or Factorized(cast(LowRank, module))

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

    @cached_property
    def _places(self) -> Places:
        """Where each module is, by its id: looked up once, as models have thousands of modules."""
        return places_of(self.model)

    # Calling it.

    @contextmanager
    def measuring(self, *others: nn.Module) -> Iterator[None]:
        """Evaluation mode, no gradients, none of the caller's autocast, for others beside it too.

        Random numbers that models, an objective or a DataLoader draw leave the caller's state.
        """
        parameters = list(self.model.parameters())
        small = sum(parameter.numel() for parameter in parameters) < SMALL
        devices = sorted({parameter.get_device() for parameter in parameters if parameter.is_cuda})
        with (
            torch.no_grad(),
            threads.plain(),
            threads.inside(1 if small else torch.get_num_threads()),
            threads.same_random(devices),
            modes.unfused(self.model),
            modes.evaluating(self.model, *others),
        ):
            yield

    @contextmanager
    def hooked(
        self, names: Iterable[str], after: After | None = None, before: Before | None = None
    ) -> Iterator[None]:
        modules = {name: self.layers[name].module for name in names}
        compiled = any(map(modes.is_compiled, self.model.modules()))  # such code ignores hooks
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with modes.evaluating(self.model), modes.hooked(modules, after, before), eager:
            yield

    def seconds(self, model: nn.Module, x: Batch, call: Call | None) -> list[float]:
        """Seconds of each layer in one run, and at last of the model itself, not opened, in another."""
        taken = dict.fromkeys(self.layers, 0.0)
        device = next((part.device for part in tensors(copied_to(model, x))), clock.CPU)

        def start(name: str, inputs: object) -> None:
            taken[name] -= clock.now(device)

        def stop(name: str, inputs: object, output: object) -> None:
            taken[name] += clock.now(device)

        with modes.evaluating(model):
            call_model = prepared(model, copied_to(model, x), call)
            before = clock.now(device)
            call_model()
            total = clock.now(device) - before
        with self.hooked(self.layers, stop, start):
            run(self.model, x, call)
        return [*taken.values(), total]

    def weights_read(self, names: Iterable[str], batch: Batch, call: Call | None) -> list[str]:
        """Those of the layers whose weight a call of the model reads without calling them."""
        found: set[str] = set()
        called: list[str] = []
        kinds = {name: type(self.layers[name].module) for name in names}

        def watched(name: str, kind: Any) -> type[nn.Module]:
            def weight(module: nn.Module) -> Any:
                if name not in called:
                    found.add(name)
                return module._parameters["weight"]

            return type(kind.__name__, (kind,), {"weight": property(weight)})

        enter = lambda name, inputs: called.append(name)
        leave = lambda name, inputs, output: called.remove(name)
        with torch.no_grad(), modes.unfused(self.model), self.hooked(kinds, leave, enter):
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


def duplicate(model: nn.Module, *, shared: bool = False) -> nn.Module:
    """A deep copy or, with ``shared``, one whose parameters share the numbers of the model's.

    Tensors with a history, results of the last call or pruned weights, which ``copy.deepcopy``
    refuses, are copied without it.
    """
    inside = (part for module in model.modules() for part in held(vars(module).values()))
    past = {id(t): t.detach().clone() for t in inside if isinstance(t, Tensor) and not t.is_leaf}
    kept = {id(parameter): _alias(parameter) for parameter in model.parameters() if shared}
    return copy.deepcopy(model, cast(dict[int, object], {**past, **kept}))


def finished(model: nn.Module) -> nn.Module:
    """The model after all `FINISHERS`."""
    for finish in FINISHERS:
        model = finish(model)
    return model


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter with the same numbers, where it is of the usual kind."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), parameter.requires_grad)


def merge_(model: nn.Module) -> nn.Module:
    """Make each `LowRank` layer one dense layer again, in place."""
    layers = {name: Factorized(layer) for name, layer in low_rank_layers(model).items()}
    dense, places = {name: layer.dense() for name, layer in layers.items()}, places_of(model)
    for name, layer in layers.items():
        trained = layer.factors[0].weight.requires_grad
        dense[name].weight.copy_(layer.weight).requires_grad_(trained)
        if layer.bias is not None:
            dense[name].bias = layer.bias
        for parent, place in places.get(id(layer.module), []):
            parent._modules[place] = dense[name]
        model = dense[name] if model is layer.module else model
    for first, *others in tied(layers):
        for name in others:
            dense[name].weight = dense[first].weight
    return model


# The parents that have a module, and its names there, by its id.
Places = dict[int, list[tuple[nn.Module, str]]]


def places_of(model: nn.Module) -> Places:
    """All places of a model's modules; a layer may have several."""
    places: Places = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, name))
    return places
