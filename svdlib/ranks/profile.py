"""How the loss of a network depends on the rank of each layer, measured cheaply and exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks
from svdlib.bars import bar
from svdlib.layers.factorize import opened
from svdlib.layers.kinds import (
    CONVOLUTIONS,
    Matrix,
    apply_rows,
    bias,
    groups,
    has_code,
    hooked,
    is_tied,
    matrix,
    obstacle,
)
from svdlib.objective import Batches, Objective
from svdlib.ranks.losses import (
    CACHED,
    Habits,
    Moments,
    Task,
    alike,
    cut_weight,
    full_losses,
    habits,
    measuring,
    profiled_layers,
    replaced,
    task,
    width,
    with_ties,
)


def loss_profile(
    model: nn.Module,
    x: Batches,
    y: Tensor | None = None,
    *,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
    layers: Iterable[str] | None = None,
    ranks: Iterable[int] | None = None,
    memory: int = 2**28,
    progress: bool = True,
) -> pd.DataFrame:
    """The network's loss with one layer at a time cut to each rank, and the others as they are.

    The paper's Algorithm 3 asks for this and takes an SVD and a whole forward pass for each
    layer and rank. Here, in an ``nn.Sequential``, each layer takes one SVD W = Σ σ_j u_j v_jᵀ
    and its input X once, the layer's output at rank j is a nested sum

        Z_0 = b,    Z_j = Z_{j−1} + σ_j u_j (v_jᵀ X),

    and only the layers behind it are run again. The losses are those of the paper's procedure
    to rounding. In any other module the whole model runs for each rank, with a hook that puts
    the nested sum in the place of the layer's output; and where a layer is used twice, shares its
    weight, holds it in groups or for a transposed convolution, or where its weight is read without
    it, with the weight replaced. So it is too, in one pass over the data,
    for all that is not inputs and labels with class scores (n, classes).

    Args:
        model: a module of layers that hold a matrix, see `LowRank`; called in evaluation mode,
            left as it was. A factorized layer counts as the one that it replaced, and of an
            ``nn.MultiheadAttention`` q_proj, k_proj, v_proj and out_proj do, all as in `factorize`.
        x, y: inputs (n, …) and labels (n,), on the model's device. Or, without y, ``x`` is all
            data: tensors (n, …), one, in a tuple (inputs …, targets) or in a mapping, which is
            cut into batches; or an iterable of batches of any kind, such as a DataLoader, which
            is looked at once and taken to the device. A list is such an iterable.
        objective: ``objective(model, batch)`` gives the losses (n,) of a batch. By default
            cross-entropy, of class scores (n, classes, …) with targets (n, …), or of tokens,
            (n, …, classes), in the model's output or its ``logits``; the mean over the places of an
            input, without those of target −100. A tuple's last part or the mapping's "labels" are
            the targets, the others the model's arguments. `next_token_losses` is one for
            language models.
        accuracy: ``accuracy(model, batch)`` gives right answers (n,), 0 to 1. By default those
            of the default objective, or NaN with another.
        layers: names of the layers to profile, or of parameters, as `project_` takes them; all
            layers by default.
        ranks: the ranks to evaluate, capped at each layer's min(m, n); 0 … min(m, n) by default.
        memory: bytes that the stacked intermediate results may take, about.
        progress: show a progress bar.

    Returns:
        one row a layer and rank: layer, rank, loss (mean of the objective), accuracy (per cent),
        increase (of the loss over the full network, paired by image), se (its standard error),
        rows and columns (the matrix's shape m × n), sigma (its singular value σ_rank, NaN at
        rank 0), and where a layer has groups, matrices (how many of that shape, each cut to the
        rank; sigma is their root mean square), and where layers share a weight, shared (the first
        of those of one weight, which `reveal_ranks` counts once and gives one rank). The full
        network's loss is in ``attrs["loss"]``.

    Raises:
        ValueError: empty data, labels of another length, batches that the model does not take, an
            objective that gives a mean, a model without matrices, an unknown layer or one whose
            weight is computed from other parameters, a rank below 0 or not whole, NaN or
            infinite weights or losses.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> profile = loss_profile(net, torch.rand(20, 8), torch.arange(20) % 3, progress=False)
    >>> profile.groupby("layer")["rank"].max().to_dict()
    {'0': 6, '2': 3}

    A regression, batch by batch:

    >>> net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
    >>> batches = [(torch.rand(10, 8), torch.rand(10, 1)) for _ in range(2)]
    >>> def error(model, batch):
    ...     return (model(batch[0]) - batch[1]).square().mean(1)
    >>> profile = loss_profile(net, batches, objective=error, progress=False)
    >>> bool(profile.increase[6] < 1e-6)
    True
    """
    model = opened(model)
    chosen = profiled_layers(model, layers)
    wanted = None if ranks is None else {checks.positive_int(r, "a rank", least=0) for r in ranks}
    if wanted is not None and not wanted:
        raise ValueError("there are no ranks to evaluate; give one at least, or ranks=None for all")
    with measuring(model):
        given = task(model, x, y, objective, accuracy, memory)
        if isinstance(given, Task):
            return with_ties(_Replaced(model, chosen, given).table(wanted, progress), chosen)
        x, y = given
        habit = habits(model, x)
        full, _ = full_losses(model, x, y, memory, habit)
        tables = []
        shared: dict[Tensor, pd.DataFrame] = {}
        for name in chosen:
            weight = chosen[name].weight
            if weight in shared:  # the same numbers, and so the same rank by any rule of one layer
                rows, columns = matrix(chosen[name]).shape[-2:]
                same = shared[weight].assign(layer=name, rows=rows, columns=columns)
                tables.append(same)
                continue
            sweep = _Sweep(model, name, chosen[name], x, y, full, memory, habit)
            at = {min(rank, sweep.limit) for rank in wanted} if wanted is not None else None
            shared[weight] = sweep.table(sorted(at) if at else range(sweep.limit + 1), progress)
            tables.append(shared[weight])
    profile = with_ties(pd.concat(tables, ignore_index=True), chosen)
    if "matrices" in profile:
        profile["matrices"] = profile.matrices.fillna(1).astype(int)
    profile.attrs["loss"] = full.double().mean().item()
    return profile


def search_ranks(
    model: nn.Module,
    x: Batches,
    y: Tensor | None = None,
    accept: Callable[[pd.DataFrame], pd.Series] | None = None,
    *,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
    window: int = 8,
    memory: int = 2**28,
) -> dict[str, int]:
    """The smallest acceptable rank of each layer, without the whole profile.

    Loss is nearly but not quite monotone in rank. So: a geometric grid of ranks, bisection
    between its last refused and first accepted rank, and then, since a smaller rank may be
    acceptable again, a window of ranks at a time below it until a whole window is refused.

    Args:
        x, y, objective, accuracy: as in `loss_profile`; an iterable of batches is looked at
            several times.
        accept: takes a profile and says of each row whether its rank would do, such as
            ``lambda rows: rows.increase <= rows.se``. Full rank always will.
        window: ranks that must be refused in a row before the search ends, or an eighth of the
            rank found, if that is more.

    Raises:
        ValueError: as `loss_profile`; no ``accept``, a generator for data.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> x, y = torch.rand(20, 8), torch.arange(20) % 3
    >>> search_ranks(net, x, y, lambda rows: rows.increase <= rows.se).keys()
    dict_keys(['0', '2'])
    """
    if accept is None or not callable(accept):
        raise ValueError(
            "accept must say which rows of a profile would do, such as "
            f"lambda rows: rows.increase <= rows.se, not {accept!r}"
        )
    window = checks.positive_int(window, "window")
    found = {}
    model = opened(model)
    with measuring(model):
        given = task(model, x, y, objective, accuracy, memory, why="search_ranks")
        layers = profiled_layers(model, None)
        if isinstance(given, Task):
            for name, layer in layers.items():
                found[name] = _smallest(_Replaced(model, {name: layer}, given), accept, window)
            return found
        x, y = given
        habit = habits(model, x)
        full, _ = full_losses(model, x, y, memory, habit)
        shared: dict[Tensor, int] = {}
        for name, layer in layers.items():
            if layer.weight not in shared:
                sweep = _Sweep(model, name, layer, x, y, full, memory, habit)
                shared[layer.weight] = _smallest(sweep, accept, window)
            found[name] = shared[layer.weight]
    return found


def _smallest(
    sweep: _Sweep | _Replaced, accept: Callable[[pd.DataFrame], pd.Series], window: int
) -> int:
    def accepted(ranks: Iterable[int]) -> list[int]:
        table = sweep.table(sorted(ranks), progress=False)
        return table["rank"][accept(table)].tolist()

    grid = {min(2**power, sweep.limit) for power in range(sweep.limit.bit_length() + 1)}
    best = min(accepted(grid), default=sweep.limit)
    low = max((rank for rank in grid if rank < best), default=0)
    while best - low > 1:
        middle = (low + best) // 2
        if accepted([middle]):
            best = middle
        else:
            low = middle
    while best > 1:
        better = accepted(range(max(1, best - max(window, best // 8)), best))
        if not better:
            break
        best = min(better)
    return best


class _Replaced:
    """Layers one at a time at any of their ranks, with weights replaced, measured by any task."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Matrix], given: Task) -> None:
        self.model, self.layers, self.given = model, layers, given
        self.factors = {
            name: torch.linalg.svd(matrix(layer), full_matrices=False)
            for name, layer in layers.items()
        }
        self.limit = max(S.shape[-1] for _, S, _ in self.factors.values())

    def table(self, wanted: Iterable[int] | None, progress: bool) -> pd.DataFrame:
        """The rows of `loss_profile` for these ranks, in one pass over the data."""
        asked = None if wanted is None else list(wanted)
        ranks = {}
        for name, (_, S, _) in self.factors.items():
            limit = S.shape[-1]
            ranks[name] = (
                range(limit + 1) if asked is None else sorted({min(r, limit) for r in asked})
            )
        number = sum(map(len, ranks.values()))
        means = self.given.means(self.model, partial(self._cut, ranks), number, progress)
        rows: list[dict[str, Any]] = []
        for name, (U, S, Vh) in self.factors.items():
            sigma = [math.nan, *_of_all_groups(S)]
            size = {"rows": U.shape[-2], "columns": Vh.shape[-1]}
            if (count := groups(self.layers[name])) > 1:
                size["matrices"] = count
            rows += [{"layer": name, "rank": r, **size, "sigma": sigma[r]} for r in ranks[name]]
        for row, loss in zip(rows, means["loss"][1:], strict=True):
            if not math.isfinite(loss):
                raise ValueError(_no_number(row["layer"], row["rank"]))
        found = pd.DataFrame(rows)
        for place, (name, values) in enumerate(means.items()):
            found.insert(2 + place, name, values[1:])
        found.attrs["loss"] = means["loss"][0]
        return found

    def _cut(self, ranks: Mapping[str, Sequence[int]]) -> Iterator[AbstractContextManager[None]]:
        """Each layer's weight at each of its ranks."""
        for name, layer in self.layers.items():
            U, S, Vh = self.factors[name]
            for rank in ranks[name]:
                yield replaced({layer.weight: cut_weight(layer, U * S.unsqueeze(-2), Vh, rank)})


def _of_all_groups(S: Tensor) -> list[float]:
    """The singular values S (…, r) of a layer's matrices, their root mean square over groups."""
    return S.double().view(-1, S.shape[-1]).square().mean(0).sqrt().tolist()


def _no_number(layer: str, rank: int) -> str:
    return f"layer {layer!r} at rank {rank} gives NaN or infinite losses on these data"


Blocks = Iterator[tuple[slice, Tensor]]


class _Sweep:
    """One layer at any of its ranks, the others as they are."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layer: Matrix,
        x: Tensor,
        y: Tensor,
        full: Tensor,
        memory: int,
        habit: Habits,
    ) -> None:
        self.model, self.name, self.x, self.y, self.full = model, name, x, y, full
        self.given, self.layer = habit.given, layer
        U, self.S, self.Vh = torch.linalg.svd(matrix(self.layer), False)
        self.US = U * self.S.unsqueeze(-2)
        self.limit = self.S.shape[-1]
        self.codes: dict[int, Tensor] = {}
        self.keep, self.block = False, 2
        self.logits = self._way()
        numbers = width(model, x, name if self.logits == self._run_on else None)
        # Four arrays of that width live at once: the sum, the stack, and two behind it.
        cells = max(1, memory // (4 * numbers * x.element_size()))
        self.images = min(len(x), cells, max(256, CACHED // numbers))
        if habit.mixes:
            self.images = len(x)
        self.block = max(1, min(cells, CACHED // numbers) // self.images)
        self.keep = len(x) * self.limit * x.element_size() <= memory

    def _way(self) -> Callable[[slice, Sequence[int]], Blocks]:
        """The fastest way that two images and two ranks show to be right.

        A model may do more with a layer or its steps than their structure tells: a forward of its
        own, hooks, a weight read elsewhere, images or ranks that are not apart.
        """
        stands = obstacle(self.model, self.layer, twin=True) or is_tied(self.model, self.layer)
        if stands or self.layer.weight.element_size() < 4 or not has_code(self.layer):
            return self._rewrite
        few, ranks = slice(0, 2), (0, (self.limit + 1) // 2)
        expected = torch.cat([z for _, z in self._rewrite(few, ranks)])

        def is_right(way: Callable[[slice, Sequence[int]], Blocks]) -> bool:
            return alike(torch.cat([z for _, z in way(few, ranks)]), expected)

        if _is_step(self.model, self.name) and is_right(self._run_on):
            return self._run_on
        if _is_called_once(self.model, self.layer, self.x[few]) and is_right(self._put_out):
            return self._put_out
        return self._rewrite

    def table(self, ranks: Sequence[int], progress: bool) -> pd.DataFrame:
        """The rows of `loss_profile` for these ranks, in rising order."""
        moments = Moments.zeros(len(ranks), self.x.device)
        starts = range(0, len(self.x), self.images)
        for start in bar(starts, progress=progress, desc=f"layer {self.name}", leave=False):
            part = slice(start, start + self.images)
            for at, logits in self.logits(part, ranks):
                moments.add(at, logits, self.y[part], self.full[part])
        means = moments.means(len(self.x))
        for rank, loss in zip(ranks, means["loss"], strict=True):
            if not math.isfinite(loss):
                raise ValueError(_no_number(self.name, rank))
        found = pd.DataFrame({"layer": self.name, "rank": list(ranks), **means})
        sigma = _of_all_groups(self.S)
        found = found.assign(
            rows=self.US.shape[-2],
            columns=self.Vh.shape[-1],
            sigma=[sigma[rank - 1] if rank else math.nan for rank in ranks],
        )
        count = groups(self.layer)
        return found if count == 1 else found.assign(matrices=count)

    # Three ways to the network's logits (R, b, classes) at blocks of ranks, the fastest first.

    def _run_on(self, part: slice, ranks: Sequence[int]) -> Blocks:
        """In a chain: the nested sums of a block of ranks, run together through what is behind."""
        assert isinstance(self.model, nn.Sequential)
        steps = list(self.model)
        place = list(dict(self.model.named_children())).index(self.name)
        code = self._code(part, lambda: _through(steps[:place], self.given(self.x[part])))
        sums = self._sums(code, ranks)
        for start in range(0, len(ranks), self.block):
            at = slice(start, min(start + self.block, len(ranks)))
            first = next(sums)
            stack = first.expand(at.stop - at.start, *first.shape).clone()
            for row in stack[1:]:
                row.copy_(next(sums))
            logits = _through(steps[place + 1 :], stack.flatten(0, 1))
            yield at, logits.view(len(stack), len(code), -1)

    def _put_out(self, part: slice, ranks: Sequence[int]) -> Blocks:
        """A layer that is called once: the whole model, the nested sum for the layer's output."""
        code = self._code(part, lambda: self._seen(part))
        for row, z in enumerate(self._sums(code, ranks)):
            with hooked({self.name: self.layer}, after=lambda *_, z=z: z.clone()):
                logits = self.model(self.given(self.x[part]))
            yield slice(row, row + 1), logits[None]

    def _rewrite(self, part: slice, ranks: Sequence[int]) -> Blocks:
        """Any other layer: the whole model, with the weight replaced."""
        for row, rank in enumerate(ranks):
            with replaced({self.layer.weight: cut_weight(self.layer, self.US, self.Vh, rank)}):
                logits = self.model(self.given(self.x[part]))
            yield slice(row, row + 1), logits[None]

    def _seen(self, part: slice) -> Tensor:
        """The layer's input, as a call of the model shows it."""
        seen: list[Tensor] = []
        with hooked({self.name: self.layer}, before=lambda _, x: seen.append(x[0].clone())):
            self.model(self.given(self.x[part]))
        return seen[0]

    def _code(self, part: slice, inputs: Callable[[], Tensor]) -> Tensor:
        """The layer's input in the basis of right singular vectors, k in the features' place."""
        if part.start not in self.codes:
            code = apply_rows(self.layer, inputs(), self.Vh)
            if not self.keep:
                return code
            self.codes[part.start] = code
        return self.codes[part.start]

    def _sums(self, code: Tensor, ranks: Sequence[int]) -> Iterator[Tensor]:
        """The layer's output at each of the ranks, one tensor that grows in place."""
        start, rows = bias(self.layer), len(self.US)
        last = not isinstance(self.layer, CONVOLUTIONS)
        places = (*code.shape[:-1], rows) if last else (len(code), rows, *code.shape[2:])
        z = code.new_zeros(places)
        if start is not None:
            (z if last else z.movedim(1, -1)).add_(start.detach())
        done = 0
        for rank in ranks:
            self._add_terms(z, code, slice(done, rank))
            done = rank
            yield z

    def _add_terms(self, z: Tensor, code: Tensor, terms: slice) -> None:
        """Z += Σ σ_j u_j (v_jᵀ X) over these terms, in place."""
        if not isinstance(self.layer, CONVOLUTIONS):
            z.flatten(0, -2).addmm_(code.flatten(0, -2)[:, terms], self.US[:, terms].mT)
        elif terms.start < terms.stop:
            z.flatten(2).add_(self.US[:, terms] @ code[:, terms].flatten(2))


def _is_step(model: nn.Module, name: str) -> bool:
    """Whether the layer is a step of an ``nn.Sequential`` that takes each step once."""
    if not isinstance(model, nn.Sequential) or "." in name:
        return False
    return len(set(map(id, model))) == len(model)


def _through(steps: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What comes of x after these steps."""
    for step in steps:
        x = step(x)
    return x


def _is_called_once(model: nn.Module, layer: nn.Module, x: Tensor) -> bool:
    """Whether a call of the model calls the layer once."""
    calls: list[int] = []
    with hooked({"": layer}, before=lambda *_: calls.append(1)):
        model(x.clone())
    return calls == [1]
