"""NumPy on raw memory, threads, a child process as the second host: no library but for lines.

The first argument names what is forgotten. h1 fills an array in a thread, then starts h2 itself,
which reads it: the only order between them is that of processes.
"""

import os
import subprocess
import sys
import threading

import numpy as np

import tagmem
from tagmem.shared import lines_of

COUNT = 256
forgotten = sys.argv[1]


def fill(array: np.ndarray) -> None:
    array[:] = np.arange(COUNT)


with tagmem.open(os.environ["TAGMEM_TAG"]) as capacity:
    lines = lines_of(capacity)
    array = capacity.numpy("i8", offset=8192, count=COUNT)
    if os.environ["TAGMEM_HOST"] == "h1":
        thread = threading.Thread(target=fill, args=(array,))
        thread.start()
        thread.join()
        if forgotten != "flush":
            lines.write_back(8192, COUNT * 8)
            lines.fence()
        other = {
            "TAGMEM_HOST": "h2",
            "TAGMEM_RUN_DIR": os.path.join(os.environ["TAGMEM_HOSTS_DIR"], "h2"),
        }
        subprocess.run([sys.executable, *sys.argv], env={**os.environ, **other}, check=True)
    else:
        if forgotten != "invalidate":
            lines.invalidate(8192, COUNT * 8)
        sys.stdout.write(f"{int(array.sum()) == COUNT * (COUNT - 1) // 2}\n")
    del array
    lines.release()
