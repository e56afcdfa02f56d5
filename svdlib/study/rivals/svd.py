"""Other ways to a low-rank approximation, to measure `randomized_svd` against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
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

# From so many m·n·k on, SciPy's two take seconds to minutes.
LIMIT = 2**27
# How many sketches' errors are averaged.
SKETCHES = 5


def slow_decay(m: int, n: int, generator: torch.Generator) -> Tensor:
    """A float32 matrix (m, n) with σ_j near 1/√j for 512 terms, and noise of norm about 1e-3.

    >>> slow_decay(30, 20, torch.Generator().manual_seed(0)).shape
    torch.Size([30, 20])
    """
    terms = min(512, m, n)
    sigma = torch.arange(1, terms + 1, dtype=torch.float32).rsqrt()
    left = torch.randn(m, terms, generator=generator) * sigma / m**0.5
    right = torch.randn(terms, n, generator=generator) / n**0.5
    noise = torch.randn(m, n, generator=generator)
    return left @ right + 1e-3 * noise / max(m, n) ** 0.5


def gaussian(m: int, n: int, generator: torch.Generator) -> Tensor:
    """A float32 matrix (m, n) of normal numbers: its singular values are nearly flat.

    >>> gaussian(30, 20, torch.Generator().manual_seed(0)).shape
    torch.Size([30, 20])
    """
    return torch.randn(m, n, generator=generator)


SPECTRA = {"decaying": slow_decay, "flat": gaussian}


def ways(A: Tensor, rank: int, generator: torch.Generator) -> dict[str, Callable[[], Any]]:
    """Each way's call for U, S and Vh of this float32 matrix, with the same sketch size and power
    iterations where it has them."""
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

    settings: dict[str, Any] = {"n_iter": POWER_ITERS}
    sketch: dict[str, Any] = {"oversample": OVERSAMPLE, "power_iters": POWER_ITERS}
    found: dict[str, Callable[[], Any]] = {
        "svdlib": partial(randomized_svd, A, rank, generator=generator, **sketch),
        "torch.svd_lowrank": torch_lowrank,
        "scikit-learn": partial(
            scikit_svd, array, rank, n_oversamples=OVERSAMPLE, random_state=0, **settings
        ),
        "fbpca": partial(fbpca.pca, array, rank, raw=True, l=columns, **settings),
    }
    if A.numel() * rank < LIMIT:
        found["SciPy svds"] = partial(svds, array, rank, random_state=0)
        found["SciPy interpolative"] = interpolative_svd
    return found


def products(A: Tensor, columns: int, power_iters: int) -> None:
    """The products with A that a randomized SVD can't do without, and nothing else."""
    left, right = A.new_ones(columns, A.shape[0]), A.new_ones(A.shape[1], columns)
    for _ in range(power_iters + 1):
        A @ right
        left @ A


def svd_race(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    repeats: int = 3,
    progress: bool = True,
) -> pd.DataFrame:
    """Every way on a `slow_decay` matrix of each shape, on the CPU, in one run.

    Returns:
        columns shape, rank, way, seconds (the median; ways that take over 0.3 s run once),
        error: Frobenius, as a multiple of the smallest of that shape and rank.
    """
    rows = []
    generator = torch.Generator().manual_seed(0)
    cases = [(shape, rank) for shape in shapes for rank in ranks]
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
    """Seconds of LAPACK's (or cuSOLVER's) SVD, `truncated_svd` and `randomized_svd`, with errors.

    Each shape has a matrix of each spectrum (`SPECTRA`). The exact ways find all terms whatever
    the rank: they are timed once a matrix, at the smallest rank. The sketch has p = 10, or less
    where it would span everything, so that it is always one.

    Returns:
        a row a spectrum, shape and rank (below the shorter side): spectrum, shape, rank; full,
        truncated, randomized, the median seconds; error, error_low, error_high, the mean with its
        95 % interval of five sketches' Frobenius errors over the best possible, ‖A − A_k‖; and
        zero, that of the zero matrix, ‖A‖ / ‖A − A_k‖.

    Raises:
        ValueError: no rank is below a shorter side.
    """
    if not any(rank < min(shape) for rank in ranks for shape in shapes):
        raise ValueError(f"none of the ranks {list(ranks)} is below the shorter side of a shape")
    rows = []
    generator = torch.Generator().manual_seed(0)
    for (spectrum, make), (m, n) in itertools.product(SPECTRA.items(), shapes):
        A = make(m, n, generator).to(device)
        fitting = sorted(rank for rank in ranks if rank < min(m, n))
        case = {"spectrum": spectrum, "shape": f"{m}×{n}"}
        rows += [{**case, **row} for row in _times_and_errors(A, fitting, repeats)]
    return pd.DataFrame(rows)


def _times_and_errors(A: Tensor, ranks: Sequence[int], repeats: int) -> list[dict[str, float]]:
    if not ranks:
        return []
    timed = partial(clock.median, repeats=repeats, device=A.device)
    sigma = torch.linalg.svdvals(A).double()
    exact = {
        "full": timed(partial(torch.linalg.svd, A, full_matrices=False)),
        "truncated": timed(partial(truncated_svd, A, ranks[0])),
    }
    generator = torch.Generator(A.device).manual_seed(0)
    rows = []
    for rank in ranks:
        p = min(OVERSAMPLE, min(A.shape) - rank - 1)
        sketch = partial(randomized_svd, A, rank, oversample=p, generator=generator)
        best = sigma[rank:].norm()
        found = (sketch() for _ in range(SKETCHES))
        errors = interval([(_norm(A - svd.matrix()) / best).item() for svd in found])
        errors = errors.drop("n").rename(
            {"mean": "error", "low": "error_low", "high": "error_high"}
        )
        zero = (_norm(A) / best).item()
        rows.append({"rank": rank, **exact, "randomized": timed(sketch), **errors, "zero": zero})
    return rows


def _norm(A: Tensor) -> Tensor:
    return torch.linalg.vector_norm(A, dtype=torch.float64)


def batch_times(
    batch: int, m: int, n: int, rank: int, device: torch.device, repeats: int = 6, rounds: int = 5
) -> pd.DataFrame:
    """Seconds of the SVDs of a batch of Gaussian matrices, by each exact way in turn.

    Returns:
        a row a round: round, svd (`torch.linalg.svd`), truncated_svd; medians of the repeats.
    """
    A = torch.randn(batch, m, n, generator=torch.Generator(device).manual_seed(0), device=device)
    timed = partial(clock.median, repeats=repeats, device=device)
    rows = [
        (
            each,
            timed(partial(torch.linalg.svd, A, full_matrices=False)),
            timed(partial(truncated_svd, A, rank)),
        )
        for each in range(rounds)
    ]
    return pd.DataFrame(rows, columns=["round", "svd", "truncated_svd"])


def paper_call_times(
    sizes: Sequence[int], rank: int, device: torch.device, repeats: int = 20, rounds: int = 5
) -> pd.DataFrame:
    """Seconds of the two calls of the paper's code, on matrices of its network's shapes, in turn.

    Returns:
        a row a round and layer: round, shape, svd (`torch.linalg.svd`), svd_lowrank
        (`torch.svd_lowrank`); medians of the repeats.
    """
    timed = partial(clock.median, repeats=repeats, device=device)
    generator = torch.Generator(device).manual_seed(0)
    matrices = [torch.randn(m, n, generator=generator, device=device) for n, m in pairwise(sizes)]
    rows = []
    for each, A in itertools.product(range(rounds), matrices):
        exact = timed(partial(torch.linalg.svd, A, full_matrices=False))
        sketch = timed(partial(torch.svd_lowrank, A, min(rank, *A.shape)))
        rows.append((each, "×".join(map(str, A.shape)), exact, sketch))
    return pd.DataFrame(rows, columns=["round", "shape", "svd", "svd_lowrank"])


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
    limit = min(map(min, race_shapes)) - OVERSAMPLE
    why = f"{OVERSAMPLE} below the shortest side of race_shapes"
    blamed = f"race_shapes = {race_shapes}"
    inputs.at_most("each of race_ranks", max(race_ranks), limit, why, blamed)
    theory.check_sketches(rank, oversamples, side=min(100, *widths[:2]))
