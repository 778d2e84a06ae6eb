"""What ``hrs generate`` prints: texts as they grow, one after another, or as JSON lines."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from hrs import strict_json
from hrs.errors import HRSError
from hrs.generation.completion import Completion, encode_prompts, generate_text, n_unread, stream_text
from hrs.generation.sampling import Sampling
from hrs.models.base import LanguageModel


def read_prompt(path: Path) -> str:
    """A file's whole text without the line break at its end; ``-`` is standard input.

    Raises:
        HRSError: if it cannot be read or is not UTF-8.
    """
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise HRSError(f"prompt file {path} cannot be read ({error.strerror}): give another") from error
    except UnicodeDecodeError as error:
        raise HRSError(f"prompt file {path} is not UTF-8 at byte {error.start}: convert it") from error


def print_completions(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    stream: bool = True,
    as_json: bool = False,
) -> None:
    """Continue each prompt ``samples`` times and print prompt and continuation; notes go to standard error.

    A single text is printed as it grows, if ``stream``; several are made side by side and printed in order. JSON is one
    line per text.

    Raises:
        HRSError: see :func:`hrs.generation.generate_text`; or if ``samples`` is below 1.
    """
    if samples < 1:
        raise HRSError(f"samples must be at least 1, got {samples}")
    _note_long_prompts(model, tokenizer, prompts)
    texts = [prompt for prompt in prompts for _ in range(samples)]
    if stream and len(texts) == 1 and not as_json:
        print(texts[0], end="", flush=True)
        for delta in stream_text(model, tokenizer, texts, sampling):
            print(delta.text, end="", flush=True)
        print()
        return
    for row, completion in enumerate(generate_text(model, tokenizer, texts, sampling)):
        if as_json:
            print(_as_json(completion, row // samples, row % samples))
            continue
        if len(texts) > 1:
            print(f"--- prompt {row // samples + 1} of {len(prompts)}, sample {row % samples + 1} of {samples} ---")
        print(completion.prompt + completion.text)


def _note_long_prompts(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    for number, ids in enumerate(encode_prompts(model, tokenizer, prompts), start=1):
        if unread := n_unread(model, len(ids)):
            print(
                f"note: prompt {number} has {len(ids)} tokens and the model's context {model.max_seq_len}: "
                f"only the last {len(ids) - unread} are read",
                file=sys.stderr,
            )


def _as_json(completion: Completion, prompt_number: int, sample: int) -> str:
    document = {
        "prompt_number": prompt_number,
        "sample": sample,
        "prompt": completion.prompt,
        "text": completion.text,
        "finish": completion.finish,
        "n_prompt_tokens": completion.n_prompt_tokens,
        "n_unread_tokens": completion.n_unread_tokens,
        "token_ids": [token.id for token in completion.tokens],
        "log_probs": [token.log_prob for token in completion.tokens],
        "entropies": [token.entropy for token in completion.tokens],
    }
    shows_all = "utf" in (sys.stdout.encoding or "").lower()
    return strict_json.dumps(document, ensure_ascii=not shows_all)
