"""Other ways to a low-rank approximation, to measure `randomized_svd` against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from svdlib import clock
from svdlib.bars import bar
from svdlib.linalg.svd import OVERSAMPLE, POWER_ITERS, randomized_svd, truncated_svd
from svdlib.study.evidence import theory
from svdlib.study.evidence.statistics import interval
from svdlib.study.running import inputs

LIMIT = 2**27  # from so many m·n·k on, SciPy's two take seconds to minutes
SKETCHES = 5  # whose errors are averaged


def slow_decay(m: int, n: int, generator: torch.Generator) -> Tensor:
    """A float32 matrix (m, n) with σ_j near 1/√j for 512 terms, and noise of norm about 1e-3."""
    terms = min(512, m, n)
    sigma = torch.arange(1, terms + 1, dtype=torch.float32).rsqrt()
    left = torch.randn(m, terms, generator=generator) * sigma / m**0.5
    right = torch.randn(terms, n, generator=generator) / n**0.5
    noise = torch.randn(m, n, generator=generator)
    return left @ right + 1e-3 * noise / max(m, n) ** 0.5


def ways(A: Tensor, rank: int, generator: torch.Generator) -> dict[str, Callable[[], Any]]:
    """Calls for U, S and Vh of a float32 matrix, by way, with equal sketches and iterations."""
    import fbpca
    from scipy.linalg import interpolative
    from scipy.sparse.linalg import svds
    from sklearn.utils.extmath import randomized_svd as scikit_svd

    columns, array = rank + OVERSAMPLE, A.numpy()

    def torch_lowrank() -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = torch.svd_lowrank(A, columns, niter=POWER_ITERS)
        return U[:, :rank], S[:rank], V[:, :rank].mT

    def interpolative_svd() -> tuple[Any, Any, Any]:
        U, S, V = interpolative.svd(array.astype("float64"), rank)
        return U, S, V.T

    sketch = {"n_oversamples": OVERSAMPLE, "n_iter": POWER_ITERS, "random_state": 0}
    calls: dict[str, Callable[[], Any]] = {
        "svdlib": partial(randomized_svd, A, rank, generator=generator),
        "torch.svd_lowrank": torch_lowrank,
        "scikit-learn": partial(scikit_svd, array, rank, **sketch),
        "fbpca": partial(fbpca.pca, array, rank, raw=True, n_iter=POWER_ITERS, l=columns),
    }
    if A.numel() * rank < LIMIT:
        calls["SciPy svds"] = partial(svds, array, rank, random_state=0)
        calls["SciPy interpolative"] = interpolative_svd
    return calls


def products(A: Tensor, columns: int, power_iters: int) -> None:
    """The products with A that a randomized SVD cannot do without, and nothing else."""
    left, right = A.new_ones(columns, A.shape[0]), A.new_ones(A.shape[1], columns)
    for _ in range(power_iters + 1):
        A @ right
        left @ A


def svd_race(
    shapes: Sequence[tuple[int, int]], ranks: Sequence[int], repeats: int = 3, progress: bool = True
) -> pd.DataFrame:
    """Median seconds of every way on `slow_decay` matrices, and Frobenius errors over the least."""
    rows, generator = [], torch.Generator().manual_seed(0)
    cases = list(itertools.product(shapes, ranks))
    for (m, n), rank in bar(cases, progress=progress, unit="case", desc="race"):
        A = slow_decay(m, n, generator)
        case = {"shape": f"{m}×{n}", "rank": rank}
        bound = clock.median(partial(products, A, rank + OVERSAMPLE, POWER_ITERS), 3 * repeats)
        rows.append({**case, "way": "products alone", "seconds": bound})
        for way, run in ways(A, rank, generator).items():
            factors = run()
            taken = clock.median(run, 1, warmup=0)
            if taken < 0.3:
                # Short ones again and again: a shared machine disturbs them most.
                taken = clock.median(run, max(repeats, round(0.1 / taken)), warmup=0)
            # SciPy's have negative strides.
            U, S, Vh = (torch.as_tensor(np.asarray(part).copy()) for part in factors)
            error = torch.linalg.matrix_norm(A - (U * S) @ Vh).item()
            rows.append({**case, "way": way, "seconds": taken, "error": error})
    table = pd.DataFrame(rows)
    table["error"] /= table.groupby(["shape", "rank"]).error.transform("min")
    return table


def exact_or_randomized(
    shapes: Sequence[tuple[int, int]], ranks: Sequence[int], device: torch.device, repeats: int = 3
) -> pd.DataFrame:
    """Median seconds of torch's full SVD, `truncated_svd`, and `randomized_svd`, with its errors.

    Each shape has a `slow_decay` matrix and a Gaussian one, whose spectrum is nearly flat. Errors
    are Frobenius, over ‖A − A_k‖, of sketches that never span everything, and of the zero matrix.
    """
    if not any(rank < min(shape) for rank in ranks for shape in shapes):
        raise ValueError(f"none of the ranks {list(ranks)} is below the shorter side of a shape")
    timed = partial(clock.median, repeats=repeats, device=device)
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    rows, generator = [], torch.Generator().manual_seed(0)
    for spectrum, (m, n) in itertools.product(("decaying", "flat"), shapes):
        flat = spectrum == "flat"
        A = torch.randn(m, n, generator=generator) if flat else slow_decay(m, n, generator)
        fitting = sorted(rank for rank in ranks if rank < min(m, n))
        if not fitting:
            continue
        A = A.to(device)
        full = timed(partial(torch.linalg.svd, A, full_matrices=False))
        truncated = timed(partial(truncated_svd, A, fitting[0]))
        case = {"spectrum": spectrum, "shape": f"{m}×{n}"}
        sigma, sketches = torch.linalg.svdvals(A).double(), torch.Generator(device).manual_seed(0)
        for rank in fitting:
            p = min(OVERSAMPLE, min(m, n) - rank - 1)
            sketch = partial(randomized_svd, A, rank, oversample=p, generator=sketches)
            best = sigma[rank:].norm()
            error = interval([(norm(A - sketch().matrix()) / best).item() for _ in range(SKETCHES)])
            row = {"rank": rank, "full": full, "truncated": truncated, "randomized": timed(sketch)}
            row |= {"error": error["mean"], "error_low": error["low"], "error_high": error["high"]}
            rows.append({**case, **row, "zero": (norm(A) / best).item()})
    return pd.DataFrame(rows)


def call_times(
    shapes: Sequence[Sequence[int]], rank: int, device: torch.device, repeats: int, rounds: int = 5
) -> pd.DataFrame:
    """Median seconds of three SVDs on Gaussian matrices, or stacks of them, round by round."""
    timed = partial(clock.median, repeats=repeats, device=device)
    generator = torch.Generator(device).manual_seed(0)
    matrices = [torch.randn(*shape, generator=generator, device=device) for shape in shapes]
    rows = []
    for number, A in itertools.product(range(rounds), matrices):
        k = min(rank, *A.shape[-2:])
        row = {"round": number, "shape": "×".join(map(str, A.shape))}
        row["svd"] = timed(partial(torch.linalg.svd, A, full_matrices=False))
        row["svd_lowrank"] = timed(partial(torch.svd_lowrank, A, k))
        rows.append(row | {"truncated_svd": timed(partial(truncated_svd, A, k))})
    return pd.DataFrame(rows)


@inputs.refusing(
    whole="rank repeats",
    from_two="draws",
    wholes="ranks race_ranks",
    wholes_from_two="oversamples",
    widths="widths",
    shapes="shapes race_shapes",
)
def check(
    rank: int,
    oversamples: Sequence[int],
    widths: Sequence[int],
    shapes: Sequence[Sequence[int]],
    ranks: Sequence[int],
    race_shapes: Sequence[Sequence[int]],
    race_ranks: Sequence[int],
) -> None:
    """Refuse what 07_randomized_svd could not use."""
    largest = max(shapes, key=math.prod)
    why = f"below the shorter side of {list(largest)}, the largest of shapes"
    inputs.at_most("the least of ranks", min(ranks), min(largest) - 1, why, "shapes")
    limit, name = min(map(min, race_shapes)) - OVERSAMPLE, f"race_shapes = {race_shapes}"
    why = f"{OVERSAMPLE} below the shortest side of race_shapes"
    inputs.at_most("each of race_ranks", max(race_ranks), limit, why, name)
    theory.check_sketches(rank, oversamples, side=min(100, *widths[:2]))
