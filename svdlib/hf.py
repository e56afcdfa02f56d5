"""Factorized models of the transformers library, by its own ``save_pretrained`` and ``from_pretrained``.

``import svdlib.hf`` is all. From then on, what svdlib factorizes writes its factors and, into
``config.json``, their ranks; and transformers reads such a folder, thin from the start, without
``trust_remote_code``. Needs the extra ``svdlib[text]``.

>>> import tempfile
>>> import svdlib, svdlib.hf
>>> from transformers import AutoModel, BertConfig
>>> small = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
>>> model = AutoModel.from_config(BertConfig(**small, intermediate_size=32))
>>> thin = svdlib.factorize(model, {"encoder.layer.0.output.dense": 3})
>>> with tempfile.TemporaryDirectory() as folder:
...     thin.save_pretrained(folder)
...     AutoModel.from_pretrained(folder).encoder.layer[0].output.dense.rank
3
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdlib.network import modes, opened
from svdlib.network.low_rank import low_rank_layers, thin_twins, tied

METHOD, FORMAT = "svdlib", 1


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """{"quant_method": "svdlib", "format": 1, "ranks": {layer: rank}} in ``config.json``."""

    def __init__(self, ranks: Mapping[str, int], format: int = FORMAT, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format, self.ranks = format, dict(ranks)
        if format != FORMAT:
            raise ValueError(f"the factors have format {format!r}, this version reads {FORMAT}")


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts thin layers into a model that has no numbers yet, before its weights are loaded."""

    requires_calibration = True  # never made by from_pretrained(quantization_config=…)
    is_trainable = is_qat_trainable = is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        ranks, net = placed(model, vars(self.quantization_config)["ranks"]), opened.Network(model)
        for name, rank in ranks.items():
            if name not in net.layers or rank > net.layers[name].full_rank:
                kind = type(model).__name__
                raise ValueError(f"{kind} has no layer {name!r} with a rank of {rank} or more")
        # Weights are tied after they are loaded, but factors must be tied now.
        for pair in model.all_tied_weights_keys.items():
            target, source = (key.removesuffix(".weight") for key in pair)
            if target in ranks and source in ranks:
                net.layers[target].module.weight = net.layers[source].module.weight
        layers = {name: net.layers[name] for name in ranks}
        for name, thin in thin_twins(layers, ranks).items():
            net.put(name, thin)
        modes.avoid_fused_(model)
        tie(model)

    def postprocess_model(self, model: nn.Module, **_: Any) -> None:
        """An ordinary model again, that trains, casts, and saves as any other."""
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(name, None)
        prepare(model)


def placed(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by the names in this model, without those of layers that it does not have.

    The weights of a model with a head may be read into its base, or the other way round.
    """
    prefix, names = f"{model.base_model_prefix}.", {name for name, _ in model.named_modules()}
    found: dict[str, int] = {}
    for name, rank in ranks.items():
        for each in (name, name.removeprefix(prefix), prefix + name):
            if each in names:
                found[each] = rank
                break
    return found


def tie(model: nn.Module) -> None:
    """Tell transformers which factors are one parameter, in place of the weights they replace."""
    thin = low_rank_layers(model)
    pairs: dict[str, str] = {}
    for first, *others in tied(opened.find_layers(model)):
        if first in thin:
            pairs |= dict(_same(thin[first], first, {name: thin[name] for name in others}))
    gone = {f"{name}.{part}" for name in thin for part in ("weight", "bias")}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, attribute, None) or {}
        left = {key: source for key, source in known.items() if not {key, source} & gone}
        setattr(model, attribute, {**left, **pairs})  # of this object, not of its class


def _same(
    layer: nn.Module, name: str, others: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str]]:
    """The names of other layers' parameters that are one layer's, with their names there."""
    own = {id(value): key for key, value in layer.named_parameters(prefix=name)}
    for other, module in others.items():
        for key, value in module.named_parameters(prefix=other):
            if id(value) in own:
                yield key, own[id(value)]


def prepare(model: nn.Module) -> nn.Module:
    """Note a model's ranks in its config, so that ``save_pretrained`` writes them, in place.

    Done for whatever svdlib factorizes, truncates, or merges after ``import svdlib.hf``. Models
    of other libraries stay as they are.

    >>> prepare(nn.Linear(3, 3))
    Linear(in_features=3, out_features=3, bias=True)
    """
    if not isinstance(model, PreTrainedModel):
        return model
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    noted = getattr(model.config, "quantization_config", None)
    if not ranks and not isinstance(noted, LowRankConfig):
        return model
    model.config = copy.deepcopy(model.config)
    model.__dict__.pop("hf_quantizer", None)  # of a GGUF file, whose weights are plain by now
    if ranks:
        model.config.quantization_config = LowRankConfig(ranks)
        tie(model)
    else:
        del model.config.quantization_config
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


opened.FINISHERS.append(prepare)
