"""What becomes of a VM's tags when it moves to another host, judged before anything is done.

A tag can *stay*: its device travels with the VM, both hosts have the bytes for the time of the
handover, and QEMU leaves them out of the stream (`x-ignore-shared`: it skips memory that is shared
and has a file's name, so a guest's own RAM in a memfd is copied though it is shared as well). Where
the presenter in the VM cannot travel, another can take its place for the journey (*switch*). And
what cannot do either is *removed*, and attached again on the other side. In the first two forms the
target has the extents before the source stops; in the third its host has their files.

Pure: facts of both sides in, moves out; the same functions make the table that documents print.
What the two hypervisors say to each other is here as well; each takes the other for hostile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from tagmem.base.errors import Conflict, InvalidInput, OutcomeUnknown, Unsupported
from tagmem.base.units import GIB, MIB, SECOND, Bytes
from tagmem.presenter.contract import (
    Command,
    Description,
    MakeHeader,
    Plan,
    Presentation,
    Presenter,
    Request,
    Slot,
    Tagged,
    Value,
    VmFacts,
)

Form = Literal["stays", "switch", "remove-all"]
FORMS: tuple[Form, ...] = ("stays", "switch", "remove-all")
TRAVELLER = "pmem"
"""What takes another's place for the journey: it migrates, and it can be taken out again."""
ADDRESSED = {
    "virtio-pmem-pci": ("memaddr", False),
    "virtio-mem-pci": ("memaddr", False),
    "nvdimm": ("addr", True),
    "pc-dimm": ("addr", True),
}
"""By driver: the property with its guest-physical address, and whether it has a memory slot too."""
TAGS_MAX = 256
ANY_BYTES = 1 << 62
DEADLINE_NS = 600 * SECOND
DEADLINE_NS_MAX = 24 * 3600 * SECOND


# ---- the table


class Forms(Value, frozen=True):
    """Which forms one presenter has. Each is None where it has it, else why not."""

    stays: str | None
    switch: str | None
    remove_all: str | None
    prepopulate: Literal["device", "host"]
    """What the target has before the source stops: the device on its extents, or its host their
    files."""


def forms(what: Description) -> Forms:
    """What follows for migration from what a presenter promises."""
    leaves = {
        "host": None,
        "guest": None,
        "sometimes": "the guest's kernel may keep it",
        "vm-end": "QEMU keeps its bytes until it ends",
        "never": "it cannot be unplugged",
    }[what.removal]
    if what.migration == "stays":
        return Forms(None, "not needed", leaves, "device")
    why = {
        "refused": "QEMU refuses to migrate while it is attached",
        "broken": "the device does not survive a migration",
    }[what.migration]
    switch = leaves or ("the guest's kernel has its pages" if what.ram else None)
    return Forms(why, switch, leaves, "host" if switch else "device")


def in_short(what: Description) -> str:
    """The forms in the words of the comparison: (a) remove all, (b) temporal sharing, (c)
    prepopulated.
    """
    have = forms(what)
    best = "stays (b, c)" if have.stays is None else ""
    if not best and have.switch is None:
        best = f"as {TRAVELLER} meanwhile (b, c)"
    last = "removed (a)" if have.remove_all is None else ""
    return ", else ".join(part for part in (best, last) if part) or "none: the VM stays"


TABLE_HEAD = """\
| presenter | (b) stays | (b) switch | (a) remove all | (c) on the target before the source stops |
|---|---|---|---|---|
"""


def table(whats: Iterable[Description]) -> str:
    """As Markdown: which presenter has which form, and why not."""
    rows = []
    for what in whats:
        have = forms(what)
        cells = (have.stays, have.switch, have.remove_all)
        told = " | ".join("yes" if no is None else no for no in cells)
        before = {"device": "its device, on its extents", "host": "its host's files"}
        rows.append(f"| `{what.name}` | {told} | {before[have.prepopulate]} |\n")
    return TABLE_HEAD + "".join(rows)


# ---- what both sides know


class TargetTag(Value, frozen=True):
    """A tag as the target's host has it."""

    tag: str
    size_bytes: Bytes
    pieces: int
    head_room_bytes: Bytes
    read_only: bool


class Move(Value, frozen=True):
    """What is done with one tag of the VM, and why this."""

    tag: str
    presenter: str
    """What presents it now, and again at the end where that is wanted."""
    form: Form
    travels_as: str
    """Empty: it does not travel."""
    why: str
    loaded: bool = True
    attach: bool = True
    """False: the target's host does not have the tag yet; whoever asked attaches it later."""


class Wish(Value, frozen=True):
    """What the asker wants of the migration."""

    form: Form | Literal["auto"] = "auto"
    back: bool = True
    """What was switched is switched back on the target."""


def unfit(what: Description, there: TargetTag) -> str | None:
    """Why a presenter cannot show a tag as the target's host has it."""
    if there.pieces > 1 and not what.pieces:
        return f"there the tag is in {there.pieces} pieces, and it must be in one"
    if there.head_room_bytes < what.header_bytes and not what.pieces:
        return "the media there leave no room for its header"
    if there.read_only and not what.read_only:
        return "there the tag is read-only"
    return None


def judge(
    shown: Iterable[Presentation],
    there: Mapping[str, TargetTag],
    ways: Mapping[str, Presenter],
    facts: VmFacts,
    wish: Wish,
    host: str,
) -> tuple[Move, ...]:
    """A move for each tag in the VM. Raises Unsupported with every reason where one cannot move."""
    moves: list[Move] = []
    reasons: list[str] = []
    for one in shown:
        found = _judge(one, there.get(one.tagged.tag), ways, facts, wish, host)
        if isinstance(found, str):
            reasons.append(f"tag {one.tagged.tag}: {found}")
            continue
        moves.append(found)
        facts = _after(facts, one, found, ways)
    if reasons:
        raise Unsupported("; ".join(reasons))
    return tuple(moves)


def _judge(
    shown: Presentation,
    there: TargetTag | None,
    ways: Mapping[str, Presenter],
    facts: VmFacts,
    wish: Wish,
    host: str,
) -> Move | str:
    """A move, or why there is none."""
    tag, name = shown.tagged.tag, shown.presenter
    if shown.state != "attached":
        return f"it is {shown.state}; detach it first"
    what = ways[name].describe()
    have = forms(what)
    if there is None:
        if wish.form == "remove-all" and have.remove_all is None:
            why = f"asked for; host {host} does not have the tag yet"
            loaded = shown.tagged.loaded
            return Move(tag, name, "remove-all", "", why, loaded, attach=False)
        return f"host {host} does not have it; attach it there first"
    if there.size_bytes != shown.tagged.size_bytes:
        return f"host {host} has {there.size_bytes} bytes of it, not {shown.tagged.size_bytes}"
    no: dict[Form, str | None] = {
        "stays": have.stays or _otherwise(shown.tagged, there) or unfit(what, there),
        "switch": have.switch or _no_switch(shown, there, ways, facts),
        "remove-all": have.remove_all,
    }
    wanted: tuple[Form, ...] = FORMS if wish.form == "auto" else (wish.form,)
    # What stays needs no switch: to ask for the one that it does not need is no reason to fail.
    if wish.form == "switch" and have.stays is None:
        wanted = ("stays",)
    for form in wanted:
        if no[form] is None:
            before = [f"not {earlier}: {no[earlier]}" for earlier in FORMS[: FORMS.index(form)]]
            why = "; ".join(before) if wish.form == "auto" else "asked for"
            travels = {"stays": name, "switch": TRAVELLER, "remove-all": ""}[form]
            return Move(tag, name, form, travels, why or _KEEPS, shown.tagged.loaded)
    return "; ".join(f"{form}: {no[form]}" for form in wanted)


def _otherwise(tagged: Tagged, there: TargetTag) -> str | None:
    """A device cannot become read-only, or writable, on the way."""
    if there.read_only == tagged.read_only:
        return None
    return f"the tag is {'read-only' if there.read_only else 'writable'} there, and not here"


_KEEPS = "its device travels with the VM, so applications keep their mappings"


def _no_switch(
    shown: Presentation, there: TargetTag, ways: Mapping[str, Presenter], facts: VmFacts
) -> str | None:
    """Why the traveller cannot take its place, on either side."""
    traveller = ways[TRAVELLER]
    free = _without(facts, shown.device)
    reason = traveller.can(Request(shown.tagged), free)
    if reason is None:
        reason = unfit(traveller.describe(), there)
    return reason and f"{TRAVELLER}: {reason}"


def _without(facts: VmFacts, device: str) -> VmFacts:
    """The VM as it is once a device has left."""
    slots = tuple(
        msgspec.structs.replace(slot, taken_by="") if slot.taken_by == device else slot
        for slot in facts.slots
    )
    devices = tuple(other for other in facts.devices if other != device)
    return msgspec.structs.replace(facts, slots=slots, devices=devices)


def _after(
    facts: VmFacts, shown: Presentation, move: Move, ways: Mapping[str, Presenter]
) -> VmFacts:
    """The VM once a move has been made, for the next one to be judged by."""
    if move.form == "stays":
        return facts
    facts = _without(facts, shown.device)
    if move.form == "remove-all":
        return facts
    plan = ways[TRAVELLER].plan(Request(shown.tagged), facts)
    slots = tuple(
        msgspec.structs.replace(slot, taken_by=plan.device) if slot.bus == plan.slot else slot
        for slot in facts.slots
    )
    left = facts.memory_free_bytes - plan.device_bytes
    return msgspec.structs.replace(facts, slots=slots, memory_free_bytes=max(0, left))


# ---- the machine, made again


_Name = Annotated[str, msgspec.Meta(max_length=63)]
_Tag = Annotated[str, msgspec.Meta(max_length=36)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
_Text = Annotated[str, msgspec.Meta(max_length=4096, pattern=r"^[\x20-\x7e]*$")]


class Build(Value, frozen=True):
    """What must be the same on both sides: no path, no program, nothing of one host."""

    qemu: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")]
    """By name: each host has its own program of that name."""
    memory_bytes: Annotated[int, msgspec.Meta(ge=64 * MIB, le=1 << 44)]
    memory_max_bytes: Annotated[int, msgspec.Meta(ge=64 * MIB, le=1 << 45)] = 32 * GIB
    cpus: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    ports: Annotated[int, msgspec.Meta(ge=0, le=16)] = 6
    port_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 45)] = 0
    memory_slots: Annotated[int, msgspec.Meta(ge=0, le=255)] = 8
    nvdimm: bool = False
    append: _Text = ""
    """The guest's kernel hears it at its next boot."""


class Seat(Value, frozen=True):
    """Where a device that travels is plugged in the source, and must be in the target."""

    tag: _Tag
    presenter: _Name
    device_bytes: _Size
    address: _Size
    """In the guest's physical memory."""
    memory_slot: Annotated[int, msgspec.Meta(ge=-1, le=255)] = -1
    slot: Annotated[str, msgspec.Meta(pattern=r"^(tmp[0-9]{1,2})?$")] = ""
    guest_path: _Text = ""


def seats(
    shown: Iterable[Presentation], memory_devices: Any, moves: Iterable[Move]
) -> tuple[Seat, ...]:
    """Of what travels, from QEMU's own list. Raises OutcomeUnknown where that makes no sense."""
    at: dict[str, Mapping[str, Any]] = {}
    for entry in memory_devices if isinstance(memory_devices, list) else ():
        data = entry.get("data", {})
        at[str(data.get("id", ""))] = data
    travelling = {move.tag for move in moves if move.travels_as}
    found = []
    for one in shown:
        if one.tagged.tag not in travelling:
            continue
        data = at.get(one.device, {})
        address = data.get("memaddr", data.get("addr"))
        if not isinstance(address, int):
            raise OutcomeUnknown(f"QEMU does not say where {one.device} is")
        found.append(
            Seat(
                one.tagged.tag,
                one.presenter,
                one.device_bytes,
                address,
                int(data.get("slot", -1)),
                one.slot,
                one.guest_path,
            )
        )
    return tuple(found)


def arrival(way: Presenter, tagged: Tagged, seat: Seat, name: str) -> Plan:
    """The plan by which the target would attach it, in its seat. Raises Unsupported, Conflict."""
    what = way.describe()
    there = TargetTag(
        tagged.tag,
        tagged.size_bytes,
        len(tagged.pieces),
        tagged.head_room_bytes,
        tagged.read_only,
    )
    reason = forms(what).stays or unfit(what, there)
    if reason is not None:
        raise Unsupported(f"tag {tagged.tag}: {what.name}: {reason}")
    slots = (Slot(seat.slot, ANY_BYTES),) if seat.slot else ()
    facts = VmFacts(
        name, what.qemu_min, slots=slots, memory_slots_free=1, memory_free_bytes=ANY_BYTES
    )
    plan = way.plan(Request(tagged), facts)
    if plan.device_bytes != seat.device_bytes:
        raise Conflict(
            f"tag {tagged.tag}: its device has {seat.device_bytes} bytes there and "
            f"{plan.device_bytes} here"
        )
    return plan


def headers(plan: Plan) -> tuple[MakeHeader, ...]:
    """What the target writes before its QEMU maps the bytes: the same as the source has."""
    return tuple(step for step in plan.steps if isinstance(step, MakeHeader))


def arguments(plan: Plan, seat: Seat) -> tuple[str, ...]:
    """The words of QEMU's command line that put a plan's device into its seat."""
    words: list[str] = []
    for step in plan.steps:
        if not isinstance(step, Command):
            continue
        if step.execute == "object-add":
            words += ["-object", json.dumps(step.arguments)]
        elif step.execute == "device_add":
            words += ["-device", json.dumps(step.arguments | _seated(step, seat))]
    return tuple(words)


def _seated(step: Command, seat: Seat) -> dict[str, int]:
    driver = str(step.arguments["driver"])
    if driver not in ADDRESSED:
        raise Unsupported(f"{driver} has no address to be put at")
    name, slotted = ADDRESSED[driver]
    place = {name: seat.address}
    if slotted and seat.memory_slot >= 0:
        place["slot"] = seat.memory_slot
    return place


# ---- what two hypervisors say to each other


class Look(Value, frozen=True):
    """`look`: could this host take the VM?"""

    name: _Name
    boot_id: Annotated[str, msgspec.Meta(max_length=64)]
    """The source's machine, as its kernel names this boot of it."""
    tags: Annotated[tuple[_Tag, ...], msgspec.Meta(max_length=TAGS_MAX)]


class Seen(Value, frozen=True):
    """Its answer."""

    tags: Annotated[tuple[TargetTag, ...], msgspec.Meta(max_length=TAGS_MAX)] = ()
    refusal: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class Later(Value, frozen=True):
    """A tag to be attached, or presented in another way, once the VM runs on the target."""

    tag: _Tag
    way: _Name
    overwrite: bool = False


class Incoming(Value, frozen=True):
    """`incoming`: start a QEMU that waits for the VM."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f-]{36}$")]
    name: _Name
    boot_id: Annotated[str, msgspec.Meta(max_length=64)]
    build: Build
    seats: Annotated[tuple[Seat, ...], msgspec.Meta(max_length=TAGS_MAX)] = ()
    later: Annotated[tuple[Later, ...], msgspec.Meta(max_length=TAGS_MAX)] = ()
    deadline_ns: Annotated[int, msgspec.Meta(ge=0, le=DEADLINE_NS_MAX)] = DEADLINE_NS
    """After which the source has certainly given up, or will ask again."""


class Waiting(Value, frozen=True):
    """Its answer: where the stream is to go."""

    machine: _Name
    accel: _Name
    path: Annotated[str, msgspec.Meta(max_length=107, pattern=r"^(/[\x21-\x7e]+)?$")] = ""
    """Of a Unix socket, where both are on one machine."""
    address: Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[0-9A-Za-z:.-]*$")] = ""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


class About(Value, frozen=True):
    """`arrived`, `abandon`, `settle`, `forget`: of one migration, by its id."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f-]{36}$")]


class Arrival(Value, frozen=True):
    """The answer to `arrived`. The source believes it only as a word: an error says nothing."""

    state: Literal["arrived", "abandoned"]
    reason: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class Settled(Value, frozen=True):
    """What became of one tag on the target."""

    tag: _Tag
    presenter: _Name = ""
    """Empty: it is not in the VM."""
    reason: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class Settlement(Value, frozen=True):
    """The answer to `settle`."""

    tags: Annotated[tuple[Settled, ...], msgspec.Meta(max_length=TAGS_MAX)] = ()


def address(waiting: Waiting, name: str) -> dict[str, str]:
    """The channel that the source's QEMU connects to: a VM's own socket or a port, never a command
    to be run (`exec:`) or a file. Raises InvalidInput.
    """
    if waiting.path:
        if not waiting.path.endswith(f"/{name}/incoming"):
            raise InvalidInput("path", f"a socket …/{name}/incoming", waiting.path)
        return {"transport": "socket", "type": "unix", "path": waiting.path}
    if not (waiting.address and waiting.port):
        raise InvalidInput("waiting", "with a path, or an address and a port", waiting)
    port = str(waiting.port)
    return {"transport": "socket", "type": "inet", "host": waiting.address, "port": port}


def later(moves: Sequence[Move], *, back: bool) -> tuple[Later, ...]:
    """What the target does once the VM runs there."""
    return tuple(
        Later(move.tag, move.presenter, overwrite=not move.loaded)
        for move in moves
        if (move.form == "switch" and back) or (move.form == "remove-all" and move.attach)
    )
