"""Continuing texts: prompts in, texts out, all at once or as they grow."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from hrs.data.tokenization import end_of_text_id
from hrs.errors import HRSError
from hrs.generation.decoding import FinishReason, SampledToken, default_keep, generate, window_length
from hrs.generation.sampling import Sampling
from hrs.generation.text import TextAssembler, token_pieces
from hrs.models.base import LanguageModel


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one more token adds to one text."""

    row: int
    """Which prompt it continues, from 0."""
    text: str
    """Text that is certain now; may be empty, and may hold what earlier tokens left open."""
    token: SampledToken
    finish: FinishReason | None
    """Why the text ends here; None if it goes on."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One continued prompt."""

    prompt: str
    text: str
    """The continuation alone, without a stop string."""
    finish: FinishReason
    tokens: list[SampledToken]
    """All that were sampled, those of a stop string or end of text included."""
    n_prompt_tokens: int
    n_unread_tokens: int
    """Tokens at the front of the prompt that did not fit into the model's context when the first token was sampled. A
    model with ``history_tokens`` may have read of them through its engrams."""


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    keep: int | None = None,
    first_row: int = 0,
) -> Iterator[TextDelta]:
    """Continue ``prompts`` side by side and give every text as it grows. See :func:`generate_text`."""
    ids = encode_prompts(model, tokenizer, prompts)
    return _stream(model, token_pieces(tokenizer), end_of_text_id(tokenizer), ids, sampling, keep, first_row)


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    keep: int | None = None,
    first_row: int = 0,
    batch_size: int = 16,
) -> list[Completion]:
    """Continue each of ``prompts``. An empty prompt starts a document; of one longer than the context the end is read.

    Args:
        model: in evaluation mode.
        tokenizer: the byte-level one it was trained with.
        keep: tokens a new window starts with when the context is full, see :func:`hrs.generation.generate`.
        first_row: number of the first prompt in the random streams.
        batch_size: prompts worked on at a time. It changes speed and memory, not the texts (but for rounding).

    Raises:
        HRSError: if the tokenizer is not the model's, a prompt is not valid text, or ``keep`` is out of range.
    """
    if batch_size < 1:
        raise HRSError(f"batch_size must be at least 1, got {batch_size}")
    ids, pieces = encode_prompts(model, tokenizer, prompts), token_pieces(tokenizer)
    rows: list[list[TextDelta]] = [[] for _ in ids]
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        for delta in _stream(model, pieces, end_of_text_id(tokenizer), batch, sampling, keep, first_row + start):
            rows[start + delta.row].append(delta)
    return [
        Completion(
            prompt=prompt,
            text="".join(delta.text for delta in row),
            finish=row[-1].finish or "length",
            tokens=[delta.token for delta in row],
            n_prompt_tokens=len(tokens),
            n_unread_tokens=n_unread(model, len(tokens), keep),
        )
        for prompt, tokens, row in zip(prompts, ids, rows, strict=True)
    ]


def _stream(
    model: LanguageModel,
    pieces: Sequence[bytes],
    end_id: int,
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    keep: int | None,
    first_row: int,
) -> Iterator[TextDelta]:
    assemblers = [TextAssembler(sampling.stop) for _ in ids]
    of_ids = dataclasses.replace(sampling, stop=())
    steps = generate(model, ids, of_ids, end_id=end_id, keep=keep, first_row=first_row)
    for step in steps:
        for token in step:
            assembler = assemblers[token.row]
            text = assembler.push(pieces[token.id], last=token.finish is not None)
            if assembler.stopped:
                steps.finish(token.row)
            yield TextDelta(token.row, text, token, "stop" if assembler.stopped else token.finish)


def encode_prompts(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt; end of text for an empty one, as at the start of a document.

    Raises:
        HRSError: if a prompt is not valid text or the tokenizer is not the model's.
    """
    if (size := tokenizer.get_vocab_size()) != model.vocab_size:
        raise HRSError(
            f"the tokenizer has {size} ids and the model {model.vocab_size}: give the one it was trained with"
        )
    for number, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise HRSError(f"prompt {number} is not valid UTF-8 at character {error.start}: mend it there") from error
    encodings = tokenizer.encode_batch_fast(list(prompts), add_special_tokens=False)
    return [encoding.ids or [end_of_text_id(tokenizer)] for encoding in encodings]


def n_unread(model: LanguageModel, n_tokens: int, keep: int | None = None) -> int:
    """Tokens at the front of a text that are out of the model's context when it is continued."""
    keep = default_keep(model) if keep is None else keep
    return n_tokens - window_length(n_tokens, model.max_seq_len, keep)
