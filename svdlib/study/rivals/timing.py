"""What this machine can do at best, to measure everything against."""

from __future__ import annotations

import torch

from svdlib import clock


def product_rate(device: torch.device, repeats: int = 5) -> float:
    """Operations a second of a 1024³ matrix product in float32.

    >>> product_rate(torch.device("cpu"), repeats=1) > 1e6
    True
    """
    n = 1024
    A = torch.rand(n, n, device=device, generator=torch.Generator(device).manual_seed(0))

    def products() -> None:
        for _ in range(4):
            A @ A

    return 4 * 2 * n**3 / clock.median(products, repeats, device=device)
