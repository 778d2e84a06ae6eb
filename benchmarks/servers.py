"""The servers that :mod:`benchmarks.serving` compares, each in processes of its own."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

from benchmarks.train_throughput import gpt2_of
from hrs.config import ModelConfig
from serve.api import make_api
from serve.opening import open_backend
from serve.settings import parse_settings

TEMPERATURE, TOP_K = 0.9, 50
START_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    url: str
    pid: int
    ours: bool
    """Whether it speaks OpenAI's API in full."""

    def cpu_seconds(self) -> float:
        """Of the process and all below it, since each began."""
        total, root = 0.0, psutil.Process(self.pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:2])
        return total


# ---- what runs in the processes --------------------------------------------------------------------------------------


def serve_in_process(artifact: Path, storage: Path, slots: int, port: int) -> None:
    """The API over a model in this process."""
    backend = open_backend(
        parse_settings({"model": str(artifact), "storage": str(storage), "name": "hrs", "slots": slots})
    )
    uvicorn.run(make_api(backend), host="127.0.0.1", port=port, log_level="error")
    backend.close()


class Completion(BaseModel):
    prompt: str
    max_tokens: int


def serve_plainly(config: ModelConfig, tokenizer_json: str, port: int) -> None:
    """A GPT-2 of the config's shape with random weights behind FastAPI, as people write it: one text at a time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = gpt2_of(config).eval()
    model.generation_config.eos_token_id = None  # every text to the last token
    model.generation_config.pad_token_id = 0
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json))
    app, lock = FastAPI(), threading.Lock()

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    def completions(body: Completion) -> StreamingResponse:
        inputs = tokenizer(body.prompt, return_tensors="pt")
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        counts: list[int] = []

        def work() -> None:
            with lock:
                made = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    streamer=streamer,
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_k=TOP_K,
                    max_new_tokens=body.max_tokens,
                    use_cache=True,
                )
            counts.append(made.shape[1] - inputs["input_ids"].shape[1])

        def events() -> Iterator[str]:
            thread = threading.Thread(target=work)
            thread.start()
            for text in streamer:
                yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
            thread.join()
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': counts[0]}})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


# ---- starting and stopping them --------------------------------------------------------------------------------------


@contextlib.contextmanager
def child(target: Callable[..., None], *args: object, ours: bool) -> Iterator[Server]:
    """``target(*args, port)`` in a process of its own, ended at the end."""
    port = _free_port()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(*args, port), daemon=True)
    process.start()
    try:
        _wait_until_ready(port, process.is_alive)
        assert process.pid is not None
        yield Server(f"http://127.0.0.1:{port}", process.pid, ours)
    finally:
        process.terminate()
        process.join(30)
        if process.is_alive():
            process.kill()


@contextlib.contextmanager
def hrs_serve(artifact: Path, storage: Path, slots: int) -> Iterator[Server]:
    """The command as users run it, interrupted at the end."""
    port = _free_port()
    arguments = ["serve", str(artifact), "--port", str(port), "--slots", str(slots), "--name", "hrs"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from hrs.cli import main; main()", *arguments],
        env={**os.environ, "HRS_STORAGE": str(storage)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_until_ready(port, lambda: process.poll() is None)
        yield Server(f"http://127.0.0.1:{port}", process.pid, ours=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=90)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(port: int, alive: Callable[[], bool]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and alive():
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
            return
        time.sleep(0.2)
    raise SystemExit("a server did not come up")
