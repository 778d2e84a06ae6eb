"""A program that the queue can run without knowing it: reports numbers, saves on SIGTERM, goes on from its file.

hrs queue add --name halves -- python examples/any_program.py --steps 200
hrs queue work --once
hrs queue show halves@commands
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.01, help="per step")
    parser.add_argument("--state", type=Path, default=Path("any_program.json"))
    args = parser.parse_args()
    # The queue asks a program to stop by SIGTERM, and kills it after the grace time.
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    step = json.loads(args.state.read_text())["step"] if args.state.exists() else 0
    print(f"on GPU {os.environ.get('CUDA_VISIBLE_DEVICES') or 'none'}, from step {step}", flush=True)
    while step < args.steps and not stop:
        step += 1
        time.sleep(args.seconds)
        if step % 10 == 0:  # lines of JSON are the progress that `hrs queue list` shows
            print(json.dumps({"step": step, "steps": args.steps, "loss": 4.0 * 0.99**step}), flush=True)
    if stop:
        args.state.write_text(json.dumps({"step": step}))
        sys.exit(128 + stop[0])
    args.state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
