"""Size and loss of one trained run under every export scheme, on its whole validation split.

    python -m benchmarks.export RUN_DIRECTORY [--budgets 5,4,3.5] [--calibrate 64] [--rows "as built,int8"]

Bytes are those of weights and buffers, without header and tokenizer, which no scheme changes. ``zstd`` and ``zlib`` are
other codecs for the same levels. The rows ``fit N`` are what a budget of N bits per weight buys.
"""

import argparse
import copy
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from hrs.data import TrainingWindows
from hrs.errors import HRSError
from hrs.evaluation import evaluate
from hrs.export import open_model, open_text
from hrs.export.as_built import export_as_built
from hrs.export.calibrate import input_hessians
from hrs.export.compression import decompress
from hrs.export.quantize import Grid
from hrs.export.search import fit
from hrs.export.tensors import Grids, Packed, entries, pack, unpack
from hrs.storage import open_storage


def recompressed(packed: Sequence[Packed]) -> dict[str, int]:
    """Bytes of the same tensors if every block were zstd's, or zlib's."""
    plain = [
        decompress(block.codec, data, size)
        for part in packed
        for block, data, size in zip(part.spec.blocks, part.payload, part.spec.plain_sizes, strict=True)
    ]
    zstd = pa.Codec("zstd", compression_level=22)
    return {
        "zstd": sum(len(zstd.compress(data, asbytes=True)) for data in plain),
        "zlib": sum(len(zlib.compress(data, 9)) for data in plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, or one of its checkpoints")
    parser.add_argument("--budgets", default="5,4,3.5", help="comma-separated bits per weight (default 5,4,3.5)")
    parser.add_argument("--calibrate", type=int, default=64, help="windows for the GPTQ rows (default 64)")
    parser.add_argument("--tokens", type=Path, help="folder of token stores (default: that of the storage)")
    parser.add_argument("--rows", help="comma-separated names of the schemes to score (default all)")
    args = parser.parse_args()
    rows = args.rows.split(",") if args.rows else None
    tokens = args.tokens or open_storage().tokens
    opened = open_model(args.run, tokens)
    model, config, store = opened.model, opened.config, open_text(opened, tokens)
    n_weights = model.count_parameters()
    windows = TrainingWindows(store.train.tokens, config.model.max_seq_len, args.calibrate, config.seed)
    hessians = input_hessians(model, [torch.from_numpy(windows.batch(0)[:, :-1])])
    scored = copy.deepcopy(model)

    def score(state: Mapping[str, Tensor]) -> float:
        scored.load_state_dict(state)
        return evaluate(scored, store, stride_frac=config.evaluation.stride_frac).bits_per_byte

    source = score(model.state_dict())

    def row(name: str, size: int, bits_per_byte: float, more: str = "") -> None:
        gap = bits_per_byte - source
        bits = 8 * size / n_weights
        print(f"{name:<16}{size:>12,}{bits:>8.2f}{bits_per_byte:>10.5f}{gap:>+10.5f}  {more}", flush=True)

    def packed_row(name: str, grids: Grids, *, calibrated: bool = False) -> None:
        if rows and name not in rows:
            return
        packed = pack(model, grids, hessians if calibrated else None)
        state = {tensor: unpack(part.spec, part.payload) for part in packed for tensor in part.spec.names}
        codecs = ", ".join(f"{codec} {size:,}" for codec, size in recompressed(packed).items())
        row(name, sum(part.stored for part in packed), score(state), codecs)

    print(f"{config.preset}/{config.seed}, {n_weights:,} parameters, {config.data.corpus}, {args.calibrate} windows")
    print(f"{'scheme':<16}{'bytes':>12}{'bits':>8}{'bits/byte':>10}{'gap':>10}")
    row("fp32", sum(e.tensor.nbytes for e in entries(model)), source)
    for name, floor in (("as built", 1 / 127), ("no floor", 0.0)):
        if not rows or name in rows:
            state, content = export_as_built(model.state_dict(), floor=floor, threshold=16_383)
            row(name, len(content), score(state), "zlib")
    for bits in (8, 6, 5, 4):
        packed_row(f"int{bits}", Grids(Grid(bits), Grid(bits)))
        packed_row(f"int{bits} GPTQ", Grids(Grid(bits), Grid(bits)), calibrated=True)
    for budget in map(float, args.budgets.split(",")):

        def attempt(grids: Grids) -> tuple[list[Packed], int]:
            packed = pack(model, grids)
            return packed, sum(part.stored for part in packed)

        if rows and not {f"fit {budget:g}", f"fit {budget:g} GPTQ"} & set(rows):
            continue
        try:
            found = fit(entries(model), attempt, budget=math.floor(budget * n_weights / 8))
        except HRSError as error:  # frozen tables stay whole, so not every budget can be met
            print(f"fit {budget:g}: {error}", flush=True)
            continue
        packed_row(f"fit {budget:g}", found.grids)
        packed_row(f"fit {budget:g} GPTQ", found.grids, calibrated=True)


if __name__ == "__main__":
    main()
