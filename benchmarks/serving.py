"""The HTTP endpoint against a plain FastAPI server around transformers' ``generate``, on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.serving --scale tiny

``dense_baseline`` with random weights and a GPT-2 of the same shape continue texts of different lengths, each by the
same number of tokens, temperature 0.9 and top-k 50. As many clients as the concurrency says ask over HTTP, each again
as soon as its reply has ended, and read the replies as streams. One thread of torch in each server:

- ``serve``: ``hrs serve`` with one replica, a Ray of its own included;
- ``uvicorn``: the same API and backend in one process, without Ray;
- ``plain``: a server as people write it: one process, a route in the thread pool, one ``generate`` at a time behind a
  lock, streamed by TextIteratorStreamer, which gives a word when it is complete;
- ``no HTTP``: ContinuousBatch in the process of the clients, with neither texts nor streams.

All take turns in every round, so that other load on the machine meets all alike. Prints of each the medians over rounds
of requests/s, tokens/s and CPU seconds of the server's processes per 1,000 tokens, which other load changes less, and
percentiles over all requests: of the time to first text, and of the time per further token. Then medians over rounds of
ratios within a round. Random text hardly ever ends by itself; requests that would are left out.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

try:
    from benchmarks.servers import TEMPERATURE, TOP_K, Server, child, hrs_serve, serve_in_process, serve_plainly
except ModuleNotFoundError as error:
    if error.name != "benchmarks":
        raise
    raise SystemExit("error: start this from the repository's root as python -m benchmarks.serving") from None
from hrs.data import TokenStore, open_tokens
from hrs.data.tokenization import end_of_text_id
from hrs.export.artifact import load_artifact, write_artifact
from hrs.export.quantize import Grid
from hrs.export.tensors import Grids, pack
from hrs.generation import Sampling
from hrs.generation.batching import ContinuousBatch
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.storage import open_storage

SHORTEST = 8
"""Tokens of the shortest prompts; the longest fill what the new tokens leave of the context."""
IDLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One text to continue."""

    text: str
    ids: list[int]
    seed: int

    def sampling(self, n_new: int) -> Sampling:
        return Sampling(temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=n_new, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Timing:
    """One reply, in seconds."""

    first: float
    """Until its first text."""
    per_token: float
    """From then to the last text, over the tokens after the first."""


@dataclass(frozen=True, slots=True)
class Round:
    """One server's turn."""

    seconds: float
    cpu_seconds: float
    timings: list[Timing]


Turn = Callable[[Sequence[Ask], int], Round]
"""Answers requests for so many clients at a time."""


# ---- what is asked ---------------------------------------------------------------------------------------------------


def make_asks(model: LanguageModel, store: TokenStore, n: int, n_new: int) -> list[Ask]:
    """Pieces of validation text, of all lengths alike, whose continuations do not end before ``n_new`` tokens."""
    draw, longest = np.random.default_rng(0), model.max_seq_len - n_new
    tokens, end = store.validation.tokens, end_of_text_id(store.tokenizer)
    asks: list[Ask] = []
    while len(asks) < n:
        batch, drawn = ContinuousBatch(model, n_slots=32, end_id=end), []
        for seed in range(len(asks), n):
            length, start = int(draw.integers(SHORTEST, longest + 1)), int(draw.integers(len(tokens) - longest))
            text = store.tokenizer.decode(tokens[start : start + length].tolist())
            ids = store.tokenizer.encode(text, add_special_tokens=False).ids
            if SHORTEST <= len(ids) <= longest:
                drawn.append(Ask(text, ids, seed))
                batch.add(ids, drawn[-1].sampling(n_new))
        last = {token.row: token.finish for token in _steps(batch)}
        asks += [ask for number, ask in enumerate(drawn) if last[number] == "length"]
    return asks


def _steps(batch: ContinuousBatch) -> Iterator[Any]:
    while batch.n_active:
        yield from batch.step()


# ---- a turn ----------------------------------------------------------------------------------------------------------


async def ask_once(session: aiohttp.ClientSession, server: Server, ask: Ask, n_new: int) -> Timing:
    """One streamed reply; asserts that it has ``n_new`` tokens."""
    body: dict[str, Any] = {"prompt": ask.text, "max_tokens": n_new}
    if server.ours:
        options = {"include_usage": True}
        body |= {"model": "hrs", "stream": True, "stream_options": options, "seed": ask.seed}
        body |= {"temperature": TEMPERATURE, "hrs": {"top_k": TOP_K}}
    began, times, n_tokens = time.perf_counter(), [], 0
    async with session.post(f"{server.url}/v1/completions", json=body) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if any(choice["text"] for choice in event["choices"]):
                times.append(now)
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    assert n_tokens == n_new, f"{n_tokens} tokens, not {n_new}"
    return Timing(times[0] - began, (times[-1] - times[0]) / (n_new - 1))


async def ask_all(server: Server, asks: Sequence[Ask], concurrency: int, n_new: int) -> list[Timing]:
    """All of ``asks``, so many at a time."""
    left, timings = iter(asks), []

    async def client(session: aiohttp.ClientSession) -> None:
        for ask in left:
            timings.append(await ask_once(session, server, ask, n_new))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        await asyncio.gather(*(client(session) for _ in range(concurrency)))
    return timings


def over_http(server: Server, asks: Sequence[Ask], concurrency: int, n_new: int) -> Round:
    cpu, began = server.cpu_seconds(), time.perf_counter()
    timings = asyncio.run(ask_all(server, asks, concurrency, n_new))
    seconds = time.perf_counter() - began
    return Round(seconds, server.cpu_seconds() - cpu, timings)


def without_http(model: LanguageModel, slots: int, asks: Sequence[Ask], concurrency: int, n_new: int) -> Round:
    """The same in this process: as soon as one text is finished the next begins."""
    batch, left, times = ContinuousBatch(model, n_slots=slots), iter(asks), dict[int, list[float]]()
    cpu, began = time.process_time(), time.perf_counter()

    def add(n: int) -> None:
        for ask in itertools.islice(left, n):
            asked = time.perf_counter()
            times[batch.add(ask.ids, ask.sampling(n_new))] = [asked]

    add(concurrency)
    while batch.n_active:
        tokens, now = batch.step(), time.perf_counter()
        for token in tokens:
            times[token.row].append(now)
        add(sum(token.finish is not None for token in tokens))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    timings = [Timing(t[1] - t[0], (t[-1] - t[1]) / (n_new - 1)) for t in times.values()]
    return Round(seconds, cpu, timings)


# ---- what is told ----------------------------------------------------------------------------------------------------

HEADER = (
    "| clients | server | requests/s | tokens/s | first text, s: p50 | p95 | p99 "
    "| per token, ms: p50 | p95 | p99 | CPU s per 1,000 tokens |\n|---:|---|" + "---:|" * 9
)


def row(name: str, concurrency: int, rounds: Sequence[Round], n_new: int) -> str:
    """A line of the table."""
    rate = statistics.median(len(each.timings) / each.seconds for each in rounds)
    cpu = statistics.median(1000 * each.cpu_seconds / (n_new * len(each.timings)) for each in rounds)
    timings = [timing for each in rounds for timing in each.timings]
    first = " | ".join(f"{q:.2f}" for q in np.quantile([t.first for t in timings], (0.5, 0.95, 0.99)))
    per_token = " | ".join(f"{1000 * q:.1f}" for q in np.quantile([t.per_token for t in timings], (0.5, 0.95, 0.99)))
    return f"| {concurrency} | {name} | {rate:.2f} | {rate * n_new:,.0f} | {first} | {per_token} | {cpu:.2f} |"


def ratio(above: Sequence[Round], below: Sequence[Round]) -> str:
    """Of throughputs within a round: the median, and the least and the largest."""
    ratios = [(len(a.timings) / a.seconds) / (len(b.timings) / b.seconds) for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def measure(turns: dict[str, Turn], asks: Sequence[Ask], args: Any) -> None:
    """All rounds of all concurrencies, and the tables."""
    rounds: dict[int, dict[str, list[Round]]] = {}
    for concurrency in map(int, args.concurrency.split(",")):
        rounds[concurrency] = {name: [] for name in turns}
        n = args.per_client * concurrency if concurrency > 1 else 2 * args.per_client
        for number in range(args.rounds + 1):
            order = list(turns)[number % len(turns) :] + list(turns)[: number % len(turns)]
            first = number * n % len(asks)
            these = [asks[(first + i) % len(asks)] for i in range(n if number else concurrency)]
            for name in order:
                made = turns[name](these, concurrency)
                if number > 0:  # the first round warms up
                    rounds[concurrency][name].append(made)
            print(f"{concurrency} clients, round {number} of {args.rounds}", file=sys.stderr, flush=True)
    print(HEADER)
    for concurrency, servers in rounds.items():
        for name, all_rounds in servers.items():
            print(row(name, concurrency, all_rounds, args.new_tokens))
    print("\nratios of tokens/s within a round: median (least-largest)\n")
    pairs = (("serve", "plain"), ("uvicorn", "plain"), ("serve", "uvicorn"), ("serve", "no HTTP"))
    print("| clients | " + " | ".join(f"{a} / {b}" for a, b in pairs) + " |\n|---:|" + "---:|" * len(pairs))
    for concurrency, servers in rounds.items():
        cells = " | ".join(ratio(servers[a], servers[b]) for a, b in pairs)
        print(f"| {concurrency} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="tiny", help="micro, tiny, small or paper")
    parser.add_argument("--concurrency", default="1,8,32", help="comma-separated numbers of clients at a time")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--slots", type=int, default=32, help="texts our servers continue at the same time")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--per-client", type=int, default=3, help="requests of each client in a round")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended then as well
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = experiment("dense_baseline", args.scale)
    store = open_tokens(config.data, open_storage().tokens)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        artifact, storage = Path(folder, "model.hrs"), Path(folder, "storage")
        packed = pack(build_model(config.model).eval(), Grids(Grid(8), Grid(8)))
        write_artifact(artifact, packed, config, store.tokenizer)
        model = load_artifact(artifact).model
        asks = make_asks(model, store, 96, args.new_tokens)
        servers = {
            "serve": running.enter_context(hrs_serve(artifact, storage, args.slots)),
            "uvicorn": running.enter_context(child(serve_in_process, artifact, storage, args.slots, ours=True)),
            "plain": running.enter_context(child(serve_plainly, config.model, store.tokenizer.to_str(), ours=False)),
        }
        lengths = [len(ask.ids) for ask in asks]
        print(
            f"scale={args.scale} prompts of {min(lengths)} to {max(lengths)} tokens, {args.new_tokens} new ones, "
            f"slots={args.slots}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f} at the start"
        )
        before = {name: server.cpu_seconds() for name, server in servers.items()}
        time.sleep(IDLE_SECONDS)
        idle = {name: (server.cpu_seconds() - before[name]) / IDLE_SECONDS for name, server in servers.items()}
        print("CPUs while nobody asks: " + ", ".join(f"{name} {share:.2f}" for name, share in idle.items()) + "\n")
        turns: dict[str, Turn] = {
            name: partial(over_http, server, n_new=args.new_tokens) for name, server in servers.items()
        }
        turns["no HTTP"] = partial(without_http, model, args.slots, n_new=args.new_tokens)
        measure(turns, asks, args)
        print(f"\nload average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
