"""One running summary per token: the mean of all states so far, added through gates that start closed."""

import torch
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.errors import HRSError
from hrs.nn.cache import SlotTable, SlotTensor
from hrs.nn.engrams.base import BlockInputs, EngramEncoder, EngramMechanism, EngramState, reconstruction_loss


class RunningCache:
    """Sum of the hidden states so far; how many they were, the next positions say."""

    def __init__(self) -> None:
        self.total: Tensor | None = None


class RunningSlots:
    """:class:`RunningCache` of sequences of unequal length."""

    def __init__(self, table: SlotTable) -> None:
        self.totals = SlotTensor(table)

    def join(self, cache: RunningCache, slot: int) -> None:
        """Copy the sequences of a cache into ``slot`` and those after it."""
        assert cache.total is not None
        self.totals.join(cache.total, slot)

    def leave(self, slot: int, last: int) -> None:
        """Move what is in slot ``last`` into ``slot``."""
        self.totals.leave(slot, last)

    def tensors(self) -> list[Tensor]:
        """Return all that a step changes."""
        return self.totals.tensors()


class RunningEngrams(EngramMechanism):
    """``running``: token t gets one engram, made of the mean of block ``extract_after``'s states at tokens 0 .. t.

    Every later block adds it to its input through a vector of its own that starts at 0, so that the model starts as if
    it had no engrams. It asks nothing of how a block mixes tokens: convolutions can read it too. ``window`` and
    ``per_window`` have no meaning here, and there is no original to be faithful to.

    Raises:
        HRSError: if ``engram.as_original`` is set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.engram.as_original:
            raise HRSError("engram.as_original has no meaning for engram.kind=running, which is new: set it to false")
        self.encoder = EngramEncoder(config.d_model, per_window=1)
        n_readers = config.n_layers - 1 - self.extract_after
        # Vectors, one by one: a matrix would be decayed as weights are.
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(config.d_model)) for _ in range(n_readers))

    def new_cache(self) -> RunningCache:
        return RunningCache()

    def new_slots(self, table: SlotTable) -> RunningSlots:
        return RunningSlots(table)

    def enter(self, index: int, x: Tensor, state: EngramState) -> tuple[Tensor, Tensor, BlockInputs]:
        if index > self.extract_after:
            x = x + self.gates[index - self.extract_after - 1] * state.carried
        return x, state.positions, BlockInputs()

    def leave(self, index: int, x: Tensor, state: EngramState) -> Tensor:
        if index == self.extract_after:
            self._extract(x, state)
        return x

    def _extract(self, hidden: Tensor, state: EngramState) -> None:
        means = self._running_means(hidden, state)
        engrams = self.encoder(means)  # [B, n, 1, d]
        loss = self.config.recon_weight * reconstruction_loss(means, engrams)
        engrams = self.theirs(engrams.squeeze(2))
        if (dropped := self.dropped(hidden.device)) is not None:
            engrams = engrams.masked_fill(dropped, 0.0)
            loss = loss.masked_fill(dropped, 0.0)
        state.losses["recon"] = loss
        state.carried = engrams

    @staticmethod
    def _running_means(hidden: Tensor, state: EngramState) -> Tensor:
        """Mean of the states [B, n, d] at each token and all before it."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if isinstance(state.cache, RunningSlots):
            sums = state.cache.totals.rows.add_(wide.squeeze(1)).unsqueeze(1)  # [n, 1, d]
            return (sums / (state.positions + 1).unsqueeze(-1)).to(hidden.dtype)
        sums = wide.cumsum(dim=1)
        if state.cache is not None:
            if state.cache.total is not None:
                sums = sums + state.cache.total.unsqueeze(1)
            state.cache.total = sums[:, -1]
        return (sums / (state.positions + 1).unsqueeze(-1)).to(hidden.dtype)
