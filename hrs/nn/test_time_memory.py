"""A second predictor that learns the text while reading it, mixed with the model's own prediction."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.nn.cache import SlotTable, SlotTensor
from hrs.nn.products import Linear, linear

_INITIAL_MIX = (0.88, 0.12)
_EPS = 1e-6


@dataclass(slots=True)
class TestTimeCache:
    """What the memory knows of a text so far."""

    __test__ = False

    memory: Tensor
    """[B, k, d], the associations of all complete chunks."""
    previous: Tensor
    """[B, 1, d], hidden state of the last token; zero before the first."""
    open_keys: Tensor
    """[B, p, k], keys of the chunk that is still open, p < chunk."""
    open_values: Tensor
    """[B, p, d], and what stood behind them."""
    open_gates: Tensor
    """[B, p, 2], and their gates before the sigmoid."""


class TestTimeSlots:
    """:class:`TestTimeCache` of sequences of unequal length.

    Args:
        table: the sequences.
        chunk: tokens of a chunk.
    """

    __test__ = False

    def __init__(self, table: SlotTable, chunk: int) -> None:
        self.table = table
        self.chunk = chunk
        self.memory = SlotTensor(table)
        self.previous = SlotTensor(table)
        self.keys = SlotTensor(table, chunk)
        self.values = SlotTensor(table, chunk)
        self.gates = SlotTensor(table, chunk)

    def join(self, cache: TestTimeCache, slot: int) -> None:
        """Copy the sequences of a cache into ``slot`` and those after it."""
        self.memory.join(cache.memory, slot)
        self.previous.join(cache.previous, slot)
        for own, tensor in (
            (self.keys, cache.open_keys),
            (self.values, cache.open_values),
            (self.gates, cache.open_gates),
        ):
            own.join(tensor, slot)

    def leave(self, slot: int, last: int) -> None:
        """Move what is in slot ``last`` into ``slot``."""
        for own in (self.memory, self.previous, self.keys, self.values, self.gates):
            own.leave(slot, last)

    def tensors(self) -> list[Tensor]:
        """Return all that a step changes."""
        every = (self.memory, self.previous, self.keys, self.values, self.gates)
        return [tensor for own in every for tensor in own.tensors()]


class TestTimeMemory(nn.Module):
    """Fast weights S [k, d] that associate the state before a token with the token, and predict by association.

    A token x_t that has been read gives one pair: the key k_t = normalise(Wk h_{t-1}) and the value v_t, the
    embedding of x_t with a root mean square of 1. When a chunk of tokens is complete, S takes one delta-rule step
    (Schlag et al. 2021) for each of its pairs in turn::

        S <- S + b_t k_t (v_t - S^T k_t)^T,     b_t = sigmoid(w . h_{t-1} + c + a * surprise_t)

    and all of them at once in closed form (Yang et al. 2024). The surprise is the mean squared error of S at the
    chunk's start, 1 for a memory that knows nothing: what is known already is written more gently (compare Titans,
    Behrouz et al. 2025, and TTT, Sun et al. 2024). Before that S is multiplied by a forget gate, the sigmoid of a
    learned function's mean over the chunk. With keys of length 1 and steps b_t below 1 no step can overshoot.

    Token t reads S as the chunks before its own left it, with the query normalise(Wq h_t), and predicts
    softmax(m_t E^T), m_t = r_t + Wo r_t for what was read, r_t = S^T q_t. A router sees h_t and the root mean square
    of r_t, which is about 1 for a key met before and 0 for an empty memory, and mixes the two predictions.

    S starts at zero with every text and nothing is detached: Wk, Wq and the gates learn through the updates.

    Args:
        config: the model's; gives the width and ``test_time_memory``.
    """

    __test__ = False  # not a test, whatever its name begins with

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory, d = config.test_time_memory, config.d_model
        self.chunk = memory.chunk
        self.key = Linear(d, memory.key_width, bias=False)
        self.query = Linear(d, memory.key_width, bias=False)
        self.gates = Linear(d, 2)
        """Step and forget gate, before the sigmoid."""
        self.surprise = nn.Parameter(torch.empty(()))
        """How much an error of 1 adds to the step's gate."""
        self.output = Linear(d, d, bias=False)
        self.router_hidden = Linear(d + 1, memory.router_hidden)
        self.router_output = Linear(memory.router_hidden, 2)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """What the model's general initialisation must not decide. Runs after it.

        Queries start as keys, so that a state met before is recognised; what is read is passed on unchanged; steps
        start at sigmoid(2) = 0.88 for what is new, forgetting at 1 - sigmoid(4) = 0.02 per chunk, the mix at 0.88 and
        0.12, whatever is read.
        """
        self.query.weight.copy_(self.key.weight)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.gates.weight)
        self.gates.bias.copy_(torch.tensor([0.0, 4.0]))
        self.surprise.fill_(2.0)
        nn.init.zeros_(self.router_output.weight)
        self.router_output.bias.copy_(torch.tensor(_INITIAL_MIX).log())

    def new_cache(self, hidden: Tensor) -> TestTimeCache:
        """An empty memory for sequences of which ``hidden`` [B, n, d] holds some states."""
        width = self.key.out_features
        batch, _, d = hidden.shape
        # Half precision would lose what many small updates add.
        exact = hidden.new_zeros(batch, 0, d, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return TestTimeCache(
            memory=exact.new_zeros(batch, width, d),
            previous=hidden.new_zeros(batch, 1, d),
            open_keys=exact.new_zeros(batch, 0, width),
            open_values=exact,
            open_gates=exact.new_zeros(batch, 0, 2),
        )

    def new_slots(self, table: SlotTable) -> TestTimeSlots:
        """Room for sequences of unequal length."""
        return TestTimeSlots(table, self.chunk)

    def forward(self, hidden: Tensor, embedded: Tensor, cache: TestTimeCache | TestTimeSlots | None = None) -> Tensor:
        """What :meth:`unembed` needs: the hidden state, m, and the logarithms of the two weights, [B, n, 2 d + 2].

        Args:
            hidden: final hidden states [B, n, d].
            embedded: embeddings [B, n, d] of the tokens at the same positions.
            cache: continues the text that it has seen, and is updated; None for a text from its start.
        """
        if isinstance(cache, TestTimeSlots):
            return self._step(hidden, embedded, cache)
        state = self.new_cache(hidden) if cache is None else cache
        behind = torch.cat((state.previous, hidden[:, :-1]), dim=1)
        keys, queries, values, gates = self._pairs(hidden, behind, embedded)
        read, done, n = [], 0, hidden.shape[1]
        with torch.autocast(hidden.device.type, enabled=False):
            while done < n:
                size = min(self.chunk - state.open_keys.shape[1], n - done)
                part = slice(done, done + size)
                read.append(queries[:, part] @ state.memory)
                state.open_keys = torch.cat((state.open_keys, keys[:, part]), dim=1)
                state.open_values = torch.cat((state.open_values, values[:, part]), dim=1)
                state.open_gates = torch.cat((state.open_gates, gates[:, part]), dim=1)
                done += size
                # A pass over a whole window needs no memory after its last token.
                if state.open_keys.shape[1] == self.chunk and (done < n or cache is not None):
                    self._learn(state)
        state.previous = hidden[:, -1:]
        return self._mix(hidden, torch.cat(read, dim=1))

    def _pairs(self, hidden: Tensor, behind: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys [B, n, k], queries [B, n, k], values [B, n, d] and gates [B, n, 2] of hidden states [B, n, d], those
        ``behind`` them by one token, and embeddings."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        # The first token has no state before it: a key of zero, which writes nothing.
        keys = F.normalize(self.key(behind).to(exact), dim=-1)
        queries = F.normalize(self.query(hidden).to(exact), dim=-1)
        values = embedded.to(exact)
        values = values * (values.square().mean(dim=-1, keepdim=True) + _EPS).rsqrt()
        return keys, queries, values, self.gates(behind).to(exact)

    def _step(self, hidden: Tensor, embedded: Tensor, slots: TestTimeSlots) -> Tensor:
        """:meth:`forward` of one token of each slot, [n, 1, d]."""
        table = slots.table
        keys, queries, values, gates = self._pairs(hidden, slots.previous.rows, embedded)
        places = table.places % self.chunk
        with torch.autocast(hidden.device.type, enabled=False):
            read = queries @ slots.memory.rows
            for own, new in ((slots.keys, keys), (slots.values, values), (slots.gates, gates)):
                own.set_at(places, new.squeeze(1))
            if complete := table.completing(self.chunk):
                rows = table.rows[complete] if len(complete) < len(hidden) else table.rows
                memory, *chunk = (own.rows[rows] for own in (slots.memory, slots.keys, slots.values, slots.gates))
                slots.memory.rows[rows] = self._learned(memory, *chunk)
        slots.previous.rows.copy_(hidden)
        return self._mix(hidden, read)

    def _learn(self, state: TestTimeCache) -> None:
        """Write the open chunk, which is complete, into the memory, and open the next."""
        keys, values, gates = state.open_keys, state.open_values, state.open_gates
        state.memory = self._learned(state.memory, keys, values, gates)
        state.open_keys, state.open_values, state.open_gates = keys[:, :0], values[:, :0], gates[:, :0]

    def _learned(self, memory: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
        """The memory [B, k, d] after a chunk of keys [B, C, k], values [B, C, d] and gates [B, C, 2].

        With error e_t = v_t - S_{t-1}^T k_t and u_t = b_t e_t, S_t = S_0 + sum_{i <= t} k_i u_i^T, so that
        u_t + b_t sum_{i < t} (k_t . k_i) u_i = b_t (v_t - S_0^T k_t): a triangular system for all u at once.
        """
        memory = memory * gates[..., 1].mean(dim=1).sigmoid()[:, None, None]
        error = values - keys @ memory  # [B, C, d]
        surprise = error.square().mean(dim=-1)  # [B, C]
        step = (gates[..., 0] + self.surprise * surprise).sigmoid().unsqueeze(-1)  # [B, C, 1]
        overlap = step * (keys @ keys.mT)  # [B, C, C]; the solver takes its diagonal for 1 and ignores what is above
        written = torch.linalg.solve_triangular(overlap, step * error, upper=False, unitriangular=True)
        return memory + keys.mT @ written

    def _mix(self, hidden: Tensor, read: Tensor) -> Tensor:
        # The 1e-6 keeps the root's slope finite where nothing was read.
        confidence = (read.square().mean(dim=-1, keepdim=True) + _EPS).sqrt()  # [B, n, 1]
        features = torch.cat((hidden, confidence.to(hidden.dtype)), dim=-1)
        mix = self.router_output(F.gelu(self.router_hidden(features))).to(read.dtype).log_softmax(dim=-1)
        read = read.to(hidden.dtype)
        return torch.cat((hidden, read + self.output(read), mix.to(hidden.dtype)), dim=-1)

    def unembed(self, joined: Tensor, embedding: Tensor) -> Tensor:
        """Logarithms of the mixed probabilities [..., V], for what :meth:`forward` gave [..., 2 d + 2].

        Args:
            joined: [..., 2 d + 2].
            embedding: [V, d], the tied embedding's weight.
        """
        d = embedding.shape[1]
        hidden, read, mix = joined.split((d, d, 2), dim=-1)
        own = linear(hidden, embedding).log_softmax(dim=-1)
        remembered = linear(read, embedding).log_softmax(dim=-1)
        return torch.logaddexp(mix[..., :1] + own, mix[..., 1:] + remembered)
