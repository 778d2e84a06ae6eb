"""Text from tokens as they come: no half characters, and nothing that may turn out to be a stop string."""

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer

from hrs.data.tokenization import byte_spelling, end_of_text_id


def token_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each id of a byte-level vocabulary stands for; none for end of text."""
    byte_of = {character: byte for byte, character in enumerate(byte_spelling())}
    end = end_of_text_id(tokenizer)
    return [
        b"" if i == end else bytes(byte_of[c] for c in tokenizer.id_to_token(i) or "")
        for i in range(tokenizer.get_vocab_size())
    ]


class TextAssembler:
    """Turns the pieces of one text into parts that can be shown at once and never have to be taken back.

    Together they are the bytes decoded as UTF-8, with U+FFFD for what is not, up to the first stop string that becomes
    complete (of those that become complete with the same character, the longest). How the bytes were cut into pieces
    does not matter.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string came."""
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, piece: bytes, *, last: bool = False) -> str:
        """The text that is certain now that ``piece`` came; all of the rest if it is the last one."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(piece, final=last)
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        n_held = 0 if last else self._possible_stop(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        return next((n for n in range(min(longest, len(text)), 0, -1) if self._begins(text[-n:])), 0)

    def _begins(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
