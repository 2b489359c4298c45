"""zstd, with a bound on what decompression may produce."""

from __future__ import annotations

import zstandard

_LEVEL = 3


def compress(data: bytes) -> bytes:
    """One frame."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def compressor() -> zstandard.ZstdCompressionObj:
    """A frame in the making."""
    return zstandard.ZstdCompressor(level=_LEVEL).compressobj()


def decompress(data: bytes, size: int) -> bytes:
    """Decompress what must be `size` bytes long. Raises `ValueError` where it is anything else, before it takes the memory.

    The size that a frame states of itself is not believed.
    """
    if size < 0:
        raise ValueError(f"{size} bytes")
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            text = reader.read(size + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(f"not zstd: {error}") from error
    if len(text) != size:
        raise ValueError(f"not {size} bytes when decompressed")
    return text


def most(size: int) -> int:
    """The most bytes that `size` bytes can take when compressed, by any version of zstd."""
    return size + (size >> 7) + 1_024
