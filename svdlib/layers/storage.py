"""Factorized networks on disk: safetensors and a small JSON, never a pickle."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.layers.kinds import (
    evaluating,
    low_rank_layers,
    matrix_layers,
    replace_module,
    thin_twin,
)

FORMAT = 1


def save_factorized(model: nn.Module, path: str | Path) -> None:
    """Write a model's tensors to ``path`` (safetensors) and its ranks beside it, as JSON.

    ``small.safetensors`` gets a ``small.json`` such as {"format": 1, "ranks": {"0": 10}}. Files
    that are there are replaced, each only when the new one is complete.

    >>> from svdlib import factorize
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_factorized(factorize(nn.Sequential(nn.Linear(9, 9)), 2), f"{folder}/small.safetensors")
    ...     print(Path(folder, "small.json").read_text())
    {"format": 1, "ranks": {"0": 2}}
    """
    path = Path(path)
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as part:
        save_model(model, f"{part}/tensors")
        Path(part, "ranks").write_text(json.dumps({"format": FORMAT, "ranks": ranks}))
        os.replace(f"{part}/tensors", path)
        os.replace(f"{part}/ranks", path.with_suffix(".json"))


@threads.making()
def load_factorized(model: nn.Module, path: str | Path) -> nn.Module:
    """A model as it was saved: a copy of its dense architecture with the factors put in.

    Args:
        model: of the same architecture, dense, with any weights; not changed. The copy stays on
            its device.

    Raises:
        FileNotFoundError: either file is missing.
        ValueError: a damaged file, or one that does not fit the model: other layers, shapes,
            types or ranks.

    >>> from svdlib import factorize
    >>> model = nn.Sequential(nn.Linear(9, 9))
    >>> small = factorize(model, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_factorized(small, f"{folder}/small.safetensors")
    ...     again = load_factorized(model, f"{folder}/small.safetensors")
    >>> torch.equal(again[0].weight, small[0].weight)
    True
    """
    path = Path(path)
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}; save_factorized writes both files")
    ranks = _read_ranks(path.with_suffix(".json"))
    loaded = copy.deepcopy(model)
    known = matrix_layers(loaded)
    for name, rank in ranks.items():
        if name not in known:
            raise ValueError(f"{path} factorizes layer {name!r}, which the model does not have")
        loaded = replace_module(loaded, known[name], thin_twin(known[name], rank))
    types = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    try:
        for name, tensor in load_file(path).items():
            if tensor.dtype != types.get(name, tensor.dtype):
                raise RuntimeError(f"{name} is {types[name]} in the model, not {tensor.dtype}")
        load_model(loaded, path, device=str(next(loaded.parameters()).device))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    return loaded


def export_onnx(model: nn.Module, x: Tensor, path: str | Path, *, tolerance: float = 1e-4) -> None:
    """Write a model as ONNX for inputs like ``x`` (any batch size), checked by onnxruntime.

    Needs the extra ``svdlib[onnx]``. The file is put in place only if onnxruntime gives the
    model's own outputs.

    Args:
        x: example inputs, at least two of them.
        tolerance: largest admissible difference, relative to the largest output.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: onnxruntime's outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx.export needs it
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'svdlib[onnx]'") from error
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as part, evaluating(model):
        file = f"{part}/model.onnx"
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(
            model,
            (x,),
            file,
            dynamo=True,
            external_data=False,
            dynamic_shapes=(batch,),
            input_names=["x"],
            output_names=["y"],
            verbose=False,
        )
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            expected = model(x).cpu()
        (found,) = session.run(None, {"x": x.cpu().numpy()})
        largest = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
        if not largest <= tolerance:
            raise ValueError(f"onnxruntime's outputs differ by {largest:.2g} of the largest")
        os.replace(file, path)


def _read_ranks(file: Path) -> dict[str, int]:
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
        return {
            name: checks.positive_int(rank, f"the rank of layer {name!r}")
            for name, rank in content["ranks"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a table of ranks: {error}") from error
