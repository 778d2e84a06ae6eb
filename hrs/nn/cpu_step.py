"""A decoding step through the blocks of a plain transformer on the CPU, with little around its kernels.

A step of a small model is some sixty kernels of a few microseconds each. Calls of modules, their attributes and views
of views take longer than that, so here the tensors of all blocks are gathered once and a block is nine calls.
:meth:`hrs.nn.block.Block.forward` is the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.nn.block import Block, BlockSlots
from hrs.nn.cache import KeyValueSlots, SlotTable


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a step takes of a block besides its matrices."""

    attention_norm: tuple[Tensor, Tensor, float]
    feed_forward_norm: tuple[Tensor, Tensor, float]
    """Scale [d], shift [d] and epsilon."""
    slots: KeyValueSlots


class CpuStep:
    """The residual stream after all blocks, of one new token for each slot.

    Args:
        blocks: all of which :meth:`covers`.
        slots: what each block remembers.
        table: of the slots.
    """

    def __init__(self, blocks: Sequence[Block], slots: Sequence[BlockSlots], table: SlotTable) -> None:
        self._table = table
        self._layers: list[_Layer] = []
        self._weights: list[tuple[Tensor, ...]] = []
        for block, memory in zip(blocks, slots, strict=True):
            attention, mlp, norm = block.attention, block.mlp, block.feed_forward_norm
            assert attention is not None and mlp is not None and norm is not None and memory.attention is not None
            self._layers.append(_Layer(_norm(block.attention_norm), _norm(norm), memory.attention))
            matrices = (attention.qkv, attention.output, mlp.hidden, mlp.output)
            self._weights.append(tuple(layer.weight for layer in matrices))
        first = blocks[0].attention
        assert first is not None
        self._attention = first  # all are alike but for their weights
        self._matrices: dict[bool, list[tuple[Tensor, ...]]] = {}

    @staticmethod
    def covers(block: Block) -> bool:
        """Return True for plain attention and one feed-forward layer, and nothing else."""
        attention, lacks = block.attention, (block.synapse, block.cross, block.conv) == (None, None, None)
        return attention is not None and attention.plain and block.order == ("mlp",) and lacks

    def __call__(self, x: Tensor) -> Tensor:
        """Return the residual stream [n, d] after all blocks; ``x`` [n, d] is that before the first.

        The step must have begun in the table. Keys and values are added to the slots.
        """
        n, width = x.shape
        attention, table = self._attention, self._table
        heads, d_head, scale = attention.n_heads, attention.d_head, attention.scale
        turns = None if attention.rotary is None else attention.turns(table, x.dtype).flatten(0, 1)
        mask = self._layers[0].slots.mask(x.dtype)
        for layer, (qkv, output, into, out_of) in zip(self._layers, self._of_step(), strict=True):
            normalised = torch.layer_norm(x, (width,), *layer.attention_norm)
            parts = torch.mm(normalised, qkv)
            if turns is not None:
                parts = torch.bmm(parts.view(3 * n, heads, d_head), turns)
            parts = parts.view(n, 3, heads, d_head)
            layer.slots.write(parts[:, 1:])
            k, v = layer.slots.filled()
            q = parts[:, 0].unsqueeze(2)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)  # [n, H, 1, d_head]
            x = torch.addmm(x, attended.view(n, width), output)
            normalised = torch.layer_norm(x, (width,), *layer.feed_forward_norm)
            x = torch.addmm(x, F.gelu(torch.mm(normalised, into)), out_of)
        return x

    def _of_step(self) -> list[tuple[Tensor, ...]]:
        """The matrices [in, out] of every block in the layout of the present step."""
        table, key = self._table, self._table.copies_matrices
        if key not in self._matrices:
            self._matrices[key] = [tuple(table.matrix(weight).t() for weight in own) for own in self._weights]
        return self._matrices[key]


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps
