"""One rule for what stands in the way, with one wording, whoever asks."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, skip_init
from torch.nn.utils import weight_norm as old_weight_norm

import svdlib
from svdlib.layers.kinds import apply_rows, matrix, obstacle, rows, thin_twin

COMPUTED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 5)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 5)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 5)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 5)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(6, 5), "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", [*COMPUTED, "old weight_norm"])
def test_a_weight_that_is_no_parameter_is_refused_by_all_alike(kind):
    layer = COMPUTED[kind]() if kind in COMPUTED else old_weight_norm(nn.Linear(6, 5))
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), layer).eval()
    x, y = torch.rand(4, 7), torch.arange(4)
    before = model(x)
    told = "layer '2': its weight is computed from other parameters"
    with pytest.raises(ValueError, match=f"can't project {told}"):
        svdlib.project_(model, {"2": 2})
    with pytest.raises(ValueError, match=f"can't factorize {told}"):
        svdlib.factorize(model, {"2": 2})
    with pytest.raises(ValueError, match=f"can't profile {told}"):
        svdlib.loss_profile(model, x, y, layers=["2"], progress=False)
    assert torch.equal(model(x), before)
    with pytest.warns(UserWarning, match="left as they were: '2' .its weight is computed"):
        profile = svdlib.loss_profile(model, x, y, progress=False)
    assert profile.layer.unique() == ["0"]
    with pytest.warns(UserWarning, match="left as they were: '2' .its weight is computed"):
        svdlib.project_(model, 2)
    assert torch.linalg.matrix_rank(model[0].weight) == 2


def test_a_twin_asks_for_more_than_another_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert obstacle(model, model[0], twin=False) is None
    assert obstacle(model, model[0], twin=True) == "its weight is shared with another layer"


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_what_a_matrix_is_applied_to(padding_mode, generator):
    layer = nn.Conv2d(3, 5, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1), bias=False,
                      padding_mode=padding_mode).double()  # fmt: skip
    x = torch.rand(2, 3, 9, 8, generator=generator, dtype=torch.float64)
    expected = layer(x)
    torch.testing.assert_close(apply_rows(layer, x, matrix(layer)), expected)
    windows = rows(layer, x) @ matrix(layer).mT
    torch.testing.assert_close(windows, expected.movedim(1, -1).reshape(-1, 5))


def test_twins_draw_no_random_number():
    state = torch.get_rng_state()
    for layer in (nn.Linear, nn.Conv2d):
        part = skip_init(layer, 4, 5, *([3] if layer is nn.Conv2d else []))
        thin_twin(part, 2)
    assert torch.equal(torch.get_rng_state(), state)
