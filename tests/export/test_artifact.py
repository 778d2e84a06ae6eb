"""The file: bit-for-bit round trips of every kind of model, and a sentence for everything that is not one."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_checks import small_config, small_model, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import nn

from hrs.errors import HRSError
from hrs.export.artifact import MAGIC, Provenance, load_artifact, write_artifact
from hrs.export.quantize import Grid
from hrs.export.tensors import Grids, Spec, entries, pack, unpack
from hrs.models import LanguageModel

PRESETS = (
    "dense_baseline",
    "full_hrs",
    "v13_low_sparsity",
    "v18_cross_attn",
    "v17_peer_only",
    "kernel_random_projection",
    "manifold_v18",
)
"""Together: tied weights, PEER tables and keys, tiers, convolutions, engram memories, frozen projections, scalars, and
a frozen geometry."""
GRIDS = Grids(embedding=Grid(7, 5.0), matrix=Grid(6, 4.0))


def dequantised(model: LanguageModel, grids: Grids) -> dict[str, torch.Tensor]:
    return {name: unpack(p.spec, p.payload) for p in pack(model, grids) for name in p.spec.names}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.hrs"
    write_artifact(path, pack(small_model(), GRIDS), small_config(), small_tokenizer(), Provenance("f00", "CC0", 1.5))
    return path


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_logits_of_the_file_are_those_of_the_dequantised_weights_bit_for_bit(preset: str, tmp_path: Path) -> None:
    model, config = small_model(preset), small_config(preset)
    write_artifact(tmp_path / "m", pack(model, GRIDS), config, small_tokenizer())
    before = torch.random.get_rng_state()
    artifact = load_artifact(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), before), "loading must not move the caller's generator"
    reference = small_model(preset, seed=1)
    reference.load_state_dict(dequantised(model, GRIDS))
    tokens = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(artifact.model(tokens).logits, reference(tokens).logits)
        assert not torch.equal(artifact.model(tokens).logits, model(tokens).logits)
    assert artifact.config == config and not artifact.model.training
    assert {t.dtype for t in artifact.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("preset", PRESETS)
def test_only_large_learned_weights_are_rounded(preset: str) -> None:
    model = small_model(preset)
    learned = dict(model.named_parameters())
    restored = dequantised(model, Grids())
    for name, tensor in model.state_dict().items():
        if name in learned and tensor.numel() >= 1024:
            assert not torch.equal(restored[name], tensor) or not tensor.any()
        elif tensor.is_floating_point() and tensor.numel() >= 1024:
            assert torch.equal(restored[name], tensor.half().float()), "geometry and memories keep float16"
        else:
            assert torch.equal(restored[name], tensor), name
        assert restored[name].dtype == tensor.dtype and restored[name].shape == tensor.shape


class Odd(nn.Module):
    """Tensors that no model has yet."""

    vocab_size = 50

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("coordinates", torch.randn(50, 40, generator=generator))
        self.register_buffer("huge", torch.full((2048,), 1e6))
        self.register_buffer("neighbours", torch.randint(-1, 50, (50, 12), generator=generator))
        self.register_buffer("wide", torch.tensor([0, 2**40]))
        self.register_buffer("mask", torch.rand(3, 7, generator=generator) > 0.5)
        self.register_buffer("precise", torch.randn(5, generator=generator, dtype=torch.float64))
        self.register_buffer("brain", torch.randn(2000, generator=generator).bfloat16())
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("transposed", torch.randn(40, 50, generator=generator).T)
        self.flag = nn.Parameter(torch.tensor(0.3))


def test_every_type_of_tensor_comes_back() -> None:
    model: Any = Odd()
    packed = pack(model, Grids())
    by_name = {name: p for p in packed for name in p.spec.names}
    state = model.state_dict()
    assert by_name.keys() == state.keys()
    assert by_name["embedding.weight"] is by_name["head.weight"], "tied weights are stored once"
    assert next(e.role for e in entries(model) if "head.weight" in e.names) == "embedding"
    for name, part in by_name.items():
        restored = unpack(part.spec, part.payload)
        assert restored.shape == state[name].shape and restored.dtype == state[name].dtype, name
        exact = state[name].half().float() if name in ("coordinates", "transposed") else state[name]
        if name not in ("embedding.weight", "head.weight"):
            assert torch.equal(restored, exact), name
    stored = {name: part.spec.stored_dtype for name, part in by_name.items()}
    assert stored["neighbours"] == "int8" and stored["wide"] == "int64" and stored["mask"] == "bool"
    assert stored["coordinates"] == "float16" and stored["huge"] == "float32", "too large for float16"
    assert by_name["flag"].n_weights == 1 and by_name["coordinates"].n_weights == 0
    assert sum(p.n_weights for p in packed) == sum(p.numel() for p in model.parameters())


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.hidden.weight")[0, 0] = torch.inf
    with pytest.raises(HRSError, match=r"blocks\.0\.mlp\.hidden\.weight: a weight is not finite"):
        pack(model, GRIDS)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_header_is_plain_json_and_the_same_model_gives_the_same_bytes(artifact: Path, tmp_path: Path) -> None:
    content = artifact.read_bytes()
    (length,) = struct.unpack_from("<I", content, 12)
    header = json.loads(content[48 : 48 + length])
    assert header["source"] == {"bits_per_byte": 1.5, "causal": None}
    assert header["data"] == {"fingerprint": "f00", "licence": "CC0"}
    names = [name for tensor in header["tensors"] for name in tensor["names"]]
    assert names == list(small_model().state_dict())
    provenance = Provenance("f00", "CC0", 1.5)
    again = write_artifact(tmp_path / "b", pack(small_model(), GRIDS), small_config(), small_tokenizer(), provenance)
    assert (tmp_path / "b").read_bytes() == content
    assert again.size == len(content) and again.parameters == small_model().count_parameters()
    assert list(tmp_path.iterdir()) == [tmp_path / "b"], "no partial file stays"


def test_the_tokenizer_travels(artifact: Path) -> None:
    text = "that cat <|endoftext|> sat"
    ours, theirs = small_tokenizer(), load_artifact(artifact).tokenizer
    assert theirs.encode(text).ids == ours.encode(text).ids
    assert theirs.token_to_id("<|endoftext|>") not in theirs.encode(text).ids


@examples(150)
@given(data=st.data())
def test_any_flipped_bit_is_refused_in_one_sentence(artifact: Path, data: st.DataObject) -> None:
    content = bytearray(artifact.read_bytes())
    place = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(content) - 1)))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    damaged = artifact.with_name("damaged")
    damaged.write_bytes(content)
    with pytest.raises(HRSError) as refused:
        load_artifact(damaged)
    assert "\n" not in str(refused.value) and str(damaged) in str(refused.value)


@examples(60)
@given(data=st.data())
def test_any_cut_or_appended_file_is_refused(artifact: Path, data: st.DataObject) -> None:
    content = artifact.read_bytes()
    n = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(content) - 1)))
    damaged = artifact.with_name("cut")
    for changed in (content[:n], content + content[: n + 1]):
        damaged.write_bytes(changed)
        with pytest.raises(HRSError):
            load_artifact(damaged)


def resealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy with another header and a checksum that holds: what a hostile author can make."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<I", content, 12)
    header = json.loads(content[48 : 48 + length])
    body = json.dumps(change(header) or header).encode()
    front = MAGIC + struct.pack("<II", 1, len(body))
    rest = body + content[48 + length :]
    made = path.with_name("hostile")
    made.write_bytes(front + hashlib.sha256(front + rest).digest() + rest)
    return made


def set_tensor(index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["tensors"][index].update(values)


@pytest.mark.parametrize(
    "change",
    [
        set_tensor(0, shape=[2**40, 2**20]),
        set_tensor(0, shape=[300, -32]),
        set_tensor(0, shape=[9600]),
        set_tensor(0, form="pickle"),
        set_tensor(0, dtype="object"),
        set_tensor(0, unit="1"),
        set_tensor(0, names=["other.weight"]),
        set_tensor(0, blocks=[]),
        set_tensor(0, blocks=[{"codec": "zstd", "stored": -5}, {"codec": "zstd", "stored": 3}]),
        set_tensor(0, surprise=1),
        lambda header: header["tensors"].pop(),
        lambda header: header["tokenizer"].update(size=2**50),
        lambda header: header["tokenizer"].update(size=-1),
        lambda header: header["tokenizer"].update(codec="exec"),
        lambda header: header["config"]["model"].update(n_layers=10**9),
        lambda header: header["config"]["model"].update(d_model=2**30),
        lambda header: header["config"]["model"].update(vocab_size="many"),
        lambda header: header["config"].update(unheard_of=1),
        lambda header: header.pop("config"),
        lambda header: ["not", "a", "header"],
    ],
)
def test_a_hostile_header_is_refused_without_a_large_allocation(
    artifact: Path, change: Callable[[dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrs.export.artifact.build_model", _only_on_meta())
    with pytest.raises(HRSError, match=r"artifact .*hostile"):
        load_artifact(resealed(artifact, change))


def _only_on_meta() -> Callable[[Any], LanguageModel]:
    from hrs.models import build_model

    def build(config: Any) -> LanguageModel:
        model = build_model(config) if torch.get_default_device().type == "meta" else None
        assert model is not None, "a model was allocated for a header that does not fit"
        return model

    return build


def test_an_honest_header_passes_the_same_surgery(artifact: Path) -> None:
    assert load_artifact(resealed(artifact, lambda header: None)).config == small_config()


def test_other_files_are_refused(tmp_path: Path, artifact: Path) -> None:
    with pytest.raises(HRSError, match="is no file"):
        load_artifact(tmp_path)
    for content in (b"", b"{}", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(HRSError, match="not an artifact"):
            load_artifact(tmp_path / "x")
    content = bytearray(artifact.read_bytes())
    content[8] = 2
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(HRSError, match="format 2 and this version of hrs reads 1: update hrs"):
        load_artifact(tmp_path / "x")


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(HRSError, match="could not be written"):
        write_artifact(tmp_path / "taken", pack(small_model(), GRIDS), small_config(), small_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_spec_survives_json() -> None:
    for part in pack(small_model("full_hrs"), GRIDS):
        again = Spec.from_dict(json.loads(json.dumps(part.spec.to_dict())))
        assert torch.equal(unpack(again, part.payload), unpack(part.spec, part.payload))
