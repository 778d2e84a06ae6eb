"""One file that is a whole model: weights, config and tokenizer, readable without trust.

    bytes 0-7     magic; its line ends and its byte above 127 show a transfer that changed them
    bytes 8-11    version of this layout, little-endian
    bytes 12-15   length of the header, little-endian
    bytes 16-47   SHA-256 of bytes 0-15 and of everything after byte 47
    header        JSON: config, source, data, and the form of each tensor
    blocks        tokenizer.json, then the blocks of the tensors in the header's order, without gaps

No pickle and no code: reading builds the model that the config describes and fills in the numbers. Every byte is
covered by the checksum, and nothing larger than the model is allocated.
"""

import hashlib
import importlib.metadata
import json
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hrs import strict_json
from hrs.config import ExperimentConfig, ModelConfig, from_dict, to_dict
from hrs.data.tokenization import load_tokenizer
from hrs.errors import HRSError
from hrs.export.compression import compress, decompress
from hrs.export.tensors import Packed, Spec, unpack
from hrs.files import write_whole
from hrs.identity import code_version
from hrs.models import LanguageModel, build_model

MAGIC = b"\x89HRSM\r\n\x1a"
FORMAT = 1
_PREAMBLE = struct.Struct("<8sII32s")
_LARGEST_RATIO = 4096
"""Of plain bytes to stored ones, over a whole file: far above any model's, far below a decompression bomb's."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a file says of where its model comes from."""

    data_fingerprint: str = ""
    licence: str = ""
    """Of the text it was trained on."""
    bits_per_byte: float | None = None
    """Of the source, on the whole validation split."""
    causal: bool | None = None
    """Verdict of the causality audit; None if there was none."""
    code_version: str = field(default_factory=code_version)
    """Of the code that exported it."""


@dataclass(frozen=True, slots=True)
class ArtifactSummary:
    """What was written."""

    path: Path
    size: int
    """Bytes of the file."""
    parameters: int
    """Distinct learned numbers."""
    parameter_bytes: int
    """Bytes of the blocks that hold them."""
    sha256: str
    """The checksum in the file, 64 hex digits: names this artifact."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.parameter_bytes / self.parameters


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A file read back."""

    model: LanguageModel
    """On the CPU, in eval mode, its weights multiplied out to float32."""
    config: ExperimentConfig
    tokenizer: Tokenizer
    header: dict[str, Any]


# ---- writing ---------------------------------------------------------------------------------------------------------


def serialise(
    packed: Sequence[Packed], config: ExperimentConfig, tokenizer: Tokenizer, provenance: Provenance
) -> bytes:
    """The bytes of the file: the same for the same model, config, tokenizer, provenance and version of hrs."""
    text = tokenizer.to_str().encode()
    codec, data = compress(text)
    header = {
        "created_by": f"hrs {importlib.metadata.version('hrs')}",
        "config": to_dict(config),
        "data": {"fingerprint": provenance.data_fingerprint, "licence": provenance.licence},
        "source": {"bits_per_byte": provenance.bits_per_byte, "causal": provenance.causal},
        "code_version": provenance.code_version,
        "tokenizer": {"codec": codec, "stored": len(data), "size": len(text)},
        "tensors": [part.spec.to_dict() for part in packed],
    }
    body = strict_json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    blocks = [data, *(block for part in packed for block in part.payload)]
    front = _PREAMBLE.pack(MAGIC, FORMAT, len(body), b"")[:16]
    content = b"".join((body, *blocks))
    return front + hashlib.sha256(front + content).digest() + content


def write_artifact(
    path: Path,
    packed: Sequence[Packed],
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    provenance: Provenance | None = None,
) -> ArtifactSummary:
    """Write what :func:`hrs.export.tensors.pack` made of a model; whole or not at all, over a file of that name.

    Raises:
        HRSError: if the disk refuses.
    """
    content = serialise(packed, config, tokenizer, provenance or Provenance())
    write_whole(path, content)
    learned = [part for part in packed if part.n_weights]
    return ArtifactSummary(
        path=path,
        size=len(content),
        parameters=sum(part.n_weights for part in learned),
        parameter_bytes=sum(part.stored for part in learned),
        sha256=content[16:48].hex(),
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_artifact(path: Path) -> Artifact:
    """Read, verify and rebuild.

    Raises:
        HRSError: if the file is missing, damaged, cut off, of a newer format, or of a model this version cannot build.
    """
    path = Path(path)
    header, blocks = _read(path)
    try:
        specs = [Spec.from_dict(values) for values in header["tensors"]]
        tokenizer_block, payloads = _cut(blocks, header["tokenizer"], specs)
        _require_modest(header["tokenizer"], specs, len(blocks))
        config: ExperimentConfig = from_dict(ExperimentConfig, header["config"])
        _require_fitting(config.model, specs)
        text = decompress(header["tokenizer"]["codec"], tokenizer_block, header["tokenizer"]["size"])
        state: dict[str, Tensor] = {}
        for spec, payload in zip(specs, payloads, strict=True):
            state |= dict.fromkeys(spec.names, unpack(spec, payload))
        with torch.random.fork_rng(devices=[]):  # initialisation must not move the caller's generator
            model = build_model(config.model)
        model.load_state_dict(state)
        tokenizer = _tokenizer_of(text)
    except HRSError as error:
        raise HRSError(f"artifact {path} cannot be used: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise HRSError(
            f"artifact {path} is not one this version of hrs can read ({_brief(error)}): update hrs, or export it again"
        ) from error
    return Artifact(model.eval(), config, tokenizer, header)


def check_artifact(path: Path) -> None:
    """Raises HRSError if a file is no artifact, is damaged or of a newer format. Builds no model."""
    _read(path)


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and all blocks of a file whose checksum holds."""
    if not path.is_file():
        raise HRSError(f"{path} is no file: give an artifact that `hrs export` wrote")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise HRSError(f"{path} cannot be read ({error.strerror})") from error
    if content[: len(MAGIC)] != MAGIC:
        raise HRSError(f"{path} is not an artifact of hrs, or its beginning is damaged: export it again")
    if len(content) < _PREAMBLE.size:
        raise HRSError(f"artifact {path} is cut off: copy or export it again")
    _, version, length, checksum = _PREAMBLE.unpack_from(content)
    if version > FORMAT:
        raise HRSError(f"artifact {path} has format {version} and this version of hrs reads {FORMAT}: update hrs")
    view = memoryview(content)
    digest = hashlib.sha256(view[:16])
    digest.update(view[_PREAMBLE.size :])
    if digest.digest() != checksum or version != FORMAT or length > len(content) - _PREAMBLE.size:
        raise HRSError(f"artifact {path} is damaged or cut off: copy or export it again")
    try:
        header = json.loads(content[_PREAMBLE.size : _PREAMBLE.size + length])
    except (ValueError, RecursionError) as error:
        raise HRSError(f"artifact {path} has a header that is not JSON: export it again") from error
    return header, content[_PREAMBLE.size + length :]


def _cut(blocks: bytes, tokenizer: Mapping[str, Any], specs: Sequence[Spec]) -> tuple[bytes, list[tuple[bytes, ...]]]:
    """The tokenizer's block, and those of each tensor."""
    lengths = [tokenizer["stored"], *(block.stored for spec in specs for block in spec.blocks)]
    if any(not isinstance(n, int) or n < 0 for n in lengths) or sum(lengths) != len(blocks):
        raise ValueError("the blocks do not fill the file")
    parts, start = [], 0
    for n in lengths:
        parts.append(blocks[start : start + n])
        start += n
    tail = iter(parts[1:])
    return parts[0], [tuple(next(tail) for _ in spec.blocks) for spec in specs]


def _require_modest(tokenizer: Mapping[str, Any], specs: Sequence[Spec], stored: int) -> None:
    """Refuse a header that announces more than a file of ``stored`` bytes can hold, before anything is allocated."""
    size = tokenizer["size"]
    plain = size + sum(sum(spec.plain_sizes) for spec in specs)
    if not isinstance(size, int) or size < 0 or plain > _LARGEST_RATIO * stored:
        raise ValueError(f"{stored} bytes cannot be {plain}")


def _require_fitting(config: ModelConfig, specs: Sequence[Spec]) -> None:
    """Refuse tensors that are not those of the config's model, by its shapes alone."""
    found = {name: (spec.shape, spec.dtype) for spec in specs for name in spec.names}
    if config.n_layers > len(found):
        raise ValueError(f"{config.n_layers} layers of {len(found)} tensors")
    with torch.device("meta"):
        wanted = build_model(config).state_dict()
    described = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in wanted.items()}
    if differing := sorted(name for name in found.keys() | described.keys() if found.get(name) != described.get(name)):
        raise HRSError(f"its {differing[0]} is not that of this version's model: use the version of hrs that wrote it")


def _tokenizer_of(text: bytes) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_bytes(text)
        return load_tokenizer(file)


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
