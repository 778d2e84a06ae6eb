"""Where the tokens of a text begin, counted in characters of the text as clients see it."""

import codecs


class Offsets:
    """Offsets of tokens whose bytes come one after the other; a character may take several tokens.

    The text is the bytes decoded as UTF-8, with U+FFFD for what is not, as :class:`hrs.generation.text.TextAssembler`
    decodes them.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n = 0
        """Characters that are complete."""

    def push(self, piece: bytes) -> int:
        """Take the bytes of the next token, and return the index of the character that its first byte belongs to."""
        begun = bool(self._decoder.getstate()[0])
        first = self._decoder.decode(piece[:1])
        # Two characters at once: the begun one stays incomplete and has become U+FFFD.
        continues = begun and (not piece or (0x80 <= piece[0] < 0xC0 and len(first) < 2))
        offset = self._n + (begun and not continues)
        self._n += len(first) + len(self._decoder.decode(piece[1:]))
        return offset

    def end(self) -> None:
        """Complete what was begun: the next token begins another text, which stands behind this one."""
        self._n += len(self._decoder.decode(b"", final=True))
        self._decoder.reset()
