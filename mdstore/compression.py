"""zstd compression, and decompression that never produces more bytes than the caller expects."""

from __future__ import annotations

import zstandard

_LEVEL = 3
#: Bytes of memory that a frame may require. Ours need 2 MB; a forged frame could require 128 MB.
_MAX_WINDOW = 8 * 2**20


def compress(data: bytes) -> bytes:
    """Compress `data` to one zstd frame."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def compressor() -> zstandard.ZstdCompressionObj:
    """Return a compressor that builds one zstd frame from several pieces."""
    return zstandard.ZstdCompressor(level=_LEVEL).compressobj()


def decompress(data: bytes, size: int) -> bytes:
    """Decompress data that must become exactly `size` bytes. Raises `ValueError` otherwise, before using more memory.

    The size that the frame's own header states is not trusted. A `MemoryError` says nothing about the data.
    """
    if size < 0:
        raise ValueError(f"{size} bytes")
    try:
        with zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(data) as reader:
            text = reader.read(size + 1)
    except zstandard.ZstdError as error:
        if "not enough memory" in str(error):
            raise MemoryError(str(error)) from error
        raise ValueError(f"not zstd: {error}") from error
    if len(text) != size:
        raise ValueError(f"not {size} bytes when decompressed")
    return text


def most(size: int) -> int:
    """Return the largest number of bytes that any version of zstd can compress `size` bytes to."""
    return size + (size >> 7) + 1_024
