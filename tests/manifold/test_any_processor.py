"""One digest from all kernels of the linear algebra library, instruction sets and thread counts this processor has.

What holds: forces and positions have the same bits on x86-64 processors, as far as one of them can pass for others.
Eigenvectors do not, they differ by some 1e-13, and coordinates are rounded to 1e-4. With 1,024 tokens a digest differs
once in about 10^5 pairs of machines.
"""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg  # noqa: F401  (its BLAS must be loaded to be looked at)
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from hrs.manifold.statistics import count_shard

PROGRAM = """
import hashlib, json, sys
from pathlib import Path
from threadpoolctl import threadpool_info
from hrs.config.manifold import GeometryConfig
from hrs.manifold.build import build_manifold
from hrs.manifold.statistics import Counts

made = build_manifold(GeometryConfig(**json.loads(sys.argv[2])), Counts.load(Path(sys.argv[1])))
positions = hashlib.sha256(made.positions.tobytes() + made.mass.tobytes() + made.energies.tobytes()).hexdigest()
kernels = {info["architecture"] for info in threadpool_info() if info["internal_api"] == "openblas"}
print(json.dumps([made.digest, positions, sorted(kernels)]))
"""
CAPABILITY = torch.backends.cpu.get_cpu_capability()
KERNELS = {"DEFAULT": ["Prescott"], "AVX2": ["Prescott", "Sandybridge", "Haswell"]}
KERNELS["AVX512"] = [*KERNELS["AVX2"], "SkylakeX"]
"""Of OpenBLAS that run with each instruction set, the oldest first."""
GEOMETRY = {"dimensions": 32, "modes": 128, "partners": 0}

pytestmark = [
    pytest.mark.skipif(
        not any(info["internal_api"] == "openblas" for info in threadpool_info()),
        reason="the BLAS of numpy and scipy is not OpenBLAS, whose kernel can be chosen",
    ),
    pytest.mark.skipif(CAPABILITY not in KERNELS, reason="this is not an x86-64 processor with a known kernel"),
]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 600 documents of 200 tokens, of which a document's topic prefers some."""
    draw, vocab_size = np.random.default_rng(0), 500
    common = 1 / np.arange(1, vocab_size + 1)
    topics = common * draw.gamma(0.3, size=(20, vocab_size))
    documents = [draw.choice(vocab_size, size=200, p=topic / topic.sum()) for topic in np.repeat(topics, 30, axis=0)]
    tokens: NDArray[np.int64] = np.concatenate(documents)
    path = tmp_path_factory.mktemp("counts") / "counts.npz"
    count_shard(tokens, vocab_size, segment_starts=np.arange(0, len(tokens), 200)).save(path)
    return path


def processors() -> dict[str, dict[str, str]]:
    """Environments that make this processor pass for others."""
    simd = " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))  # type: ignore[call-overload]
    # The C library chooses its logarithm and cosine by the processor too.
    plain = {"NPY_DISABLE_CPU_FEATURES": simd, "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4"}
    return {
        "oldest": {"OPENBLAS_CORETYPE": "Prescott", "OMP_NUM_THREADS": "2", **plain},
        **{kernel: {"OPENBLAS_CORETYPE": kernel, "OMP_NUM_THREADS": "1"} for kernel in KERNELS[CAPABILITY]},
        "no vectors in numpy": {"OMP_NUM_THREADS": "1", **plain},
        "two threads": {"OMP_NUM_THREADS": "2"},
        "no vectors in torch": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    }


def made_by(processor: str, counts: Path, **geometry: object) -> tuple[str, str, tuple[str, ...]]:
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(counts), json.dumps(GEOMETRY | geometry)],
        env=os.environ | processors()[processor],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    digest, positions, kernels = json.loads(made.stdout.splitlines()[-1])
    return digest, positions, tuple(kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",
    [
        {"definition": "clean", "partners": 8, "steps": 40},
        {"definition": "as_built", "partners": 0, "steps": 40},
        {"definition": "as_built", "partners": 8, "steps": 30},
    ],
    ids=lambda geometry: f"{geometry['definition']}-{geometry['partners']}",
)
def test_the_oldest_and_the_newest_processor_agree(geometry: dict[str, object], counts: Path) -> None:
    with ThreadPoolExecutor(2) as pool:  # of which most waits for imports
        ends = ("oldest", KERNELS[CAPABILITY][-1])
        oldest, newest = pool.map(lambda name: made_by(name, counts, **geometry), ends)
    assert oldest[:2] == newest[:2]


@pytest.mark.slow
def test_one_digest_from_all_processors(counts: Path) -> None:
    made = {processor: made_by(processor, counts) for processor in processors()}
    assert len({(digest, positions) for digest, positions, _ in made.values()}) == 1, made
    kernels = {kernel for _, _, kernel in made.values()}
    assert len(kernels) > 1 or CAPABILITY == "DEFAULT", "kernels were really changed"


@pytest.mark.skipif(CAPABILITY == "DEFAULT", reason="there is only one kernel")
def test_plain_products_differ_between_kernels() -> None:
    """Or else the tests above could not fail."""
    program = "import hashlib, numpy as n; x = n.random.default_rng(0).random((300, 99)); print((x @ x.T).tobytes())"
    bits = set()
    for kernel in ("Prescott", "Haswell"):
        made = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"OPENBLAS_CORETYPE": kernel}, capture_output=True
        )
        assert made.returncode == 0, made.stderr
        bits.add(hashlib.sha256(made.stdout).hexdigest())
    assert len(bits) == 2
