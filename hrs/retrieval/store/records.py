"""What callers give to an engram store, checked, as columns."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from hrs.errors import HRSError
from hrs.retrieval.store.layout import row_schema, vector_column
from hrs.retrieval.store.parts import NewMemory, Vectors
from hrs.retrieval.store.rewrite import LARGEST_SEGMENT, with_units
from hrs.retrieval.store.transform import Transform


def as_vectors(given: ArrayLike, width: int, what: str) -> Vectors:
    """[n, width] in float32.

    Raises:
        HRSError: if they have another shape or are not finite.
    """
    with np.errstate(over="ignore"):
        vectors = np.asarray(given).astype(np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise HRSError(f"{what} have shape {list(vectors.shape)} and this store needs [n, {width}]: use its model")
    if not np.isfinite(vectors).all():
        raise HRSError(f"{what} hold numbers that are not finite in float32: the model that made them is broken")
    return vectors


def as_batches(
    memories: Sequence[NewMemory], keys: Vectors, transform: Transform, *, first: int, created: float
) -> list[pa.RecordBatch]:
    """Rows of new memories numbered from ``first``, at least one, in batches as large as segments may be.

    Raises:
        HRSError: if a field has a wrong type, an entropy is not finite or a text is not Unicode.
    """
    numbers = np.arange(first, first + len(memories))
    schema = row_schema(keys.shape[1])
    batches = []
    for start in range(0, len(memories), LARGEST_SEGMENT):
        piece = slice(start, start + LARGEST_SEGMENT)
        some, key = memories[piece], vector_column(keys[piece])
        columns: dict[str, Any] = {
            "number": numbers[piece],
            "created": np.full(len(some), created),
            "norm": np.zeros(len(some)),
            "key": key,
            "unit": key,
            **{
                name: _column([getattr(memory, name) for memory in some], name, schema.field(name))
                for name in ("text", "entropy", "source", "topic")
            },
        }
        batch = pa.record_batch([columns[name] for name in schema.names], schema=schema)
        batches.append(with_units(batch, transform))
    return batches


def _column(values: list[Any], name: str, field: pa.Field) -> pa.Array:
    if name == "entropy" and not all(value is None or math.isfinite(value) for value in values):
        raise HRSError("a memory has an entropy that is not finite: give bits per token, or None")
    try:
        column = pa.array(values, field.type)
    except (pa.ArrowException, UnicodeError, TypeError) as error:
        raise HRSError(f"a memory has a {name} that cannot be stored ({error}): give Unicode text") from error
    if column.null_count and not field.nullable:
        raise HRSError(f"a memory has no {name}: give a text")
    return column


def as_id(tag: str, number: int) -> str:
    """The id of a memory."""
    return f"{tag}-{number}"


def number_of(id: str, tag: str) -> int | None:
    """The number in an id of the store with this tag; None if it is not one."""
    found, _, digits = id.partition("-")
    return int(digits) if found == tag and digits.isascii() and digits.isdigit() and len(digits) < 19 else None
