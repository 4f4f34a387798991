"""Lines out of a byte stream, each and all of them bounded: what local sockets speak."""

from __future__ import annotations

from tagmem.base.errors import InvalidInput


class Lines:
    """What has come of a line that is not complete yet; `feed` gives those that are."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._data = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that end in `data`, without their ends. Raises InvalidInput for a line that is
        too long: nothing after it can be read.
        """
        *lines, self._data = (self._data + data).split(b"\n")
        longest = max(len(self._data), *(len(line) for line in lines), 0)
        if longest > self._bytes_max:
            raise InvalidInput("line", f"at most {self._bytes_max} bytes", longest)
        return lines
