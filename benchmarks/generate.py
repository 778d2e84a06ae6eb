"""Cached generation of ``dense_baseline`` against transformers' GPT-2 of the same shape, on the CPU.

    python -m benchmarks.generate --scales tiny,small --threads 1

Random weights; temperature 0.9 and top-k 50 on both sides, prompts of 16 tokens, as many new tokens as fit into the
context. All models take turns in one process, so that other load on the machine meets all alike. Prints the medians of
tokens/s and their ratio to GPT-2. ``v17_peer_only`` runs beside them for comparison where there is such a preset.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

try:
    from benchmarks.train_throughput import gpt2_of
except ModuleNotFoundError as error:
    if error.name != "benchmarks":
        raise
    raise SystemExit("error: start this from the repository's root as python -m benchmarks.generate") from None
from hrs.config import ModelConfig
from hrs.generation import Sampling, generate
from hrs.models import build_model
from hrs.presets import PRESETS, experiment

PROMPT_TOKENS = 16
OURS = ("dense_baseline", "v17_peer_only")


def our_run(config: ModelConfig, batch: int, n_new: int) -> Callable[[], None]:
    """A function that continues random prompts with our model."""
    model = build_model(config).eval()
    prompts = torch.randint(config.vocab_size, (batch, PROMPT_TOKENS)).tolist()
    sampling = Sampling(temperature=0.9, top_k=50, max_new_tokens=n_new)

    def run() -> None:
        n = sum(len(step) for step in generate(model, prompts, sampling))
        assert n == batch * n_new

    return run


def gpt2_run(config: ModelConfig, batch: int, n_new: int) -> Callable[[], None]:
    """The same with transformers' ``generate``."""
    model = gpt2_of(config).eval()
    model.generation_config.eos_token_id = None  # every row to the last token
    model.generation_config.pad_token_id = 0
    prompts = torch.randint(1, config.vocab_size, (batch, PROMPT_TOKENS))
    mask = torch.ones_like(prompts)

    def run() -> None:
        made = model.generate(
            prompts,
            attention_mask=mask,
            do_sample=True,
            temperature=0.9,
            top_k=50,
            max_new_tokens=n_new,
            use_cache=True,
        )
        assert made.shape == (batch, PROMPT_TOKENS + n_new)

    return run


def compare(scale: str, batch: int, repeats: int, clock: Callable[[], float]) -> None:
    """Print one block of results."""
    configs = {name: experiment(name, scale).model for name in OURS if name in PRESETS}
    dense = configs["dense_baseline"]
    n_new = dense.max_seq_len - PROMPT_TOKENS
    runs = {name: our_run(config, batch, n_new) for name, config in configs.items()}
    runs["gpt2"] = gpt2_run(dense, batch, n_new)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if repeat > 0:  # the first round warms up
                seconds[name].append(clock() - start)
    rate = {name: batch * n_new / statistics.median(taken) for name, taken in seconds.items()}
    print(f"scale={scale} batch={batch} new tokens={n_new} threads={torch.get_num_threads()}")
    for name in runs:
        print(f"  {name:16}{rate[name]:10.0f} tokens/s   ratio to gpt2 {rate[name] / rate['gpt2']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", default="tiny,small", help="comma-separated, of micro, tiny, small and paper")
    parser.add_argument("--batches", default="1,8", help="comma-separated prompts side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds this process computed, for a machine that is busy with other work; use with --threads 1",
    )
    args = parser.parse_args()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for scale in args.scales.split(","):
        for batch in args.batches.split(","):
            compare(scale, int(batch), args.repeats, clock)


if __name__ == "__main__":
    main()
