"""Colours and axes that every figure shares.

The palette is that of Okabe & Ito (2008), which stays apart for colour-blind readers.
"""

from matplotlib.axes import Axes

BLUE, VERMILION, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#E69F00", "#56B4E9", "#CC79A7"
GREY, INK = "#9A9A9A", "#333333"
DPI = 150


def plain(axes: Axes) -> None:
    """Two thin spines and small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=7, color=GREY)
