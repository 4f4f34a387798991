"""The judgement against the truth: every legal order of what caches do by themselves is tried for
small programs, and `luck` must find something exactly where the outcome could differ.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tagmem.coherence.caches import HABITS, Caches
from tagmem.coherence.luck import Luck, Missing

HOSTS = 2
WIDTH = 2
"""Bytes of the only line that are told apart."""

Op = tuple[str, int, int]
"""What, host, byte."""

ops = st.lists(
    st.tuples(
        st.sampled_from(["load", "store", "write_back", "fence", "invalidate"]),
        st.integers(0, HOSTS - 1),
        st.integers(0, WIDTH - 1),
    ),
    min_size=1,
    max_size=12,
)

Line = tuple[int, ...]
Host = tuple[Line | None, bool, Line | None]
"""What it has of the line, whether that is dirty, and what is on its way."""
State = tuple[Line, tuple[Host, ...]]


def put(hosts: tuple[Host, ...], number: int, host: Host) -> tuple[Host, ...]:
    return (*hosts[:number], host, *hosts[number + 1 :])


def closure(states: set[State]) -> set[State]:
    """All that caches may do by themselves, any number of times."""
    pending, seen = list(states), set(states)
    while pending:
        memory, hosts = pending.pop()
        for number, (line, dirty, flight) in enumerate(hosts):
            after: list[State] = []
            if line is None:
                held = memory if flight is None else flight
                after.append((memory, put(hosts, number, (held, False, flight))))
            elif dirty:
                after.append((line, put(hosts, number, (None, False, None))))
            else:
                after.append((memory, put(hosts, number, (None, False, flight))))
            if flight is not None:
                after.append((flight, put(hosts, number, (line, dirty, None))))
            for state in after:
                if state not in seen:
                    seen.add(state)
                    pending.append(state)
    return seen


def step(state: State, op: Op, value: int) -> list[State]:
    memory, hosts = state
    what, number, byte = op
    line, dirty, flight = hosts[number]
    if what in ("load", "store") and line is None:
        line = memory if flight is None else flight
    if what == "store":
        assert line is not None
        line, dirty = (*line[:byte], value, *line[byte + 1 :]), True
    elif what == "write_back" and dirty:
        memory = memory if flight is None else flight
        dirty, flight = False, line
    elif what == "fence" and flight is not None:
        memory, flight = flight, None
    elif what == "invalidate":
        dropped = (memory, put(hosts, number, (None, False, flight)))
        if dirty and line is not None:
            return [dropped, (line, put(hosts, number, (None, False, None)))]
        return [dropped]
    return [(memory, put(hosts, number, (line, dirty, flight)))]


def truth(program: list[Op]) -> tuple[bool, list[Line]]:
    """Whether any load could differ, and what memory may hold once all is published."""
    empty: Line = (0,) * WIDTH
    states = closure({(empty, ((None, False, None),) * HOSTS)})
    differs = False
    for number, op in enumerate(program, 1):
        if op[0] == "load":
            values = set()
            for state in states:
                ((_, hosts),) = step(state, op, number)
                line = hosts[op[1]][0]
                assert line is not None
                values.add(line[op[2]])
            differs |= len(values) > 1
        states = closure({after for state in states for after in step(state, op, number)})
    return differs, sorted({memory for memory, _ in states})


def judge(program: list[Op]) -> Luck:
    luck = Luck(HOSTS)
    for what, host, byte in program:
        if what == "load":
            luck.load(host, byte, 1)
        elif what == "store":
            luck.store(host, byte, 1)
        elif what == "fence":
            luck.fence(host)
        elif what == "write_back":
            luck.write_back(host, byte, 1)
        else:
            luck.invalidate(host, byte, 1)
    return luck


@given(ops)
def test_what_is_not_found_cannot_differ(program: list[Op]) -> None:
    if judge(program).first is None:
        differs, _ = truth(program)
        assert not differs


@given(ops)
def test_a_load_that_is_found_could_have_differed(program: list[Op]) -> None:
    first = judge(program).first
    if first is not None and first.access == "load":
        differs, _ = truth(program[: first.at])
        assert differs


@given(ops, st.integers(0, 1 << 32))
def test_caches_do_nothing_but_what_is_legal(program: list[Op], seed: int) -> None:
    """The simulated caches return one of the values that the exhaustive model has."""
    empty: Line = (0,) * WIDTH
    states = closure({(empty, ((None, False, None),) * HOSTS)})
    caches = Caches(64, HOSTS, random.Random(seed), HABITS[seed % len(HABITS)])
    for number, (what, host, byte) in enumerate(program, 1):
        legal = closure({after for s in states for after in step(s, (what, host, byte), number)})
        if what == "load":
            got = caches.load(host, byte, 1)[0]
            legal = {s for s in legal if (line := s[1][host][0]) is None or line[byte] == got}
            values = set()
            for state in states:
                ((_, hosts),) = step(state, (what, host, byte), number)
                line = hosts[host][0]
                values.add(line[byte] if line else -1)
            assert got in values
        elif what == "store":
            caches.store(host, byte, bytes([number]))
        elif what == "fence":
            caches.fence(host)
        elif what == "write_back":
            caches.write_back(host, byte, 1)
        else:
            caches.invalidate(host, byte, 1)
        states = closure(legal)


def test_the_four_mistakes_have_their_names() -> None:
    def run(*program: tuple[str, int]) -> Missing:
        """Byte 0 is data of host 0; a word at 64 says that it is there; host 1 reads."""
        luck = Luck(2)
        for what, host in program:
            if what == "word":
                luck.store_word(0, 64, 1)
                luck.write_back(0, 64, 8)
                luck.fence(0)
            elif what == "see":
                luck.invalidate(1, 64, 8)
                luck.load_word(1, 64, 1)
            elif what == "fence":
                luck.fence(host)
            else:
                getattr(luck, what)(host, 0, 1)
        assert luck.first is not None
        return luck.first.missing

    w, r = 0, 1
    begin = (("store", w),)
    read = (("see", r), ("invalidate", r), ("load", r))
    assert run(*begin, ("word", w), *read) is Missing.FLUSH
    assert run(*begin, ("write_back", w), ("see", r), ("invalidate", r), ("load", r)) is (
        Missing.FENCE
    )
    late = (("write_back", w), ("fence", w))
    assert run(*begin, ("word", w), *late, *read) is Missing.LATE
    assert run(*begin, ("word", w), *read, *late) is Missing.LATE
    assert run(*begin, *late, ("word", w), ("see", r), ("load", r)) is Missing.INVALIDATE
    assert run(*begin, ("invalidate", r), ("load", r), *late) is Missing.ORDER
