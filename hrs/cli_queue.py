"""``hrs queue ...``: look at the durable queue, change it, and work on it."""

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hrs import strict_json
from hrs.errors import HRSError

if TYPE_CHECKING:
    from hrs.queue import Queue, Wanted
    from hrs.queue.admission import Gpu

app = typer.Typer(help="The durable queue: what is to be computed, what runs, and what you want of it.",
                  no_args_is_help=True)  # fmt: skip

Name = Annotated[str, typer.Argument(metavar="X", help="A study, RUN@STUDY, or a stage by the beginning of its key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
GIB = 2**30
_SHOWN = 1000
"""Most stages that are watched for people."""


def _open() -> tuple["Queue", Path]:
    from hrs.queue import open_queue
    from hrs.storage import open_storage

    root = open_storage().root
    return open_queue(root), root


@app.command(context_settings={"ignore_unknown_options": True})
def add(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="Any program and its arguments.")],
    name: Annotated[str | None, typer.Option(help="What it is called; the command itself if not given.")] = None,
    gpu_gib: Annotated[float, typer.Option(min=0, help="GPU memory to reserve; 0 for work on the CPU.")] = 0.0,
    cpus: Annotated[float, typer.Option(min=0, help="Cores to reserve.")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="How long it takes, if you know.")] = 0.0,
    study: Annotated[str, typer.Option(help="The study it belongs to.")] = "commands",
    priority: Annotated[int, typer.Option(help="Studies with a higher one come first.")] = 0,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Environment of the program.")] = None,
) -> None:
    """Put a program into the queue: hrs queue add --gpu-gib 6 -- python train.py --lr 3e-4."""
    from hrs.queue import Resources
    from hrs.queue.commands import command_study

    environment = {}
    for pair in env or []:
        variable, equals, value = pair.partition("=")
        if not equals or not variable:
            raise HRSError(f"--env {pair} is not NAME=VALUE: write for example --env WANDB_MODE=offline")
        environment[variable] = value
    resources = Resources(cpus=cpus, gpu_bytes=int(gpu_gib * GIB), minutes=minutes)
    spec = command_study(
        command, name=name or shlex.join(command)[:200], cwd=Path.cwd(), environment=environment, resources=resources,
        study=study, priority=priority,
    )  # fmt: skip
    queue, _ = _open()
    submitted = queue.submit(spec, extend=True)
    key = spec.stages[0].key
    if submitted.new:
        print(f"added {key[:8]} to study '{study}': 'hrs queue work' runs it, 'hrs queue show {key[:8]}' looks at it")
    else:
        print(f"{key[:8]} is in the queue already: see 'hrs queue show {key[:8]}', or give it another --name")


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(metavar="[X]", help="Only of this study, run or stage.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also what is finished, failed or cancelled.")] = False,
    as_json: AsJson = False,
) -> None:
    """List studies and stages: what runs, what comes next, what waits for what."""
    from hrs.queue.views import list_stages, list_studies, to_json

    queue, _ = _open()
    target = queue.target(name) if name else None
    studies = [view for view in list_studies(queue) if target is None or view.id == target.study]
    stages = list_stages(queue, target, settled=all_ or target is not None)
    if as_json:
        print(strict_json.dumps({"studies": to_json(studies), "stages": to_json(stages)}))
        return
    if not studies and not stages:
        print("the queue is empty: put something in with 'hrs queue add -- COMMAND'")
        return
    _table(
        ["study", "wanted", "priority", "runs", "stages"],
        [
            [v.title, v.wanted, v.priority, v.runs, ", ".join(f"{n} {state}" for state, n in sorted(v.stages.items()))]
            for v in studies
        ],
    )
    if stages:
        print()
        _table(
            ["stage", "kind", "name", "state", "on", "progress", "why"],
            [[v.key[:8], v.kind, v.label, v.state, v.device, _progress(v.progress), v.why] for v in stages],
        )


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show one study, run or stage: its stages, their attempts, and what happened."""
    from hrs.queue.views import list_attempts, list_events, list_stages, to_json

    queue, root = _open()
    target = queue.target(name)
    stages = list_stages(queue, target)
    events = list_events(queue, target)
    tries = {view.key: list_attempts(queue, view.key) for view in stages}
    if as_json:
        told = {
            "name": target.name,
            "stages": [stage | {"tries": to_json(tries[stage["key"]])} for stage in to_json(stages)],
            "events": events,
        }
        print(strict_json.dumps(told))
        return
    for view in stages:
        print(f"{view.key[:8]}  {view.kind}  {view.label}: {view.state}{f' ({view.why})' if view.why else ''}")
        for attempt in tries[view.key]:
            where = f" on {attempt.device}" if attempt.device else ""
            parts = [f"attempt {attempt.number}{where}", f"{attempt.seconds:.0f} s", attempt.outcome, attempt.message]
            print("    " + ", ".join(filter(None, [*parts, _progress(attempt.progress)])))
        result = root / "stages" / view.key / "result.json"
        if view.state == "finished" and result.exists():
            print(f"    result: {result.read_text(encoding='utf-8')[:300]}")
    print()
    for event in events:
        at = datetime.fromtimestamp(event["time"]).strftime("%Y-%m-%d %H:%M:%S")
        print(f"{at}  {event['stage'][:8]:8}  {event['kind']}  {event['message']}".rstrip())


def _want(name: str, wanted: "Wanted", done: str) -> None:
    queue, _ = _open()
    target = queue.target(name)
    n = queue.want(wanted, target)
    print(f"{target.name}: {_count(n)} {done}")


@app.command()
def pause(name: Name) -> None:
    """Let it rest: what runs keeps what it has computed and stops."""
    from hrs.queue import Wanted

    _want(name, Wanted.PAUSE, "will rest")


@app.command()
def resume(name: Name) -> None:
    """Let what is paused or cancelled run again."""
    from hrs.queue import Wanted

    _want(name, Wanted.RUN, "may run")


@app.command()
def cancel(name: Name) -> None:
    """Stop it: what is finished stays, and other studies that need a stage still get it."""
    from hrs.queue import Wanted

    _want(name, Wanted.CANCEL, "will not run")


@app.command()
def retry(name: Name) -> None:
    """Queue what failed or did not fit once more."""
    queue, _ = _open()
    target = queue.target(name)
    print(f"{target.name}: {_count(queue.retry(target))} queued again")


@app.command()
def priority(
    name: Name, value: Annotated[int, typer.Argument(metavar="N", help="0 by default; higher first.")]
) -> None:
    """Put it in front of others, or behind. One is worth an hour of waiting."""
    queue, _ = _open()
    target = queue.target(name)
    print(f"{target.name}: priority {value} for {_count(queue.prioritise(value, target))}")


@app.command()
def remove(name: Name) -> None:
    """Forget a study that does not run; files of its stages stay."""
    queue, _ = _open()
    queue.remove(name)
    print(f"{name} is not in the queue any more")


@app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until its stage has ended.")] = False,
) -> None:
    """Print what the attempts at a stage have printed."""
    from hrs.queue.attempts import LOG_FILE, stage_directory
    from hrs.queue.views import list_stages

    queue, root = _open()
    target = queue.target(name)
    stages = list_stages(queue, target)
    if len(stages) != 1:
        keys = ", ".join(f"{view.key[:8]} ({view.kind})" for view in stages[:5])
        raise HRSError(f"{name} has {len(stages)} stages: name one of {keys}")
    path = stage_directory(root, stages[0].key) / LOG_FILE
    position = _print_from(path, 0)
    if position == 0 and not follow:
        raise HRSError(f"stage {stages[0].key[:8]} has printed nothing yet: it is {stages[0].state}")
    while follow and list_stages(queue, target)[0].state in ("queued", "running", "waiting"):
        time.sleep(0.5)
        position = _print_from(path, position)
    _print_from(path, position)


def _print_from(path: Path, position: int) -> int:
    """Print a file from a place on; returns where it ends."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(position)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)


@app.command()
def work(
    gpus: Annotated[str | None, typer.Option(help="Plan for these instead of what is here, as 1x16 (GiB).")] = None,
    cpus: Annotated[float | None, typer.Option(min=0.1, help="Cores to use; all by default.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End when nothing is left that can run.")] = False,
) -> None:
    """Work on the queue on this machine, without Ray: Ctrl-C stops, and what runs keeps what it has computed."""
    from hrs.queue.dispatcher import Dispatcher
    from hrs.queue.executors import ProcessExecutor
    from hrs.queue.views import list_stages

    queue, root = _open()
    executor = ProcessExecutor(queue, root, cpus=cpus, gpus=_gpus(gpus))
    (host,) = executor.hosts
    offered = ", ".join(f"{gpu.name} with {gpu.bytes / GIB:.1f} GiB" for gpu in host.gpus) or "no GPU"
    print(f"working on {queue.database.name} with {host.cpus:g} cores and {offered}; Ctrl-C stops", flush=True)
    shown = {view.key: view.state for view in list_stages(queue, limit=_SHOWN)}

    def idle() -> bool:
        views = list_stages(queue, limit=_SHOWN)
        for view in views:
            if shown.get(view.key, "queued") != view.state and view.state not in ("queued", "waiting"):
                why = f" ({view.why})" if view.why else ""
                print(f"{view.key[:8]}  {view.label}: {view.state}{why}", flush=True)
            shown[view.key] = view.state
        return once and not any(view.state in ("queued", "running") for view in views)

    try:
        Dispatcher(queue, executor, root).run(idle, poll_seconds=0.2)
    except KeyboardInterrupt:
        print("stopped: what ran is in the queue again, with what it had computed")


def _gpus(text: str | None) -> tuple["Gpu", ...]:
    """Return the GPUs of this machine with the memory that is free, or those that ``text`` describes."""
    from hrs.queue.admission import Gpu

    if text is None:
        from hrs.gpu import probe_gpus

        return tuple(Gpu(name=f"cuda:{gpu.index}", bytes=gpu.free_bytes, kind=gpu.kind) for gpu in probe_gpus())
    from hrs.cluster.hardware import parse_gpus

    gpus = [gpu for node in parse_gpus(text) for gpu in node.gpus]
    return tuple(Gpu(name=f"cuda:{i}", bytes=gpu.free_bytes, kind=gpu.kind) for i, gpu in enumerate(gpus))


def _count(n: int) -> str:
    return f"{n} stage" if n == 1 else f"{n} stages"


def _progress(values: dict[str, Any] | None) -> str:
    if not values:
        return ""
    step = f"{values['step']}/{values['steps']}" if {"step", "steps"} <= values.keys() else ""
    rest = [f"{k} {v:.4g}" for k, v in values.items() if k != "steps" and not (step and k == "step")
            and isinstance(v, int | float)]  # fmt: skip
    return " ".join([step, *rest[:3]]).strip()


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns that fit the terminal; the last one is cut."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [min(max(len(row[i]) for row in cells), 40) for i in range(len(header))]
    room = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else None
    for row in cells:
        line = "  ".join(f"{cell[:width]:{width}}" for cell, width in zip(row[:-1], widths, strict=False))
        print(f"{line}  {row[-1]}".rstrip()[:room])
