"""What a checkpoint costs training: written between two steps, as before, or by a thread beside them.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoint --threads 1

A transformer with about 100 MB of weights (300 MB with its moments) takes real training steps in one process. In every
round, in alternation: steps alone; steps with one checkpoint written in the training thread; steps with one written by
:class:`hrs.training.checkpoint_writer.CheckpointWriter`. A round goes on until the checkpoint is on the disk. *Lost* is
the wall time beyond that of as many steps alone, so it counts what the writing thread takes from the steps as well;
*stopped* is the time in which no step can run. Prints a Markdown table of medians and the ratio of what is lost.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hrs.models import build_model
from hrs.presets import experiment
from hrs.training.checkpoint import write_checkpoint
from hrs.training.checkpoint_writer import CheckpointWriter
from hrs.training.optimizer import build_optimizer, set_rates
from hrs.training.step import Stepper

CPU = torch.device("cpu")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="time that a checkpoint takes from training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of every measurement, at least")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    changes = {
        "model.d_model": arguments.width,
        "model.d_ff": 4 * arguments.width,
        "model.max_seq_len": 128,
        "training.batch_sequences": arguments.windows,
    }
    config = experiment("dense_baseline", "small", 0, changes)
    torch.manual_seed(0)
    model = build_model(config.model).train()
    optimizer = build_optimizer(model, config.training.optimizer)
    set_rates(optimizer, 1e-4, {})
    stepper = Stepper(model, optimizer, config.training, CPU, arguments.windows)
    tokens = torch.randint(config.model.vocab_size, (arguments.windows, 129))

    def steps_until(done: Callable[[], bool]) -> int:
        n = 0
        while n < arguments.steps or not done():
            stepper.step(tokens)
            n += 1
        return n

    steps_until(lambda: True)
    seconds: dict[str, list[float]] = {"step": [], "inline lost": [], "thread lost": [], "thread stopped": []}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        writer = CheckpointWriter(Path(folder, "thread"), model, optimizer, CPU)
        writer.begin({"step": 0})  # allocates its host memory
        writer.wait()
        for number in range(1, arguments.rounds + 1):
            began = time.perf_counter()
            n = steps_until(lambda: True)
            step_seconds = (time.perf_counter() - began) / n
            seconds["step"].append(step_seconds)

            began = time.perf_counter()
            tensors = writer._state_tensors().items()
            files = {file: {name: t.detach().contiguous() for name, t in found.items()} for file, found in tensors}
            write_checkpoint(Path(folder, "inline"), {"step": number}, files)
            n = steps_until(lambda: True)
            seconds["inline lost"].append(time.perf_counter() - began - n * step_seconds)

            began = time.perf_counter()
            writer.begin({"step": number})
            seconds["thread stopped"].append(time.perf_counter() - began)
            n = steps_until(lambda: not writer.busy)
            writer.wait()
            seconds["thread lost"].append(time.perf_counter() - began - n * step_seconds)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        size, host = writer.checkpoint_bytes, writer.host_bytes
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{weights / MIB:.0f} MiB of weights, checkpoint {size / MIB:.0f} MiB, host memory {host / MIB:.0f} MiB,")
    print(f"{arguments.threads} thread(s), step {1e3 * medians['step']:.0f} ms, medians of {arguments.rounds} rounds\n")
    print("| written | lost, s | stopped, s | ratio of lost |\n|---|---:|---:|---:|")
    inline, thread = medians["inline lost"], medians["thread lost"]
    print(f"| between steps | {inline:.2f} | {inline:.2f} | |")
    print(f"| by a thread | {thread:.2f} | {medians['thread stopped']:.2f} | {inline / thread:.1f} |")
    for name, values in seconds.items():
        print(f"{name}: " + ", ".join(f"{value:.2f}" for value in values))


if __name__ == "__main__":
    main()
