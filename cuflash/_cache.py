"""Compiled kernels on disk, shared by processes that know nothing of each other.

An entry is two files, `name-key.cu` (the generated source, readable and compilable by hand) and
`name-key.cubin`. Both are written to a temporary name and renamed, so a reader sees a whole file or
none; the cubin comes last, so an entry that has one has both. A directory that cannot be written
(read-only, full) costs one warning; kernels are then kept in memory only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import sys
import tempfile
import warnings
from pathlib import Path

_warned: set[str] = set()


def directory() -> Path:
    """Where compiled kernels are kept: $CUFLASH_CACHE_DIR, else the platform's cache folder."""
    chosen = os.environ.get("CUFLASH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "cuflash"


def key(*parts: str | bytes) -> str:
    """A digest of `parts`, each with its length so that no two lists of parts collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.hexdigest()[:24]


def paths(name: str, digest: str) -> tuple[Path, Path]:
    """The source and the cubin of an entry."""
    folder = directory()
    return folder / f"{name}-{digest}.cu", folder / f"{name}-{digest}.cubin"


def elf_length(data: bytes) -> int | None:
    """Bytes a 64-bit ELF file needs to hold its program and section tables; None when it is no such file."""
    if len(data) < 64 or data[:4] != b"\x7fELF" or data[4] != 2:
        return None
    program_at, section_at = struct.unpack_from("<QQ", data, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<HHHH", data, 54)
    return max(section_at + section_size * sections, program_at + program_size * programs)


def is_whole_elf(data: bytes) -> bool:
    """True when `data` is a 64-bit ELF file that reaches to the end of its tables.

    In a cubin the tables come last; a truncated copy (power cut, full disk on a file system that
    renames before it writes) is thereby noticed without loading it.
    """
    length = elf_length(data)
    return length is not None and 64 < length <= len(data)


def read(name: str, digest: str) -> bytes | None:
    """The cubin of an entry, or None when there is none that is whole."""
    try:
        data = paths(name, digest)[1].read_bytes()
    except OSError:
        return None
    return data if is_whole_elf(data) else None


def write_source(name: str, digest: str, source: str) -> Path | None:
    """Keep the generated source; its path, or None when the directory cannot be written."""
    path = paths(name, digest)[0]
    return path if _replace(path, source.encode()) else None


def write(name: str, digest: str, cubin: bytes) -> None:
    """Keep a cubin (best effort)."""
    _replace(paths(name, digest)[1], cubin)


def _replace(path: Path, data: bytes) -> bool:
    """Write `data` to `path` in one step; False (and one warning per directory) when that fails."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
        return True
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        folder = str(path.parent)
        if folder not in _warned:
            _warned.add(folder)
            warnings.warn(
                f"cuflash cannot write its kernel cache {folder} ({error.strerror or error}); "
                "kernels are compiled again in every process. Set CUFLASH_CACHE_DIR to a writable folder.",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
