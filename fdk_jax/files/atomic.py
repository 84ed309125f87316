"""Files that are replaced whole or not at all."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[str]:
    """A temporary path beside `path` that replaces it when the block ends without an exception."""
    path = Path(path)
    temporary = str(path.with_name(f".{path.name}.{secrets.token_hex(6)}"))
    # Not by tempfile, whose files only their owner may read.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, mode)
        _flush(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            _flush(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _flush(path: str | Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
