"""Training throughput of ``dense_baseline`` against nanoGPT's form and transformers' GPT-2 of the same shape.

    python -m benchmarks.train_throughput --scale tiny --threads 1 --rounds 40

All models take full steps on the same random tokens in one process, in alternation, on the CPU or one GPU:

- ``hrs``: the step of ``hrs.training`` as every run takes it (:class:`hrs.training.step.Stepper` and
  :func:`build_optimizer`): forward, loss, backward, norm of the gradient, check that loss and norm are finite,
  clipping, fused AdamW over its parameter groups, diagnostics.
- ``nanogpt`` and ``gpt2``: forward, loss, backward, clipping of the gradient's norm at the same limit, which nanoGPT's
  training script and transformers' Trainer do by default, and fused AdamW. No checks and no diagnostics.

A round is one step of each. The ratio of two models is the median over rounds of the ratio of their times: load on the
machine that lasts longer than a round meets all of them alike. The interval is that of the median (95 %, from order
statistics, no assumption on the distribution).
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hrs.config import ExperimentConfig, ModelConfig
from hrs.gpu import open_gpu
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.training.optimizer import build_optimizer, set_rates
from hrs.training.step import Stepper

LR = 3e-4
WARM_UP = 5

Step = Callable[[Tensor], None]
"""Take one training step on windows [B, T + 1] of token ids."""


class NanoGPTBlock(nn.Module):
    """Pre-norm block as in nanoGPT: one projection to queries, keys and values, fused attention, GELU MLP, no biases.

    Args:
        config: gives width, heads, hidden width and dropout.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads, self.p = config.n_heads, config.dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.projection = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.widen, self.narrow = nn.Linear(d, config.d_ff, bias=False), nn.Linear(config.d_ff, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream [B, T, d] to the next one."""
        p = self.p if self.training else 0.0
        q, k, v = (
            t.view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)  # [B, H, T, d_head]
            for t in self.qkv(self.attention_norm(x)).split(x.shape[-1], dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + F.dropout(self.projection(attended.transpose(1, 2).reshape(x.shape)), p, self.training)
        return x + F.dropout(self.narrow(F.gelu(self.widen(self.mlp_norm(x)))), p, self.training)


class NanoGPT(nn.Module):
    """GPT in nanoGPT's form: learned positions, pre-norm blocks, output weights tied to the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(NanoGPTBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, V] of token ids [B, T]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def gpt2_of(config: ModelConfig) -> GPT2LMHeadModel:
    """GPT-2 of the same vocabulary, layers, widths, context and dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.d_ff,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def plain_step(model: nn.Module, clip_norm: float, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return forward, ``loss_of(inputs, targets)`` of ids [B, T], backward, clipping and fused AdamW, nothing else."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    model.train()

    def step(window: Tensor) -> None:
        loss_of(window[:, :-1], window[:, 1:].contiguous()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hrs_step(config: ExperimentConfig, model: LanguageModel, device: torch.device) -> Step:
    """Return the step that a run of ``config`` takes."""
    optimizer = build_optimizer(model, config.training.optimizer)
    set_rates(optimizer, LR, {})
    stepper = Stepper(model.train(), optimizer, config.training, device, config.training.batch_sequences)

    def step(window: Tensor) -> None:
        assert stepper.step(window) is not None, "a step was skipped: its loss or gradient was not finite"

    return step


def build(config: ExperimentConfig, name: str, device: torch.device) -> tuple[nn.Module, Step]:
    """Return model ``hrs``, ``nanogpt`` or ``gpt2`` on ``device`` and its step."""
    if name == "hrs":
        ours = build_model(config.model).to(device)
        return ours, hrs_step(config, ours, device)
    clip_norm = config.training.optimizer.clip_norm
    if name == "nanogpt":
        nano = NanoGPT(config.model).to(device)
        return nano, plain_step(
            nano, clip_norm, lambda ids, targets: F.cross_entropy(nano(ids).flatten(0, 1), targets.flatten())
        )
    gpt2 = gpt2_of(config.model).to(device)  # type: ignore[arg-type]
    # Labels are given already shifted, so all models predict the same tokens.
    return gpt2, plain_step(
        gpt2, clip_norm, lambda ids, targets: gpt2(input_ids=ids, labels=targets, shift_labels=targets).loss
    )


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return the order statistics that enclose the median with at least 95 % confidence, or the extremes of few."""
    ordered, n = sorted(values), len(values)
    tail, below = 0.0, 0
    # P(fewer than below + 1 values lie under the median), binomial with p = 1 / 2.
    while below < n // 2 and tail + math.comb(n, below) / 2**n <= 0.025:
        tail += math.comb(n, below) / 2**n
        below += 1
    below = max(below - 1, 0)
    return ordered[below], ordered[n - 1 - below]


def measure(
    steps: dict[str, Step],
    windows: Callable[[], Tensor],
    rounds: int,
    wait: Callable[[], None],
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Return the seconds of every step in ``rounds`` rounds, after some warm-up; the order rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(WARM_UP + rounds):
        window = windows()
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait()
            start = clock()
            steps[name](window)
            wait()
            if i >= WARM_UP:
                seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="tiny", help="micro, tiny, small or paper")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each model")
    parser.add_argument("--repetitions", type=int, default=1, help="measure so many times, with new models each time")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what a step's seconds are")
    parser.add_argument("--models", default="nanogpt,gpt2", help="what to compare with, of nanogpt and gpt2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    gpu = open_gpu("auto")
    device = torch.device("cpu") if gpu is None else gpu.device
    config = experiment("dense_baseline", args.scale)
    config = replace(config, training=replace(config.training, batch_sequences=args.batch))
    shape = (args.batch, config.model.max_seq_len + 1)
    tokens = args.batch * config.model.max_seq_len
    names = ["hrs", *args.models.split(",")]
    print(f"scale={args.scale} batch={args.batch} tokens/step={tokens} device={device}", end=" ")
    print(f"threads={args.threads} clock={args.clock}")
    for repetition in range(args.repetitions):
        built = {name: build(config, name, device) for name in names}
        seconds = measure(
            {name: step for name, (_, step) in built.items()},
            lambda: torch.randint(config.model.vocab_size, shape, device=device),
            args.rounds,
            (lambda: None) if gpu is None else gpu.synchronize,
            time.process_time if args.clock == "cpu" else time.perf_counter,
        )
        print(f"repetition {repetition + 1}:")
        for name, taken in seconds.items():
            n = sum(p.numel() for p in built[name][0].parameters())
            line = f"  {name:8}{tokens / statistics.median(taken):9.0f} tokens/s   {n / 1e6:6.2f}M parameters"
            if name != "hrs":
                ratios = [theirs / ours for theirs, ours in zip(taken, seconds["hrs"], strict=True)]
                low, high = median_interval(ratios)
                line += f"   hrs is {statistics.median(ratios):.2f} times as fast [{low:.2f}, {high:.2f}]"
            print(line, flush=True)


if __name__ == "__main__":
    main()
