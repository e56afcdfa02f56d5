"""Factorized networks on disk: safetensors with their ranks inside, never a pickle; and ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.files import complete_file
from svdlib.network import calls
from svdlib.network.calls import Batch, Batches, Call
from svdlib.network.low_rank import ranks_of, thin_twins
from svdlib.network.modes import evaluating
from svdlib.network.opened import Network

FORMAT = 2


def save_factorized(model: nn.Module, path: str | Path) -> None:
    """Write a model's tensors, and ranks in the metadata, to one safetensors file.

    An existing file is replaced once the new one is complete.

    Raises:
        ValueError: ``path`` exists and is no file, or its folder does not exist.

    >>> import tempfile
    >>> from svdlib import factorize
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_factorized(factorize(nn.Sequential(nn.Linear(9, 9)), 2), f"{folder}/a")
    ...     safe_open(f"{folder}/a", "pt").metadata()["svdlib"]
    '{"format": 2, "ranks": {"0": 2}}'
    """
    path = _place(path)
    ranks = ranks_of(model)
    metadata = {"svdlib": json.dumps({"format": FORMAT, "ranks": ranks})}
    with complete_file(path) as part:
        save_model(model, str(part), metadata=metadata)


@threads.making()
def load_factorized(model: nn.Module, path: str | Path) -> nn.Module:
    """The model that `save_factorized` wrote: a copy of a dense one with the factors put in.

    Args:
        model: of the same architecture, dense, with any weights, on the device of the copy.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or layers, shapes, types or ranks that do not fit the model.

    >>> import tempfile
    >>> from svdlib import factorize
    >>> model = nn.Sequential(nn.Linear(9, 9))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_factorized(factorize(model, 2), f"{folder}/a")
    ...     load_factorized(model, f"{folder}/a")[0].rank
    2
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; save_factorized writes one")
    ranks = _read_ranks(path)
    net = Network.copy_of(model)
    for name, rank in ranks.items():
        if name not in net.layers:
            raise ValueError(f"{path} factorizes layer {name!r}, which the model does not have")
        if rank > (limit := net.layers[name].full_rank):
            found = f"{path} has layer {name!r} at rank {rank}"
            raise ValueError(f"{found}, but in the model it is {limit} at most")
    for name, thin in thin_twins({name: net.layers[name] for name in ranks}, ranks).items():
        net.put(name, thin)
    loaded = net.closed()
    own = loaded.state_dict()
    try:
        for name, tensor in load_file(path).items():
            if name in own and tensor.dtype != own[name].dtype:
                raise RuntimeError(f"{name} is {own[name].dtype} in the model, not {tensor.dtype}")
        load_model(loaded, path, device=str(next(loaded.parameters()).device))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit the model: {error}") from None
    return loaded


def export_onnx(
    model: nn.Module,
    x: Batches,
    path: str | Path,
    *,
    call: Call | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Write a model as ONNX for inputs like ``x`` (any batch size), if onnxruntime agrees with it.

    Needs the extra ``svdlib[onnx]``.

    Args:
        x, call: as in `cost`, at least two inputs. In the file one tensor is "x"; several are "x0",
            "x1", … or have a mapping's names. The output is "y".
        tolerance: largest admissible difference, relative to the largest output.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: onnxruntime's outputs differ; inputs that the model or numpy does not take;
            outputs other than one tensor or logits; ``path`` as in `save_factorized`.
    """
    batch = calls.first_batch(x)
    if any(tensor.dtype == torch.bfloat16 for tensor in calls.tensors(batch)):
        raise ValueError("onnxruntime takes no bfloat16 inputs; export model.float()")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx.export needs it
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'svdlib[onnx]'") from None
    path = _place(path)
    with torch.no_grad(), evaluating(model):
        expected = calls.prepared(model, calls.copied(batch), call)()
    exported: nn.Module = model
    if call is not None or not isinstance(batch, Tensor) or not isinstance(expected, Tensor):
        exported = _OfTensors(model, batch, call)
        batch, expected = exported.batch, getattr(expected, "logits", expected)
    if not torch.is_tensor(expected):
        raise ValueError(f"the model must put out one tensor, not {type(expected).__name__}")
    inputs = calls.tensors(calls.copied(batch))
    names = [f"x{place}" for place in range(len(inputs))] if len(inputs) > 1 else ["x"]
    if isinstance(batch, Mapping) and len(inputs) == len(batch):
        names = [str(name) for name in batch]
    many = torch.export.Dim("batch")
    shapes = tuple({0: many} if len(x) == len(inputs[0]) else None for x in inputs)
    with complete_file(path) as part, evaluating(exported), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # of inputs that share the first
        file = part.with_name("model.onnx")  # a name like "a.json" would get another format
        torch.onnx.export(
            exported,
            tuple(inputs),
            file,
            dynamo=True,
            external_data=False,
            dynamic_shapes=shapes if exported is model else (shapes,),
            input_names=names,
            output_names=["y"],
            verbose=False,
        )
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        used = {node.name for node in session.get_inputs()}
        values = zip(names, calls.tensors(batch), strict=True)
        (found,) = session.run(None, {name: x.cpu().numpy() for name, x in values if name in used})
        expected = expected.cpu().double()
        difference = (torch.from_numpy(found).double() - expected).abs().max().item()
        largest = expected.abs().max().item()
        if not difference <= tolerance * largest:
            raise ValueError(f"onnxruntime's outputs differ by {difference:.2g} of {largest:.2g}")
        file.replace(part)


class _OfTensors(nn.Module):
    """A model as a function of a batch's tensors, which gives its output or the logits of it."""

    def __init__(self, model: nn.Module, batch: Batch, call: Call | None) -> None:
        super().__init__()
        if call is None:
            inputs = calls.prepared(model, batch, None)
            batch = inputs.keywords or inputs.args[1:]  # without targets
            named = isinstance(batch, Mapping)
            call = lambda model, batch: model(**batch) if named else model(*batch)
        self.model, self.batch, self.call = model, batch, call

    def forward(self, *values: Tensor) -> Any:
        left = iter(values)
        output = self.call(self.model, calls.rebuilt(self.batch, lambda _: next(left)))
        return getattr(output, "logits", output)


def _place(path: str | Path) -> Path:
    place = Path(path).resolve()
    if place.exists() and not place.is_file():
        raise ValueError(f"{path} is there and no regular file; give the path of a file")
    if not place.parent.is_dir():
        raise ValueError(f"there is no folder {Path(path).parent} to write {place.name} into")
    return place


def _read_ranks(file: Path) -> dict[str, int]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} does not fit the model: {error}") from None
    if "svdlib" not in metadata:
        raise ValueError(f"{file} tells no ranks; save_factorized writes them into the file")
    try:
        content = json.loads(metadata["svdlib"])
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
        return {n: checks.positive_int(r, f"rank of {n!r}") for n, r in content["ranks"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} has no table of ranks: {error}") from None
