"""A model's tensors and the form each is stored in.

Large weights become integers by rows, large frozen tables float16, everything else stays exactly as it is: norms, gates
and biases are a percent of a model, and cost less than what their error would. Whole numbers take the smallest type
that holds them, truth values one bit.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hrs.errors import HRSError
from hrs.export.calibrate import quantize_calibrated
from hrs.export.compression import compress, decompress
from hrs.export.quantize import MIN_COLUMNS, Grid, Quantized, quantize, rows_of
from hrs.models import LanguageModel

Role = Literal["embedding", "matrix", "table", "exact"]
MIN_WEIGHTS = 1024
"""Tensors with fewer numbers are stored exactly."""
FINE = Grid()
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bool, *_INTEGERS, *_FLOATS)}


@dataclass(frozen=True, slots=True)
class Grids:
    """The grids of a model's weights."""

    embedding: Grid = FINE
    """Of weights with a row for every token id."""
    matrix: Grid = FINE
    """Of all other weights."""

    def of(self, role: Role) -> Grid:
        return self.embedding if role == "embedding" else self.matrix


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One distinct tensor of a model."""

    names: tuple[str, ...]
    """In the state_dict; several for tied weights."""
    tensor: Tensor
    role: Role
    learned: bool
    """Whether it is a parameter, not a buffer."""


@dataclass(frozen=True, slots=True)
class Block:
    """A run of bytes of the file."""

    codec: str
    stored: int
    """Bytes in the file."""


@dataclass(frozen=True, slots=True)
class Spec:
    """All that is needed to turn blocks back into a tensor."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    """Of the tensor in the model."""
    form: Literal["levels", "plain", "bits"]
    """``levels``: int8 levels, column after column, then float16 scales of their rows. ``plain``: numbers of type
    ``stored_dtype``. ``bits``: truth values, eight to a byte."""
    stored_dtype: str
    blocks: tuple[Block, ...]
    bits: int = 0
    k: float | None = None
    unit: float = 1.0
    calibrated: bool = False

    @property
    def plain_sizes(self) -> tuple[int, ...]:
        """Bytes of each block when it is not compressed."""
        n = math.prod(self.shape)
        if self.form == "levels":
            return n, 2 * math.prod(rows_shape(self.shape)[:1])
        return ((n + 7) // 8,) if self.form == "bits" else (n * _DTYPES[self.stored_dtype].itemsize,)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Spec":
        """Raises HRSError, KeyError, TypeError or ValueError if it is none."""
        tuples = {name: tuple(values[name]) for name in ("names", "shape")}
        spec = cls(**{**values, **tuples, "blocks": tuple(Block(**block) for block in values["blocks"])})
        counts = [*spec.shape, *(block.stored for block in spec.blocks)]
        if any(not isinstance(n, int) or n < 0 for n in counts) or not all(isinstance(n, str) for n in spec.names):
            raise ValueError(f"{spec.names} has an impossible shape or length")
        if spec.form not in ("levels", "plain", "bits") or {spec.dtype, spec.stored_dtype} - set(_DTYPES):
            raise ValueError(f"{spec.names} has an unknown form or type")
        if len(spec.blocks) != len(spec.plain_sizes):
            raise ValueError(f"{spec.names} has {len(spec.blocks)} blocks")
        return spec


def rows_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of :func:`hrs.export.quantize.rows_of` for a tensor of this shape."""
    return tuple(rows_of(torch.empty(shape, device="meta")).shape)


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as it lies in the file."""

    spec: Spec
    payload: tuple[bytes, ...]
    n_weights: int
    """Distinct learned numbers; 0 for a buffer."""

    @property
    def stored(self) -> int:
        return sum(map(len, self.payload))


# ---- from a model ----------------------------------------------------------------------------------------------------


def entries(model: LanguageModel) -> list[Entry]:
    """Every distinct tensor of the state_dict, in its order, on the CPU."""
    learned = dict(model.named_parameters(remove_duplicate=False))
    names: dict[tuple[Any, ...], list[str]] = {}
    tensors: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        key = place if tensor.numel() else (name,)
        names.setdefault(key, []).append(name)
        tensors[key] = tensor
    found = []
    for key, tensor in tensors.items():
        is_learned = names[key][0] in learned
        role = _role(tensor, is_learned, model.vocab_size)
        found.append(Entry(tuple(names[key]), tensor.detach().cpu(), role, is_learned))
    return found


def _role(tensor: Tensor, learned: bool, vocab_size: int) -> Role:
    if not tensor.is_floating_point() or tensor.numel() < MIN_WEIGHTS:
        return "exact"
    if not learned:
        # Coordinates and memories were computed, not learned to bear errors; ten bits of them are kept.
        in_range = tensor.dtype == torch.float32 and float(tensor.abs().amax()) <= torch.finfo(torch.float16).max
        return "table" if in_range else "exact"
    if tensor.ndim < 2 or rows_shape(tuple(tensor.shape))[1] < MIN_COLUMNS:
        return "exact"
    return "embedding" if tensor.shape[0] == vocab_size else "matrix"


def pack(model: LanguageModel, grids: Grids, hessians: Mapping[str, Tensor] | None = None) -> list[Packed]:
    """All tensors of a model in their stored form.

    Args:
        hessians: of :func:`hrs.export.calibrate.input_hessians`; weights that have one are rounded with it.

    Raises:
        HRSError: naming the tensor that has a value which is not finite.
    """
    return [_pack(entry, grids.of(entry.role), hessians or {}) for entry in entries(model)]


def _pack(entry: Entry, grid: Grid, hessians: Mapping[str, Tensor]) -> Packed:
    tensor, names = entry.tensor, entry.names
    shape, dtype = tuple(tensor.shape), _name(tensor.dtype)
    n_weights = tensor.numel() if entry.learned else 0
    if entry.role in ("embedding", "matrix"):
        hessian = next((hessians[name] for name in names if name in hessians), None)
        try:
            q = quantize(tensor, grid) if hessian is None else quantize_calibrated(tensor, grid, hessian)
        except HRSError as error:
            raise HRSError(f"{names[0]}: {error}") from error
        blocks, payload = _compressed(q.levels.T.numpy().tobytes(), q.scales.numpy().tobytes())
        calibrated = hessian is not None
        spec = Spec(names, shape, dtype, "levels", "int8", blocks, grid.bits, grid.k, q.unit, calibrated)
        return Packed(spec, payload, n_weights)
    if tensor.dtype == torch.bool:
        blocks, payload = _compressed(np.packbits(tensor.numpy().ravel()).tobytes())
        return Packed(Spec(names, shape, dtype, "bits", "bool", blocks), payload, n_weights)
    stored = torch.float16 if entry.role == "table" else _smallest(tensor)
    blocks, payload = _compressed(tensor.to(stored).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Packed(Spec(names, shape, dtype, "plain", _name(stored), blocks), payload, n_weights)


def _compressed(*parts: bytes) -> tuple[tuple[Block, ...], tuple[bytes, ...]]:
    made = [compress(part) for part in parts]
    return tuple(Block(codec, len(data)) for codec, data in made), tuple(data for _, data in made)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _smallest(tensor: Tensor) -> torch.dtype:
    """The smallest type that holds a tensor without loss; its own unless it is one of integers."""
    if tensor.is_floating_point() or tensor.numel() == 0:
        return tensor.dtype
    low, high = int(tensor.min()), int(tensor.max())
    fits = (t for t in _INTEGERS if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
    return min(fits, key=lambda t: t.itemsize)


# ---- and back --------------------------------------------------------------------------------------------------------


def unpack(spec: Spec, payload: tuple[bytes, ...]) -> Tensor:
    """The tensor as a model gets it: of its own shape and type, integers by rows multiplied out.

    Raises:
        HRSError: if the bytes are not what the spec says.
    """
    plain = [
        decompress(block.codec, data, size)
        for block, data, size in zip(spec.blocks, payload, spec.plain_sizes, strict=True)
    ]
    dtype = _DTYPES[spec.dtype]
    if 0 in spec.shape:
        return torch.empty(spec.shape, dtype=dtype)
    if spec.form == "levels":
        rows, columns = rows_shape(spec.shape)
        levels = np.ascontiguousarray(np.frombuffer(plain[0], np.int8).reshape(columns, rows).T)
        scales = np.frombuffer(plain[1], np.float16).copy()
        quantized = Quantized(torch.from_numpy(levels), torch.from_numpy(scales), spec.unit)
        return quantized.dequantize().reshape(spec.shape).to(dtype)
    if spec.form == "bits":
        flags = np.unpackbits(np.frombuffer(plain[0], np.uint8), count=math.prod(spec.shape)).astype(bool)
        return torch.from_numpy(flags).reshape(spec.shape)
    raw = torch.from_numpy(np.frombuffer(plain[0], np.uint8).copy())
    return raw.view(_DTYPES[spec.stored_dtype]).reshape(spec.shape).to(dtype)
