"""The language model's task, on a small random Llama and a tokenizer by characters."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import svdlib
from svdlib.study import language

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


class Characters:
    def __call__(self, text):
        return {"input_ids": [min(ord(letter), 127) for letter in text]}


def test_passages_are_of_one_length_and_differ_by_seed_but_not_by_run():
    first, again, other = (
        language.passages(Characters(), ("numpy", "scipy"), 5, seed) for seed in (0, 0, 1)
    )
    assert first.shape == (5, language.TOKENS)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(set(map(tuple, first.tolist()))) == 5


def test_too_many_passages_are_refused_with_the_package():
    with pytest.raises(ValueError, match=r"numpy .* 1000000"):
        language.passages(Characters(), ["numpy"], 1_000_000)


def test_losses_are_those_of_each_passage(model):
    tokens = torch.randint(128, (11, 20), generator=torch.Generator().manual_seed(0))
    found = language.losses(model, tokens)
    logits = model(tokens).logits[:, :-1].detach()
    expected = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_even_ranks_leave_the_share_of_all_parameters(model):
    total = sum(p.numel() for p in model.parameters())
    small = svdlib.factorize(model, language.even(model, 0.7))
    left = sum(p.numel() for p in small.parameters()) / total
    assert 0.66 < left <= 0.7


def test_int8_rounds_rows_and_leaves_the_tied_embedding(model):
    small = language.int8(model)
    before, after = (m.model.layers[0].mlp.up_proj.weight for m in (model, small))
    steps = before.abs().amax(1, keepdim=True) / 127
    assert ((before - after).abs() <= 0.5001 * steps).all() and not torch.equal(before, after)
    assert all(len(row.unique()) <= 255 for row in after)
    assert torch.equal(model.lm_head.weight, small.lm_head.weight)


def test_megabytes_count_numbers_and_scales(model):
    total = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    size, rows = sum(p.numel() for p in matrices), sum(map(len, matrices))
    assert language.megabytes(model) == pytest.approx(4 * total / 1e6)
    assert language.megabytes(model, 8) == pytest.approx((4 * (total - size + rows) + size) / 1e6)


def test_training_on_brings_a_cut_model_nearer(model):
    tokens = torch.randint(128, (8, 16), generator=torch.Generator().manual_seed(0))
    small = svdlib.factorize(model, language.even(model, 0.6))
    with torch.no_grad():
        distance = lambda: (small(tokens).logits - model(tokens).logits).square().mean().item()
        before = distance()
    language.train_on(small, model, tokens, 20, rate=1e-3)
    with torch.no_grad():
        assert distance() < 0.9 * before


def test_perplexities_are_paired_with_the_dense_model_by_draw_and_passage():
    rng = np.random.default_rng(0)
    rows = []
    for draw in range(3):
        for document in range(4):
            base = {"draw": draw, "document": document, "megabytes": 1.0}
            loss = rng.normal(3)
            rows += [
                {**base, "form": "dense", "share": 1.0, "loss": loss},
                {**base, "form": "a", "share": 0.5, "loss": loss + np.log(2)},
                {**base, "form": "b", "share": 0.5, "loss": loss + np.log(6)},
            ]
    table = pd.DataFrame(rows)
    summary = language.perplexities(table).set_index("form")
    assert summary.loc["a", ["times", "low", "high"]].tolist() == pytest.approx([2, 2, 2])
    mean = table[table.form == "b"].loss.mean()
    assert summary.perplexity["b"] == pytest.approx(np.exp(mean))
    assert language.ahead(table, "a", "b", 0.5)["mean"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"methods": ["SVD"]}, "SVD"), ({"shares": [0.2]}, "0.4"), ({"draw": -1}, "draw")],
)
def test_parameters_that_cannot_be_used_are_refused(change, said):
    good = {"shares": [0.9], "methods": ["compress"], "draw": 0}
    language.check(good)
    with pytest.raises(ValueError, match=said):
        language.check(good | change)


def test_fewer_than_three_draws_have_no_interval():
    rows = [
        {
            "draw": draw,
            "document": document,
            "megabytes": 1.0,
            "form": form,
            "share": share,
            "loss": 1.0,
        }
        for draw in range(2)
        for document in range(3)
        for form, share in (("dense", 1.0), ("a", 0.5))
    ]
    summary = language.perplexities(pd.DataFrame(rows))
    assert summary.draws.tolist() == [2] and summary[["low", "high"]].isna().all(axis=None)
    assert language.perplexity_table(summary).iloc[0, -1] == "1"
