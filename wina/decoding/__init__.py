"""Decoding at the speed of memory: :func:`decode` and :class:`Decoder`."""

from wina.decoding.engines import choose_engine
from wina.decoding.loop import Decoded, Decoder, Streamer, decode

__all__ = ["Decoded", "Decoder", "Streamer", "choose_engine", "decode"]
