"""How well the queue packs GPUs, in its simulator: against the lower bound, one run per GPU, and fixed fractions.

    python -m benchmarks.packing

Mixes of runs as they occur: seeds of tiny models that use a part of a GPU's time, small ones, and a few large ones. The
lower bound is the largest of three: the work over all GPUs, the longest run, and memory times minutes over all memory.
``one per GPU`` is first come, first served. ``fractions`` is Ray Tune with a fraction set by hand for each kind
of run, the smallest that never exceeds the memory of the smallest GPU that it fits.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

from hrs.queue import Resources, RunSpec, StageSpec, StudySpec
from hrs.queue.admission import Decision, Gpu, Host, Placement, Tenant, admit
from hrs.queue.simulator import simulate

GIB = 2**30
KINDS = {"tiny": (0.9, 2.5, 8, 20, 0.15, 0.35), "small": (3, 6, 20, 60, 0.4, 0.7), "large": (9, 14, 60, 90, 0.9, 1.0)}
"""Memory in GiB, minutes, and share of a GPU's time, each from and to."""
MIXES = {"small runs": {"tiny": 48, "small": 6}, "all sizes": {"tiny": 24, "small": 12, "large": 4}}
MACHINES = {"1 x 16 GB": (14.9,), "4 mixed": (7.4, 14.9, 22.0, 44.0)}


def draw(mix: dict[str, int], seed: int) -> tuple[StudySpec, dict[str, float]]:
    """Return a study of runs, and the share of a GPU's time that each one needs."""
    source = random.Random(seed)
    stages, busy = [], {}
    for kind, n in mix.items():
        low, high, short, long, idle, full = KINDS[kind]
        for i in range(n):
            key = f"{kind}-{i:03}"
            minutes = source.uniform(short, long)
            busy[key] = source.uniform(idle, full)
            bytes_ = int(source.uniform(low, high) * GIB)
            resources = Resources(gpu_bytes=bytes_, minutes=minutes, busy_frac=busy[key])
            stages.append(StageSpec(key=key, kind=kind, label=key, function="a:b", resources=resources))
    source.shuffle(stages)
    run = RunSpec(key="run", label="run", definition={}, stages=tuple(stage.key for stage in stages))
    return StudySpec(title="mix", definition={}, runs=(run,), stages=tuple(stages)), busy


def lower_bound(study: StudySpec, busy: dict[str, float], gib: Sequence[float]) -> float:
    """Return minutes that no schedule can beat."""
    needs = [stage.resources for stage in study.stages]
    work = sum(stage.resources.minutes * busy[stage.key] for stage in study.stages) / len(gib)
    memory = sum(need.minutes * need.gpu_bytes for need in needs) / (sum(gib) * GIB)
    return max(work, memory, max(need.minutes for need in needs))


def one_per_gpu(
    candidates: Sequence[StageSpec], hosts: Sequence[Host], tenants: Sequence[Tenant], now: float
) -> Decision:
    """Give every run the next free GPU that is large enough for it, in the order in which they came."""
    return _fixed(candidates, hosts, tenants, dict.fromkeys(KINDS, 1.0))


def by_fractions(gib: Sequence[float]) -> dict[str, float]:
    """Return the fraction of a GPU for each kind of run that is safe on every GPU on which it could land."""
    fractions = {}
    for kind, (_, most, *_rest) in KINDS.items():
        smallest = min(size for size in gib if size >= most)
        fractions[kind] = 1.0 / int(smallest / most)
    return fractions


def _fixed(
    candidates: Sequence[StageSpec], hosts: Sequence[Host], tenants: Sequence[Tenant], fractions: dict[str, float]
) -> Decision:
    """Admit by fractions, which know nothing of memory, where the memory suffices; later runs do not overtake."""
    (host,) = hosts
    used = {gpu.name: 0.0 for gpu in host.gpus}
    for tenant in tenants:
        used[tenant.gpu] += tenant.cpus  # carries the fraction, see below
    placements = []
    for stage in candidates:
        fraction = fractions[stage.kind]
        most = KINDS[stage.kind][1] * GIB
        fitting = [gpu.name for gpu in host.gpus if gpu.bytes >= most and used[gpu.name] + fraction <= 1 + 1e-9]
        if not fitting:
            break
        name = max(fitting, key=lambda gpu: used[gpu])
        used[name] += fraction
        marked = replace(stage, resources=replace(stage.resources, cpus=fraction))
        placements.append(Placement(stage=marked, places=((host.name, name),)))
    return Decision(placements=tuple(placements), impossible=())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="drawn mixes; medians are printed")
    args = parser.parse_args()
    print(f"{'machine':12}{'mix':13}{'bound, min':>11}{'queue':>8}{'one per GPU':>13}{'fractions':>11}{'gain':>8}")
    for machine, gib in MACHINES.items():
        gpus = tuple(Gpu(name=f"cuda:{i}", bytes=int(size * GIB)) for i, size in enumerate(gib))
        hosts = (Host(name="here", cpus=1e9, gpus=gpus),)
        fractions = by_fractions(gib)
        for mix, numbers in MIXES.items():
            rows = []
            for seed in range(args.seeds):
                study, busy = draw(numbers, seed)
                bound = lower_bound(study, busy, gib)
                times = [
                    simulate([study], hosts, busy=busy, admission=policy).makespan_minutes
                    for policy in (
                        admit, one_per_gpu,
                        lambda c, h, t, now, f=fractions: _fixed(c, h, t, f),
                    )
                ]  # fmt: skip
                rows.append([bound, *(time / bound for time in times), times[1] / times[0]])
            bound, ours, single, fixed, gain = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{machine:12}{mix:13}{bound:11.0f}{ours:8.2f}{single:13.2f}{fixed:11.2f}{gain:7.2f}x")


if __name__ == "__main__":
    main()
