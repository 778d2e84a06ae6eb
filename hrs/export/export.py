"""From a checkpoint to an artifact that is reloaded and scored before any number is printed."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hrs import strict_json
from hrs.config import ExperimentConfig
from hrs.data import TokenStore, TrainingWindows
from hrs.errors import HRSError
from hrs.evaluation import evaluate
from hrs.export.artifact import ArtifactSummary, Provenance, load_artifact, serialise, write_artifact
from hrs.export.calibrate import input_hessians
from hrs.export.opening import verdict
from hrs.export.quantize import Grid
from hrs.export.search import fit
from hrs.export.tensors import Grids, Packed, entries, pack
from hrs.gpu import move, with_batch_that_fits
from hrs.models import LanguageModel
from hrs.training import TrainedModel, load_trained

LEAK_ALARM_BITS = 0.02
"""Gap in bits per byte above which rounding took away more than language: honest models lose less than that at these
widths, and a covert channel, which needs precision, lost 0.25."""
_WINDOWS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """What an export made, and what it costs in quality."""

    path: Path
    size: int
    """Bytes of the file."""
    budget: int | None
    parameters: int
    """Distinct learned numbers."""
    bits_per_weight: float
    """Stored bits per learned number, steps of rows included, header and tokenizer not."""
    grids: Grids
    calibration_windows: int
    source_bits_per_byte: float
    artifact_bits_per_byte: float
    """Of the file as it was read back: the number to quote."""
    causal: bool | None
    """The audit's verdict on the source; None if there was none."""
    sha256: str

    @property
    def gap(self) -> float:
        """Bits per byte lost to rounding."""
        return self.artifact_bits_per_byte - self.source_bits_per_byte

    @property
    def leak_alarm(self) -> bool:
        return not self.gap <= LEAK_ALARM_BITS

    def to_json(self) -> str:
        derived = {"path": str(self.path), "gap": self.gap, "leak_alarm": self.leak_alarm}
        return strict_json.dumps(asdict(self) | derived, indent=1)


def export(
    checkpoint: Path,
    target: Path,
    *,
    store: TokenStore,
    budget: int | None = None,
    bits: int | None = None,
    calibrate: int = 0,
    device: str | torch.device = "cpu",
) -> ExportResult:
    """Round a trained model, write it to ``target``, read that file back and score it on the whole validation split.

    Args:
        checkpoint: a run directory or one of its checkpoints.
        store: of the data the model was trained on.
        budget: bytes the file may take; without one, the least error at ``bits``.
        bits: width of the integers, 4 to 8; without it 8, or what fits the budget best.
        calibrate: windows of the training split to look at while rounding (GPTQ); 0 rounds to nearest.
        device: where models are scored and calibrated.

    Raises:
        HRSError: if the checkpoint cannot be used, ``store`` is not of its data, the budget cannot be met, or the file
            cannot be written.
    """
    trained = load_trained(checkpoint)
    model, config = trained.model, trained.config
    _require_own(trained, store)
    device = torch.device(device)
    move(model, device)
    hessians = _hessians(model, config, store, calibrate) if calibrate else {}
    stride = config.evaluation.stride_frac
    source = evaluate(model, store, stride_frac=stride).bits_per_byte
    model = model.cpu()
    causal = verdict(Path(checkpoint))
    provenance = Provenance(store.fingerprint, store.licence, source, causal)

    def attempt(grids: Grids) -> tuple[list[Packed], int]:
        packed = pack(model, grids, hessians)
        return packed, len(serialise(packed, config, store.tokenizer, provenance))

    chosen = fit(entries(model), attempt, budget=budget, bits=bits)
    written = write_artifact(Path(target), chosen.packed, config, store.tokenizer, provenance)
    reloaded = move(load_artifact(written.path).model, device)
    score = evaluate(reloaded, store, stride_frac=stride).bits_per_byte
    return _result(written, chosen.grids, budget, calibrate, source, score, causal)


def _require_own(trained: TrainedModel, store: TokenStore) -> None:
    """Refuse to pack a tokenizer that the model does not know."""
    if trained.data_fingerprint not in ("", store.fingerprint):
        raise HRSError(
            f"the run was trained on tokens {trained.data_fingerprint} and these are {store.fingerprint}: export it "
            "with the data that it was trained on"
        )


def _result(
    written: ArtifactSummary,
    grids: Grids,
    budget: int | None,
    calibrate: int,
    source: float,
    score: float,
    causal: bool | None,
) -> ExportResult:
    return ExportResult(
        path=written.path,
        size=written.size,
        budget=budget,
        parameters=written.parameters,
        bits_per_weight=written.bits_per_weight,
        grids=grids,
        calibration_windows=calibrate,
        source_bits_per_byte=source,
        artifact_bits_per_byte=score,
        causal=causal,
        sha256=written.sha256,
    )


def format_result(result: ExportResult) -> str:
    """Lines for a terminal: the artifact's score is the headline."""
    budget = f" of {result.budget:,} allowed" if result.budget else ""
    calibrated = f", calibrated on {result.calibration_windows} windows" if result.calibration_windows else ""
    lines = [
        f"artifact      {result.path}",
        f"bits/byte     {result.artifact_bits_per_byte:.4f} (the file, read back)",
        f"source        {result.source_bits_per_byte:.4f}, gap {result.gap:+.4f}",
        f"size          {result.size:,} bytes{budget}",
        f"parameters    {result.parameters:,} at {result.bits_per_weight:.2f} bits each",
        f"grids         {_grid(result.grids.matrix)}; embeddings {_grid(result.grids.embedding)}{calibrated}",
    ]
    if result.causal is False:
        lines.append("NOT CAUSAL    the audit found that the source sees the future: its score means nothing")
    if result.leak_alarm:
        lines.append(
            f"LEAK ALARM    rounding cost {result.gap:.3f} bits per byte, more than {LEAK_ALARM_BITS}: a hidden "
            "channel needs precision that language does not; audit the model, and if it is causal allow more bytes"
        )
    return "\n".join(lines)


def _grid(grid: Grid) -> str:
    return f"int{grid.bits} to " + ("the row's largest" if grid.k is None else f"{grid.k:.3g} rms")


def _hessians(
    model: LanguageModel, config: ExperimentConfig, store: TokenStore, n_windows: int
) -> dict[str, torch.Tensor]:
    """Input moments over the first windows that training saw."""
    batch = min(_WINDOWS_AT_ONCE, n_windows)
    windows = TrainingWindows(store.train.tokens, config.model.max_seq_len, batch, config.seed)
    steps = range(-(-n_windows // batch))

    def moments(n_at_once: int) -> dict[str, torch.Tensor]:
        read = (torch.from_numpy(windows.batch(step)[:, :-1]) for step in steps)
        return input_hessians(model, (part for tokens in read for part in tokens.split(n_at_once)))

    device = next(model.parameters()).device
    return with_batch_that_fits(moments, batch, device, "calibration")[0]
