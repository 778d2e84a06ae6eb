"""``hrs ...``: a thin face on the functions the jobs call. Heavy imports wait until a command needs them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hrs import cli_queue, cli_storage
from hrs.cli_storage import StudyName
from hrs.config import ExperimentConfig, parse_assignments
from hrs.config.checks import LARGEST_SEED, LARGEST_SIZE
from hrs.errors import HRSError
from hrs.presets import FAMILIES, PRESETS, STUDIES, compare, experiment
from hrs.presets.description import describe_preset
from hrs.threads import MOST_THREADS, set_threads

app = typer.Typer(
    help="An experiment queue for language-model research: name ablations, get a table you can believe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(cli_queue.app, name="queue")

Scale = Annotated[str, typer.Option(help="micro, tiny, small or paper.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything random.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override any config field.")]
Corpus = Annotated[
    str | None, typer.Option(help="wiki-mini, bbc, wikitext-103, hf:NAME, text:PATH, jsonl:PATH, parquet:PATH.")
]


def _model_path(text: str) -> Path:
    """Where a model lies that is named by a path, a run's key, a study, or in the registry."""
    if Path(text).exists():
        return Path(text)  # without the tracking store, which a path has no use for
    from hrs.storage import open_storage
    from hrs.tracking.naming import find_model

    return find_model(open_storage(writable=text.startswith("mlflow:")), text)


def _complete_model(incomplete: str) -> list[str]:
    """Studies, runs and ``PRESET@STUDY`` that begin with what was typed."""
    from hrs.storage import open_storage
    from hrs.tracking.naming import model_names

    return model_names(open_storage(writable=False), incomplete)


def _complete_preset(incomplete: str) -> list[str]:
    return [name for name in PRESETS if name.startswith(incomplete)]


def _complete_named_study(incomplete: str) -> list[str]:
    return [name for name in STUDIES if name.startswith(incomplete)]


MODEL_HELP = (
    "A study (its best causal run), PRESET@STUDY, the beginning of a run's key, a run's directory, one of its "
    "checkpoints, an artifact, or mlflow:NAME@ALIAS of the registry."
)
Model = Annotated[
    Path,
    typer.Argument(parser=_model_path, metavar="MODEL", autocompletion=_complete_model, help=MODEL_HELP),
]
PresetName = Annotated[str, typer.Argument(autocompletion=_complete_preset, help="A name that `hrs presets` lists.")]
NamedStudy = Annotated[
    str, typer.Argument(autocompletion=_complete_named_study, help="A named list of presets, such as v1.")
]


@app.callback()
def options(
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_THREADS,
            help="CPU threads of torch in this process; OMP_NUM_THREADS, or 1, if not given.",
        ),
    ] = None,
) -> None:
    """An experiment queue for language-model research: name ablations, get a table you can believe."""
    if threads is not None:
        set_threads(threads)


@app.command()
def presets(
    markdown: Annotated[bool, typer.Option("--markdown", help="The whole page docs/presets.md, to stdout.")] = False,
) -> None:
    """List every preset and what it adds, by family."""
    if markdown:
        from hrs.report.lineage_page import lineage_page

        print(lineage_page(), end="")
        return
    width = max(map(len, PRESETS))
    for family, members in FAMILIES.items():
        print(f"\n{family}")
        for preset in members:
            print(f"  {preset.name:<{width}}  {preset.summary}")
    print(f"\nstudies: {', '.join(STUDIES)}")


@app.command()
def show(preset: PresetName, scale: Scale = "tiny", overrides: Overrides = None) -> None:
    """Print a preset's lineage, parameters, differences from its parent, and every config field."""
    changes = _changes(None, overrides)
    print(describe_preset(preset, scale, changes, _parameters(experiment(preset, scale, overrides=changes))))


@app.command()
def diff(left: PresetName, right: PresetName, scale: Scale = "tiny") -> None:
    """Print the config fields in which two presets differ, and their parameter counts."""
    a, b = experiment(left, scale), experiment(right, scale)
    for field in compare(a, b):
        print(f"{field.field}\n  - {field.left}\n  + {field.right}")
    print(f"parameters\n  - {_parameters(a):,}\n  + {_parameters(b):,}")


data_app = typer.Typer(help="Look at text before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.callback()
def data() -> None:
    """Look at text before training on it."""


@data_app.command("check")
def check_data(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="As for train: wiki-mini, text:PATH and so on.")],
    tokenizer: Annotated[str, typer.Option(help="gpt2, or bpe:N trained on the text, to count tokens with.")] = "gpt2",
) -> None:
    """Print sizes by split, duplicates, and odd documents of a corpus; nothing is written."""
    from hrs.data import load_corpus
    from hrs.data.build import corpus_tokenizer
    from hrs.data.check import check_corpus, format_check

    found = load_corpus(corpus)
    print(format_check(check_corpus(found, corpus_tokenizer(found, tokenizer))))


@app.command()
def train(
    preset: PresetName,
    scale: Scale = "tiny",
    seed: Seed = 0,
    corpus: Corpus = None,
    overrides: Overrides = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 1,
) -> None:
    """Train, evaluate and audit one preset in this process, without Ray; continues a run that was cut off."""
    from hrs.cluster.inline import train_inline
    from hrs.cluster.study import Study
    from hrs.training import Runtime

    study = Study(title=preset, presets=(preset,), scale=scale, seeds=(seed,), overrides=_changes(corpus, overrides))
    train_inline(study, Runtime(threads=threads))


@app.command()
def audit(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET|MODEL]",
            autocompletion=lambda incomplete: _complete_preset(incomplete) + _complete_model(incomplete),
            help="A preset's name, or a model as for evaluate.",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Audit every preset; status 1 if one is not what its label says.")
    ] = False,
    scale: Scale = "micro",
    seed: Seed = 0,
    random_tokens: Annotated[
        bool,
        typer.Option("--random-tokens", help="Also train on random tokens, which no causal model can learn (slow)."),
    ] = False,
) -> None:
    """Prove that a model cannot see the token it predicts; status 1 if it can."""
    from hrs.evaluation import audit as run_audit
    from hrs.evaluation.audit_all import new_model
    from hrs.export import load

    if every == (model is not None) or (every and random_tokens):
        raise HRSError("audit takes one preset or run directory, or --all alone: see 'hrs audit --help'")
    if model is None:
        raise typer.Exit(_audit_all(scale, seed))
    if model in PRESETS and not Path(model).exists():
        network = new_model(experiment(model, scale, seed).model, seed)
    else:
        network, _ = load(_model_path(model))
    report = run_audit(network, seed=seed, random_token_training=random_tokens)
    print(report)
    raise typer.Exit(0 if report.causal else 1)


def _audit_all(scale: str, seed: int) -> int:
    from hrs.evaluation.audit_all import audit_presets

    verdicts = []
    for verdict in audit_presets(PRESETS.values(), scale, seed):
        print(verdict, flush=True)
        verdicts.append(verdict)
    n_causal, n_wrong = sum(v.report.causal for v in verdicts), sum(not v.as_expected for v in verdicts)
    print(f"{len(verdicts)} presets: {n_causal} causal, {len(verdicts) - n_causal} not, {n_wrong} unexpected")
    return 1 if n_wrong else 0


@app.command()
def evaluate(
    model: Model,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    corpus: Annotated[
        str | None, typer.Option(help="Score other text than it was trained on, in the model's own tokenizer.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            writable=True,
            help="Write evaluation.json and documents.arrow into this folder.",
        ),
    ] = None,
) -> None:
    """Score a model on a whole split of the text it was trained on, whatever became of the corpus since."""
    from hrs.data import absolute_corpus
    from hrs.data.documents import require_split
    from hrs.evaluation import evaluate as run_evaluation
    from hrs.export import open_model, open_text
    from hrs.storage import open_storage

    require_split(split)  # now, not after the model is read
    tokens = open_storage(writable=False).tokens
    opened = open_model(model, tokens)
    config, other = opened.config, None if corpus is None else absolute_corpus(corpus)
    result = run_evaluation(
        opened.model, open_text(opened, tokens, other), split, stride_frac=config.evaluation.stride_frac
    )
    text = config.data.corpus if other is None else f"{other} (not the text it was trained on, its own tokenizer)"
    print(f"{config.preset} on {text}, {split} split, {result.n_tokens:,} tokens")
    for name, value in result.metrics().items():
        print(f"{name:<20} {value:.6g}")
    if save:
        result.save(save)


@app.command()
def export(
    checkpoint: Model,
    budget: Annotated[str | None, typer.Option(help="Most bytes of the file: 16MB, 16MiB or a number.")] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            min=4,
            max=8,
            help="Width of the integers, 4 to 8; default 8 or what fits.",
        ),
    ] = None,
    calibrate: Annotated[
        int,
        typer.Option(min=0, max=LARGEST_SIZE, help="Training windows to look at while rounding (GPTQ)."),
    ] = 0,
    output: Annotated[Path, typer.Option(dir_okay=False, writable=True, help="The file to write.")] = Path("model.hrs"),
) -> None:
    """Round a trained model into one small file, read it back and score it; status 1 if that cost suspiciously much."""
    from hrs.export import export as run_export
    from hrs.export import format_result, open_model, open_text, parse_budget
    from hrs.storage import open_storage
    from hrs.training import Runtime

    size, tokens = None if budget is None else parse_budget(budget), open_storage().tokens
    store, device = open_text(open_model(checkpoint, tokens), tokens), Runtime().torch_device()
    result = run_export(checkpoint, output, store=store, budget=size, bits=bits, calibrate=calibrate, device=device)
    print(format_result(result))
    raise typer.Exit(1 if result.leak_alarm else 0)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text to continue; may be repeated.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A file that is one prompt, '-' for standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add to each prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the best token always.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k best tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the smallest set of best tokens with this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this fraction as likely as the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what the text has becomes less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends a text; may be repeated.")] = None,
    seed: Seed = 0,
    samples: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print a single text as it grows.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line, with token ids.")] = False,
) -> None:
    """Continue texts with a trained model; without a prompt, start a document."""
    from hrs.export import open_model
    from hrs.generation import Sampling
    from hrs.generation.console import print_completions, read_prompt
    from hrs.storage import open_storage
    from hrs.training import Runtime

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        seed=seed,
    )
    if not 1 <= samples <= LARGEST_SIZE:
        raise HRSError(f"samples must be at least 1 and at most {LARGEST_SIZE:,}, got {samples}")
    prompts = [*(prompt or []), *map(read_prompt, prompt_file or [])] or [""]
    opened = open_model(model, open_storage(writable=False).tokens)
    if opened.causal is False:
        sentence = "this model is not causal: it was trained to see the future, which is not there to continue"
        print(f"warning: {sentence} (hrs audit tells more)", file=sys.stderr)
    network = opened.model.to(Runtime().torch_device())
    print_completions(network, opened.tokenizer, prompts, sampling, samples=samples, stream=stream, as_json=as_json)


@app.command()
def topics(
    model: Model,
    corpus: Annotated[
        str | None, typer.Option(help="Other text than the model's own, in its tokenizer; like --corpus of train.")
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Block whose output engrams are means of, as memory_block of serve; default none."),
    ] = None,
) -> None:
    """Fit topics to a model on its validation text, say how well they separate, and keep the fit for serve."""
    from hrs.export import open_model, open_text
    from hrs.retrieval.topics.fit import fit_path, fit_topics
    from hrs.storage import open_storage
    from hrs.training import Runtime

    storage = open_storage()
    opened = open_model(model, storage.tokens)
    text = open_text(opened, storage.tokens, corpus).validation
    fit = fit_topics(opened.model.to(Runtime().torch_device()), text, block=block)
    fit.save(fit_path(model))
    print(f"topics: {fit.sentence()}")
    print(f"serve:  {'on' if (why := fit.why_off()) is None else f'off, {why}'}")
    print(f"kept:   {fit_path(model)}")


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Let other machines use the endpoint without an API key.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Another name it is asked under, such as that of a proxy."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", metavar="ORIGIN", help="Let pages of another site ask, such as http://localhost:3000."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default its preset.")] = None,
    slots: Annotated[int, typer.Option(help="Texts a replica continues at the same time.")] = 8,
    max_queue: Annotated[int, typer.Option(help="Texts that may wait for a slot of a replica.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens a request may ask for.")] = 2048,
    replicas: Annotated[int, typer.Option(help="Most copies of the model; one runs, others come with the load.")] = 1,
    device: Annotated[str, typer.Option(help="auto (GPUs, if there are any), cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of each replica.")] = 1,
    memories: Annotated[
        Path | None, typer.Option(help="Folder of an engram store; default one below the storage root.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with one key per line; without it $HRS_API_KEY, if set, is the key.")
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds that running replies may take to end when it stops.")] = 10.0,
) -> None:
    """Serve a model over HTTP in the shapes of OpenAI's API, until Ctrl-C."""
    from serve.command import serve_model
    from serve.settings import parse_settings

    values: dict[str, object] = {
        "model": str(model),
        "name": name,
        "slots": slots,
        "max_queue": max_queue,
        "max_new_tokens": max_new_tokens,
        "max_replicas": replicas,
        "device": device,
        "threads": threads,
        "memories": memories and str(memories.absolute()),
        "api_key_file": api_key_file and str(api_key_file.absolute()),
        "grace_seconds": grace,
        "allowed_hosts": allow_host or [],
        "allowed_origins": allow_origin or [],
    }
    serve_model(parse_settings(values), host, port, allow_anonymous=allow_anonymous)


for _command in (cli_storage.report, cli_storage.runs, cli_storage.clean):
    app.command()(_command)


@app.command()
def promote(
    study: StudyName,
    name: Annotated[str, typer.Option(help="Name of the registered model.")] = "hrs",
    alias: Annotated[str, typer.Option(help="Points at the promoted version from now on.")] = "champion",
) -> None:
    """Register the best causal run of a study, for use as mlflow:NAME@ALIAS."""
    from hrs.storage import open_storage
    from hrs.tracking import format_promotion
    from hrs.tracking import promote as run_promotion

    print(format_promotion(run_promotion(open_storage(), study, name=name, alias=alias)))


@app.command()
def verify() -> None:
    """Read everything in the storage and name what is damaged; status 1 if something is."""
    from hrs.storage import open_storage
    from hrs.verify import format_findings
    from hrs.verify import verify as run_verification

    storage = open_storage(writable=False)
    findings = list(run_verification(storage))
    print(format_findings(findings, storage))
    raise typer.Exit(1 if any(finding.problem for finding in findings) else 0)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000) -> None:
    """Show every run in MLflow's browser interface, until Ctrl-C."""
    from hrs.storage import open_storage
    from hrs.tracking import Tracker, ui_command

    storage = open_storage()
    command = ui_command(storage, port=port)
    print(f"MLflow UI of {storage.root}: {Tracker(storage).experiment_page(port)}", flush=True)
    os.execvp(command[0], command)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    study: Annotated[
        str, typer.Argument(autocompletion=_complete_named_study, help="A named list of presets, such as v1.")
    ],
) -> None:
    """Print what a study would do, without starting it. Takes the options of jobs/ablation_sweep.py."""
    from jobs.ablation_sweep import main as sweep

    raise typer.Exit(sweep(["--study", study, "--dry-run", *context.args]))


def _changes(corpus: str | None, overrides: list[str] | None) -> dict[str, str]:
    return parse_assignments(overrides or []) | ({"data.corpus": corpus} if corpus else {})


def _parameters(config: ExperimentConfig) -> int:
    from hrs.models import count_parameters

    return count_parameters(config.model)


def _run() -> int | None:
    try:
        status: int | None = app(standalone_mode=False)
        return status
    except typer.TyperException as error:  # a usage error, or a file that cannot be opened
        said = error.format_message() if hasattr(error, "format_message") else str(error)
        if not said:  # the help was asked for, or printed in place of a command
            return 2
        context = getattr(error, "ctx", None)
        raise HRSError(f"{said.rstrip('.')}: see `{context.command_path if context else 'hrs'} --help`") from None
    except typer.Abort:
        raise KeyboardInterrupt from None


def main() -> None:
    """The console script."""
    from jobs.entry import run_entry

    run_entry(_run)
