"""One rule for what stands in the way, with one wording, whoever asks."""

import copy
import pickle
import warnings
from collections import deque
from dataclasses import dataclass
from functools import partial
from types import MethodType, SimpleNamespace

import pytest
import torch
from layer_kinds import KINDS, Scores, inputs, layer, matrices
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm

import svdlib
from svdlib.network.kinds import layer_of
from svdlib.network.low_rank import Factorized, low_rank_layers, thin_twin
from svdlib.network.opened import Network, duplicate, find_layers

COMPUTED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 5)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 5)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 5)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 5)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(6, 5), "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", [*COMPUTED, "old weight_norm"])
def test_a_weight_that_is_no_parameter_is_refused_by_all_in_the_same_words(kind):
    layer = COMPUTED[kind]() if kind in COMPUTED else old_weight_norm(nn.Linear(6, 5))
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), layer).eval()
    x, y = torch.rand(4, 7), torch.arange(4)
    before = model(x)
    reason = "layer '2': its weight is computed from other parameters"
    with pytest.raises(ValueError, match=f"can't project {reason}"):
        svdlib.project_(model, {"2": 2})
    with pytest.raises(ValueError, match=f"can't factorize {reason}"):
        svdlib.factorize(model, {"2": 2})
    with pytest.raises(ValueError, match=f"can't profile {reason}"):
        svdlib.loss_profile(model, x, y, layers=["2"], progress=False)
    assert torch.equal(model(x), before)
    with pytest.warns(UserWarning, match="left as they were: '2' .its weight is computed"):
        profile = svdlib.loss_profile(model, x, y, progress=False)
    assert profile.layer.unique() == ["0"]
    with pytest.warns(UserWarning, match="left as they were: '2' .its weight is computed"):
        svdlib.project_(model, 2)
    assert torch.linalg.matrix_rank(model[0].weight) == 2


def test_a_twin_asks_for_more_than_another_weight():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1))
    model[1].weight = model[0].weight
    assert Network(model).obstacle("0", replace=False) is None
    assert Network(model).obstacle("0", replace=True) == "its weight is shared with '1'"


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_what_a_matrix_is_applied_to(padding_mode, generator):
    layer = nn.Conv2d(3, 5, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1), bias=False,
                      padding_mode=padding_mode).double()  # fmt: skip
    x = torch.rand(2, 3, 9, 8, generator=generator, dtype=torch.float64)
    expected = layer(x)
    torch.testing.assert_close(layer_of(layer).apply(x, layer_of(layer).matrix()), expected)
    windows = layer_of(layer).vectors(x) @ layer_of(layer).matrix().mT
    torch.testing.assert_close(windows, expected.movedim(1, -1).reshape(-1, 5))


def test_twins_draw_no_random_number():
    parts = [layer(kind) for kind in KINDS]
    state = torch.get_rng_state()
    for part in parts:
        Factorized(thin_twin(layer_of(part), 2)).dense()
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


@dataclass
class Plain:
    inner: object


@dataclass(slots=True)
class Slotted:
    inner: object


def as_default(inner):
    def call(x, layer=inner):
        return layer(x)

    return call


HOLDERS = {
    "lambda": lambda inner: lambda x: inner(x),
    "bound method": lambda inner: inner.forward,
    "partial": lambda inner: partial(nn.Module.__call__, inner),
    "default": as_default,
    "dataclass": Plain,
    "slots": lambda inner: Slotted({"a": inner}),
    "namespace": lambda inner: SimpleNamespace(inner=(inner,)),
    "deque": lambda inner: deque([[inner]]),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_layer_is_found_wherever_a_model_holds_it(holder):
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    model.extra = HOLDERS[holder](model[0])
    with pytest.raises(ValueError, match="'0': 'extra' holds it"):
        svdlib.factorize(model, {"0": 2})
    with pytest.warns(UserWarning, match="'extra' holds it"):
        small = svdlib.factorize(model, 2)
    assert list(low_rank_layers(small)) == ["1"]


def test_attributes_that_go_in_circles_or_hold_much_are_read_once():
    model = nn.Sequential(nn.Linear(9, 9))
    model.vocabulary = {str(word): word for word in range(1000)}
    model.vocabulary["all"] = model.vocabulary

    def reads():
        return small

    model.reads = reads
    small = svdlib.factorize(model, 2)
    assert small[0].rank == 2


@pytest.mark.parametrize(
    "patch",
    [lambda old: MethodType(lambda self, x: 2 * old(x), old.__self__), lambda old: partial(old)],
    ids=["method", "partial"],
)
def test_a_layer_with_another_forward_is_refused(patch):
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    model[0].forward = patch(model[0].forward)
    with pytest.raises(ValueError, match="'0': its forward"):
        svdlib.factorize(model, {"0": 2})
    with pytest.warns(UserWarning, match="its forward"):
        small = svdlib.factorize(model, 2)
    x = torch.randn(4, 9)
    torch.testing.assert_close(small[0](x), model[0](x))


def test_a_model_whose_forward_is_a_function_of_its_layers_is_left():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    model.forward = lambda x: model[1](model[0](x).tanh())
    with pytest.raises(ValueError, match="has a forward"):
        svdlib.factorize(model, {"0": 2})


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


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_the_matrix_that_its_weight_is_said_to_hold(kind, generator):
    part = layer(kind)
    expected = matrices(part)
    A = layer_of(part).matrix()
    assert layer_of(part).groups == len(expected)
    assert torch.equal(A, expected[0] if len(expected) == 1 else torch.stack(expected))
    assert torch.equal(layer_of(part).to_weight(A), part.weight)
    if "Transpose" in kind:
        return
    x = inputs(part)
    # What it is applied to, from first principles: the layer is linear in its input.
    places = layer_of(part).vectors(x)
    if kind == "Embedding":
        places = nn.functional.one_hot(places, 40).double()
    z = (A @ places.unsqueeze(-1)).flatten(1)
    bare = duplicate(part)
    if getattr(bare, "bias", None) is not None:
        bare.bias.data.zero_()
    found = bare(x)
    found = found.movedim(1, -1) if "Conv" in kind and kind != "Conv1D" else found
    torch.testing.assert_close(z, found.flatten(0, -2))
    if layer_of(part).has_code():
        code = layer_of(part).apply(x, A)
        code = code.movedim(1, -1) if "Conv" in kind and kind != "Conv1D" else code
        torch.testing.assert_close(code, found)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_projected_factorized_merged_and_saved(kind, tmp_path):
    model = nn.Sequential(layer(kind))
    x = inputs(model[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    projected = svdlib.project_(duplicate(model), 2)
    for W, cut in zip(matrices(model[0]), matrices(projected[0]), strict=True):
        torch.testing.assert_close(cut, svdlib.truncated_svd(W, 2).matrix())
    small = svdlib.factorize(model, {"0": 2})
    torch.testing.assert_close(small(x), projected(x))
    torch.testing.assert_close(small[0].weight, projected[0].weight)
    assert small[0].rank == 2
    kept = sum(2 * sum(W.shape) for W in matrices(model[0]))
    assert sum(f.weight.numel() for f in small[0].factors) == kept
    merged = svdlib.merge(small)
    assert type(merged[0]) is type(model[0])
    torch.testing.assert_close(merged(x), projected(x))
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert repr(merged) == repr(model)
    svdlib.save_factorized(small, tmp_path / "small")
    assert torch.equal(svdlib.load_factorized(model, tmp_path / "small")(x), small(x))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_profiled_and_verified_as_with_its_weight_replaced(kind):
    model = Scores(layer(kind))
    x, y = inputs(model.part, 12), torch.arange(12) % 3
    profile = svdlib.loss_profile(model, x, y, progress=False)
    wanted = matrices(model.part)
    assert profile["rank"].max() == min(wanted[0].shape)
    for rank in (1, 2, profile["rank"].max()):
        cut = svdlib.project_(duplicate(model), {"part": rank})
        loss = nn.functional.cross_entropy(cut(x), y).item()
        row = profile[profile["rank"] == rank].iloc[0]
        assert row.loss == pytest.approx(loss, rel=1e-9)
        verified = svdlib.verify_ranks(model, {"part": rank}, x, y)
        assert verified["loss"] == pytest.approx(loss, rel=1e-9)
        m, n = wanted[0].shape
        others = getattr(model.part, "bias", None)
        others = 0 if others is None else others.numel()
        stored = len(wanted) * min(rank * (m + n), m * n)
        assert verified["parameters"] == stored + others
    smallest = len(wanted) * sum(wanted[0].shape)
    assert svdlib.reveal_ranks(profile, "budget", parameters=smallest) == {"part": 1}
    with pytest.raises(ValueError, match=f"smallest reachable cost is {smallest}"):
        svdlib.reveal_ranks(profile, "budget", parameters=smallest - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_counted(kind):
    """Multiply-adds: outputs (or a transposed convolution's inputs) by numbers of the weight."""
    model = nn.Sequential(layer(kind))
    x = inputs(model[0])
    small = svdlib.factorize(model, {"0": 2})
    table = svdlib.cost(small, x, repeats=1).set_index("layer").loc["0"]
    products = []
    z = x
    for part in (model[0], *small[0].factors):
        z = x if part is model[0] or part is small[0][0] else z
        out = part(z)
        places = z if "Transpose" in type(part).__name__ else out
        channels = places.shape[1] if hasattr(part, "in_channels") else places.shape[-1]
        looked_up = isinstance(part, nn.Embedding)
        products.append(0 if looked_up else places.numel() // channels * part.weight.numel())
        z = out
    assert table.dense_multiply_adds == products[0]
    assert table.multiply_adds == products[1] + products[2]


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_helps_each_kind(kind):
    model = nn.Sequential(layer(kind))
    x = inputs(model[0], 60)
    if x.is_floating_point():
        x = (x * torch.logspace(0, -1.5, x.shape[1], dtype=x.dtype).view(1, -1, *[1] * (x.ndim - 2))
             if hasattr(model[0], "in_channels")
             else x * torch.logspace(0, -1.5, x.shape[-1], dtype=x.dtype)) + 0.2  # fmt: skip
    else:
        x = x.clamp(max=5)  # few words, often
    plain, aware = (svdlib.factorize(model, {"0": 2}, calibration=c) for c in (None, x))
    plain, aware = ((small(x) - model(x)).norm().item() for small in (plain, aware))
    assert aware < 0.97 * plain


def test_a_transposed_convolution_still_takes_the_size_of_its_output():
    part = layer("ConvTranspose2d")
    x = inputs(part)
    small, cut = svdlib.factorize(part, 2), svdlib.project_(duplicate(part), 2)
    for size in ([19, 21], [20, 22]):
        torch.testing.assert_close(small(x, output_size=size), cut(x, output_size=size))


def test_an_embedding_that_is_cut_keeps_its_empty_row():
    model = nn.Sequential(layer("Embedding"))
    small = svdlib.factorize(model, {"0": 2})
    small(torch.tensor([[3, 4]])).sum().backward()
    assert small[0][0].padding_idx == 3 and small[0][0].weight.grad[3].abs().max() == 0
    assert small(torch.tensor([3])).abs().max() < 1e-12


class Tied(nn.Module):
    """A language model's ends: words in, scores of words out, by one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.inner(self.embed(x)).tanh().mean(1))


def test_a_weight_tied_between_an_embedding_and_an_output_layer(tmp_path):
    model, x, y = Tied().double(), torch.arange(90).view(30, 3) % 40, torch.arange(30) % 40
    both = {"embed": 3, "head": 3}
    cut = svdlib.project_(duplicate(model), both)
    assert cut.head.weight is cut.embed.weight
    assert torch.linalg.matrix_rank(cut.head.weight) == 3
    everything = svdlib.project_(duplicate(model), 3)
    torch.testing.assert_close(everything.head.weight, cut.head.weight)
    small = svdlib.factorize(model, both)
    torch.testing.assert_close(small(x), cut(x))
    assert small.head[1].weight is small.embed[0].weight
    assert small.head[0].weight is small.embed[1].weight
    count = sum(p.numel() for p in small.parameters())
    assert count == 3 * (40 + 16) + 16 * 17 + 40
    assert svdlib.verify_ranks(model, both, x, y)["parameters"] == count
    profile = svdlib.loss_profile(model, x, y, ranks=[3], progress=False).set_index("layer")
    loss = nn.functional.cross_entropy(cut(x), y).item()
    assert profile.loss["embed"] == pytest.approx(loss, rel=1e-9)
    assert profile.loss["head"] == pytest.approx(loss, rel=1e-9)
    merged = svdlib.merge(small)
    assert merged.head.weight is merged.embed.weight
    torch.testing.assert_close(merged(x), cut(x))
    svdlib.save_factorized(small, tmp_path / "small")
    again = svdlib.load_factorized(model, tmp_path / "small")
    assert again.head[1].weight is again.embed[0].weight and torch.equal(again(x), small(x))
    aware = svdlib.factorize(model, {**both, "inner": 3}, calibration=x)
    torch.testing.assert_close(aware.embed(x), small.embed(x))
    table = svdlib.cost(small, x, repeats=1).set_index("layer").multiply_adds
    assert table["embed"] == 90 * 3 * 16 and table["head"] == 30 * 3 * (16 + 40)


def test_tied_layers_get_one_rank_from_profiles_and_searches():
    model, x, y = Tied().double(), torch.arange(90).view(30, 3) % 40, torch.arange(30) % 40
    profile = svdlib.loss_profile(model, x, y, progress=False)
    parts = {name: part.reset_index(drop=True) for name, part in profile.groupby("layer")}
    numbers = ["rank", "loss", "accuracy", "increase", "se", "sigma"]
    assert parts["embed"][numbers].equals(parts["head"][numbers])
    shape = ["rows", "columns"]
    assert parts["embed"][shape].iloc[0].tolist() == [16, 40]
    assert parts["head"][shape].iloc[0].tolist() == [40, 16]
    for ranks in (
        svdlib.reveal_ranks(profile, "energy", tolerance=0.5),
        svdlib.reveal_ranks(profile, "budget", parameters=400),
        svdlib.reveal_ranks(svdlib.predicted_profile(model, x, y), "level", parameters=400),
        svdlib.reveal_ranks(
            svdlib.loss_profile(model, [(x, y)], progress=False), "budget", increase=0.5
        ),
        svdlib.search_ranks(model, x, y, lambda rows: rows.increase <= 0.5),
    ):
        assert ranks["embed"] == ranks["head"]
        with warnings.catch_warnings():  # of ranks that store no less
            warnings.simplefilter("ignore")
            svdlib.factorize(model, ranks)


@pytest.mark.parametrize("call", [svdlib.project_, svdlib.factorize])
@pytest.mark.parametrize("ranks", [{"head": 3}, {"embed": 3}, {"embed": 3, "head": 4}])
def test_tied_layers_are_cut_both_or_neither(call, ranks):
    model = Tied()
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match=r"its weight is shared with '\w+'; give all of them"):
        call(model, ranks)
    assert torch.equal(model.head.weight, before)


def test_a_tied_layer_that_can_not_be_replaced_keeps_the_other():
    model = Tied()
    model.head.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"'embed' .its weight is shared with 'head', which can"):
        small = svdlib.factorize(model, 3)
    assert small.embed.weight is small.head.weight and list(low_rank_layers(small)) == ["inner"]


def test_gpt2_of_the_transformers_library():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.GPT2Config(
        vocab_size=120, n_positions=16, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(settings).eval()
    ids = torch.arange(24).view(3, 8) % 120
    ranks = {"lm_head": 5, "transformer.wte": 5}
    ranks |= {name: 4 for name in find_layers(model) if ".h." in name}
    assert len(ranks) == 10
    small = svdlib.factorize(model, ranks)
    cut = svdlib.project_(duplicate(model), ranks)
    torch.testing.assert_close(small(ids).logits, cut(ids).logits, atol=1e-5, rtol=1e-4)
    merged = svdlib.merge(small)
    assert merged.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(merged(ids).logits, cut(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*jit.script:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_factorized_layer_stands_in_for_what_it_replaced(kind):
    part = layer(kind)
    x = inputs(part)
    small = svdlib.factorize(part, 2)
    attributes = [
        "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride",
        "padding", "dilation", "groups", "padding_mode", "output_padding", "num_embeddings",
        "embedding_dim", "padding_idx", "nf", "nx",
    ]  # fmt: skip
    for name in attributes:
        assert hasattr(small, name) == hasattr(part, name), name
        assert getattr(small, name, None) == getattr(part, name, None), name
    assert small.weight.shape == part.weight.shape and small.weight.dtype == part.weight.dtype
    bias = getattr(part, "bias", None)
    assert small.bias is None if bias is None else torch.equal(small.bias, bias)
    expected = small(x)
    again = copy.deepcopy(small)
    assert torch.equal(again(x), expected) and again[0].weight is not small[0].weight
    again.load_state_dict(small.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)
    torch.testing.assert_close(torch.compile(small, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), expected)
    if kind != "Conv1D":  # torch can't script the transformers library's
        torch.testing.assert_close(torch.jit.script(small)(x), expected)
    half = svdlib.factorize(duplicate(part).bfloat16(), 2)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    found = half(x.bfloat16() if x.is_floating_point() else x).double()
    assert (found - expected).norm() < 0.05 * expected.norm()
    small.weight.sum().backward()
    assert all(factor.weight.grad is not None for factor in small)


@pytest.mark.parametrize("kind", KINDS)
def test_factorizing_twice_lowers_the_rank(kind):
    model = nn.Sequential(layer(kind))
    x = inputs(model[0])
    small = svdlib.factorize(model, 3)
    smaller = svdlib.factorize(small, {"0": 2})
    assert smaller[0].rank == 2 and small[0].rank == 3
    assert type(smaller[0][0]) is type(small[0][0])
    torch.testing.assert_close(smaller(x), svdlib.factorize(model, 2)(x))
    with pytest.warns(UserWarning, match="left as they were: '0' .it has rank 2 already"):
        same = svdlib.factorize(smaller, 2)
    assert torch.equal(same(x), smaller(x)) and same[0][0].weight is not smaller[0][0].weight


def test_tied_layers_factorized_twice_share_their_factors_still():
    model, x = Tied().double(), torch.arange(90).view(30, 3) % 40
    small = svdlib.factorize(svdlib.factorize(model, 4), {"embed": 2, "head": 2})
    assert small.head[1].weight is small.embed[0].weight and small.inner.rank == 4
    assert small.embed.rank == 2
    torch.testing.assert_close(
        small(x), svdlib.factorize(model, {"embed": 2, "head": 2, "inner": 4})(x)
    )


def test_weights_that_only_look_like_tensors_are_left_by_name():
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 0), nn.Linear(0, 9), nn.Linear(9, 8))
    model[0].weight = nn.Parameter(TwoTensor(torch.rand(10, 12), torch.rand(10, 12)))
    for call in (svdlib.project_, svdlib.factorize):
        with pytest.warns(UserWarning, match="'0' .its weight is a TwoTensor.*'1' .*'2' .*no numb"):
            made = call(duplicate(model), 3)
        assert len(svdlib.network.low_rank.low_rank_layers(made)) == (call is svdlib.factorize)
    with pytest.raises(ValueError, match="layer '0': its weight is a TwoTensor"):
        svdlib.factorize(model, {"0": 3})
