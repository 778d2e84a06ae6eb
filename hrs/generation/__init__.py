"""Continuing texts with any language model: batched, cached, past its context, with seeds that say what each row gets.

for completion in generate_text(model, tokenizer, ["Once upon a time"], Sampling(temperature=0.8, top_p=0.95)):
    print(completion.prompt + completion.text)
"""

from hrs.generation.batching import ContinuousBatch
from hrs.generation.completion import Completion, TextDelta, generate_text, stream_text
from hrs.generation.decoding import FinishReason, Generation, SampledToken, Step, generate, window_length
from hrs.generation.sampling import Sampling

__all__ = [
    "Completion", "ContinuousBatch", "FinishReason", "Generation", "SampledToken", "Sampling", "Step", "TextDelta",
    "generate", "generate_text", "stream_text", "window_length",
]  # fmt: skip
