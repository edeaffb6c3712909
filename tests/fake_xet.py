"""What hf_xet uploads, read back: xorbs (compressed chunks of files) and shards (which chunks make which file).

The formats are those of https://huggingface.co/docs/xet, as far as an upload uses them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import lz4.frame

_ENTRY = 48  # bytes of everything in a shard
_LAST = b"\xff" * 32
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30


def name_of(digest: bytes) -> str:
    """Return a hash as it stands in addresses: four numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def chunks_of(xorb: bytes) -> list[bytes]:
    """Return the chunks of a xorb, each behind its version, size, compression and size when unpacked."""
    chunks, at = [], 0
    while at < len(xorb):
        packed, size = (int.from_bytes(xorb[at + start : at + start + 3], "little") for start in (1, 5))
        compression, data = xorb[at + 4], xorb[at + 8 : at + 8 + packed]
        if compression:
            data = lz4.frame.decompress(data)
        if compression == 2:
            data = _ungrouped(data)
        assert len(data) == size
        chunks.append(data)
        at += 8 + packed
    return chunks


def _ungrouped(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte, which lets numbers be compressed better."""
    numbers, start = bytearray(len(data)), 0
    for place in range(4):
        size = len(numbers[place::4])
        numbers[place::4] = data[start : start + size]
        start += size
    return bytes(numbers)


def files_of(shard: bytes, xorbs: Mapping[str, list[bytes]]) -> dict[str, bytes]:
    """Return the files that a shard describes, by their SHA-256, put together from the chunks of xorbs by name."""
    files, at = {}, _ENTRY
    while (digest := shard[at : at + 32]) != _LAST:
        assert digest, "the shard ends too early"
        flags, entries = struct.unpack_from("<II", shard, at + 32)
        at += _ENTRY
        content = b""
        for _ in range(entries):
            _, size, first, end = struct.unpack_from("<4I", shard, at + 32)
            part = b"".join(xorbs[name_of(shard[at : at + 32])][first:end])
            assert len(part) == size
            content += part
            at += _ENTRY
        if flags & _WITH_VERIFICATION:
            at += _ENTRY * entries
        assert flags & _WITH_SHA256
        files[bytes.fromhex(name_of(shard[at : at + 32])).hex()] = content
        at += _ENTRY
    return files
