"""Repairs that several presets share, in a few words; the page of presets says at length what was wrong."""

WINDOWS = "a token sees engrams of complete windows only, as extra keys and values"
GATE = "the expert gate has a gradient"
SYNAPSE = "temperatures follow from windows complete before a token, and only blocks that read engrams have a synapse"
LOSS_SCALES = "learned loss weights follow each loss's uncertainty and have no constant pull"
IDLE_NORM = "the idle norm is gone"

EXPLAINED = {
    WINDOWS: (
        "Engrams were means of whole windows, put in front of the text where every token sees them: a token could read "
        "a summary of the tokens it was to predict, at every position of a training window."
    ),
    GATE: "The chosen expert's weight was divided by itself, so that the choice of experts stayed a random one.",
    SYNAPSE: (
        "The synapse took the mean of all engrams, later windows included, and every block had one, read or not."
    ),
    LOSS_SCALES: (
        "A constant pulled on the weights, so that they drifted to the published values at the speed of the optimiser "
        "whatever the data; the negative entropy loss had no minimum at all."
    ),
    IDLE_NORM: "Blocks with experts alone kept the norm of an MLP that they did not have, and never used it.",
}
