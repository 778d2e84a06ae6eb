"""Training of any language model: resumable to the bit, blind to how the machine cuts a batch.

for progress in train(config, store, directory):
    print(progress.step, progress.loss)
model, config = load_model(directory)  # the weights the run is to be evaluated with
"""

from hrs.training.checkpoint import TrainedModel, latest_checkpoint, load_model, load_trained
from hrs.training.loop import train
from hrs.training.progress import Progress, TrainingSummary
from hrs.training.runtime import Runtime

__all__ = [
    "Progress", "Runtime", "TrainedModel", "TrainingSummary",
    "latest_checkpoint", "load_model", "load_trained", "train",
]  # fmt: skip
