"""What several test modules share: small data, and the real ones."""

import os

import pytest
import torch

import svdlib


@pytest.fixture(scope="session", autouse=True)
def threads():
    """One, since the test processes share the cores, unless ``OMP_NUM_THREADS`` says otherwise."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def mnist() -> svdlib.Data:
    return svdlib.load("MNIST", device="cpu")


@pytest.fixture
def blobs() -> svdlib.Data:
    """200 + 50 points of 12 features around three centres."""
    g = torch.Generator().manual_seed(0)
    centres = torch.rand(3, 12, generator=g)
    y = torch.arange(250) % 3
    x = centres[y] + 0.1 * torch.randn(250, 12, generator=g)
    return svdlib.Data("blobs", x[:200], y[:200], x[200:], y[200:])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
