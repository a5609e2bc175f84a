"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Give a temporary file to write, which takes a file's place when the context ends.

    Args:
        path: The file; left as it was, without the temporary one, where an exception flies.

    Yields:
        Path of the temporary file.
    """
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
