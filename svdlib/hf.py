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

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdlib import checks
from svdlib.network import modes, opened
from svdlib.network.attention import Attention, pack_, unpack_
from svdlib.network.kinds import Layer
from svdlib.network.low_rank import low_rank_layers, ranks_of, thin_twins, tied

METHOD, FORMAT = "svdlib", 1
# transformers only logs an unknown quantization method, and then leaves the weights random. An
# unknown entry of fusion_config is an error, which shows the entry.
NOTE = "its layers are factorized by svdlib, so run `import svdlib.hf` first"


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """{"quant_method": "svdlib", "format": 1, "ranks": {layer: rank}} in ``config.json``.

    "tied", {layer: layer whose factors it has}, holds whatever tie_word_embeddings says: PEFT sets
    that to False as it merges adapters, since two products share no memory.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        format: int = FORMAT,
        tied: Mapping[str, str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format, self.ranks, self.tied = format, dict(ranks or {}), dict(tied or {})
        if format != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {format!r}; update svdlib")


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts thin layers into a model that has no numbers yet, before its weights are loaded."""

    requires_calibration = True  # never made by from_pretrained(quantization_config=…)
    is_trainable = is_qat_trainable = is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """The config without `NOTE`: the only method that sees it before fusions are looked up."""
        unmark(config)
        return config

    update_tp_plan = update_attn_implementation  # what earlier versions of transformers call

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        net = opened.Network(unpack_(model))
        noted = vars(self.quantization_config)
        ranks = placed(model, net.layers, noted["ranks"])
        # Weights are tied after they are loaded, but factors must be tied now. The rank of one
        # holds for both, as where a base is read into a model with a head.
        for pair in (*model.all_tied_weights_keys.items(), *noted["tied"].items()):
            names = [key.removesuffix(".weight") for key in pair]
            known = [ranks[name] for name in names if name in ranks]
            if known and all(name in net.layers for name in names):
                ranks |= dict.fromkeys(names, known[0])
                target, source = (net.layers[name].module for name in names)
                target.weight = source.weight
        layers = {name: net.layers[name] for name in ranks}
        for name, thin in thin_twins(layers, ranks).items():
            net.put(name, thin)
        modes.avoid_fused_(pack_(model))
        for part in model.modules():  # what initializes an attention's own tensors finds none
            if any(isinstance(inner, Attention) for inner in (part, *part.children())):
                part._is_hf_initialized = True
        for part in parts(model):
            tie(part)

    def postprocess_model(self, model: nn.Module, **_: Any) -> None:
        """An ordinary model again, that trains, casts, and saves as any other."""
        for name in ("quantization_method", "is_quantized"):
            model.__dict__.pop(name, None)
        prepare(model)


def placed(
    model: nn.Module, layers: Mapping[str, Layer], ranks: Mapping[str, int]
) -> dict[str, int]:
    """Ranks by the names in this model, without those of layers that it does not have.

    The weights of a model with a head may be read into its base, or the other way round.

    Raises:
        ValueError: a layer that is missing where its neighbors are, or has no such rank.
    """
    prefix, modules = f"{model.base_model_prefix}.", {name for name, _ in model.named_modules()}
    found: dict[str, int] = {}
    for name, rank in ranks.items():
        for each in (name, name.removeprefix(prefix), prefix + name):
            parent = each.rpartition(".")[0]
            if each in layers or (parent and parent in modules):
                limit = layers[each].full_rank if each in layers else 0
                if rank > limit:
                    kind = type(model).__name__
                    raise ValueError(
                        f"the ranks in config.json do not fit {kind}: layer {each!r} can have rank "
                        f"{limit} at most, not {rank}"
                    )
                found[each] = rank
                break
    return found


def parts(model: nn.Module) -> list[Any]:
    """The models of the transformers library in a model, the outermost first."""
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def mark(config: Any) -> None:
    """Make transformers without svdlib.hf raise an error, with `NOTE`, where it reads a config."""
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), NOTE: False}


def unmark(config: Any) -> None:
    """Undo `mark`."""
    left = {k: v for k, v in (getattr(config, "fusion_config", None) or {}).items() if k != NOTE}
    if left:
        config.fusion_config = left
    else:
        vars(config).pop("fusion_config", None)


def tie(model: Any) -> None:
    """Tell transformers which factors are one parameter, in place of the weights they replace."""
    thin = low_rank_layers(model)
    pairs: dict[str, str] = {}
    for name, first in ties_of(model).items():
        pairs |= dict(_same(thin[first], first, {name: thin[name]}))
    gone = {f"{name}.{part}" for name in thin for part in ("weight", "bias")}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, attribute, None) or {}
        left = {key: source for key, source in known.items() if not {key, source} & gone}
        setattr(model, attribute, {**left, **pairs})  # of this object, not of its class


def ties_of(model: nn.Module) -> dict[str, str]:
    """The factorized layers that have another one's factors, with the name of that one."""
    thin = low_rank_layers(model)
    groups = tied(opened.find_layers(model))
    return {name: first for first, *others in groups if first in thin for name in others}


def _same(
    layer: nn.Module, name: str, others: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str]]:
    """The names of other layers' parameters that are one layer's, with their names there."""
    own = {id(value): key for key, value in layer.named_parameters(prefix=name)}
    for other, module in others.items():
        for key, value in module.named_parameters(prefix=other):
            if id(value) in own:
                yield key, own[id(value)]


def refuse_resize(*_: Any, **__: Any) -> None:
    """What a model with a factorized embedding or output layer has for ``resize_token_embeddings``.

    That of transformers would resize a dense embedding, and then fail at the output layer.
    """
    raise ValueError(
        "resize_token_embeddings cannot resize a factorized embedding or output layer; resize "
        "svdlib.merge(model), or resize before you factorize"
    )


def guard_resize(model: Any) -> None:
    """Refuse ``resize_token_embeddings`` while one of the layers it would resize is factorized."""
    if vars(model).get("resize_token_embeddings") is refuse_resize:
        del model.resize_token_embeddings
    with suppress(NotImplementedError):  # a model without token embeddings
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if any(layer in ends for layer in low_rank_layers(model).values()):
            model.resize_token_embeddings = refuse_resize


def prepare(model: nn.Module) -> nn.Module:
    """Note ranks in the configs of all transformers models in a model, in place.

    ``save_pretrained`` then writes them. This is done for whatever svdlib factorizes, truncates, or
    merges after ``import svdlib.hf``; call it for a model that was factorized before.

    >>> prepare(nn.Linear(3, 3))
    Linear(in_features=3, out_features=3, bias=True)
    """
    configs: set[int] = set()
    for part in parts(model):
        ranks = ranks_of(part)
        noted = getattr(part.config, "quantization_config", None)
        own = noted is not None and _method(noted) == METHOD
        if ranks and noted is not None and not own and _method(noted) != "gguf":
            checks.warn(f"the ranks are not saved with a model quantized by {_method(noted)}")
            continue
        if id(part.config) not in configs:  # parts that share one are named as its first owner's
            configs.add(id(part.config))
            if ranks:
                part.config.quantization_config = LowRankConfig(ranks, tied=ties_of(part))
                mark(part.config)
            elif own:
                del part.config.quantization_config
                unmark(part.config)
        if ranks or own:
            part.__dict__.pop("hf_quantizer", None)  # of a GGUF file, whose weights are plain now
        guard_resize(part)
        if ranks:
            tie(part)
        elif "_tied_weights_keys" in part.__dict__:  # it was factorized before
            del part._tied_weights_keys
            part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def _method(config: Any) -> str:
    found = config.get("quant_method") if isinstance(config, Mapping) else config.quant_method
    return str(getattr(found, "value", found))


opened.FINISHERS.append(prepare)
