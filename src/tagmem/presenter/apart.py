"""Processes that outlive the agent which starts them: in a session, and where there is one a
cgroup, of their own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tagmem.base.errors import InvalidInput


def start(
    argv: Sequence[str],
    log_path: str,
    *,
    environment: Mapping[str, str] = {},
    cgroup: str = "",
) -> subprocess.Popen[bytes]:
    """Start a program; what it says goes to `log_path`. Raises InvalidInput when it cannot be."""
    with Path(log_path).open("ab") as output:
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(os.environ) | dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            raise InvalidInput("program", f"one ({error.strerror})", argv[:1]) from None
    if cgroup:
        Path(cgroup, "cgroup.procs").write_text(str(child.pid))
    return child
