"""``hrs ...``: a thin face on the functions the jobs call. Heavy imports wait until a command needs them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hrs.config import ExperimentConfig, flatten, parse_assignments
from hrs.presets import PRESETS, compare, experiment, lineage

app = typer.Typer(
    help="An experiment queue for language-model research: name ablations, get a table you can believe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Scale = Annotated[str, typer.Option(help="micro, tiny, small or paper.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override any config field.")]
Corpus = Annotated[
    str | None, typer.Option(help="wiki-mini, bbc, wikitext-103, hf:NAME, text:PATH, jsonl:PATH, parquet:PATH.")
]


@app.command()
def presets() -> None:
    """List every preset with its parent and what it changes."""
    width = max(map(len, PRESETS))
    for preset in PRESETS.values():
        print(f"{preset.name:<{width}}  {preset.summary}")


@app.command()
def show(preset: str, scale: Scale = "tiny", overrides: Overrides = None) -> None:
    """Print a preset's lineage, parameters and every config field."""
    config = experiment(preset, scale, overrides=_changes(None, overrides))
    print(" -> ".join(p.name for p in lineage(preset)))
    print(f"{_parameters(config):,} parameters at scale {scale}\n")
    for name, value in flatten(config).items():
        print(f"{name} = {value}")


@app.command()
def diff(left: str, right: str, scale: Scale = "tiny") -> None:
    """Print the config fields in which two presets differ, and their parameter counts."""
    a, b = experiment(left, scale), experiment(right, scale)
    for field in compare(a, b):
        print(f"{field.field}\n  - {field.left}\n  + {field.right}")
    print(f"parameters\n  - {_parameters(a):,}\n  + {_parameters(b):,}")


@app.command()
def train(
    preset: str,
    scale: Scale = "tiny",
    seed: Seed = 0,
    corpus: Corpus = None,
    overrides: Overrides = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train, evaluate and audit one preset in this process, without Ray; continues a run that was cut off."""
    from hrs.cluster.inline import train_inline
    from hrs.cluster.study import Study
    from hrs.training import Runtime

    study = Study(title=preset, presets=(preset,), scale=scale, seeds=(seed,), overrides=_changes(corpus, overrides))
    train_inline(study, Runtime(threads=threads))


@app.command()
def audit(
    model: Annotated[str, typer.Argument(metavar="PRESET|CHECKPOINT", help="A preset's name, or a run's directory.")],
    scale: Scale = "micro",
    seed: Seed = 0,
    random_tokens: Annotated[
        bool,
        typer.Option("--random-tokens", help="Also train on random tokens, which no causal model can learn (slow)."),
    ] = False,
) -> None:
    """Prove that a model cannot see the token it predicts; status 1 if it can."""
    import torch

    from hrs.evaluation import audit as run_audit
    from hrs.models import build_model
    from hrs.training import load_model

    if Path(model).exists():
        network, _ = load_model(Path(model))
    else:
        torch.manual_seed(seed)
        network = build_model(experiment(model, scale, seed).model)
    report = run_audit(network, seed=seed, random_token_training=random_tokens)
    print(report)
    raise typer.Exit(0 if report.causal else 1)


@app.command()
def evaluate(
    checkpoint: Path,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    save: Annotated[
        Path | None, typer.Option(help="Write evaluation.json and documents.arrow into this folder.")
    ] = None,
) -> None:
    """Score a checkpoint on a whole split of the corpus it was trained on."""
    from hrs.data import open_tokens
    from hrs.evaluation import evaluate as run_evaluation
    from hrs.storage import open_storage
    from hrs.training import load_model

    network, config = load_model(checkpoint)
    store = open_tokens(config.data, open_storage().tokens)
    result = run_evaluation(network, store, split, stride_frac=config.evaluation.stride_frac)
    print(f"{config.preset} on {config.data.corpus}, {split} split, {result.n_tokens:,} tokens")
    for name, value in result.metrics().items():
        print(f"{name:<20} {value:.6g}")
    if save:
        result.save(save)


@app.command()
def report(study: Annotated[str, typer.Argument(help="The study's name, such as v1-tiny.")]) -> None:
    """Print a study's table and write its page again from what was tracked."""
    from hrs.report import format_table, write_report
    from hrs.storage import open_storage
    from hrs.tracking import Tracker

    storage = open_storage()
    records = Tracker(storage).study_records(study)
    files = write_report(study, records, storage.report(study), command=f"hrs report {study}")
    print(f"{format_table(records)}\n\nreport: {files.html}")


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000) -> None:
    """Show every run in MLflow's browser interface, until Ctrl-C."""
    from hrs.storage import open_storage
    from hrs.tracking import Tracker, ui_command

    storage = open_storage()
    Tracker(storage)  # makes the store if there is none yet
    command = ui_command(storage, port=port)
    print(f"MLflow UI of {storage.root}: http://127.0.0.1:{port}", flush=True)
    os.execvp(command[0], command)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(context: typer.Context, study: Annotated[str, typer.Argument(help="v1 or v1_with_legacy.")]) -> None:
    """Print what a study would do, without starting it. Takes the options of jobs/ablation_sweep.py."""
    from jobs.ablation_sweep import main as sweep

    raise typer.Exit(sweep(["--study", study, "--dry-run", *context.args]))


def _changes(corpus: str | None, overrides: list[str] | None) -> dict[str, str]:
    return parse_assignments(overrides or []) | ({"data.corpus": corpus} if corpus else {})


def _parameters(config: ExperimentConfig) -> int:
    import torch

    from hrs.models import build_model

    with torch.device("meta"):
        return build_model(config.model).count_parameters()


def main() -> None:
    """The console script."""
    from jobs.entry import run_entry

    run_entry(app)
