"""What every route asks of a request before it costs anything."""

import asyncio
from collections.abc import Sequence

from serve.backend import Backend
from serve.errors import ApiError, bad_request
from serve.settings import most_texts

_LONG = 10_000
"""Characters that take so long to encode that the others should not wait for it."""


def require_model(backend: Backend, name: str) -> None:
    """Raises ApiError 404 if this endpoint does not serve ``name``."""
    if name != backend.card.name:
        sentence = f"the model '{name[:100]}' is not served here: it is '{backend.card.name}'"
        raise ApiError(404, sentence, code="model_not_found", param="model")


def require_possible(backend: Backend, n_prompts: int, n_choices: int, n_new: int) -> None:
    """Raises ApiError 422 if more is asked for than the endpoint ever gives, however idle it is."""
    limits = backend.settings
    most = min(limits.max_choices, most_texts(limits))
    if n_prompts * n_choices > most:
        raise ApiError(422, f"{n_prompts} prompts times n of {n_choices} is more than {most}: ask for fewer", param="n")
    if n_new > limits.max_new_tokens:
        sentence = f"max_tokens of {n_new} is more than the {limits.max_new_tokens} this endpoint writes"
        raise ApiError(422, f"{sentence}: ask for fewer", param="max_tokens")


async def prompts_of(
    backend: Backend, given: str | list[str] | list[int] | list[list[int]], field: str, most: int | None = None
) -> list[list[int]]:
    """Token ids of texts or ids, one list per prompt; end of text for an empty text, as at the start of a document.

    Args:
        most: tokens of each at most; the endpoint's limit if None.

    Raises:
        ApiError: 400 for ids the model does not have, 422 for a prompt that is too long.
    """
    most = backend.settings.max_prompt_tokens if most is None else most
    prompts: list[list[int]] = []
    for prompt in _separate(given):
        if isinstance(prompt, str):
            ids = backend.encode(prompt) if len(prompt) < _LONG else await asyncio.to_thread(backend.encode, prompt)
        else:
            ids = list(prompt)
            if max(ids) >= backend.card.vocab_size:
                raise bad_request(f"{max(ids)} is not a token id: the model has {backend.card.vocab_size}", field)
        if len(ids) > most:
            sentence = f"a text of {len(ids)} tokens is longer than the {most} that are read here: shorten it"
            raise ApiError(422, sentence, param=field, code="context_length_exceeded")
        prompts.append(ids)
    return prompts


def _separate(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]
    return given
