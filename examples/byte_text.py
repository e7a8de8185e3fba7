"""Text as token ids for the byte-level models in `checkpoints/`: token id = byte value, vocabulary of 256."""

from collections.abc import Iterable

VOCAB_SIZE = 256


def encode(text: str) -> list[int]:
    """Return the token ids (0..255) of `text`: its UTF-8 bytes, one id per byte, no special tokens."""
    return list(text.encode("utf-8"))


def decode(ids: Iterable[int]) -> str:
    """Return the text of `ids` (each 0..255); bytes that are not valid UTF-8 become U+FFFD."""
    return bytes(ids).decode("utf-8", errors="replace")
