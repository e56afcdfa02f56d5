"""One rule for what stands in the way, with one wording, whoever asks."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, skip_init
from torch.nn.utils import weight_norm as old_weight_norm

import svdlib
from svdlib.layers.kinds import apply_rows, duplicate, matrix, obstacle, rows, thin_twin

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


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 9)
        self.order = {"first": [self.layer]}

    def forward(self, x):
        return self.order["first"][0](x)


def test_a_layer_that_is_held_besides_is_not_replaced():
    with pytest.raises(ValueError, match="layer 'layer': 'order' holds it besides"):
        svdlib.factorize(Listed(), {"layer": 2})
    assert torch.linalg.matrix_rank(svdlib.project_(Listed(), 2).layer.weight) == 2


def test_compiled_models():
    model = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.rand(8, 9), torch.arange(8) % 3
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="is compiled with it; factorize first, then compile"):
        svdlib.factorize(compiled, {"_orig_mod.0": 2})
    products = svdlib.cost(compiled, x, repeats=1).set_index("layer").multiply_adds
    assert products["_orig_mod.0"] == 8 * 81
    ours = svdlib.loss_profile(compiled, x, y, progress=False)
    expected = svdlib.loss_profile(model, x, y, progress=False)
    torch.testing.assert_close(
        torch.tensor(ours.loss.values), torch.tensor(expected.loss.values), rtol=1e-5, atol=0
    )


class Keeps(nn.Module):
    """Keeps its activation, calls by keyword, and has a pruned layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(12, 9), prune.l1_unstructured(nn.Linear(9, 3), "weight", 2)

    def forward(self, x):
        self.last = self.inner(input=x)
        return self.out(self.last.tanh())


@pytest.mark.filterwarnings("ignore:left as they were")
def test_models_that_keep_activations_and_call_by_keyword():
    model, x, y = Keeps(), torch.rand(8, 12), torch.arange(8) % 3
    model(x)
    small = svdlib.factorize(model, {"inner": 2}, calibration=x)
    assert torch.linalg.matrix_rank(small(x) - small.out.bias) <= 3
    assert torch.equal(svdlib.merge(model)(x), model(x))
    profile = svdlib.loss_profile(model, x, y, progress=False)
    for row in profile.itertuples():
        cut = svdlib.project_(duplicate(model), {"inner": max(row.rank, 1)})
        loss = nn.functional.cross_entropy(cut(x), y).item()
        assert row.rank == 0 or row.loss == pytest.approx(loss, rel=1e-5)


def test_layers_without_numbers():
    with pytest.raises(ValueError, match="call the model once"):
        svdlib.project_(nn.Sequential(nn.LazyLinear(3)), {"0": 2})
    with pytest.raises(ValueError, match=r"its weight has no numbers here .device meta"):
        svdlib.project_(nn.Sequential(nn.Linear(3, 3, device="meta")), {"0": 2})
    with pytest.raises(ValueError, match="no layers are named to profile; known: 0"):
        svdlib.loss_profile(
            nn.Sequential(nn.Linear(3, 3)), torch.rand(3, 3), torch.arange(3), layers=[]
        )
