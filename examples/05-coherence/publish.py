"""Two hosts and a message: h1 publishes it, h2 waits for the word and reads. The first argument
names what is forgotten; "nothing" is the right program.
"""

import os
import sys

import tagmem
from tagmem.shared import MappedMemory, SoftwareCoherent, lines_of

DATA, WORD = 4096, 256
MESSAGE = b"the quick brown fox jumps over the lazy dog; " * 5


def write(memory: MappedMemory, forgotten: str) -> None:
    memory.store(DATA, MESSAGE)
    if forgotten not in ("flush", "order"):
        memory.write_back(DATA, len(MESSAGE))
    if forgotten not in ("flush", "order", "fence"):
        memory.fence()
    memory.store_word(WORD, 1)
    memory.write_back(WORD, 8)
    memory.fence()
    if forgotten == "order":
        memory.write_back(DATA, len(MESSAGE))
        memory.fence()


def read(memory: MappedMemory, forgotten: str) -> None:
    while True:
        memory.invalidate(WORD, 8)
        if memory.load_word(WORD) == 1:
            break
    if forgotten != "invalidate":
        memory.invalidate(DATA, len(MESSAGE))
    sys.stdout.write(f"{memory.load(DATA, len(MESSAGE)) == MESSAGE}\n")


forgotten = sys.argv[1]
with tagmem.open(os.environ["TAGMEM_TAG"]) as capacity:
    lines = lines_of(capacity)
    memory = MappedMemory(capacity.map, SoftwareCoherent(lines))
    (write if os.environ["TAGMEM_HOST"] == "h1" else read)(memory, forgotten)
    memory.release()
    lines.release()
