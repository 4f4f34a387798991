"""Compiles the few C files of the package when it is installed or built.

Each `NAME.c` becomes `libNAME.so` beside it: a plain shared library, loaded by ctypes or by
LD_PRELOAD, that knows nothing of Python and so serves every version of it. Without a compiler the
package installs all the same; what needs the library says then that it is not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = (
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-shared",
    "-fvisibility=default",
)


_DASHES = str.maketrans("-.", "__")


def compile_all(root: Path) -> list[Path]:
    """The libraries, each compiled anew. Raises CalledProcessError for code that does not."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    sources = sorted((root / "src").rglob("*.c"))
    if compiler is None:
        sys.stderr.write("tagmem: no C compiler: installed without its C libraries\n")
        return []
    made = []
    for source in sources:
        target = source.with_name(f"lib{source.stem}.so")
        partial = target.with_suffix(".partial")
        subprocess.run([compiler, *FLAGS, "-o", partial, source, "-ldl"], check=True)
        # A library that a process has mapped is replaced, not written over.
        partial.replace(target)
        made.append(target)
    return made


class CustomBuildHook(BuildHookInterface[Any]):
    """Called by hatchling."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before files are gathered."""
        root = Path(self.root)
        made = compile_all(root)
        build_data["artifacts"] += [str(path.relative_to(root)) for path in made]
        if made:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().translate(_DASHES)}"
