"""Messages of the tracer, and the places that they tell of."""

from __future__ import annotations

import struct

import pytest

from tagmem.coherence.trace import Kind, decode_event, python_frames

STACK = 'Stack (most recent call first):\n  File "a.py", line 3 in f\n  File "b.py", line 9 in g\n'


def message(kind: int = 1, stack: bytes = STACK.encode()) -> bytes:
    head = struct.pack(
        "<IIQQQQQIIII16s", kind, 1, 4096, 2, 3, 4, 5, 1, 10, 11, len(stack), b"\x48\x89\x07"
    )
    return head + stack


def test_an_event_and_its_place() -> None:
    event = decode_event(message())
    assert (event.kind, event.host, event.offset, event.write) == (Kind.ACCESS, 1, 4096, True)
    assert event.code.startswith(b"\x48\x89\x07")
    frames = python_frames(event.stack)
    assert [str(frame) for frame in frames] == ["a.py:3 (f)", "b.py:9 (g)"]


def test_a_stack_that_was_cut_loses_its_last_line_only() -> None:
    assert len(python_frames(STACK[:-4])) == 1


def test_what_is_no_event_is_refused() -> None:
    for data in (b"", b"short", message(kind=77)):
        with pytest.raises(ValueError):
            decode_event(data)
