"""``nn.MultiheadAttention`` with its projections as layers, held against torch's own."""

import copy
import itertools
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import svdlib
from svdlib.network.attention import Attention, pack_, unpack_
from svdlib.network.low_rank import low_rank_layers

PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]
FORMS = {
    "packed": {},
    "apart": {"kdim": 6, "vdim": 10},
    "no bias": {"bias": False},
    "no bias, apart": {"bias": False, "kdim": 6},
    "bias of k and v": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "bias": False, "add_bias_kv": True},
}


def attention(form="packed", **more):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(16, 4, dropout=0.3, **FORMS[form], **more).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def inputs(made, batched=True, n=3, length=5, keys=7):
    g = torch.Generator().manual_seed(1)
    sizes = [(length, 16), (keys, made.kdim), (keys, made.vdim)]
    found = [torch.randn(n, *size, generator=g, dtype=torch.float64) for size in sizes]
    if not batched:
        return [x[0] for x in found]
    return found if made.batch_first else [x.transpose(0, 1) for x in found]


def masks(batched, n=3, length=5, keys=7):
    """Each kind of mask of pairs, and of keys."""
    g = torch.Generator().manual_seed(2)
    padding = torch.zeros(n, keys, dtype=torch.bool)
    padding[:, -2:] = True
    padding = padding if batched else padding[0]
    each = torch.randn((n if batched else 1) * 4, length, keys, generator=g, dtype=torch.float64)
    causal = torch.ones(length, keys, dtype=torch.bool).triu(1)
    return [
        {},
        {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": each},
        {"attn_mask": each[0]},
        {"key_padding_mask": padding},
        {"key_padding_mask": padding, "attn_mask": causal, "is_causal": True},
        {"key_padding_mask": padding.double() * -3, "attn_mask": each},
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_outputs_are_those_of_torch(form, batch_first, batched):
    """At full rank, to rounding, with dropout's own random numbers in training mode."""
    model = attention(form, batch_first=batch_first)
    ours = unpack_(copy.deepcopy(model))
    x = inputs(model, batched)
    for mask, weights, average, training in itertools.product(
        masks(batched), (False, True), (False, True), (False, True)
    ):
        more = {**mask, "need_weights": weights, "average_attn_weights": average}
        found = []
        for each in (ours, model):
            torch.manual_seed(3)
            found.append(each.train(training)(*x, **more))
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_projected_factorized_merged_and_saved(form, tmp_path):
    model = attention(form).eval()
    x = inputs(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranks = dict(zip(PARTS, (3, 2, 4, 2), strict=True))
    cut = svdlib.project_(copy.deepcopy(model), ranks)
    assert cut.state_dict().keys() == before.keys() and type(cut) is nn.MultiheadAttention
    wholes = [None if m.in_proj_weight is None else m.in_proj_weight for m in (cut, model)]
    for place, part in enumerate(PARTS[:3]):
        W_k, W = (
            getattr(m, f"{part}_weight") if whole is None else whole.chunk(3)[place]
            for m, whole in zip((cut, model), wholes, strict=True)
        )
        expected = svdlib.truncated_svd(W.detach(), ranks[part]).matrix()
        torch.testing.assert_close(W_k.detach(), expected)
    small = svdlib.factorize(model, ranks)
    assert isinstance(small, nn.MultiheadAttention) and list(low_rank_layers(small)) == PARTS
    torch.testing.assert_close(small(*x), cut(*x))
    merged = svdlib.merge(small)
    assert repr(merged) == repr(model)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }
    torch.testing.assert_close(merged(*x), cut(*x))
    svdlib.save_factorized(small, tmp_path / "small")
    assert torch.equal(svdlib.load_factorized(model, tmp_path / "small")(*x)[0], small(*x)[0])
    again = copy.deepcopy(small)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(*x)[0], small(*x)[0])
    with pytest.warns(UserWarning, match="'k_proj' .it has rank 2 already"):
        lower = svdlib.factorize(small, 2)
    torch.testing.assert_close(lower(*x), svdlib.factorize(model, 2)(*x))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_one_projection_alone_is_factorized(tmp_path):
    model = attention()
    small = svdlib.factorize(model, {"v_proj": 2})
    assert list(low_rank_layers(small)) == ["v_proj"] and type(small.q_proj) is nn.Linear
    x = inputs(model.eval())
    torch.testing.assert_close(
        small.eval()(*x), svdlib.project_(copy.deepcopy(model), {"v_proj": 2})(*x)
    )
    svdlib.save_factorized(small, tmp_path / "small")
    again = svdlib.load_factorized(model, tmp_path / "small")
    assert torch.equal(again(*x)[0], small(*x)[0])
    both = nn.ModuleDict({"first": attention(), "second": attention()})
    small = svdlib.factorize(both, {"first.q_proj": 2})
    assert type(small["second"]) is nn.MultiheadAttention, "as it was"


def test_types_flags_hooks_and_modes_are_kept():
    model = attention().bfloat16().eval()
    model.in_proj_weight.requires_grad_(False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    small = svdlib.factorize(model, 2)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not any(part.training for part in small.modules())
    flags = [p.requires_grad for p in small.q_proj.parameters()]
    assert flags == [False, False, True]
    small(*(x.bfloat16() for x in inputs(model)))
    assert calls == [1]
    merged = svdlib.merge(small)
    assert not merged.in_proj_weight.requires_grad and merged.in_proj_bias.requires_grad


def encoder(**more):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **more)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [False, True])
def test_transformers_of_torch(training):
    """Their fused ways, and tensors nested for these, want packed weights."""
    model = encoder().double()
    small = svdlib.factorize(model, 3)
    assert len(low_rank_layers(small)) == 12
    cut = svdlib.project_(copy.deepcopy(model), 3)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    merged = svdlib.merge(small)
    for more in ({}, {"mask": causal, "is_causal": True}, {"src_key_padding_mask": padding}):
        found = []
        for each in (cut, small, merged):
            torch.manual_seed(1)
            with torch.no_grad():
                found.append(each.train(training)(x, **more)[~padding])
        torch.testing.assert_close(found[1], found[0])
        torch.testing.assert_close(found[2], found[0])


def test_a_decoder_layer():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 4, 32).double().eval()
    small = svdlib.factorize(model, 3)
    names = set(low_rank_layers(small))
    assert {f"{part}.{name}" for part in ("self_attn", "multihead_attn") for name in PARTS} < names
    target, memory = (torch.randn(n, 3, 16, dtype=torch.float64) for n in (5, 7))
    torch.testing.assert_close(
        small(target, memory), svdlib.project_(copy.deepcopy(model), 3)(target, memory)
    )


def test_a_vision_transformer_is_profiled_calibrated_counted_and_compiled():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    x, y = torch.rand(24, 3, 32, 32), torch.arange(24) % 5
    name = "encoder.layers.encoder_layer_1.self_attention.k_proj"
    profile = svdlib.loss_profile(model, x, y, layers=[name], ranks=[2, 32], progress=False)
    cut = svdlib.project_(copy.deepcopy(model), {name: 2})
    loss = nn.functional.cross_entropy(cut(x), y).item()
    assert profile.loss.tolist()[0] == pytest.approx(loss, rel=1e-5)
    assert profile.increase.tolist()[1] == pytest.approx(0, abs=1e-6)
    verified = svdlib.verify_ranks(model, {name: 2}, x, y)
    assert verified["loss"] == pytest.approx(loss, rel=1e-5)
    plain, aware = (svdlib.factorize(model, {name: 2}, calibration=c) for c in (None, x))
    assert verified["parameters"] == sum(p.numel() for p in plain.parameters())
    errors = [(small(x) - model(x)).norm() for small in (plain, aware)]
    assert errors[1] < errors[0]
    torch.testing.assert_close(torch.compile(plain, backend="aot_eager")(x), plain(x))
    table = svdlib.cost(plain, x, repeats=1).set_index("layer")
    places = 24 * 5
    assert table.multiply_adds[name] == places * 2 * (32 + 32)
    assert table.dense_multiply_adds[name] == places * 32 * 32
    counted = table.parameters.drop("whole model")
    assert counted[name] == 2 * 64 + 32 and counted[name.replace("k_proj", "q_proj")] == 32 * 33
    assert table.dense_parameters["whole model"] == sum(p.numel() for p in model.parameters())


def test_calibration_sees_what_queries_keys_and_values_are():
    model = attention("apart").eval()
    x = [part * torch.logspace(0, -2, part.shape[-1]).double() for part in inputs(model, n=60)]

    def call(model, batch):
        return model(*batch, need_weights=False)

    for name, part in zip(PARTS, x, strict=False):
        calibration = svdlib.Calibration([tuple(x)], call)
        small = svdlib.factorize(model, {name: 3}, calibration=calibration)
        layer = getattr(unpack_(copy.deepcopy(model)), name)
        alone = svdlib.factorize(layer, 3, calibration=part.flatten(0, 1))
        torch.testing.assert_close(getattr(small, name).weight, alone.weight)


class Scores(nn.Module):
    """Class scores of tokens that look at each other."""

    def __init__(self):
        super().__init__()
        self.attention, self.out = attention(batch_first=True), nn.Linear(16, 3).double()

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0].mean(1))


def test_names_and_ranks_go_from_one_function_to_the_next():
    model, x, y = Scores(), torch.randn(30, 5, 16).double(), torch.arange(30) % 3
    state = copy.deepcopy(model.state_dict())
    names = [f"attention.{part}" for part in PARTS] + ["out"]
    profile = svdlib.loss_profile(model, x, y, progress=False)
    assert profile.layer.unique().tolist() == names
    assert svdlib.predicted_profile(model, x, y).layer.unique().tolist() == names
    ranks = svdlib.reveal_ranks(profile, "budget", parameters=400)
    ranks = svdlib.refine_ranks(model, x, y, ranks, tolerance=0.01)
    with warnings.catch_warnings():  # of ranks that store no less
        warnings.simplefilter("ignore")
        small = svdlib.factorize(model, ranks)
    verified = svdlib.verify_ranks(model, ranks, x, y)
    loss = nn.functional.cross_entropy(small.eval()(x), y).item()
    assert loss == pytest.approx(verified["loss"], rel=1e-6)
    assert verified["parameters"] == sum(p.numel() for p in small.parameters())
    assert svdlib.search_ranks(model, x, y, lambda rows: rows.increase <= 1).keys() == set(names)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_attach_projects_the_packed_weight():
    model = Scores()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    svdlib.Projection("truncsvd", rank=2, every="step").attach(model, optimizer)
    model(torch.randn(4, 5, 16).double()).sum().backward()
    optimizer.step()
    for W in model.attention.in_proj_weight.chunk(3):
        assert torch.linalg.matrix_rank(W) == 2


def test_weights_that_attentions_share():
    model = nn.ModuleList([attention(), attention()])
    model[1].in_proj_weight = model[0].in_proj_weight
    with pytest.raises(ValueError, match=r"layer '0.q_proj' by itself: its weight is shared with"):
        svdlib.project_(model, {"0.q_proj": 2})
    small = svdlib.factorize(model, 2)
    assert small[0].q_proj[0].weight is small[1].q_proj[0].weight
    merged = svdlib.merge(small)
    assert merged[0].in_proj_weight is merged[1].in_proj_weight


def test_pruned_attention_is_left_or_refused():
    model = nn.ModuleList([attention(), nn.Linear(16, 16).double()])
    prune.l1_unstructured(model[0], "in_proj_weight", 0.5)
    for call in (svdlib.project_, svdlib.factorize):
        with pytest.raises(ValueError, match=r"'0\.q_proj': its weight is computed from other"):
            call(model, {"0.q_proj": 2})
        with pytest.warns(UserWarning, match=r"left as they were: '0\.q_proj' .its weight is comp"):
            call(model, 2)


def test_masks_that_do_not_fit():
    model = unpack_(attention())
    x = inputs(model)
    for more, message in (
        ({"is_causal": True}, "give attn_mask too"),
        ({"attn_mask": torch.zeros(7)}, r"attn_mask must be \(5, 7\) or \(12, 5, 7\), not \(7,\)"),
        ({"key_padding_mask": torch.zeros(7)}, r"key_padding_mask must be \(3, 7\), not \(7,\)"),
        ({"attn_mask": torch.zeros(5, 7).int()}, "must be of type bool or floating, not torch.int"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*x, **more)
    assert type(pack_(model)) is nn.MultiheadAttention and not isinstance(model, Attention)
    assert type(model._modules["out_proj"]) is not nn.Linear and len(model._modules) == 1
