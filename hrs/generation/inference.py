"""How a model runs while texts grow: its precision, its slots, and what is captured in CUDA graphs.

On the CPU the model runs as it is, in the precision of its weights. On a GPU it runs in half precision with logits in
float32: bfloat16 where the GPU computes it, float16 on older ones. There, steps of one token per text have static
shapes: the number of rows is a power of two, attention looks at a multiple of :data:`KEYS_AT_ONCE` keys, and inputs
stand in one buffer, so that a step is a CUDA graph that is captured once and replayed.
"""

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hrs.gpu import Gpu, gpu_of
from hrs.models.base import Cache, LanguageModel

KEYS_AT_ONCE = 64
"""Attention of a static step looks at a multiple of it. More would compute more masked keys, fewer capture more."""
_WARM_UP_CALLS = 3


class Inference:
    """A model in evaluation mode in the precision in which texts are continued.

    Args:
        model: where it lies decides the precision. On a GPU its matrices are copied in half precision.
        dtype: half precision to use whatever the device; None for the choice of the device.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype | None = None) -> None:
        self.device = next(model.parameters()).device
        self.gpu = gpu_of(self.device)
        if dtype is None and self.gpu is not None and next(model.parameters()).dtype == torch.float32:
            dtype = torch.bfloat16 if self.gpu.bf16 else torch.float16
        self._dtype = dtype
        self.model = model if dtype is None else with_half_matrices(model, dtype)
        self.constants: dict[Hashable, object] = {}
        """What slots of this model compute once, see :class:`hrs.nn.cache.SlotTable`."""

    def precision(self) -> AbstractContextManager[None]:
        """The context in which the model runs."""
        if self._dtype is None:
            return nullcontext()
        # Its matrices are in half precision already: nothing is left to be cached.
        return torch.autocast(self.device.type, self._dtype, cache_enabled=False)

    @torch.no_grad()
    def new_cache(self, n: int, history: Tensor | None = None) -> Cache:
        """See :meth:`LanguageModel.new_cache`."""
        with self.precision():
            return self.model.new_cache(n, history)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [B, V] after the last of each row's tokens [B, n], which are read; in float32 at least."""
        with self.precision():
            logits = self.model.decode(tokens, cache).logits
        assert logits is not None
        last = logits[:, -1]
        return last.to(torch.promote_types(last.dtype, torch.float32))  # bf16 is too coarse for a distribution

    def read(self, pieces: Sequence[Sequence[int]], cache: Cache) -> Tensor:
        """:meth:`decode` of token ids, one piece of equal length for each row."""
        return self.decode(self.upload(np.array(pieces, dtype=np.int64)), cache)

    def upload(self, values: NDArray[np.int64]) -> Tensor:
        """The same on the device. On a GPU the host does not wait for the copy."""
        tensor = torch.from_numpy(values)
        if self.gpu is None:
            return tensor.to(self.device)
        pinned = self.gpu.pinned_empty(tensor.shape, tensor.dtype).copy_(tensor)
        return pinned.to(self.device, non_blocking=True)


def with_half_matrices(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Return a copy of a model whose embedding and linear layers are in half precision; it shares everything else."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in (*model.modules(), model.input_embedding):
        if isinstance(module, nn.Linear) or module is model.input_embedding:
            for parameter in module.parameters(recurse=False):
                half = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                shared[id(parameter)] = half
    return copy.deepcopy(model, shared)


class SlotDecoder:
    """Texts of unequal length that advance by one token at a time, in one pass of the model for all.

    Args:
        inference: of a model with :attr:`LanguageModel.batches_ragged`.
        n_slots: texts there is room for.
    """

    def __init__(self, inference: Inference, n_slots: int) -> None:
        self._inference = inference
        self._n_slots = n_slots
        self._limit = inference.model.max_seq_len
        self.slots = inference.model.new_slots(n_slots)
        self.slots.table.constants = inference.constants
        self._inputs = torch.zeros(2, n_slots, dtype=torch.int64, device=inference.device)
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one token for each slot in use; logits [n, V] after it.

        On a GPU the next call may overwrite them.
        """
        slots, gpu, n = self.slots, self._inference.gpu, len(tokens)
        if gpu is None:
            return self._inference.decode(torch.tensor(tokens, device=self._inference.device).unsqueeze(1), slots)
        n_rows = min(1 << (n - 1).bit_length(), self._n_slots)
        end = min(-(-(max(slots.lengths) + 1) // KEYS_AT_ONCE) * KEYS_AT_ONCE, self._limit)
        if slots.memory is not None:  # of as many rows as there are texts
            n_rows = n
        inputs = np.zeros((2, n_rows), dtype=np.int64)
        inputs[:, :n] = tokens, slots.lengths
        self._inputs[:, :n_rows].copy_(self._inference.upload(inputs), non_blocking=True)

        def run() -> Tensor:
            """The step without its effect on the lengths, which the host keeps."""
            lengths = slots.table.lengths
            slots.stage(self._inputs[1, :n_rows].unsqueeze(1), end)
            logits = self._inference.decode(self._inputs[0, :n_rows].unsqueeze(1), slots)
            slots.table.lengths = lengths
            return logits

        logits = self._replay(gpu, run, (n_rows, end)) if slots.is_plain and slots.memory is None else run()
        slots.table.advance()
        return logits[:n]

    def _replay(self, gpu: Gpu, run: Callable[[], Tensor], shape: tuple[int, int]) -> Tensor:
        """Run a step of static shapes as a graph, which is captured when its shape is first met."""
        if shape not in self._graphs:
            restore = self.slots.snapshot()
            self._graphs[shape] = gpu.capture(run, _WARM_UP_CALLS)
            restore()  # what the calls of the capture changed
        replay, logits = self._graphs[shape]
        replay()
        return logits
