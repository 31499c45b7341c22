"""Write files so that an interruption or a full disk never leaves half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` when the block ends; on any error the old file stays.

    What is written goes to a file of another name in the same folder, which is made if it is missing. At the end that
    file is flushed to the disk (``fsync``) and renamed, so readers see the whole old file or the whole new one. The
    name is unique: processes that write the same file at once do not disturb each other, and the last one wins.
    A process that is killed can leave a hidden ``.<name>.<random>.part`` behind, which nothing reads.

    Args:
        path: File to write. A symbolic link stays one: the file that it names is replaced.

    Raises:
        OSError: If the folder cannot be written or the disk is full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results" / "notes.txt"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_text(), [p.name for p in path.parent.iterdir()]
        ('whole', ['notes.txt'])
    """
    # Renaming onto a link would replace the link.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file's own name is shortened: a name has at most 255 bytes.
    part = path.with_name(f".{path.name[:40]}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def replace_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8 with the guarantees of :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def replace_figure(path: str | Path, figure: Figure, **options: Any) -> None:
    """Save a matplotlib figure, with the options of ``savefig``, with the guarantees of :func:`replacing`."""
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or None, **options)


def append_line(path: str | Path, line: str) -> None:
    r"""Append a line to a file that grows; on an error, such as a full disk, the file has its old length again.

    A line that an earlier process did not finish is ended first, so that this one stands alone.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scores.jsonl"
        >>> for line in ("1", "2"):
        ...     append_line(path, line)
        >>> path.read_text()
        '1\n2\n'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        unfinished = file.read(1) not in (b"", b"\n")
        data = b"\n" * unfinished + line.encode() + b"\n"
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def _sync_folder(folder: Path) -> None:
    """Flush the renaming itself, where the system can."""
    # Windows opens no folders, and some network file systems do not flush them.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
