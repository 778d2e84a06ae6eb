"""Lazy against dense AdamW on the two tables of a PEER layer: when is it worth touching only the rows that were hit?

    python -m benchmarks.expert_optimizer [--threads 1] [--device cpu]

Both optimizers take steps on tables of their own in one process, in alternation, with the same gradients: those of
``--tokens`` tokens with ``--choices`` experts each, drawn uniformly or by Zipf's law. Prints a Markdown table: the
share of rows hit, medians of the update alone and with norm and clipping before it (both as in training), the ratio
dense / lazy of each (above 1 lazy is faster), and the bytes of the gradients. It begins with 2,048 tokens, a training
step of the original, and goes on with fewer. Making the gradients is not timed.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from hrs.config import OptimizerConfig
from hrs.gpu import synchronize
from hrs.training.optimizer import build_optimizer, clip_gradients, gradient_norm, set_rates

CLIP_NORM = 1.0
MIB = 2**20


class Tables(nn.Module):
    """The tables of a PEER layer, without the layer."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rows, width))
        self.up = nn.Parameter(torch.randn(rows, width))
        self.sparse_gradients = False

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"expert": list(self.parameters())}


def draw(kind: str, n: int, rows: int, exponent: float) -> Tensor:
    """The distinct rows, ascending, among ``n`` draws."""
    if kind == "uniform":
        return torch.randint(rows, (n,)).unique()
    weights = torch.arange(1, rows + 1, dtype=torch.float64).pow(-exponent)
    uniform = torch.rand(n, dtype=torch.float64) * weights.sum()
    ranks = torch.searchsorted(weights.cumsum(0), uniform).clamp_max(rows - 1)
    return torch.randperm(rows)[ranks].unique()


def step(model: Tables, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[float, float]:
    """Seconds of norm and clipping, and of the update."""
    times = [_now(device)]
    clip_gradients(optimizer, CLIP_NORM, gradient_norm(optimizer))
    times.append(_now(device))
    optimizer.step()
    times.append(_now(device))
    optimizer.zero_grad(set_to_none=True)
    return times[1] - times[0], times[2] - times[1]


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def gradient_bytes(gradient: Tensor) -> int:
    parts = (gradient._indices(), gradient._values()) if gradient.is_sparse else (gradient,)
    return sum(part.nbytes for part in parts)


def compare(kind: str, tokens: int, arguments: argparse.Namespace) -> str:
    """One row of the table."""
    rows, width, device = arguments.rows, arguments.width, torch.device(arguments.device)
    models, optimizers = {}, {}
    for updates in ("dense", "lazy"):
        models[updates] = Tables(rows, width).to(device)
        optimizers[updates] = build_optimizer(models[updates], OptimizerConfig(expert_updates=updates))  # type: ignore
        set_rates(optimizers[updates], 1e-3, {})
    seconds: dict[str, list[tuple[float, float]]] = {"dense": [], "lazy": []}
    n_bytes, hit = dict.fromkeys(seconds, 0), []
    for _ in range(arguments.repeats + 1):
        for name in ("down", "up"):
            touched = draw(kind, tokens * arguments.choices, rows, arguments.exponent).to(device)
            values = torch.randn(len(touched), width, device=device)
            hit.append(len(touched) / rows)
            gradient = torch.sparse_coo_tensor(touched[None], values, (rows, width), check_invariants=True)
            getattr(models["lazy"], name).grad = gradient
            getattr(models["dense"], name).grad = gradient.to_dense()
        for updates, model in models.items():
            n_bytes[updates] = max(n_bytes[updates], sum(gradient_bytes(p.grad) for p in model.parameters()))
            seconds[updates].append(step(model, optimizers[updates], device))
    medians = {}
    for updates, measured in seconds.items():
        measured = measured[1:]  # the first step makes the state
        medians[updates] = [statistics.median(update for _, update in measured), statistics.median(map(sum, measured))]
    cells = [kind, f"{tokens}", f"{100 * statistics.mean(hit):.1f} %"]
    for dense, lazy in zip(*medians.values(), strict=True):
        cells += [f"{1e3 * dense:.0f}", f"{1e3 * lazy:.1f}", f"{dense / lazy:.2f}"]
    cells += [f"{n_bytes['dense'] / MIB:.0f}", f"{n_bytes['lazy'] / MIB:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="lazy against dense AdamW on expert tables")
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 512, 128, 32])
    parser.add_argument("--choices", type=int, default=128, help="experts per token")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"two tables of {arguments.rows} x {arguments.width}, {arguments.device}, {arguments.threads} thread(s)\n")
    print(
        "| draw | tokens | rows hit | dense ms | lazy ms | ratio | with clipping: dense ms | lazy ms | ratio ", end=""
    )
    print("| dense gradients MiB | lazy MiB |\n|---|" + "---:|" * 10)
    for tokens in arguments.tokens:
        for kind in ("uniform", "zipf"):
            print(compare(kind, tokens, arguments), flush=True)


if __name__ == "__main__":
    main()
