"""The loss profile and the searches, on networks and data of many kinds, by their definition."""

import copy
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from modules import network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import svdlib


class Language(nn.Module):
    """Tokens, by keyword, to scores of the next in an output with logits."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, *, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.out(self.mix(self.embed(input_ids)).tanh()))


class Distance(nn.Module):
    """Two inputs, one of which may be left out."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, a, b=None):
        return (self.left(a) - self.right(b)).square().sum(1)


def case(kind):
    """A model, its data, the objective, and the losses by themselves."""
    torch.manual_seed(0)
    if kind == "language":
        model, ids = Language(), torch.randint(11, (20, 8))
        return model, {"input_ids": ids}, svdlib.next_token_losses, lambda m: torch.stack(
            [F.cross_entropy(m(input_ids=row).logits[:-1], row[1:]) for row in ids]
        )  # fmt: skip
    if kind == "tokens":
        model, ids, y = Language(), torch.randint(11, (20, 8)), torch.randint(11, (20, 8))
        return model, {"input_ids": ids, "labels": y}, None, lambda m: torch.stack(
            [F.cross_entropy(m(input_ids=row).logits, t) for row, t in zip(ids, y, strict=True)]
        )  # fmt: skip
    if kind == "regression":
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        x, y = torch.rand(20, 5), torch.rand(20, 2)
        objective = lambda m, batch: (m(batch[0]) - batch[1]).square().mean(1)
        return model, (x, y), objective, lambda m: (m(x) - y).square().mean(1)
    if kind == "segmentation":
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        x, y = torch.rand(20, 2, 5, 4), torch.randint(3, (20, 5, 4))
        y[0, :3] = -100
        return model, (x, y), None, lambda m: torch.stack(
            [F.cross_entropy(m(a[None]), b[None]) for a, b in zip(x, y, strict=True)]
        )  # fmt: skip
    if kind == "single input":  # reconstruction
        model, x = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5)), torch.rand(20, 5)
        return (
            model,
            x,
            lambda m, x: (m(x) - x).square().sum(1),
            lambda m: (m(x) - x).square().sum(1),
        )
    model, a, b = Distance(), torch.rand(20, 5), torch.rand(20, 5)
    return model, (a, b), lambda m, batch: m(*batch), lambda m: m(a, b)


KINDS = ["language", "tokens", "regression", "segmentation", "single input", "two inputs"]


class Rows(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if isinstance(self.data, dict):
            return {name: part[i] for name, part in self.data.items()}
        return self.data[i] if torch.is_tensor(self.data) else tuple(p[i] for p in self.data)


@pytest.mark.parametrize("kind", KINDS)
def test_profile_is_that_of_the_papers_procedure(kind):
    model, data, objective, losses = case(kind)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    profile = svdlib.loss_profile(model, data, objective=objective, progress=False)
    loader = DataLoader(Rows(data), batch_size=6, shuffle=True)
    batched = svdlib.loss_profile(model, loader, objective=objective, progress=False)
    assert torch.equal(torch.get_rng_state(), state), "a shuffling loader draws numbers"
    once = svdlib.loss_profile(
        model, (batch for batch in loader), objective=objective, progress=False
    )
    small = svdlib.loss_profile(model, data, objective=objective, memory=1, progress=False)
    for other in (batched, once, small):
        pd.testing.assert_frame_equal(other, profile, rtol=1e-4, atol=1e-6)
        assert other.attrs["loss"] == pytest.approx(profile.attrs["loss"], rel=1e-5)
    full = losses(model).detach()
    assert profile.attrs["loss"] == pytest.approx(full.mean().item(), rel=1e-5)
    for row in profile.itertuples():
        cut = copy.deepcopy(model)
        weight = cut.get_submodule(row.layer).weight.data
        U, S, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        S[row.rank :] = 0
        weight.copy_((U * S @ Vh).view_as(weight))
        paired = (losses(cut).detach() - full).double()
        assert row.increase == pytest.approx(paired.mean().item(), abs=1e-6)
        assert row.se == pytest.approx(paired.std().item() / 20**0.5, abs=1e-6)
        assert math.isnan(row.accuracy) == (objective is not None)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("kind", KINDS)
def test_searches_verify_and_refine(kind):
    model, data, objective, losses = case(kind)
    loader = DataLoader(Rows(data), batch_size=6, shuffle=True)
    profile = svdlib.loss_profile(model, data, objective=objective, progress=False)
    for given in (data, loader):
        found = svdlib.search_ranks(
            model, given, accept=lambda rows: rows.increase <= 1e-3, objective=objective
        )
        fits = profile[(profile["rank"] > 0) & (profile.increase <= 1e-3)]
        assert found == fits.groupby("layer")["rank"].min().to_dict()
        start = dict.fromkeys(profile.layer.unique(), 2)
        ranks = svdlib.refine_ranks(model, given, ranks=start, tolerance=1e-3, objective=objective)
        verified = svdlib.verify_ranks(model, ranks, given, objective=objective)
        assert verified["increase"] <= 1e-3 + 1e-5
        cut = svdlib.project_(copy.deepcopy(model), ranks)
        assert verified["loss"] == pytest.approx(losses(cut).mean().item(), rel=1e-4)
    once = svdlib.verify_ranks(model, ranks, (batch for batch in loader), objective=objective)
    assert once["loss"] == pytest.approx(verified["loss"], rel=1e-5)


def test_labels_in_batches_give_what_labels_in_tensors_do():
    model, x, y = network("convolutions"), torch.rand(20, 12), torch.arange(20) % 3
    model(x)
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    expected = svdlib.loss_profile(model, x, y, progress=False)
    pair = svdlib.loss_profile(model, (x, y), progress=False)
    pd.testing.assert_frame_equal(pair, expected, check_exact=True)
    batched = svdlib.loss_profile(model, loader, progress=False)
    pd.testing.assert_frame_equal(batched, expected, rtol=1e-5, atol=1e-6)
    right = svdlib.loss_profile(
        model,
        loader,
        objective=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"),
        accuracy=lambda m, batch: m(batch[0]).argmax(1) == batch[1],
        progress=False,
    )
    pd.testing.assert_frame_equal(right, expected, rtol=1e-5, atol=1e-6)
    ranks = {"1": 2, "4": 3, "7": 1}
    one = svdlib.verify_ranks(model, ranks, x, y)
    assert svdlib.verify_ranks(model, ranks, loader) == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_losses_that_depend_on_the_others_of_a_batch_see_all():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.rand(20, 6)
    contrastive = lambda m, x: F.cross_entropy(
        m(x) @ m(x).mT, torch.arange(len(x)), reduction="none"
    )
    verified = svdlib.verify_ranks(model, {"": 4}, x, objective=contrastive, memory=1)
    assert verified["loss"] == pytest.approx(contrastive(model, x).mean().item(), rel=1e-5)


def test_what_does_not_fit_is_said_in_one_sentence():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)), torch.rand(9, 6)
    squares = lambda m, x: (m(x) - x).square().sum(1)
    before = copy.deepcopy(model.state_dict())

    def refused(message, data=x, objective=squares, look=svdlib.loss_profile, **more):
        with pytest.raises(ValueError, match=message):
            look(model, data, objective=objective, **more)

    quiet = {"progress": False}
    refused("a mean perhaps", objective=lambda m, x: squares(m, x).mean(), **quiet)
    refused("the data are empty", data=[], **quiet)
    refused("without an objective a batch is", objective=None, **quiet)
    refused(
        "does not take float32 .2, 5.",
        data=(x[:, 1:], torch.ones(9).long()),
        objective=None,
        **quiet,
    )
    refused("objective must be a function of .model, batch., not 'mse'", objective="mse", **quiet)
    refused("the model gives NaN", data=[x, x * torch.nan], **quiet)
    only = lambda m, x: squares(m, x) / (m[1].weight.abs().sum() > 0)
    refused("layer '1' at rank 0 gives NaN or infinite", objective=only, **quiet)
    refused("objective gives 9 losses for a batch, and 8",
            objective=lambda m, x: squares(m, x)[bool(m[1].weight.any()) ^ 1 :], **quiet)  # fmt: skip
    once = iter([x])
    accept = lambda rows: rows.increase <= 0.1
    refused(
        "search_ranks looks at the data several times",
        once,
        look=svdlib.search_ranks,
        accept=accept,
    )
    refused("refine_ranks looks at the data several times", once, look=svdlib.refine_ranks,
            ranks={"0": 1}, tolerance=1)  # fmt: skip
    refused("accept must say which rows", look=svdlib.search_ranks)
    refused("ranks must say where to start", look=svdlib.refine_ranks, tolerance=1)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_a_loader_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            g = torch.Generator().manual_seed(0)
            return ((torch.randn(6, generator=g), i % 3) for i in range(20))

    model = nn.Linear(6, 3)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=5)
    found = svdlib.loss_profile(model, loader, progress=True)
    expected = svdlib.loss_profile(model, list(loader), progress=False)
    assert found.loss.tolist() == pytest.approx(expected.loss.tolist())
