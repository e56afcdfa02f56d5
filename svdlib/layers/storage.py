"""Factorized networks on disk: safetensors with their ranks inside, never a pickle; and ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
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
        ValueError: ``path`` exists and is no file, or its folder does not exist; the model has
            extra state, or tensors that safetensors does not store.
        OSError: the file can't be written, as on a full disk; nothing is left of it.

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
    stored = _stored(model)
    try:
        with complete_file(path) as part:
            save_file(stored, str(part), metadata=metadata)
    except KeyError as error:
        raise ValueError(f"safetensors stores no tensors of type {error}; convert them") from None
    except SafetensorError as error:
        raise OSError(f"{path} can't be written, and nothing is left of it: {error}") from None


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
    try:
        _load_(loaded, load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit the model: {error}") from None
    return loaded


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by name, each once, and none that shares memory with another."""
    found: dict[str, Tensor] = {}
    seen, memory = set[object](), set[int]()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(  # noqa: TRY004
                f"{name!r} is a {type(value).__name__}, and only tensors are stored; keep such "
                "extra state in a file of its own, or make it a tensor"
            )
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"{name!r} is a tensor that safetensors does not store (device {value.device}, "
                f"{value.layout}); make it dense, and give it numbers"
            )
        if value.numel() and (same := _memory(value)) in seen:
            continue
        seen.add(same if value.numel() else name)
        place = value.untyped_storage().data_ptr()
        free = value.is_contiguous() and place not in memory
        found[name] = value if free else value.clone(memory_format=torch.contiguous_format)
        memory.add(place)
    return found


def _memory(tensor: Tensor) -> object:
    return tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()


def _load_(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model; those that it shares may be stored once."""
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and 0 in buffer.stride():  # expanded: it can't be written to
                part._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
    own = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    places: dict[object, str] = {}
    for name in stored.keys() & own.keys():
        if stored[name].dtype != own[name].dtype:
            types = f"{own[name].dtype} in the model, not {stored[name].dtype}"
            raise RuntimeError(f"{name} is {types}")
        if own[name].numel() and (other := places.setdefault(_memory(own[name]), name)) != name:
            raise RuntimeError(f"{other} and {name} are one tensor in the model, two in the file")
    missing, unexpected = model.load_state_dict(stored, strict=False)
    memory = {own[name].untyped_storage().data_ptr() for name in stored.keys() & own.keys()}
    missing = [
        n for n in missing if n not in own or own[n].untyped_storage().data_ptr() not in memory
    ]
    if missing or unexpected:
        raise RuntimeError(f"missing {missing}, unexpected {unexpected}")


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
