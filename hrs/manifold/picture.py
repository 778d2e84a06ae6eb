"""A look at a manifold: its tokens in two dimensions, the most frequent ones by name, and how the energy fell."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hrs.manifold.blocks import single_threaded_blas
from hrs.manifold.manifold import Manifold

BLUE, GREY, INK = "#0072B2", "#9A9A9A", "#333333"
DPI = 150
NAMED = 400
"""Most frequent tokens that are tried as labels; those that would cover another are left out."""


def picture(manifold: Manifold, tokenizer: Tokenizer, frequency: NDArray[np.int64]) -> bytes:
    """A PNG. ``frequency`` [V] counts the tokens of the training text; tokens that do not occur are not shown."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3.4, 1))
    _energy(right, manifold)
    _tokens(left, manifold, tokenizer, frequency)  # last: labels are placed in the finished layout
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


@single_threaded_blas()
def principal_components(coordinates: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates [V, 2] along the two directions of largest variance, and the share of variance of each [2]."""
    centred = coordinates.astype(np.float64) - coordinates.mean(axis=0)
    variance, directions = np.linalg.eigh(centred.T @ centred)
    return centred @ directions[:, :-3:-1], variance[:-3:-1] / max(variance.sum(), 1e-30)


def _tokens(axes: Axes, manifold: Manifold, tokenizer: Tokenizer, frequency: NDArray[np.int64]) -> None:
    shown = np.flatnonzero((frequency > 0) & manifold.coordinates.any(axis=1))
    if len(shown) < 3:
        return
    places, share = principal_components(manifold.coordinates[shown])  # [shown, 2]
    axes.scatter(places[:, 0], places[:, 1], s=_dot_sizes(frequency[shown]), color=BLUE, alpha=0.3, linewidths=0)
    low, high = np.percentile(places, (0.5, 99.5), axis=0)
    margin = 0.06 * (high - low) + 1e-9
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
    order = np.argsort(-frequency[shown], kind="stable")[:NAMED]
    _name(axes, places[order], [_readable(tokenizer, int(shown[i])) for i in order])
    outside = int(((places < low - margin) | (places > high + margin)).any(axis=1).sum())
    hidden = f", {outside} outside the frame" if outside else ""
    axes.set_title(f"{len(shown):,} tokens that occur{hidden}", fontsize=9, loc="left", color=INK)
    axes.set_xlabel(f"first principal component, {share[0]:.1%} of the variance", fontsize=8)
    axes.set_ylabel(f"second, {share[1]:.1%}", fontsize=8)
    _plain(axes)


def _dot_sizes(frequency: NDArray[np.int64]) -> NDArray[np.float64]:
    return 3 + 24 * np.sqrt(frequency / frequency.max())


def _readable(tokenizer: Tokenizer, token: int) -> str:
    """The token's text; a leading space as a low line, control and broken characters escaped."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    text = text.replace("\ufffd", "?").replace(" ", "_").replace("$", r"\$")
    return text if text.isprintable() else repr(text)[1:-1]


def _name(axes: Axes, places: NDArray[np.float64], names: list[str]) -> None:
    """Labels in the order given, each dropped if it would overlap one before or leave the axes."""
    canvas = FigureCanvasAgg(axes.get_figure(root=True))
    canvas.draw()  # the layout must stand before extents are asked for
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    boxes = np.zeros((0, 4))
    for (x, y), name in zip(places, names, strict=True):
        label: Text = axes.annotate(
            name, (x, y), xytext=(2.5, 2.5), textcoords="offset points", fontsize=7, color=INK, parse_math=False
        )
        extent = label.get_window_extent(renderer)
        box = np.array([extent.x0 - 1, extent.y0 - 1, extent.x1 + 1, extent.y1 + 1])
        apart = (boxes[:, 2] < box[0]) | (boxes[:, 0] > box[2]) | (boxes[:, 3] < box[1]) | (boxes[:, 1] > box[3])
        inside = box[0] > frame.x0 and box[1] > frame.y0 and box[2] < frame.x1 and box[3] < frame.y1
        if name and inside and apart.all():
            boxes = np.vstack([boxes, box])
        else:
            label.remove()


def _energy(axes: Axes, manifold: Manifold) -> None:
    axes.plot(np.arange(1, len(manifold.energies) + 1), manifold.energies, color=BLUE, linewidth=1.2)
    if len(manifold.energies) and manifold.energies.min() > 0:
        axes.set_yscale("log")
    state = "at rest" if manifold.converged else "still falling"
    axes.set_title(f"energy, {state} after {len(manifold.energies):,} steps", fontsize=9, loc="left", color=INK)
    axes.set_xlabel("step", fontsize=8)
    _plain(axes)


def _plain(axes: Axes) -> None:
    """Two thin spines and small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", labelsize=7, color=GREY)
