"""The demo's workload: Debian's memcached as it is, with its memory file on the tag.

`memcached -e FILE` keeps its items in FILE instead of anonymous memory, and sizes it with ftruncate
to `-m` MiB. Told as many MiB as the tag has, it leaves the size as it is, and every item that it
stores lies in the tag's extents.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from itertools import islice

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError

from tagmem.base.errors import NotFound, OutcomeUnknown
from tagmem.base.units import MIB

_BATCH = 4_000
_ANSWER_SECONDS = 10.0


Address = str | tuple[str, int]
"""A Unix socket, or (host, port)."""


def command(size_bytes: int, socket_path: str) -> tuple[str, ...]:
    """The command line, with `{dax}` for the host's agent to fill in. Raises NotFound."""
    program = shutil.which("memcached", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/sbin")
    if program is None:
        raise NotFound("memcached is not installed; install it: apt install memcached")
    # It refuses to run as root unless told so, and must own the DAX device that it opens.
    user = ("-u", "root") if os.geteuid() == 0 else ()
    size_mib, rest = divmod(size_bytes, MIB)
    assert rest == 0, "the demo's tags are whole MiB"
    return (program, *user, "-e", "{dax}", "-m", str(size_mib), "-s", socket_path, "-U", "0")


class Cache:
    """A client of one memcached."""

    def __init__(self, address: Address, patience_seconds: float = 10.0) -> None:
        """Waits for it to answer. Raises OutcomeUnknown when it does not."""
        deadline = time.monotonic() + patience_seconds
        while True:
            self._client = Client(address, connect_timeout=_ANSWER_SECONDS, timeout=_ANSWER_SECONDS)
            try:
                self.version = self._client.version().decode()
                return
            except (OSError, MemcacheError) as error:
                if time.monotonic() > deadline:
                    raise OutcomeUnknown(
                        f"memcached at {address} does not answer: {error}"
                    ) from error
            time.sleep(0.01)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def store(self, records: dict[bytes, bytes]) -> None:
        """Store all records, in batches that are not answered one by one; then see that it did."""
        for batch in _batches(records):
            self._client.set_many({key: records[key] for key in batch}, noreply=True)
        # An answer to a later request says that it has read all earlier ones.
        self._client.version()

    def differing(self, records: dict[bytes, bytes]) -> int:
        """Read every record back; how many are missing or not as they were stored."""
        wrong = 0
        for batch in _batches(records):
            found = self._client.get_many(batch)
            wrong += sum(found.get(key) != records[key] for key in batch)
        return wrong

    def counters(self) -> tuple[int, int]:
        """(items held, items that were evicted for want of room)."""
        stats = self._client.stats()
        return int(stats[b"curr_items"]), int(stats[b"evictions"])


def _batches(records: dict[bytes, bytes]) -> Iterator[list[bytes]]:
    keys = iter(records)
    while batch := list(islice(keys, _BATCH)):
        yield batch
