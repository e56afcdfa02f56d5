"""Factorized networks on disk: safetensors with their ranks inside, never a pickle."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.network.batches import Batch, Batches, copied, first_batch, rebuilt, tensors
from svdlib.network.calls import Call, prepared
from svdlib.network.low_rank import low_rank_layers, thin_twins
from svdlib.network.modes import evaluating
from svdlib.network.opened import Network

FORMAT = 2


def save_factorized(model: nn.Module, path: str | Path) -> None:
    """Write a model's tensors and ranks to ``path``, one safetensors file.

    The ranks are in the file's own metadata, as JSON under "svdlib", such as
    {"format": 2, "ranks": {"0": 10}}. A file that is there is replaced once the new one is whole.

    Raises:
        ValueError: ``path`` is there and no file, or in no folder.

    >>> from svdlib import factorize
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/small.safetensors"
    ...     save_factorized(factorize(nn.Sequential(nn.Linear(9, 9)), 2), path)
    ...     with safe_open(path, "pt") as file:
    ...         print(file.metadata()["svdlib"])
    {"format": 2, "ranks": {"0": 2}}
    """
    path = _place(path)
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    told = {"svdlib": json.dumps({"format": FORMAT, "ranks": ranks})}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as part:
        save_model(model, f"{part}/tensors", metadata=told)
        _put(Path(part, "tensors"), path)


@threads.making()
def load_factorized(model: nn.Module, path: str | Path) -> nn.Module:
    """A model as it was saved: a copy of its dense architecture with the factors put in.

    Args:
        model: of the same architecture, dense, with any weights; not changed. The copy stays on
            its device.

    Raises:
        FileNotFoundError: there is no such file.
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
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; save_factorized writes one")
    ranks = _read_ranks(path)
    net = Network.copy_of(model)
    for name, rank in ranks.items():
        if name not in net.layers:
            raise ValueError(f"{path} factorizes layer {name!r}, which the model does not have")
        if rank > (limit := net.layers[name].full_rank):
            raise ValueError(
                f"{path} has layer {name!r} at rank {rank}, but in the model its rank is {limit} "
                "at most"
            )
    for name, thin in thin_twins({name: net.layers[name] for name in ranks}, ranks).items():
        net.put(name, thin)
    loaded = net.closed()
    types = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    try:
        for name, tensor in load_file(path).items():
            if tensor.dtype != types.get(name, tensor.dtype):
                raise RuntimeError(f"{name} is {types[name]} in the model, not {tensor.dtype}")
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
    """Write a model as ONNX for inputs like ``x`` (any batch size), checked by onnxruntime.

    Needs the extra ``svdlib[onnx]``. The file is put in place only if onnxruntime gives the
    model's own outputs.

    Args:
        x: example inputs, at least two of them, on the model's device: a tensor, or a tuple or
            mapping of several, or an iterable of batches, such as a DataLoader, of which the
            first is taken. Targets are left out as in `factorize`. In the file a tensor is "x",
            several are "x0", "x1", …, or have a mapping's names, and the output is "y".
        call: ``call(model, batch)`` calls the model on them in another way.
        tolerance: largest admissible difference, relative to the largest output.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: onnxruntime's outputs differ, the model puts out something else than one
            tensor or an output with logits, it does not take the inputs, inputs in a type that numpy lacks, ``path`` is there and no file.
    """
    batch = first_batch(x)
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors(batch)):
        raise ValueError("onnxruntime takes no bfloat16 inputs; export model.float()")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx.export needs it
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'svdlib[onnx]'") from None
    path = _place(path)
    with torch.no_grad(), evaluating(model):
        expected = prepared(model, copied(batch), call)()
    whole: nn.Module = model
    if call is not None or not isinstance(batch, Tensor) or not isinstance(expected, Tensor):
        whole = _OfTensors(model, batch, call)
        batch, expected = whole.batch, getattr(expected, "logits", expected)
    if not torch.is_tensor(expected):
        raise ValueError(f"the model must put out one tensor, not {type(expected).__name__}")
    inputs, names = tensors(copied(batch)), _names(batch)
    many = torch.export.Dim("batch")
    shapes = tuple({0: many} if len(x) == len(inputs[0]) else None for x in inputs)
    folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-")
    with folder as part, evaluating(whole), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # of inputs that share the first
        file = f"{part}/model.onnx"
        torch.onnx.export(
            whole,
            tuple(inputs),
            file,
            dynamo=True,
            external_data=False,
            dynamic_shapes=shapes if whole is model else (shapes,),
            input_names=names,
            output_names=["y"],
            verbose=False,
        )
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        wired = {each.name for each in session.get_inputs()}
        given = zip(names, tensors(batch), strict=True)
        (found,) = session.run(None, {name: x.cpu().numpy() for name, x in given if name in wired})
        wanted = expected.cpu().double()
        off = (torch.from_numpy(found).double() - wanted).abs().max().item()
        if not off <= tolerance * wanted.abs().max().item():
            raise ValueError(
                f"onnxruntime's outputs differ by {off:.2g} where the largest is "
                f"{wanted.abs().max().item():.2g}"
            )
        _put(Path(file), path)


class _OfTensors(nn.Module):
    """A model that is called on a batch, as a function of the batch's tensors."""

    def __init__(self, model: nn.Module, batch: Batch, call: Call | None) -> None:
        super().__init__()
        self.model, self.batch, self.call = model, batch, call
        if call is None:  # without targets
            inputs = prepared(model, batch, None)
            self.batch = inputs.keywords or inputs.args[1:]

    def forward(self, *values: Tensor) -> Any:
        """The output, or its logits."""
        left = iter(values)
        batch = rebuilt(self.batch, lambda _: next(left))
        if self.call is not None:
            output = self.call(self.model, batch)
        elif isinstance(batch, Mapping):
            output = self.model(**batch)
        else:
            output = self.model(*batch)
        return getattr(output, "logits", output)


def _names(batch: Batch) -> list[str]:
    """What a batch's tensors are called.

    >>> _names(torch.ones(2)), _names((torch.ones(2), torch.ones(2)))
    (['x'], ['x0', 'x1'])
    """
    if isinstance(batch, Mapping) and len(tensors(batch)) == len(batch):
        return [str(name) for name in batch]
    number = len(tensors(batch))
    return ["x"] if number == 1 else [f"x{place}" for place in range(number)]


def _place(path: str | Path) -> Path:
    """Where to write: the file itself where a link points at it."""
    place = Path(path).resolve()
    if place.exists() and not place.is_file():
        raise ValueError(f"{path} is there and no regular file; give the path of a file")
    if not place.parent.is_dir():
        raise ValueError(f"there is no folder {Path(path).parent} to write {place.name} into")
    return place


def _put(file: Path, path: Path) -> None:
    """Move a file to its place, with the mode that files of this user have."""
    usual = file.with_name("usual")
    usual.touch()
    file.chmod(usual.stat().st_mode)
    os.replace(file, path)


def _read_ranks(file: Path) -> dict[str, int]:
    try:
        with safe_open(file, "pt") as tensors:
            told = tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} does not fit the model: {error}") from None
    if "svdlib" not in told:
        raise ValueError(f"{file} tells no ranks; save_factorized writes them into the file")
    try:
        content = json.loads(told["svdlib"])
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
        return {
            name: checks.positive_int(rank, f"the rank of layer {name!r}")
            for name, rank in content["ranks"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} has no table of ranks: {error}") from None
