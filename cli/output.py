"""Standard output and errors that end no run, whatever becomes of the terminal."""

import io
import os
import sys
from typing import Any, TextIO


class _Lasting(io.FileIO):
    """An open file whose reader may go away: a pipe that is closed, a terminal that is hung up, a
    full disk under a log. What cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


def keep_output() -> None:
    """Let standard output and errors of this process take every line: characters that their
    encoding does not have are written as `\\u2026`, and a reader that is gone is no failure."""
    sys.stdout = _lasting(sys.stdout, sys.__stdout__)
    sys.stderr = _lasting(sys.stderr, sys.__stderr__)


def _lasting(stream: TextIO | None, original: TextIO | None) -> TextIO:
    if stream is None:  # closed by whoever started this process
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")
    if stream is not original:  # somebody else's, such as a test's
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
    )
