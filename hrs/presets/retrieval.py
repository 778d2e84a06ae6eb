"""Cross-attention trained with retrieval in the loop, and its controls; jobs/retrieval_study.py gives them a base."""

from hrs.presets.preset import Preset

RETRIEVAL = (
    Preset(
        name="dense_retrieved",
        parent="dense_baseline",
        summary="learns on from a trained baseline while every second block reads chunks of other documents",
        changes={"model.engram.kind": "retrieved", "model.engram.slots": 64},
    ),
    Preset(
        name="dense_retrieved_shuffled",
        parent="dense_retrieved",
        summary="the control of relevance: every window reads in training what belongs to another",
        changes={"training.retrieval.memory": "shuffled"},
    ),
    Preset(
        name="dense_retrieved_none",
        parent="dense_retrieved",
        summary="the control of longer training: the same steps from the same weights without any memory",
        changes={"training.retrieval.memory": "none"},
    ),
)
