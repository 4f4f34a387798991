"""What host and guest agent say to each other over a virtio-serial port or vsock: frames and
messages. The host's bookkeeping of them is in `guest_session`, which the guest does not need.

Standard library only, and little of it: the guest's half runs on a bare python3 in an initramfs.

A frame is one byte that occurs nowhere else in it (F5h, which is in no UTF-8 text either), `tgm1`,
length and CRC-32 as eight hexadecimal digits each, and that many bytes of JSON in ASCII. A port has
no beginning and no end: a guest that reboots and a host agent that restarts leave halves of frames
in it. Whoever reads finds the next frame at the next F5h, at once and whatever came before it.

    F5 't' 'g' 'm' '1'  LLLLLLLL CCCCCCCC  {"kind":"find","id":7,...}

Each request has an id, which its answers bear; answers come in any order and late ones are told
apart. Each side believes nothing of what the other says: every field has a kind and a bound
(`_SHAPES`), and what does not fit becomes a value (`Malformed`, `Unknown`) instead of an exception.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import parse_tag

VERSION = 1
PORT_NAME = "org.tagmem.agent.0"
"""The virtio-serial port: /dev/virtio-ports/org.tagmem.agent.0 in the guest."""
VSOCK_PORT = 7465

START = 0xF5
MAGIC = b"\xf5tgm1"
HEAD_BYTES = len(MAGIC) + 16
PAYLOAD_BYTES_MAX = 64 * 1024

OUTPUT_BYTES_MAX = 24 * 1024
"""One message's share of a command's output (or its whole input)."""
MEMORIES_MAX = 64
HOLDERS_MAX = 64
ARGUMENTS_MAX = 256
COMMAND_BYTES_MAX = 32 * 1024
MILLISECONDS_MAX = 3_600_000
_ID_MAX = (1 << 53) - 1
_U64_MAX = (1 << 64) - 1


# ---- frames


def frame(payload: bytes) -> bytes:
    """One frame. Raises InvalidInput for a payload that is too long or is not ASCII."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise InvalidInput("payload", f"at most {PAYLOAD_BYTES_MAX} bytes", len(payload))
    if not payload.isascii():
        raise InvalidInput("payload", "ASCII", payload[:16])
    return MAGIC + b"%08x%08x" % (len(payload), binascii.crc32(payload)) + payload


class Frames:
    """Cuts a byte stream into payloads. What is no frame is dropped, and counted."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.dropped_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that are whole now. Holds back less than one frame, whatever comes."""
        self._data += data
        found = []
        while (payload := self._next()) is not None:
            found.append(payload)
        return found

    def clear(self) -> None:
        """The peer has gone: what is left of it is a half."""
        self.dropped_bytes += len(self._data)
        self._data.clear()

    def _next(self) -> bytes | None:
        while True:
            start = self._data.find(START)
            if start < 0:
                self.clear()
                return None
            self._drop(start)
            end = self._extent()
            again = self._data.find(START, 1, end)
            if again > 0:
                self._drop(again)  # Another frame begins within this one: it was a half.
            elif end < 0:
                self._drop(1)
            elif len(self._data) < end:
                return None
            else:
                payload = bytes(self._data[HEAD_BYTES:end])
                if payload.isascii() and binascii.crc32(payload) == int(
                    self._data[HEAD_BYTES - 8 : HEAD_BYTES], 16
                ):
                    del self._data[:end]
                    return payload
                self._drop(1)

    def _extent(self) -> int:
        """Where the frame at the front ends, as far as that is known; -1 when it is none."""
        head = bytes(self._data[:HEAD_BYTES])
        if not (head.startswith(MAGIC) or MAGIC.startswith(head)):
            return -1
        digits = head[len(MAGIC) :]
        if digits.strip(b"0123456789abcdef"):
            return -1
        if len(head) < HEAD_BYTES:
            return HEAD_BYTES
        length = int(digits[:8], 16)
        return -1 if length > PAYLOAD_BYTES_MAX else HEAD_BYTES + length

    def _drop(self, count: int) -> None:
        self.dropped_bytes += count
        del self._data[:count]


# ---- what messages are made of


class Memory(NamedTuple):
    """Tagged memory as it is in the guest. `address` and `slot` are those of its PCI function."""

    tag: str
    kind: str
    name: str
    """As the kernel calls it: dax0.0, or the address of a PCI function."""
    path: str
    """What an application maps, from byte 0."""
    size_bytes: int
    align_bytes: int
    resource: int = 0
    """Guest physical address; 0 where the kernel does not say."""
    address: str = ""
    slot: str = ""
    serial: str = ""
    read_only: bool = False


class Told(NamedTuple):
    """What the host says of memory that cannot carry its tag: how to know it among its like.

    At least one of serial (cxl), address, slot, acpi_index (ivshmem) and resource is given. Two
    kinds are to be made first: `cxl`, an extent that the device has offered, and `cxl-static`, a
    device whose decoders are to be committed before the kernel's driver sees it.
    """

    tag: str
    kind: str = ""
    serial: str = ""
    """As sysfs writes it: 0xabc."""
    address: str = ""
    slot: str = ""
    acpi_index: int = 0
    resource: int = 0
    size_bytes: int = 0
    """Where the tag is smaller than what presents it (a BAR is a power of two); 0: all of it."""
    read_only: bool = False
    dpa: int = 0
    """`cxl`: where the extent of `size_bytes` lies in the address space of the device `serial`."""


class Holder(NamedTuple):
    """A process in the guest that has the tag's bytes: `how` is `maps` or `open`."""

    pid: int
    name: str
    how: str


# ---- host to guest


class Greet(NamedTuple):
    """The host is there, and asks who answers: Hello."""

    id: int
    version: int = VERSION


class Find(NamedTuple):
    """Which tagged memory is there: Found."""

    id: int
    told: tuple[Told, ...] = ()


class Attach(NamedTuple):
    """Expect a tag, give it its names: Attached when it is there, Failed when it is not in time."""

    id: int
    tag: str
    wait_ms: int = 10_000
    told: Told | None = None


class Detach(NamedTuple):
    """Give a tag back: Released, or Held by whom.

    Its holders are asked (SIGTERM) and after `ask_ms` stopped (SIGKILL); `stop_ms` later the answer
    is due. A rung of 0 ms is left out: 0 and 0 only look. With `everyone` all holders are, else
    those that were started by Exec. `eject` takes its PCI function out of the slot (or unbinds its
    driver) once nobody has it, `force` even before; a BAR's mappings outlive that, and stay Held.
    """

    id: int
    tag: str
    ask_ms: int = 10_000
    stop_ms: int = 5_000
    everyone: bool = False
    eject: bool = False
    force: bool = False


class Give(NamedTuple):
    """Have a CXL device take an extent back that nobody uses any more, or has not been taken yet:
    Done, or Failed (`conflict`: a DAX device lies over it still).
    """

    id: int
    told: Told


class Exec(NamedTuple):
    """Run a command, on a tag if one is named: Started, Output as it comes, Exited.

    `{dax}`, `{tag}` and `{size}` in its arguments are filled in, and TAGMEM_* is set. Beyond
    `output_max` bytes its output is dropped.
    """

    id: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = {}
    tag: str = ""
    input: bytes = b""
    output_max: int = 16 * 1024 * 1024


class Signal(NamedTuple):
    """Send a signal to the session of what Exec `exec_id` started: Done."""

    id: int
    exec_id: int
    number: int


class Eject(NamedTuple):
    """Take a PCI function out by the name of its slot, or the memory of a tag: Done."""

    id: int
    slot: str = ""
    tag: str = ""


class Reset(NamedTuple):
    """End what Exec started, give every tag back, forget what was told: Done, or Held."""

    id: int
    ask_ms: int = 10_000
    stop_ms: int = 5_000
    everyone: bool = True


class Shutdown(NamedTuple):
    """As Reset, then poweroff, reboot, kexec, or (`agent`) only the agent's end: Done before it."""

    id: int
    how: str = "poweroff"
    ask_ms: int = 10_000
    stop_ms: int = 5_000


# ---- guest to host


class Hello(NamedTuple):
    """Who answers. Told by itself (id 0) whenever the port opens, and in answer to Greet.

    Another `boot_id` means that the guest was rebooted, another `instance` that its agent was
    restarted: either way nothing asked before will be answered.
    """

    id: int
    version: int
    boot_id: str
    instance: str
    kernel: str
    features: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    """Those that have names now."""


class Found(NamedTuple):
    """Answers Find."""

    id: int
    memory: tuple[Memory, ...]


class Attached(NamedTuple):
    """Answers Attach; with id 0 the guest tells of memory that came without being expected."""

    id: int
    memory: Memory


class Released(NamedTuple):
    """Answers Detach: no process in the guest can reach the tag; a complete look proved it.

    `present`: its device is still there. `stopped` were sent SIGKILL. `revoked` still map a DAX
    device that was ejected by force, and get SIGBUS from it.
    """

    id: int
    tag: str
    present: bool
    stopped: tuple[Holder, ...] = ()
    revoked: tuple[Holder, ...] = ()


class Held(NamedTuple):
    """Answers Detach and Reset: who has it; or, not `complete`, why nobody can say."""

    id: int
    tag: str
    holders: tuple[Holder, ...]
    complete: bool = True
    reason: str = ""


class Started(NamedTuple):
    """The command of Exec runs."""

    id: int
    pid: int


class Output(NamedTuple):
    """What it wrote; `stream` is 1 or 2."""

    id: int
    stream: int
    data: bytes


class Exited(NamedTuple):
    """It ended, and all its output was sent: `code` as a shell has it, 128 + N for signal N."""

    id: int
    code: int
    dropped_bytes: int = 0


class Done(NamedTuple):
    """A request was carried out."""

    id: int


class Failed(NamedTuple):
    """A request was not carried out. `code` is one of CODES; id 0: it could not be read."""

    id: int
    code: str
    reason: str


class Vanished(NamedTuple):
    """A tag's device has gone without being asked for; its names are taken back. Id 0."""

    id: int
    tag: str


class Leaving(NamedTuple):
    """The agent ends: every tag was given back, but for these. Id 0.

    For some seconds more it answers Greet, Find and Detach, so that the host can take the devices.
    """

    id: int
    reason: str
    held: tuple[str, ...] = ()


CODES = ("absent", "busy", "conflict", "failed", "invalid", "unsupported")
HOWS = ("poweroff", "reboot", "kexec", "agent")

Request = Greet | Find | Attach | Detach | Give | Exec | Signal | Eject | Reset | Shutdown
Answer = (
    Hello
    | Found
    | Attached
    | Released
    | Held
    | Started
    | Output
    | Exited
    | Done
    | Failed
    | Vanished
    | Leaving
)
Message = Request | Answer


class Unknown(NamedTuple):
    """A message of a kind that this version does not know: to be answered `unsupported`."""

    id: int
    kind: str


class Malformed(NamedTuple):
    """What is no message, and why; `id` where it could be read, else 0."""

    id: int
    reason: str


# ---- the shape of each field

_Check = Callable[[str, Any], Any]


def _int(low: int, high: int) -> _Check:
    def check(field: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidInput(field, f"an integer from {low} to {high}", _shown(value))
        return int(value)

    return check


def _text(most: int, *, empty: bool = True, pattern: str = "") -> _Check:
    allowed = frozenset(pattern)

    def check(field: str, value: Any) -> str:
        if type(value) is not str or len(value) > most or (not value and not empty):
            low = 0 if empty else 1
            raise InvalidInput(field, f"text of {low} to {most} characters", _shown(value))
        if "\0" in value or (allowed and not allowed.issuperset(value)):
            raise InvalidInput(field, f"of the characters {pattern or 'beside NUL'}", _shown(value))
        return value

    return check


def _one_of(*values: str) -> _Check:
    def check(field: str, value: Any) -> str:
        if type(value) is not str or value not in values:
            raise InvalidInput(field, f"one of {', '.join(values)}", _shown(value))
        return value

    return check


def _bool(field: str, value: Any) -> bool:
    if type(value) is not bool:
        raise InvalidInput(field, "true or false", _shown(value))
    return value


def _tag(field: str, value: Any) -> str:
    if type(value) is not str:
        raise InvalidInput(field, "a UUID", _shown(value))
    if parse_tag(value[:64], field) != value:
        raise InvalidInput(field, "a UUID in canonical form", _shown(value))
    return value


def _tag_or_none(field: str, value: Any) -> str:
    return "" if value == "" else _tag(field, value)


def _bytes(most: int) -> _Check:
    def check(field: str, value: Any) -> bytes:
        if type(value) is str:
            try:
                value = binascii.a2b_base64(value, strict_mode=True)
            except ValueError:
                raise InvalidInput(field, "base64", _shown(value)) from None
        if type(value) is not bytes or len(value) > most:
            raise InvalidInput(field, f"at most {most} bytes", _shown(value))
        return value

    return check


def _many(item: _Check, most: int, *, least: int = 0, characters: int = 0) -> _Check:
    def check(field: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise InvalidInput(field, f"a list of {least} to {most}", _shown(value))
        items = tuple(item(f"{field}[{index}]", entry) for index, entry in enumerate(value))
        if characters and sum(map(len, items)) > characters:
            raise InvalidInput(field, f"at most {characters} characters in all", "more")
        return items

    return check


def _environment(field: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > ARGUMENTS_MAX:
        raise InvalidInput(field, f"a map of at most {ARGUMENTS_MAX}", _shown(value))
    text = _text(COMMAND_BYTES_MAX)
    for name, content in value.items():
        text(f"{field}.{name[:64]}" if isinstance(name, str) else field, content)
        if type(name) is not str or not name or "=" in name or "\0" in name or len(name) > 256:
            raise InvalidInput(field, "names of 1 to 256 characters without =", _shown(name))
    return dict(value)


def _record(kind: type[Any]) -> _Check:
    def check(field: str, value: Any) -> Any:
        if type(value) is kind:
            value = value._asdict()
        if not isinstance(value, dict):
            raise InvalidInput(field, f"a {kind.__name__}", _shown(value))
        return _built(kind, value, f"{field}.")

    return check


def _optional(inner: _Check) -> _Check:
    return lambda field, value: None if value is None else inner(field, value)


def _shown(value: Any) -> Any:
    return value if isinstance(value, int | bool | None) else repr(value)[:80]


_ID = _int(1, _ID_MAX)
_ANY_ID = _int(0, _ID_MAX)
_MS = _int(0, MILLISECONDS_MAX)
_U64 = _int(0, _U64_MAX)
_WORD = "abcdefghijklmnopqrstuvwxyz0123456789._:-"
_ADDRESS = _text(32, pattern=_WORD)
_SLOT = _text(32, pattern=_WORD.upper() + _WORD)
_SERIAL = _text(32, pattern="0123456789abcdefx")
_KIND = _text(32, pattern=_WORD)
_NAME = _text(64)
_SENTENCE = _text(2048)

_SHAPES: dict[type[Any], dict[str, _Check]] = {
    Memory: {
        "tag": _tag_or_none,
        "kind": _KIND,
        "name": _NAME,
        "path": _text(255),
        "size_bytes": _U64,
        "align_bytes": _U64,
        "resource": _U64,
        "address": _ADDRESS,
        "slot": _SLOT,
        "serial": _SERIAL,
        "read_only": _bool,
    },
    Told: {
        "tag": _tag,
        "kind": _KIND,
        "serial": _SERIAL,
        "address": _ADDRESS,
        "slot": _SLOT,
        "acpi_index": _int(0, 16383),
        "resource": _U64,
        "size_bytes": _U64,
        "read_only": _bool,
        "dpa": _U64,
    },
    Holder: {"pid": _int(1, 1 << 31), "name": _NAME, "how": _one_of("maps", "open")},
}
_HOLDERS = _many(_record(Holder), HOLDERS_MAX)
_TAGS = _many(_tag, MEMORIES_MAX)
_SHAPES |= {
    Greet: {"id": _ID, "version": _int(0, 1 << 16)},
    Find: {"id": _ID, "told": _many(_record(Told), MEMORIES_MAX)},
    Attach: {"id": _ID, "tag": _tag, "wait_ms": _MS, "told": _optional(_record(Told))},
    Detach: {
        "id": _ID,
        "tag": _tag,
        "ask_ms": _MS,
        "stop_ms": _MS,
        "everyone": _bool,
        "eject": _bool,
        "force": _bool,
    },
    Give: {"id": _ID, "told": _record(Told)},
    Exec: {
        "id": _ID,
        "argv": _many(
            _text(COMMAND_BYTES_MAX), ARGUMENTS_MAX, least=1, characters=COMMAND_BYTES_MAX
        ),
        "env": _environment,
        "tag": _tag_or_none,
        "input": _bytes(OUTPUT_BYTES_MAX),
        "output_max": _int(0, 1 << 30),
    },
    Signal: {"id": _ID, "exec_id": _ID, "number": _int(1, 64)},
    Eject: {"id": _ID, "slot": _SLOT, "tag": _tag_or_none},
    Reset: {"id": _ID, "ask_ms": _MS, "stop_ms": _MS, "everyone": _bool},
    Shutdown: {"id": _ID, "how": _one_of(*HOWS), "ask_ms": _MS, "stop_ms": _MS},
    Hello: {
        "id": _ANY_ID,
        "version": _int(0, 1 << 16),
        "boot_id": _text(64),
        "instance": _text(64),
        "kernel": _text(128),
        "features": _many(_KIND, 32),
        "tags": _TAGS,
    },
    Found: {"id": _ID, "memory": _many(_record(Memory), MEMORIES_MAX)},
    Attached: {"id": _ANY_ID, "memory": _record(Memory)},
    Released: {
        "id": _ID,
        "tag": _tag,
        "present": _bool,
        "stopped": _HOLDERS,
        "revoked": _HOLDERS,
    },
    Held: {
        "id": _ID,
        "tag": _tag_or_none,
        "holders": _HOLDERS,
        "complete": _bool,
        "reason": _SENTENCE,
    },
    Started: {"id": _ID, "pid": _int(1, 1 << 31)},
    Output: {"id": _ID, "stream": _int(1, 2), "data": _bytes(OUTPUT_BYTES_MAX)},
    Exited: {"id": _ID, "code": _int(0, 255), "dropped_bytes": _U64},
    Done: {"id": _ID},
    Failed: {"id": _ANY_ID, "code": _one_of(*CODES), "reason": _SENTENCE},
    Vanished: {"id": _ANY_ID, "tag": _tag},
    Leaving: {"id": _ANY_ID, "reason": _SENTENCE, "held": _TAGS},
}
REQUESTS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in get_args(Request)}
ANSWERS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in get_args(Answer)}


def _built(kind: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    """A message or record from its fields. Raises InvalidInput; unknown fields are left aside."""
    shape = _SHAPES[kind]
    given = {}
    for name, check in shape.items():
        if name in values:
            given[name] = check(prefix + name, values[name])
        elif name not in kind._field_defaults:
            raise InvalidInput(prefix + name, "given", "nothing")
    return kind(**given)


# ---- messages in frames


def encode(message: Message) -> bytes:
    """The frame of a message. Raises InvalidInput for what the other side would refuse."""
    checked = _built(type(message), message._asdict())
    document = {"kind": type(message).__name__.lower(), **_plain(checked)}
    return frame(json.dumps(document, separators=(",", ":")).encode("ascii"))


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, bytes):
        return binascii.b2a_base64(value, newline=False).decode("ascii")
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def decode(payload: bytes, kinds: Mapping[str, type[Any]]) -> Any:
    """The message in a payload, one of `kinds` (REQUESTS or ANSWERS), else Unknown or Malformed."""
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        return Malformed(0, f"no JSON: {type(error).__name__}")
    if not isinstance(document, dict):
        return Malformed(0, "no JSON object")
    number, name = document.get("id"), document.get("kind")
    known_id = number if type(number) is int and 0 <= number <= _ID_MAX else 0
    if type(name) is not str or name not in kinds:
        return Unknown(known_id, str(name)[:32])
    try:
        return _built(kinds[name], document)
    except InvalidInput as error:
        return Malformed(known_id, str(error)[:512])
