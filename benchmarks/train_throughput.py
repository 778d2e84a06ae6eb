"""Training throughput of ``dense_baseline`` against transformers' GPT-2 of the same shape, on the CPU or one GPU.

    python benchmarks/train_throughput.py --scale tiny --threads 1

Both models take full steps (forward, cross-entropy, backward, fused AdamW) on the same random tokens in one process,
in alternation, so that other load on the machine meets both alike. Prints the median tokens/s of each and their ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hrs.config import ModelConfig
from hrs.gpu import synchronize
from hrs.models import build_model
from hrs.presets import experiment
from hrs.training import Runtime


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


def stepper(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    """A function that takes one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    model.train()

    def step(window: Tensor) -> float:
        synchronize(window.device)
        start = time.perf_counter()
        loss_of(window).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(window.device)
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="tiny", help="micro, tiny, small or paper")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = Runtime().torch_device()
    config = experiment("dense_baseline", args.scale).model
    ours, theirs = build_model(config).to(device), gpt2_of(config).to(device)

    def our_loss(window: Tensor) -> Tensor:
        return F.cross_entropy(ours(window[:, :-1]).logits.flatten(0, 1), window[:, 1:].flatten())

    def their_loss(window: Tensor) -> Tensor:
        # Its own loss; labels are given already shifted, so both models predict the same tokens.
        targets = window[:, 1:].contiguous()
        return theirs(input_ids=window[:, :-1], labels=targets, shift_labels=targets).loss

    steps = {"hrs": stepper(ours, our_loss), "gpt2": stepper(theirs, their_loss)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    warm_up = 3
    for i in range(warm_up + args.steps):
        window = torch.randint(config.vocab_size, (args.batch, config.max_seq_len + 1), device=device)
        for name, step in steps.items():
            elapsed = step(window)
            if i >= warm_up:
                seconds[name].append(elapsed)
    tokens = args.batch * config.max_seq_len
    rate = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    print(f"scale={args.scale} batch={args.batch} tokens/step={tokens} device={device} threads={args.threads}")
    for name, model in (("hrs", ours), ("gpt2", theirs)):
        n = sum(p.numel() for p in model.parameters())
        print(f"{name:5} {rate[name]:10.0f} tokens/s   {n / 1e6:.2f}M parameters")
    print(f"ratio {rate['hrs'] / rate['gpt2']:.2f}")


if __name__ == "__main__":
    main()
