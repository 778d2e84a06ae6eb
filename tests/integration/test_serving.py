"""The endpoint as users run it: Ray Serve behind real HTTP, and what happens to clients when parts of it die."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from waiting import free_port, wait_until

from hrs.data import open_tokens
from hrs.generation import Sampling, generate_text
from hrs.models import build_model
from hrs.presets import experiment
from hrs.retrieval.engrams import model_fingerprint
from hrs.training import load_model
from hrs.training.checkpoint import config_as_json
from hrs.training.checkpoint_writer import save_checkpoint
from serve.settings import Settings
from tests.strangers import listeners, require_closed, require_no_member

pytestmark = pytest.mark.slow

PROMPT = "The ship and the tide"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def run_directory(small_corpus: Path, storage: Path) -> Path:
    """A run with a checkpoint of random weights, a context of 64 tokens."""
    changes = {"data.tokenizer": "bpe:300", "data.corpus": f"jsonl:{small_corpus}", "model.max_seq_len": "64"}
    config = experiment("dense_baseline", "micro", overrides=changes)
    torch.manual_seed(0)
    model = build_model(config.model)
    directory = storage / "runs" / "tiny"
    tokens = open_tokens(config.data, storage / "tokens")
    state = {"step": 1, "config": config_as_json(config), "data": tokens.fingerprint}
    save_checkpoint(directory, model, torch.optim.AdamW(model.parameters()), state, torch.device("cpu"))
    return directory


class Application:
    """An endpoint on the session's Ray."""

    def __init__(self, port: int, settings: Settings) -> None:
        self.url, self.settings = f"http://127.0.0.1:{port}", settings

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=None, **options)

    def process(self) -> psutil.Process:
        """A replica, which is not asked over HTTP."""
        from ray import serve as ray_serve

        return psutil.Process(ray_serve.get_app_handle("tested").process_id.remote().result())

    def wait_until_up(self) -> None:
        def is_up() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/healthz").status_code == 200
            return False

        wait_until(is_up, every_seconds=0.2)

    def wait_until_idle(self) -> None:
        wait_until(lambda: httpx.get(f"{self.url}/healthz").json()["running"] == 0, every_seconds=0.1)

    def deploy(self, **changes: object) -> None:
        from ray import serve as ray_serve

        from serve.app import build

        ray_serve.run(build(self.settings.model_copy(update=changes)), name="tested", route_prefix="/")
        self.wait_until_up()


@pytest.fixture(scope="module")
def application(ray_local, run_directory: Path, storage: Path) -> Iterator[Application]:
    from ray import serve as ray_serve

    port = free_port()
    settings = Settings(
        model=str(run_directory), name="tiny", storage=str(storage), cpus_per_replica=0.5, grace_seconds=5,
        slots=4, max_queue=16, max_new_tokens=100_000,
    )  # fmt: skip
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    made = Application(port, settings)
    made.deploy()
    yield made
    ray_serve.shutdown()


def test_openais_client_gets_the_librarys_texts(application: Application, run_directory: Path, small_store) -> None:
    model, _ = load_model(run_directory)
    sampling = Sampling(seed=7, max_new_tokens=40)
    (expected,) = generate_text(model, small_store.tokenizer, [PROMPT], sampling)
    client = application.client()
    options = {"model": "tiny", "prompt": PROMPT, "seed": 7, "max_tokens": 40}
    assert client.completions.create(**options).choices[0].text == expected.text
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert len(chunks) > 20
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0
    )
    assert chat.usage.completion_tokens == 5
    assert len(client.embeddings.create(model="tiny", input=["a", "b"]).data) == 2
    assert client.models.list().data[0].id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**options | {"model": "other"})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**options, presence_penalty=1)
    assert (storage_folder := next(Path(application.settings.storage).glob("engrams/*-served"))).is_dir()
    assert (storage_folder / "gate.json").is_file(), "the validation split is at hand, so the gate is calibrated"


def test_tokens_of_a_stream_come_one_by_one(application: Application) -> None:
    options = {"model": "tiny", "prompt": "The", "max_tokens": 400, "temperature": 0}  # drawn ones may end at once
    assert len(list(application.client().completions.create(**options, stream=True))) == 400
    with application.client().completions.create(**options | {"max_tokens": 50_000}, stream=True) as stream:
        next(stream)
        assert httpx.get(f"{application.url}/healthz").json()["running"] == 1, "the first came before the last was made"
    application.wait_until_idle()


def test_a_client_that_leaves_frees_its_slot(application: Application) -> None:
    client = application.client()
    for _ in range(20):  # as many as there is room for: one that is not freed leaves none for the rest
        stream = client.completions.create(model="tiny", prompt="The", max_tokens=50_000, temperature=0, stream=True)
        next(stream)
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(
            model="tiny", prompt="The", max_tokens=50_000, temperature=0
        )
    application.wait_until_idle()


def test_a_replica_that_dies_in_a_stream_ends_it_and_another_answers(application: Application) -> None:
    client = application.client()
    stream = client.completions.create(model="tiny", prompt="The", max_tokens=50_000, temperature=0, stream=True)
    next(stream)
    victim = application.process()
    victim.kill()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)

    def answer() -> openai.types.Completion | None:
        with contextlib.suppress(openai.APIError):
            return client.completions.create(model="tiny", prompt="The", max_tokens=3, temperature=0)
        return None

    made = wait_until(answer, every_seconds=0.2)
    assert made.usage.completion_tokens == 3
    assert application.process().pid != victim.pid


def test_what_was_acknowledged_survives_a_replica_that_dies_in_a_write(application: Application) -> None:
    """Writers write without pause while their replica is killed three times."""
    acknowledged: list[str] = []
    stop = threading.Event()

    def write(writer: int) -> None:
        number = 0
        with httpx.Client(base_url=f"{application.url}/v1") as client:
            while not stop.is_set():
                text = f"memory {writer} {number}"
                number += 1
                try:
                    response = client.post("/memories", json={"input": text, "source": "crash"})
                except httpx.HTTPError:
                    continue
                if response.status_code == 200:
                    acknowledged.append(text)
                else:
                    time.sleep(0.2)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(3):
            enough = len(acknowledged) + 10
            wait_until(lambda enough=enough: len(acknowledged) >= enough)
            application.process().kill()
            application.wait_until_up()
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    listed = httpx.get(f"{application.url}/v1/memories", params={"source": "crash", "limit": 1000})
    kept = [memory["text"] for memory in listed.json()["data"]]
    assert len(acknowledged) >= 30
    assert set(acknowledged) <= set(kept)
    assert len(kept) == len(set(kept))


def test_a_thousand_connections_at_once(application: Application) -> None:
    """All are answered, most by 429; the replica lives and has grown by little."""

    async def ask(client: httpx.AsyncClient) -> int:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30}
        return (await client.post(f"{application.url}/v1/completions", json=body)).status_code

    async def flood() -> Counter:
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits) as client:
            return Counter(await asyncio.gather(*(ask(client) for _ in range(1000))))

    asyncio.run(flood())  # the first flood fills pools that stay
    replica = application.process()
    for _ in range(3):  # a leak grows each time; what the allocator takes at a peak, only once
        before = replica.memory_info().rss
        answers = asyncio.run(flood())
        assert set(answers) == {200, 429}
        assert answers[200] >= 20
        assert replica.is_running()
        grown = replica.memory_info().rss - before
        if grown < 50 * 2**20:
            break
    assert grown < 50 * 2**20
    made = application.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=3, temperature=0)
    assert made.usage.completion_tokens == 3
    print(f"1,000 connections: {dict(answers)}, {grown / 2**20:.1f} MiB more")


def test_malformed_bodies_by_the_hundred(application: Application) -> None:
    shapes = [b"", b"{", b"[]", b"null", b"\xff", b'{"model": "tiny"}', b'{"model": "tiny", "prompt": {}}',
              b'{"model": "tiny", "prompt": "x", "n": -1}', b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
              b"[" * 10_000]  # fmt: skip
    routes = ("completions", "chat/completions", "embeddings", "memories")
    with httpx.Client(base_url=f"{application.url}/v1") as client:
        headers = {"Content-Type": "application/json"}
        statuses = Counter(
            client.post(f"/{route}", content=body, headers=headers).status_code
            for route in routes for body in shapes for _ in range(5)
        )  # fmt: skip
    assert sum(statuses.values()) == 200
    assert all(400 <= status < 500 for status in statuses), statuses


def test_replicas_share_memories_and_figures(application: Application) -> None:
    application.deploy(min_replicas=2, max_replicas=2)
    with httpx.Client() as client:
        texts = [f"shared {number}" for number in range(12)]
        for text in texts:  # written by whichever replica the proxy chooses, and read at once through any
            added = client.post(f"{application.url}/v1/memories", json={"input": text, "source": "two"}).json()["data"]
            assert client.get(f"{application.url}/v1/memories/{added[0]['id']}").json() == added[0]

        def counted() -> list[int]:
            page = client.get(f"{application.url}/metrics").text
            written = re.findall(r'hrs_memories_written_total\{replica="\w+"\} (\d+)', page)
            return [int(n) for n in written]

        written = wait_until(lambda: found if sum(found := counted()) == len(texts) else None, every_seconds=0.5)
        # The replica before these may still have answered, and its figures stay for a while.
        assert sum(n > 0 for n in written) >= 2
    application.deploy(min_replicas=1, max_replicas=1)
    listed = httpx.get(f"{application.url}/v1/memories", params={"source": "two"}).json()["data"]
    assert [memory["text"] for memory in listed] == texts


def test_replicas_come_with_the_load(application: Application) -> None:
    from ray import serve as ray_serve

    def n_replicas() -> int:
        (deployment,) = ray_serve.status().applications["tested"].deployments.values()
        return deployment.replica_states.get("RUNNING", 0)

    application.deploy(max_replicas=2, target_ongoing_requests=1, upscale_delay_seconds=0.2)
    assert n_replicas() == 1
    client = application.client()
    options = {"model": "tiny", "prompt": "The", "max_tokens": 50_000, "temperature": 0, "stream": True}
    streams = [client.completions.create(**options) for _ in range(4)]
    for stream in streams:
        next(stream)

    def has_grown() -> bool:
        """Keep four texts running meanwhile: on a loaded machine one may end before the second replica is there."""
        for place, stream in enumerate(streams):
            if next(stream, None) is None:
                streams[place] = client.completions.create(**options)
        return n_replicas() == 2

    wait_until(has_grown)
    for stream in streams:
        stream.close()


# ---- the command -----------------------------------------------------------------------------------------------------


class Command:
    """``hrs serve`` as a process."""

    def __init__(self, model: Path, storage: Path, *options: str) -> None:
        self.port = free_port()
        program = [sys.executable, "-c", "from hrs.cli import main; main()", "serve", str(model)]
        self.process = subprocess.Popen(
            [*program, "--port", str(self.port), *options],
            env=os.environ | {"HRS_STORAGE": str(storage)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self.up = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("stop:"):
                self.up.set()
        self.up.set()

    def end(self, how: signal.Signals) -> float:
        began = time.monotonic()
        self.process.send_signal(how)
        assert self.process.wait() == 0, "".join(self.said)
        return time.monotonic() - began

    def replica(self) -> psutil.Process:
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.name().startswith("ray::ServeRepl")
        ]
        return found

    def wait_until(self, condition: Callable[[httpx.Response], bool]) -> None:
        """Until ``/healthz`` says so."""
        wait_until(lambda: condition(httpx.get(f"http://127.0.0.1:{self.port}/healthz")), every_seconds=0.2)

    def __enter__(self) -> "Command":
        self.up.wait()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()


class Newcomers:
    """Asks an endpoint that stops again and again, until its process has ended."""

    def __init__(self, command: Command) -> None:
        self._command, self._answers = command, []
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        alone = httpx.Limits(max_keepalive_connections=0)  # every request comes by a connection of its own
        with httpx.Client(base_url=f"http://127.0.0.1:{self._command.port}", limits=alone) as client:
            while self._command.process.poll() is None:
                began = time.monotonic()
                try:
                    answer = client.get("/v1/models")
                except httpx.TransportError as error:
                    answer = error
                self._answers.append((time.monotonic() - began, answer))
                time.sleep(0.02)

    def wait_until_told(self) -> None:
        """Return once some were refused: at once, not when the process has ended."""

        def n_refused() -> int:
            return sum(isinstance(answer, httpx.Response) and answer.status_code == 503 for _, answer in self._answers)

        wait_until(lambda: n_refused() > 5, self._thread.is_alive)

    def were_told(self) -> None:
        """Check that all were told by 503 in OpenAI's shape, or by nobody being there any more, and by nothing else."""
        self._thread.join()
        kinds = [answer.status_code if isinstance(answer, httpx.Response) else 0 for _, answer in self._answers]
        told = [answer for _, answer in self._answers if isinstance(answer, httpx.Response)][kinds.count(200) :]
        assert kinds == [200] * kinds.count(200) + [503] * len(told) + [0] * kinds.count(0)
        for answer in told:
            assert answer.json()["error"]["type"] == "service_unavailable_error"
            assert int(answer.headers["retry-after"]) >= 1
        slowest = max(seconds for seconds, _ in self._answers)
        print(f"{Counter(kinds)}, the slowest after {slowest:.2f} s")


def test_the_command_serves_drains_and_leaves_nothing(run_directory: Path, storage: Path) -> None:
    with Command(run_directory, storage, "--name", "tiny", "--grace", "3600") as command:
        said = "".join(command.said)
        assert f"http://127.0.0.1:{command.port}/v1" in said
        assert said.startswith(f"starting:  1 replica of tiny, on 127.0.0.1:{command.port}\n")
        assert "warning: this model was never audited" in said
        assert "\ncausal:    unknown, no audit was run" in said
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{command.port}/v1", api_key="x", max_retries=0)
        kept = httpx.post(f"http://127.0.0.1:{command.port}/v1/memories", json={"input": "kept"}).json()
        family = psutil.Process(command.process.pid).children(recursive=True)
        options = {"model": "tiny", "prompt": "The", "max_tokens": 2000, "n": 8, "temperature": 0}
        stream = client.completions.create(**options, stream=True)
        next(stream)
        for process in (*family, psutil.Process(command.process.pid)):  # as a service manager does it
            process.send_signal(signal.SIGTERM)
        newcomers = Newcomers(command)
        newcomers.wait_until_told()
        time.sleep(5)  # the replica is done long before a client that reads late
        finished = [chunk.choices[0].finish_reason for chunk in stream]
        assert finished.count("length") == 8
        assert command.process.wait() == 0, "".join(command.said)
        newcomers.were_told()
    psutil.wait_procs(family)
    (folder,) = storage.glob("engrams/*-served")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert modes == {0o700, 0o600}, "what users say is nobody else's"
    with Command(run_directory, storage, "--grace", "3600") as again:  # which it does not wait for, as nothing runs
        url = f"http://127.0.0.1:{again.port}/v1"
        texts = [memory["text"] for memory in httpx.get(f"{url}/memories").json()["data"]]
        assert kept["data"][0]["text"] in texts
        seconds = again.end(signal.SIGINT)
    print(f"stopped in {seconds:.1f} s")
    said = "".join(command.said + again.said)
    assert not re.search("INFO|raylet|Error|Traceback", said), said


def test_only_the_endpoint_is_open_and_it_ends_when_no_replica_can_live(
    run_directory: Path, storage: Path, tmp_path: Path
) -> None:
    """Nobody else can use the Ray of the command: it would run code as the user. Then its model is taken away."""
    model = tmp_path / "run"
    shutil.copytree(run_directory, model)
    with Command(model, storage, "--name", "tiny", "--host", "::1") as command:
        root = psutil.Process(command.process.pid)
        kinds = require_closed(root, tmp_path / "mark", own_ports={command.port})
        assert kinds >= {"gcs_server", "raylet", "object manager", "worker", "agent", "replica", "http"}
        require_no_member(root)
        (address,) = {address for _, address, port in listeners(root) if port == command.port}
        assert address == "::1"
        asked = {"model": "tiny", "prompt": "The", "max_tokens": 3, "temperature": 0}
        made = httpx.post(f"http://[::1]:{command.port}/v1/completions", json=asked, timeout=60).json()
        assert made["usage"]["completion_tokens"] == 3
        model.rename(tmp_path / "moved")
        command.replica().kill()
        statuses = Counter()
        with contextlib.suppress(httpx.TransportError):  # it ends
            while True:
                statuses[
                    httpx.post(f"http://[::1]:{command.port}/v1/completions", json=asked, timeout=30).status_code
                ] += 1
                time.sleep(0.1)
        assert set(statuses) <= {200, 500, 503} and statuses[503] > 10, statuses
        assert command.process.wait() == 2
    assert command.said[-1].startswith(f"error: no process of the model can be started: there is no model at {model}: ")
    assert f"endpoint:  http://[::1]:{command.port}/v1" in "".join(command.said)


def test_replies_are_cut_off_by_a_second_signal_also_those_of_a_new_replica(run_directory: Path, storage: Path) -> None:
    """That the grace does the same is tested without Ray."""

    def both_run(health: httpx.Response) -> bool:
        return health.json()["running"] == 2 * body["n"]

    options = ["--name", "tiny", "--grace", "3600", "--max-new-tokens", "50000"]
    with Command(run_directory, storage, *options) as command:
        base = f"http://127.0.0.1:{command.port}/v1"
        body = {"model": "tiny", "prompt": "The", "max_tokens": 50_000, "n": 4, "temperature": 0}
        client = openai.OpenAI(base_url=base, api_key="x", max_retries=0, timeout=None)
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(httpx.post, f"{base}/completions", json=body, timeout=None)
            stream = client.completions.create(**body, stream=True)
            next(stream)
            command.wait_until(both_run)
            command.replica().kill()
            with pytest.raises(openai.APIError, match="ended before it had answered"):
                list(stream)
            died = asked.result()
            assert (died.status_code, died.json()["error"]["code"]) == (500, "replica_died")
            command.wait_until(lambda health: health.status_code == 200)
            asked = threads.submit(httpx.post, f"{base}/completions", json=body, timeout=None)
            stream = client.completions.create(**body, stream=True)
            next(stream)
            command.wait_until(both_run)
            os.killpg(command.process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
            newcomers = Newcomers(command)
            newcomers.wait_until_told()
            os.killpg(command.process.pid, signal.SIGINT)
            with pytest.raises(openai.APIError, match="stopped before this reply was finished"):
                list(stream)
            cut_off = asked.result()
        assert cut_off.status_code == 503
        assert "stopped before this reply was finished" in cut_off.json()["error"]["message"]
        assert command.process.wait() == 0, "".join(command.said)
        newcomers.were_told()


def test_a_mistake_is_one_sentence_before_anything_starts(run_directory: Path, storage: Path, tmp_path: Path) -> None:
    def said(*options: str) -> str:
        program = [sys.executable, "-c", "from hrs.cli import main; main()", "serve"]
        ended = subprocess.run(
            [*program, *options], env=os.environ | {"HRS_STORAGE": str(tmp_path)}, capture_output=True, text=True
        )
        assert ended.returncode == 2, ended.stdout
        return ended.stderr.strip().splitlines()[-1]

    assert said(str(tmp_path / "nothing")).startswith("error: there is no model at")
    assert "slots: Input should be greater than or equal to 1" in said(str(tmp_path), "--slots", "0")
    assert said(str(run_directory), "--port", "99999").startswith("error: Invalid value for '--port'")
    shutil.copytree(storage, tmp_path, dirs_exist_ok=True)
    model, _ = load_model(run_directory)
    manifest = tmp_path / "engrams" / f"{model_fingerprint(model)}-served" / "store" / "manifest.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("{")
    assert said(str(run_directory)).startswith(f"error: engram store {manifest.parent} has a damaged or missing file")
