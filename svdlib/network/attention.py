"""``nn.MultiheadAttention`` with its projections as layers, which can be factorized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SEPARATE = tuple(f"{name}_weight" for name in PROJECTIONS)
HELD = ("in_proj_weight", *SEPARATE, "in_proj_bias")


class Attention(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` that calls its projections as the layers q_proj, k_proj, v_proj.

    With queries Q (L × d), keys K and values V (S × …) and the projections' weights and biases, each
    of h heads takes its d/h columns of Q W_qᵀ + b_q, K W_kᵀ + b_k and V W_vᵀ + b_v, and gives

        softmax(q kᵀ / √(d/h) + mask) v,

    whose columns side by side go through out_proj. Arguments and outputs are those of the class
    that it stands in for. `unpack_` makes one, `pack_` undoes it.

    >>> model, x = nn.MultiheadAttention(8, 2), torch.rand(5, 3, 8)
    >>> expected, _ = model(x, x, x)
    >>> torch.allclose(unpack_(model)(x, x, x)[0], expected, atol=1e-6)
    True
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal; give attn_mask too")
        batched, inputs = query.dim() == 3, (query, key, value)
        if not batched:
            inputs = (query[None], key[None], value[None])
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            turned = {id(x): x.transpose(0, 1) for x in inputs}  # what is one input, stays one
            inputs = (turned[id(query)], turned[id(key)], turned[id(value)])
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x) for layer, x in zip(layers, inputs, strict=True))
        masks = [self._on_keys(key_padding_mask, q, k), self._on_pairs(attn_mask, q, k)]
        if is_causal and key_padding_mask is None and not need_weights:
            masks = []  # torch knows this mask
        else:
            is_causal = False
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = None
        for each in masks:
            if each is not None:  # what was added to the keys is seen by all
                each = F.pad(each, (0, k.shape[1] - each.shape[-1]))
                mask = each if mask is None else mask + each
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        # In memory as torch has it, places before inputs, for which dropout draws in that order.
        output: Tensor = self.out_proj(heads.permute(2, 0, 1, 3).flatten(2))
        if not batched:
            return output[:, 0], None if weights is None else weights[0]
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _on_keys(self, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """A mask of keys (N, S) as what is added to scores (N, h, L, S)."""
        if mask is None:
            return None
        if mask.shape != k.shape[:2]:
            raise ValueError(
                f"key_padding_mask must be {tuple(k.shape[:2])}, not {tuple(mask.shape)}"
            )
        return _added(mask, q)[:, None, None]

    def _on_pairs(self, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """A mask of pairs (L, S) or (N · h, L, S) as what is added to scores (N, h, L, S)."""
        if mask is None:
            return None
        pairs = (q.shape[1], k.shape[1])
        all_pairs = (len(q) * self.num_heads, *pairs)
        if mask.shape not in (pairs, all_pairs):
            raise ValueError(f"attn_mask must be {pairs} or {all_pairs}, not {tuple(mask.shape)}")
        return _added(mask, q).view(-1, 1 if mask.dim() == 2 else self.num_heads, *pairs)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added to scores: −∞ where it is True, or its own numbers."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
    if not mask.is_floating_point():
        raise ValueError(f"a mask must be of type bool or floating, not {mask.dtype}")
    return mask.to(like.dtype)


# Tensors of projections by the parameter that holds them and their place in it.
Made = dict[tuple[int, int], Tensor]


def projections(attention: nn.MultiheadAttention, made: Made | None = None) -> dict[str, nn.Linear]:
    """The projections of q, k and v as layers, whose tensors are views of the attention's.

    Where it holds these as no parameters of its own (pruning), neither do they.

    Args:
        made: what was made so far, so that what attentions share is shared by their layers.

    >>> attention = nn.MultiheadAttention(8, 2)
    >>> torch.equal(projections(attention)["k_proj"].weight, attention.in_proj_weight[8:16])
    True
    """
    made = {} if made is None else made
    packed, layers = attention.in_proj_weight is not None, {}
    for place, name in enumerate(PROJECTIONS):
        layer = nn.Linear(1, 1, attention.in_proj_bias is not None, device="meta")
        sources = {"weight": "in_proj_weight" if packed else f"{name}_weight"}
        if layer.bias is not None:
            sources["bias"] = "in_proj_bias"
        for what, source in sources.items():
            whole = getattr(attention, source)
            part = whole.detach()
            if source.startswith("in_proj"):
                part = part.chunk(3)[place]
            if is_open(attention):
                part = nn.Parameter(part, whole.requires_grad)
            else:
                del layer._parameters[what]
            setattr(layer, what, made.setdefault((id(whole), place), part))
        layer.out_features, layer.in_features = layer.weight.shape
        layers[name] = layer.train(attention.training)
    return layers


def is_open(attention: nn.MultiheadAttention) -> bool:
    """Whether it holds its projections as parameters of its own, which pruning takes away."""
    return all(name in attention._parameters for name in HELD)


def unpack_(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Make each ``nn.MultiheadAttention`` in a model an `Attention`, in place.

    Args:
        names: of layers; only where one of these is. By default everywhere.

    >>> list(dict(unpack_(nn.MultiheadAttention(8, 2)).named_children()))
    ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """
    names = None if names is None else tuple(names)
    made: Made = {}
    for name, part in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        wanted = names is None or any(each.startswith(prefix) for each in names)
        if type(part) is not nn.MultiheadAttention or not is_open(part) or not wanted:
            continue
        layers = projections(part, made)
        part._parameters.update(dict.fromkeys(HELD))
        part.__class__ = Attention
        part._qkv_same_embed_dim = False  # as torch calls it where the three are apart
        vars(part)["_modules"] = {**layers, **part._modules}
        if type(part.out_proj) is NonDynamicallyQuantizableLinear:
            _become(part.out_proj, nn.Linear)
    for tensor in made.values():
        tensor.data = tensor.data.clone()
    return model


def pack_(model: nn.Module) -> nn.Module:
    """Make each `Attention` whose layers are plain an ``nn.MultiheadAttention`` again, in place.

    >>> type(pack_(unpack_(nn.MultiheadAttention(8, 2)))).__name__
    'MultiheadAttention'
    """
    made: dict[tuple[int, ...], nn.Parameter] = {}

    def put_together(parts: Sequence[Tensor]) -> nn.Parameter:
        whole = torch.cat([part.detach() for part in parts])
        whole = nn.Parameter(whole, any(part.requires_grad for part in parts))
        return made.setdefault(tuple(map(id, parts)), whole)

    for part in list(model.modules()):
        if not isinstance(part, Attention) or {*map(type, part.children())} != {nn.Linear}:
            continue
        layers = [cast(nn.Linear, part._modules[name]) for name in PROJECTIONS]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        part._qkv_same_embed_dim = part.embed_dim == part.kdim == part.vdim
        held: dict[str, Any] = dict.fromkeys(HELD)
        if part._qkv_same_embed_dim:
            held["in_proj_weight"] = put_together(weights)
        else:
            held.update(zip(SEPARATE, weights, strict=True))
        if biases[0] is not None:
            held["in_proj_bias"] = put_together(biases)
        part._parameters.update(held)
        vars(part)["_modules"] = {"out_proj": part.out_proj}
        _become(part.out_proj, NonDynamicallyQuantizableLinear)
        _become(part, nn.MultiheadAttention)
    return model


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make a module one of another class that holds the same, hooks and all."""
    module.__class__ = kind
