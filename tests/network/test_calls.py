"""Batches of every kind become calls and losses, or one clear error."""

import re
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdlib import next_token_losses
from svdlib.network.calls import batches, class_losses, copied, judged, prepared, refuse_generator

Pair = namedtuple("Pair", "x y")


class Scores(nn.Module):
    """Keyword inputs, and an output with logits (n, T, 5)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.out(self.embed(input_ids)))


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


def test_default_losses_of_images_pixels_and_tokens(generator):
    z = torch.randn(4, 3, 6, 2, generator=generator)
    y = torch.randint(3, (4, 6, 2), generator=generator)
    y[0, :4] = -100
    y[3] = -100  # an input without targets
    expected = [F.cross_entropy(z[i : i + 1], y[i : i + 1]) for i in range(3)]
    for scores in (z, z.movedim(1, -1)):
        losses, right = class_losses(nn.Identity(), (scores, y))
        torch.testing.assert_close(losses, torch.stack(expected))
        hits = [(z.argmax(1) == y)[i][y[i] >= 0].float().mean() for i in range(3)]
        torch.testing.assert_close(right, torch.stack(hits))
    model, ids = Scores(), torch.randint(5, (2, 7), generator=generator)
    z = model(ids).logits
    batch = {"input_ids": ids, "attention_mask": torch.ones(2, 7), "labels": (ids + 1) % 5}
    losses, _ = class_losses(model, batch)
    expected = F.cross_entropy(z.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    torch.testing.assert_close(losses, expected.view(2, 7).mean(1))


def test_next_tokens(generator):
    model, ids = Scores(), torch.randint(5, (2, 7), generator=generator)
    z = model(ids).logits[:, :-1].movedim(-1, 1)
    expected = F.cross_entropy(z, ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(next_token_losses(model, ids), expected)
    mask = torch.ones(2, 7).long()
    mask[1, 4:] = 0
    found = next_token_losses(model, {"input_ids": ids, "attention_mask": mask})
    kept = F.cross_entropy(z[1:, :, :3], ids[1:, 1:4])
    torch.testing.assert_close(found, torch.stack([expected[0], kept]))
    with pytest.raises(ValueError, match=r"give objective=svdlib\.next_token_losses"):
        class_losses(model, {"input_ids": ids, "labels": ids})
    with pytest.raises(ValueError, match=r"next tokens are of texts .n, T.*not of float32 .2,"):
        next_token_losses(model, torch.rand(2))


def test_what_a_function_does_to_a_batch_leaves_the_callers_alone():
    x = torch.ones(3)
    batch = {"x": x, "pair": Pair(x, [x, "text"])}

    def objective(model, batch):
        batch["x"].zero_()
        return batch.pop("pair").x.mul_(2)

    losses, right = judged(nn.Identity(), batch, objective, None)
    assert losses.tolist() == [2, 2, 2] and right.isnan().all()
    assert batch["x"] is x and x.tolist() == [1, 1, 1]
    again = copied(batch)
    assert type(again["pair"]) is Pair and again["pair"].y[1] == "text"


def test_calls_that_only_take_inputs():
    a, b = torch.ones(3, 2), torch.ones(3, 2)
    assert prepared(nn.Identity(), (a, b), None)().equal(a)
    assert prepared(Sum(), (a, b), None)().equal(a + b)
    assert prepared(Sum(), [a, b, b.long()], None)().equal(a + b)
    assert prepared(Sum(), {"a": a, "b": b, "labels": a}, None)().equal(a + b)
    assert prepared(Sum(), a, lambda model, batch: model(batch, batch))().equal(2 * a)
    optional = Scores()
    with pytest.raises(ValueError, match=r"takes both all of .* and all but the last"):
        prepared(optional, (a.long(), b), None)
    with pytest.raises(ValueError, match=r"takes neither all of .* and all but the last"):
        prepared(Sum(), (a, a, a, a), None)


def test_what_is_given_whole_is_cut_and_batches_are_not():
    x, y = torch.arange(5), torch.arange(5)
    assert [len(batch["x"]) for batch in batches({"x": x, "y": y}, 2)] == [2, 2, 1]
    assert [len(batch[0]) for batch in batches([(x, y), (x, y)], 2)] == [5, 5]
    with pytest.raises(ValueError, match=r"lengths 2, 5; give all as .n, …., or batches in a list"):
        next(batches((x, y[:2]), 2))
    with pytest.raises(ValueError, match="data are empty"):
        next(batches((x[:0], y[:0]), 2))


@pytest.mark.parametrize("data", [3, "text", None, torch.ones(2).numpy()])
def test_data_of_no_kind(data):
    with pytest.raises(ValueError, match="data must be a tensor, a tuple or mapping of tensors"):
        next(batches(data))


def test_empty_data_and_generators():
    with pytest.raises(ValueError, match="the data are empty; one batch at least"):
        next(batches([]))
    with pytest.raises(ValueError, match=r"looks at the data several times, .* this generator"):
        refuse_generator((batch for batch in [torch.ones(1)]), "it")
    refuse_generator([torch.ones(1)], "it")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda m, b: b.mean(), "gives one number, a mean perhaps; .* reduction='none'"),
        (lambda m, b: 0.5, "must give losses, a tensor .n,., not float"),
        (lambda m, b: b[:, None], r"must give losses of shape \(n,\), one per input, not \(3, 1\)"),
    ],
)
def test_objectives_that_give_no_losses(objective, message):
    with pytest.raises(ValueError, match=message):
        judged(nn.Identity(), torch.ones(3), objective, None)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(3), "without an objective a batch is .* not float32 (3,); give objective="),
        (({1}, torch.ones(3)), "a batch must be a tensor, tuple or mapping, not set"),
        ((torch.ones(3), torch.ones(3)), "(n, …); here (3,) for (3,)"),
        ((torch.ones(3, 2), torch.ones(3)), "must be class numbers of type torch.int64"),
        ((torch.ones(3, 2), torch.arange(3)), "labels run to 2 but the model has 2 outputs"),
        ((torch.ones(3, 2), -torch.arange(3)), "labels must be at least 0 (or -100), not -2"),
        ((torch.ones(2, 5, 5), torch.ones(2, 5).long()), "classes may be second or last"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        class_losses(nn.Identity(), batch)


def test_a_batch_that_the_model_does_not_take():
    with pytest.raises(ValueError, match=r"the model does not take float32 \(3, 2\): .*mat1"):
        class_losses(nn.Linear(4, 2), (torch.ones(3, 2), torch.ones(3).long()))
    with pytest.raises(ValueError, match=r"does not take .c: float32 \(1,\).: .*argument 'c'"):
        class_losses(Sum(), {"c": torch.ones(1), "labels": torch.ones(1).long()})
