"""The manifold-guided network, its controls, and the original that saw the future."""

from hrs.config import ModelConfig
from hrs.presets.preset import FromModel, Preset


def _width_of_equal_size(model: ModelConfig) -> int:
    """``d_ff`` with which a transformer of these sizes has as many parameters as the manifold-guided network."""
    v, d, n, hops = model.vocab_size, model.d_model, model.manifold.geometry.n_coordinates, model.n_layers
    ends = 2 * v * d + v + n * d + d * d + 4 * d + 2 * d * d + d + 2 * d  # embeddings, fusion, norm, output layer
    shared = 2 * d * d + 2 * d + d * (4 * d + 3 * n) + d * n  # messages, attention, map to coordinates
    cell = n * d + 9 * d * d + 7 * d
    router = d * d + 2 * d + 29
    mixer = 4 * d * d + 2 * d * n + 2 * d
    network = ends + shared + hops * (cell + router + mixer + 9 * d + 2)
    without_mlp = v * d + 2 * d + model.n_layers * (4 * d * d + 4 * d)
    return round((network - without_mlp) / (2 * d * model.n_layers))


def _control(name: str, source: str, summary: str) -> Preset:
    return Preset(name=name, parent="manifold_v18", summary=summary, changes={"model.manifold.source": source})


MANIFOLD = (
    Preset(
        name="manifold_v18",
        parent="dense_baseline",
        summary="hops guided by a frozen geometry of tokens, computed from the training text before any learning",
        changes={"model.family": "manifold"},
        repaired="where nothing is allowed the router abstains instead of reading the whole window, masks come last, "
        "the recent past weighs most, transport is a rotation, directed springs have a direction, and the couplings of "
        "the geometry are those of its energy",
    ),
    _control("manifold_permuted", "permuted", "each token has the coordinates of another: is it the geometry at all?"),
    _control("manifold_random", "random", "Gaussian coordinates of the same spectrum: is it this geometry?"),
    _control("manifold_none", "none", "no coordinates and no neighbours: what do the hops do without guidance?"),
    Preset(
        name="dense_wide_manifold",
        parent="dense_baseline",
        summary="wider MLPs in place of the hops and their guidance, with as many parameters as manifold_v18",
        changes={
            "model.d_ff": FromModel(_width_of_equal_size, "the width with which the MLPs hold as much as the hops")
        },
    ),
    Preset(
        name="manifold_as_built_geometry",
        parent="manifold_v18",
        summary="the clean network over the original's definition of the geometry",
        changes={"model.manifold.geometry.definition": "as_built"},
    ),
)

MANIFOLD_LEGACY = Preset(
    name="manifold_v18_legacy",
    parent="manifold_v18",
    summary="manifold_v18 as the original ran it: an empty row of its router reads the whole window, future included",
    changes={
        "model.manifold.as_built": True,
        "model.manifold.geometry.definition": "as_built",
        "model.dropout": 0.0,
        "training.optimizer.beta2": 0.999,
        "training.optimizer.weight_decay": 0.01,
        "training.optimizer.decay_vectors": True,
        "training.optimizer.clip_norm": 0.5,
        "training.schedule.shape": "cosine_hold_linear",
        "training.schedule.floor_frac": 0.1,
        "training.schedule.hold_frac": 2100 / 6100,
        "training.schedule.decay_frac": 600 / 6100,
        "training.averaging.decays": (0.999,),
        "training.averaging.start_frac": 3000 / 6100,
        "training.validation_windows": 1024,
    },
    paper={
        "data.tokenizer": "bpe:1024",
        "model.d_model": 500,
        "model.n_heads": 2,
        "model.max_seq_len": 64,
        "model.manifold.geometry.partners": 0,
        "model.manifold.geometry.steps": 5000,
        "training.steps": 6100,
        "training.batch_sequences": 1024,
        "training.schedule.peak_lr": 4e-3,
        "training.schedule.warmup_frac": 100 / 6100,
    },
    legacy=True,
    leaks=True,
    original_params=20_705_679,
    original_micro_batch=1024,
    reported_gb=23.1,
)
