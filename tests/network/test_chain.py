"""What counts as a chain, and the moments that every sweep adds up."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdlib.network.chain import chain_of, is_relu_perceptron
from svdlib.network.task import Moments


def test_a_chain_has_the_steps_of_nested_sequentials():
    inner = nn.Sequential(nn.Linear(9, 4), nn.ReLU())
    assert list(chain_of(nn.Sequential(nn.Flatten(), inner))) == ["0", "1.0", "1.1"]
    relu = nn.ReLU()
    for steps in ([nn.Flatten(0)], [nn.Softmax(0)], [relu, relu], [nn.Bilinear(2, 2, 2)]):
        assert chain_of(nn.Sequential(*steps)) is None
    assert is_relu_perceptron(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))
    assert not is_relu_perceptron(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)))


@pytest.mark.parametrize("classes", [3, 80])
def test_moments_of_logits_are_those_of_their_cross_entropy(classes, generator):
    z = torch.randn(2, 9, classes, generator=generator, dtype=torch.float64)
    z[:, 0] = 0  # of equal logits the first is the answer
    y = torch.arange(9) % classes
    moments = Moments.zeros(3, z.device)
    full = torch.rand(9, generator=generator, dtype=torch.float64)
    moments.add_logits(slice(1, 3), z, y, full)
    means = moments.means(9)
    assert means["loss"][0] == means["accuracy"][0] == 0
    for row, scores in enumerate(z, 1):
        losses = F.cross_entropy(scores, y, reduction="none")
        assert means["loss"][row] == pytest.approx(losses.mean().item())
        assert means["accuracy"][row] == pytest.approx(
            100 * (scores.argmax(1) == y).double().mean()
        )
        assert means["increase"][row] == pytest.approx((losses - full).mean().item())
        assert means["se"][row] == pytest.approx((losses - full).std().item() / 3)
