"""Byte-level BPE: trained on a corpus (``bpe:N``), or exactly that of GPT-2 (``gpt2``)."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from hrs import strict_json
from hrs.data.documents import package_file
from hrs.errors import HRSError
from hrs.presets.compose import vocabulary_size

END_OF_TEXT = "<|endoftext|>"


def build_tokenizer(name: str, texts: Iterator[str]) -> Tokenizer:
    """The tokenizer ``gpt2``, which reads no text, or ``bpe:N`` trained on ``texts`` (the same texts, the same result).

    Raises:
        HRSError: for another name, or texts too small for N ids.
    """
    size = vocabulary_size(name)
    return _prepare(_gpt2() if name == "gpt2" else _train(size, texts))


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that :func:`build_tokenizer` made and ``Tokenizer.save`` wrote.

    Raises:
        ValueError: if the file is not one.
    """
    try:
        return _prepare(Tokenizer.from_file(str(path)))
    except Exception as error:  # the binding raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def adopt_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level tokenizer that a folder of the transformers library holds.

    Its token for the end of a text is spelled as ours from then on; its id stays.

    Raises:
        HRSError: if there is none, or its tokens do not spell bytes.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text, end = theirs.backend_tokenizer.to_str(), theirs.eos_token
    except Exception as error:  # of whatever reads the many formats there are
        cause = " ".join(str(error).split())[:200]
        raise HRSError(f"the tokenizer in {folder} cannot be opened ({cause}): is the folder complete?") from error
    values = json.loads(text)
    if '"ByteLevel"' not in strict_json.dumps(values["decoder"]):
        raise HRSError(
            f"the tokenizer in {folder} does not spell bytes, so bits per byte cannot be counted: only byte-level ones "
            "are supported"
        )
    known = {token["content"] for token in values["added_tokens"]}
    if END_OF_TEXT not in known:
        if end not in known:
            raise HRSError(f"the tokenizer in {folder} has no token for the end of a text, which separates documents")
        for token in values["added_tokens"]:
            token["content"] = END_OF_TEXT if token["content"] == end else token["content"]
        vocabulary = values["model"]["vocab"]
        if end in vocabulary:
            vocabulary[END_OF_TEXT] = vocabulary.pop(end)
    values["post_processor"] = None  # tokens before and after a text are the store's business
    return _prepare(Tokenizer.from_str(strict_json.dumps(values)))


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """UTF-8 bytes each id stands for, int32 [V]; 0 for end of text.

    The tokens of a text sum to its length in bytes: a byte-level vocabulary spells every byte as one character.
    """
    sizes = np.array([len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())], dtype=np.int32)
    sizes[end_of_text_id(tokenizer)] = 0
    return sizes


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that the store writes around documents.

    Raises:
        ValueError: if the tokenizer has none.
    """
    token_id = tokenizer.token_to_id(END_OF_TEXT)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}")
    return token_id


def _prepare(tokenizer: Tokenizer) -> Tokenizer:
    # Text that spells "<|endoftext|>" is text: only the store itself writes that id. Not kept in the saved file.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train(size: int, texts: Iterator[str]) -> Tokenizer:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (reached := tokenizer.get_vocab_size()) != size:
        raise HRSError(f"the training text yields only {reached} BPE tokens: choose bpe:N with N <= {reached}")
    return tokenizer


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


def _gpt2() -> Tokenizer:
    try:
        ranks = package_file("whisper", "assets/gpt2.tiktoken")
    except HRSError as error:
        return _gpt2_from_hub(error)
    tokenizer = _from_ranks(ranks)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return tokenizer


def _gpt2_from_hub(missing_package: HRSError) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained("gpt2")
    except Exception as error:  # the binding raises bare Exception
        raise HRSError(f"the gpt2 tokenizer is neither here nor on the hub within reach: {missing_package}") from error


def _from_ranks(path: Path) -> Tokenizer:
    """A tokenizer from tiktoken's ``base64(token) rank`` lines.

    The file lists tokens only, but BPE restricted to lower ranks always ends at the two parts a token was merged from.
    """
    lines = (line.split() for line in path.read_bytes().splitlines() if line.strip())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    spell = byte_spelling()
    vocabulary = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _bpe(token, ranks, below=rank)
            merges.append(("".join(spell[b] for b in left), "".join(spell[b] for b in right)))
    return _byte_level(models.BPE(vocab=vocabulary, merges=merges))


def _bpe(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    parts = [bytes([b]) for b in token]
    while True:
        pairs = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, i = min(pairs, default=(below, 0))
        if rank >= below:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def byte_spelling() -> list[str]:
    """GPT-2's printable character for each byte (Radford et al. 2019, ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (b for b in range(256) if b not in printable)
    spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [spelling[b] for b in range(256)]
