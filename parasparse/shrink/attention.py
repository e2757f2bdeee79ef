"""`nn.MultiheadAttention` with fewer heads than its width is made of."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parasparse.attach.attaching import reclass
from parasparse.attach.classes import base_class
from parasparse.shrink.plan import Shrinkage
from parasparse.shrink.undo import Undo


class FewerHeads(nn.MultiheadAttention):
    """The same layer, whose heads need not make up its width.

    torch wants `num_heads * head_dim == embed_dim`. Here the rows of the three projections are
    `num_heads * head_dim`, whatever the width of the input. Arguments, parameters and results are
    those of `nn.MultiheadAttention`, except that a mask with an entry for each head has one for
    each head that is left.
    """

    # Encoder layers read it to choose a kernel of their own, which wants all heads.
    _qkv_same_embed_dim = property(lambda self: False)

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
        """Attend as `nn.MultiheadAttention` does. `is_causal` is a hint; `attn_mask` counts."""
        if is_causal and attn_mask is None:
            raise RuntimeError("`attn_mask` must be given with `is_causal`, which is only a hint.")
        if query.is_nested:
            return self._attend_to_nested(query), None
        batched, first = query.ndim == 3, self.batch_first
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._heads(query, key, value)
        k, v = self._with_more_keys(k, self.bias_k), self._with_more_keys(v, self.bias_v)
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        out, weights = self._attend(q, k, v, mask, need_weights)
        out = out.transpose(1, 2)
        out = self.out_proj(out.reshape(*out.shape[:2], self.num_heads * self.head_dim))
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not first:
            out = out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        return out, weights

    def _attend_to_nested(self, x: Tensor) -> Tensor:
        """Attend to itself, for `nn.TransformerEncoder`, which makes nested tensors of padding."""
        lengths = torch.tensor([len(sequence) for sequence in x.unbind()], device=x.device)
        padded = torch.nested.to_padded_tensor(x, 0.0)
        padding = torch.arange(padded.shape[1], device=x.device) >= lengths.unsqueeze(1)
        out, _ = self(padded, padded, padded, padding, need_weights=False)
        nested: Tensor = torch._nested_tensor_from_mask(out, ~padding)
        return nested

    def _heads(self, *inputs: Tensor) -> list[Tensor]:
        """Return queries, keys and values of each head: (batch, heads, length, head_dim)."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = map(F.linear, inputs, weights, biases)
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]

    def _with_more_keys(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append what `add_bias_kv` and `add_zero_attn` add."""
        if bias is not None:
            more = bias.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            x = torch.cat([x, more.expand(x.shape[0], -1, -1, -1)], 2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Return what is added to the products of `q` and `k`, or None."""
        mask = None
        if attn_mask is not None:
            mask = _as_numbers(attn_mask, q)
            if mask.ndim == 3:
                mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _as_numbers(key_padding_mask, q)[..., None, None, :]
            mask = padding if mask is None else mask + padding
        if mask is None:
            return None
        return F.pad(mask, (0, k.shape[2] - mask.shape[-1]))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout, scale = self.dropout if self.training else 0.0, self.head_dim**-0.5
        if not need_weights:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
            return out, None
        products = (q * scale) @ k.transpose(-2, -1)
        weights = (products if mask is None else products + mask).softmax(-1)
        weights = F.dropout(weights, dropout)
        return weights @ v, weights


def _as_numbers(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as torch adds it: bool True is minus infinity."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def let_heads_go(module: nn.Module, undo: Undo | None = None) -> None:
    """Give an `nn.MultiheadAttention` the class `FewerHeads`."""
    if base_class(module) is nn.MultiheadAttention:
        if undo is not None:
            undo.steps.append(partial(_set_class, module, nn.MultiheadAttention))
        _set_class(module, FewerHeads)


def prepare(model: nn.Module, plan: Shrinkage, undo: Undo) -> None:
    """Let heads or inputs go in the modules of `model` that lose some by `plan`.

    `nn.MultiheadAttention` has heads that make up the width of its input.
    """
    paths = {row.path for row in plan.attributes if row.name == "num_heads"}
    paths |= {row.name.rpartition(".")[0] for row in plan.rows}
    for path, module in model.named_modules():
        if path in paths:
            let_heads_go(module, undo)


def _set_class(module: nn.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)
    reclass(module)  # to its subclass for masks
