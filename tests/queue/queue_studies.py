"""Small studies for tests of the queue."""

from hrs.queue.records import Resources, RunSpec, StageSpec, StudySpec


def stage(key: str, *inputs: str, kind: str = "train", gpu_bytes: int = 0, minutes: float = 0.0) -> StageSpec:
    resources = Resources(gpu_bytes=gpu_bytes, minutes=minutes)
    return StageSpec(key=key, kind=kind, label=key, function="builtins:print", inputs=inputs, resources=resources)


def study(title: str, *names: str, priority: int = 0) -> StudySpec:
    """One run per name: tokens (shared by all), its training and its evaluation; then a report over all."""
    stages = [stage("tokens", kind="tokens")]
    runs = []
    for name in names:
        stages += [stage(f"train-{name}", "tokens"), stage(f"evaluate-{name}", f"train-{name}", kind="evaluate")]
        own = ("tokens", f"train-{name}", f"evaluate-{name}")
        runs.append(RunSpec(key=f"run-{name}", label=name, definition={"name": name}, stages=own))
    report = f"report-{title}"
    stages.append(stage(report, *(f"evaluate-{name}" for name in names), kind="report"))
    return StudySpec(
        title=title, definition={"names": list(names)}, runs=tuple(runs), stages=tuple(stages), own_stages=(report,),
        priority=priority,
    )  # fmt: skip


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        return self.time
