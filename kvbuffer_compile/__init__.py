"""Buffered decoding for any model with linear attention: torch.compile(model, backend="kvbuffer")."""

__version__ = "0.1.0"
