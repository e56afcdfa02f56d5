"""``nn.MultiheadAttention`` with its projections as layers, which can be factorized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SEPARATE = tuple(f"{name}_weight" for name in PROJECTIONS)
JOINED = ("in_proj_weight", "in_proj_bias")
HELD = (*JOINED, *SEPARATE)


class Attention(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` that calls its projections as the layers q_proj, k_proj, v_proj.

    With queries Q (L × d), keys K and values V (S × …) and the projections' weights and biases, each
    of h heads takes its d/h columns of Q W_qᵀ + b_q, K W_kᵀ + b_k and V W_vᵀ + b_v, and gives

        softmax(q kᵀ / √(d/h) + mask) v,

    whose columns side by side go through out_proj. `unpack_` makes one, `pack_` undoes it.
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
        (n, length, _), keys, masks = q.shape, k.shape[1], []
        if key_padding_mask is not None:
            added = _added(key_padding_mask, "key_padding_mask", [(n, keys)], q.dtype)
            masks.append(added[:, None, None])
        if attn_mask is not None:
            shapes = [(length, keys), (n * self.num_heads, length, keys)]
            added = _added(attn_mask, "attn_mask", shapes, q.dtype)
            masks.append(added.view(-1, 1 if added.dim() == 2 else self.num_heads, length, keys))
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = None
        if masks and not is_causal:  # all see the keys that were added
            mask = F.pad(reduce(torch.add, masks), (0, k.shape[1] - keys))
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


def _added(mask: Tensor, what: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
    """A mask of one of these shapes as what is added to scores: its numbers, or −∞ for True."""
    if mask.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{what} must be {expected}, not {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    if not mask.is_floating_point():
        raise ValueError(f"{what} must be of type bool or floating, not {mask.dtype}")
    return mask.to(dtype)


# Tensors of projections by the parameter that holds them and their place in it.
Made = dict[tuple[int, int], Tensor]


def projections(attention: nn.MultiheadAttention, made: Made) -> dict[str, nn.Linear]:
    """The projections of q, k and v as layers, whose tensors are views of the attention's.

    Tensors that attentions share come from ``made``, which receives new ones. Of an attention that
    holds no parameters of its own (pruning), neither do the layers.
    """
    packed, layers = attention.in_proj_weight is not None, {}
    for place, name in enumerate(PROJECTIONS):
        layer = nn.Linear(1, 1, attention.in_proj_bias is not None, device="meta")
        weight = "in_proj_weight" if packed else f"{name}_weight"
        for what, _ in list(layer.named_parameters()):
            source = weight if what == "weight" else "in_proj_bias"
            held = getattr(attention, source)
            part = held.detach().chunk(3)[place] if source in JOINED else held.detach()
            if is_open(attention):
                part = nn.Parameter(part, held.requires_grad)
            else:
                del layer._parameters[what]
            setattr(layer, what, made.setdefault((id(held), place), part))
        layer.out_features, layer.in_features = layer.weight.shape
        layers[name] = layer.train(attention.training)
    return layers


def is_open(attention: nn.MultiheadAttention) -> bool:
    """Whether it holds its projections as parameters of its own, which pruning takes away."""
    return all(name in attention._parameters for name in HELD)


def unpack_(model: nn.Module) -> nn.Module:
    """Make each ``nn.MultiheadAttention`` in a model an `Attention`, in place."""
    made: Made = {}
    for part in list(model.modules()):
        if type(part) is not nn.MultiheadAttention or not is_open(part):
            continue
        layers = projections(part, made)
        part._parameters.update(dict.fromkeys(HELD))
        part.__class__ = Attention
        part._qkv_same_embed_dim = False  # torch's name for three separate weights
        vars(part)["_modules"] = {**layers, **part._modules}
        if type(part.out_proj) is NonDynamicallyQuantizableLinear:
            cast(Any, part.out_proj).__class__ = nn.Linear
    for tensor in made.values():
        tensor.data = tensor.data.clone()
    return model


def pack_(model: nn.Module) -> nn.Module:
    """Make each `Attention` whose layers are plain an ``nn.MultiheadAttention`` again, in place."""
    made: dict[tuple[int, ...], nn.Parameter] = {}

    def put_together(parts: Sequence[Tensor]) -> nn.Parameter:
        joined = torch.cat([part.detach() for part in parts])
        trained = any(part.requires_grad for part in parts)
        return made.setdefault(tuple(map(id, parts)), nn.Parameter(joined, trained))

    for part in list(model.modules()):
        if not isinstance(part, Attention) or {*map(type, part.children())} != {nn.Linear}:
            continue
        layers = [cast(nn.Linear, part._modules[name]) for name in PROJECTIONS]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        held: dict[str, Any] = dict.fromkeys(HELD)
        part._qkv_same_embed_dim = part.embed_dim == part.kdim == part.vdim
        if part._qkv_same_embed_dim:
            held["in_proj_weight"] = put_together(weights)
        else:
            held.update(zip(SEPARATE, weights, strict=True))
        if biases[0] is not None:
            held["in_proj_bias"] = put_together(biases)
        part._parameters.update(held)
        vars(part)["_modules"] = {"out_proj": part.out_proj}
        cast(Any, part.out_proj).__class__ = NonDynamicallyQuantizableLinear
        cast(Any, part).__class__ = nn.MultiheadAttention
    return model
