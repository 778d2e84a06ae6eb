"""How the numbers of a comparison were computed, and what they cannot tell: printed below every table."""

from hrs.report.rows import Comparison
from hrs.report.statistics import LEVEL, RESAMPLES


def notes(comparison: Comparison) -> list[str]:
    """One paragraph per column that needs one, plain text."""
    rows = [row for row in comparison.rows if row.bits_per_byte]
    if not rows:
        return ["No run has been evaluated yet, so there is nothing to compare."]
    texts = [
        "bits/byte: nats of the text's tokens / (ln 2 x bytes of text), over the whole validation split: "
        f"{comparison.n_documents:,} documents, {comparison.n_bytes:,} bytes. Lower is better; end-of-text excluded.",
        _interval_note(sorted({row.seeds_done for row in rows}), comparison.n_documents),
        "perplexity: exp of the mean nats per token, end-of-text included, ± half the width of its interval. It "
        "depends on the tokenizer; bits/byte does not.",
        _difference_note(comparison),
    ]
    if comparison.validation_overlap > 0:
        texts.insert(
            1,
            f"Warning: {comparison.validation_overlap:.1%} of the validation documents are also in the training text, "
            "exactly or nearly, so these numbers are better than those of new text: data.deduplicate=near leaves such "
            "training documents out.",
        )
    if any(row.is_best for row in rows):
        texts.append("> the lowest bits/byte of the causal rows; the difference column says what is more than chance.")
    if contents := [f"{r.preset} {r.engram_content:+.4f}" for r in rows if r.engram_content is not None]:
        texts.append(
            "engrams: bits/byte lost when every window reads those of another text, so what their content is worth: "
            f"{', '.join(contents)}."
        )
    if comparison.below:
        texts.append(
            "causal: whether the model passed the causality audit. A row below the line is not ranked: a model that "
            "can see the token it predicts has no perplexity as a language model."
        )
    return [*texts, "tok/s: training, mean over seeds. memory: highest of the seeds while training."]


def _interval_note(seed_counts: list[int], n_documents: int) -> str:
    text = f"[low, high]: {LEVEL:.0%} percentile interval, {RESAMPLES:,} bootstrap resamples of "
    if seed_counts == [1]:
        return f"{text}documents only: with one seed per row it says nothing about how another seed would have done."
    text += "seeds and documents."
    if seed_counts[0] == 1:
        text += " A row with one seed has an interval over documents only."
    if (fewest := min(n for n in seed_counts if n > 1)) < 10:
        text += (
            f" A row of {fewest} seeds cannot see beyond its best and its worst, and 1 time in {2 ** (fewest - 1)} the "
            "median over all seeds lies outside those: read the intervals as too narrow."
        )
    if n_documents < 30:
        text += f" {n_documents} documents are few: the bounds are rough."
    return text


def _difference_note(comparison: Comparison) -> str:
    baseline, compared = comparison.baseline, [row for row in comparison.rows if row.difference]
    if not baseline.is_ranked:
        return f"difference: none, because the baseline {baseline.preset} has no ranked result."
    if not compared:
        return f"difference: none, because no other row than the baseline {baseline.preset} is ranked."
    text = (
        f"difference: bits/byte minus {baseline.preset}'s, paired: every resample takes the same documents for both, "
        "and the same seeds if both have the same set. * its interval excludes 0."
    )
    n = len(compared)
    if n > 1:
        text += f" {n} comparisons, not corrected: chance alone would mark about {n * (1 - LEVEL):.2g} of {n}."
    return text
