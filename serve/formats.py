"""Replies in OpenAI's shapes: whole, or as chunks. What is ours lies in ``hrs``."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hrs.generation import FinishReason
from serve.backend import ModelCard, Piece, Scores
from serve.offsets import Offsets

_LEAST_LOG_PROB = -9999.0
"""Stands for minus infinity, which JSON does not have; the value OpenAI uses."""
_REASONS: dict[FinishReason, str] = {"stop": "stop", "end_of_text": "stop", "length": "length"}


def token_text(piece: bytes) -> str:
    """A token's bytes as text; of one that cuts a character the bytes, spelled as OpenAI does."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def log_prob(value: float) -> float:
    return max(value, _LEAST_LOG_PROB)


@dataclass(slots=True)
class Choice:
    """One text as its client sees it."""

    index: int
    of_token: Callable[[int], bytes]
    log_probs: bool
    details: bool
    prompt: str | None = None
    """What stands before the text, if it is asked for."""
    prompt_ids: Sequence[int] = ()
    scores: Scores | None = None
    """What the model says of the prompt, if that is asked for."""
    topic: dict[str, Any] | None = None
    """Where its prompt was sorted."""
    skip_space: bool = False
    """Leave out white space at the start of the text."""
    offsets: Offsets = field(default_factory=Offsets)
    pieces: list[Piece] = field(default_factory=list)
    n_characters: int = 0

    def add(self, piece: Piece) -> Piece:
        """Append a piece, and give it as it is shown."""
        if self.skip_space and not self.n_characters:
            piece = dataclasses.replace(piece, text=piece.text.lstrip())
        self.n_characters += len(piece.text)
        self.pieces.append(piece)
        return piece

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        finish = self.pieces[-1].finish if self.pieces else None
        return None if finish is None else _REASONS[finish]

    def hrs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Tokens if they were asked for, and what was looked up."""
        told: dict[str, Any] = {}
        if self.details:
            told["tokens"] = [
                {
                    "id": piece.token.id,
                    "text": token_text(self.of_token(piece.token.id)),
                    "log_prob": log_prob(piece.token.log_prob),
                    "entropy": piece.token.entropy,
                }
                for piece in pieces
            ]
        if events := [event for piece in pieces for event in piece.events]:
            told["retrieval"] = events
        if pieces and pieces[-1].finish is not None:
            told["finish"] = pieces[-1].finish
            if self.topic is not None:
                told["topic"] = self.topic
        return {"hrs": told} if told else {}


class CompletionFormat:
    """``/v1/completions``."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def full(self, choice: Choice) -> dict[str, Any]:
        tables = [self._prompt_table(choice), self._table(choice, choice.pieces)] if choice.log_probs else []
        return {
            "index": choice.index,
            "text": (choice.prompt or "") + choice.text,
            "logprobs": {key: [row for table in tables for row in table[key]] for key in tables[0]} if tables else None,
            "finish_reason": choice.finish or "length",
            **choice.hrs(choice.pieces),
        }

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk before the first token; None if there is nothing to say yet."""
        if choice.prompt is None:
            return None
        table = self._prompt_table(choice) if choice.log_probs else None
        return {"index": choice.index, "text": choice.prompt, "logprobs": table, "finish_reason": None}

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": piece.text,
            "logprobs": self._table(choice, [piece]) if choice.log_probs else None,
            "finish_reason": choice.finish,
            **choice.hrs([piece]),
        }

    def _prompt_table(self, choice: Choice) -> dict[str, list[Any]]:
        if choice.scores is None:
            return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        tokens = [token_text(choice.of_token(token)) for token in choice.prompt_ids]
        best = [
            None if row is None else self._alternatives(choice, row.items(), token, row[token])
            for token, row in zip(choice.prompt_ids, choice.scores.best, strict=True)
        ]
        offsets = [choice.offsets.push(choice.of_token(token)) for token in choice.prompt_ids]
        choice.offsets.end()
        values = [None if lp is None else log_prob(lp) for lp in choice.scores.log_probs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}

    def _table(self, choice: Choice, pieces: Sequence[Piece]) -> dict[str, list[Any]]:
        tokens = [token_text(choice.of_token(piece.token.id)) for piece in pieces]
        values = [log_prob(piece.token.log_prob) for piece in pieces]
        offsets = [choice.offsets.push(choice.of_token(piece.token.id)) for piece in pieces]
        told = [piece.token for piece in pieces]
        best = [self._alternatives(choice, token.best, token.id, token.log_prob) for token in told]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}

    @staticmethod
    def _alternatives(
        choice: Choice, best: Iterable[tuple[int, float]], token: int, of_token: float
    ) -> dict[str, float]:
        """Log-probabilities by text. Of tokens that are spelled alike the text's own one counts, then the likeliest."""
        told: dict[str, float] = {}
        for other, value in best:
            told.setdefault(token_text(choice.of_token(other)), log_prob(value))
        told[token_text(choice.of_token(token))] = log_prob(of_token)
        return told


class ChatFormat:
    """``/v1/chat/completions``."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def full(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._table(choice, choice.pieces) if choice.log_probs else None,
            "finish_reason": choice.finish,
            **choice.hrs(choice.pieces),
        }

    def opening(self, choice: Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": {"content": piece.text} if piece.text or piece.finish is None else {},
            "logprobs": self._table(choice, [piece]) if choice.log_probs else None,
            "finish_reason": choice.finish,
            **choice.hrs([piece]),
        }

    def _table(self, choice: Choice, pieces: Sequence[Piece]) -> dict[str, Any]:
        rows = []
        for token in (piece.token for piece in pieces):
            best = [self._row(choice, other, value) for other, value in token.best]
            rows.append(self._row(choice, token.id, token.log_prob) | {"top_logprobs": best})
        return {"content": rows, "refusal": None}

    @staticmethod
    def _row(choice: Choice, token: int, value: float) -> dict[str, Any]:
        raw = choice.of_token(token)
        return {"token": token_text(raw), "logprob": log_prob(value), "bytes": list(raw)}


class Envelope:
    """What every document of one reply has in common."""

    def __init__(self, form: CompletionFormat | ChatFormat, card: ModelCard, seed: int) -> None:
        self._form = form
        self._common = {
            "id": form.prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": card.name,
            "system_fingerprint": card.fingerprint,
        }
        self._hrs = {"seed": seed, "causal": card.causal}

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        return {
            "object": self._form.whole,
            **self._common,
            "choices": [self._form.full(choice) for choice in choices],
            "usage": usage,
            "hrs": self._hrs,
        }

    def chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        ends = {"hrs": self._hrs} if choice["finish_reason"] else {}
        return {"object": self._form.chunk, **self._common, "choices": [choice], **ends, **more}

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk of usage counts."""
        return {"object": self._form.chunk, **self._common, "choices": [], "usage": usage}


def usage(n_prompt_tokens: int, n_new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": n_prompt_tokens,
        "completion_tokens": n_new_tokens,
        "total_tokens": n_prompt_tokens + n_new_tokens,
    }
