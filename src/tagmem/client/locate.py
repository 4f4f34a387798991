"""Finds a tag on this host: in the host agent's run directory, else among the kernel's own DAX
devices.

Apart from mapping it, because `tagmem run --local` needs the place and not the bytes, and because
saying *why* a tag is not there is most of the work: an application that only hears "not found"
cannot be helped.

The run directory is described in docs/ARCHITECTURE.md: `by-tag/<uuid>` is a link into `daxR.N/`,
whose text attributes have one value and a newline, as sysfs has. The kernel's surface is
`/sys/bus/dax/devices/daxX.Y/uuid` (DCD series). A guest's agent keeps the same directory, whose
bytes are a link to a DAX device or a BAR.
"""

from __future__ import annotations

import os
import time

from tagmem.base.errors import Conflict, InvalidInput, NotFound, Unsupported
from tagmem.base.ids import Tag, parse_tag

RUN_DIR = "/run/tagmem"
"""Where a host agent keeps its run directory unless TAGMEM_RUN_DIR says otherwise."""
SYSFS = "/sys"
DEV = "/dev"

_POLL_SECONDS_MIN = 0.0001
_POLL_SECONDS_MAX = 0.02
_SYSFS_SECONDS = 0.01
"""The kernel's devices are looked through no more often than this while waiting."""
_REASON_BYTES_MAX = 4096
_TAGS_NAMED_MAX = 5


class TagAbsent(NotFound, TimeoutError):
    """The tag did not come in time."""


class OfferRefused(Conflict):
    """The host agent refused the offer of the tag."""


class Device:
    """One tag on this host. `pieces` are (offset, length) in the media, in sequence order."""

    __slots__ = (
        "align",
        "emulated",
        "path",
        "pieces",
        "read_only",
        "sharing",
        "size_bytes",
        "stale_caches",
        "tag",
    )

    def __init__(
        self,
        tag: Tag,
        path: str,
        size_bytes: int,
        align: int,
        *,
        read_only: bool,
        emulated: bool,
        pieces: tuple[tuple[int, int], ...],
        stale_caches: bool = False,
        sharing: str = "",
    ) -> None:
        self.tag = tag
        self.path = path
        self.size_bytes = size_bytes
        self.align = align
        self.read_only = read_only
        self.emulated = emulated
        self.pieces = pieces
        self.stale_caches = stale_caches
        """Whether `path` is this host's view alone, and memory lies beside it (shared/stale.py)."""
        self.sharing = sharing
        """none, read-only, hardware-coherent or software-coherent; empty where nobody says."""

    @property
    def has_path(self) -> bool:
        """Whether `path` can be opened: by-DPA media have none."""
        return os.path.exists(self.path)


def default_run_dir() -> str:
    """TAGMEM_RUN_DIR, or where a host agent runs by default."""
    return os.environ.get("TAGMEM_RUN_DIR") or RUN_DIR


def find(
    tag: Tag, run_dir: str | None = None, *, sysfs: str = SYSFS, dev: str = DEV
) -> Device | None:
    """The device of a tag that is here now, or None."""
    run_dir = run_dir or default_run_dir()
    return _in_run_dir(tag, run_dir) or _in_sysfs(tag, sysfs, dev)


def wait_for(
    tag: object,
    *,
    timeout: float | None,
    run_dir: str | None = None,
    sysfs: str = SYSFS,
    dev: str = DEV,
) -> Device:
    """The device of a tag, once it is here. `timeout` in seconds; 0 looks once, None waits for
    ever.

    Raises InvalidInput (not a tag), OfferRefused (the agent refused it, with its reason), TagAbsent
    (with what is there instead).
    """
    wanted = parse_tag(str(tag))
    if timeout is not None and not timeout >= 0:
        raise InvalidInput("timeout", "None or at least 0 seconds", timeout)
    run_dir = run_dir or default_run_dir()
    begun = time.monotonic()
    looked_in_sysfs = -1.0
    while True:
        device = _in_run_dir(wanted, run_dir)
        elapsed = time.monotonic() - begun
        if device is None and (looked_in_sysfs < 0 or elapsed - looked_in_sysfs > _SYSFS_SECONDS):
            looked_in_sysfs = elapsed
            device = _in_sysfs(wanted, sysfs, dev)
        if device is not None:
            return device
        reason = _refusal(wanted, run_dir)
        if reason is not None:
            raise OfferRefused(f"tag {wanted}: this host refused the offer: {reason}")
        if timeout is not None and elapsed >= timeout:
            raise TagAbsent(why_absent(wanted, run_dir, timeout, sysfs))
        # Late by a tenth of the wait at most, and never busy.
        pause = min(max(elapsed / 10, _POLL_SECONDS_MIN), _POLL_SECONDS_MAX)
        time.sleep(pause if timeout is None else min(pause, max(timeout - elapsed, 0)))


def why_absent(tag: Tag, run_dir: str, timeout: float, sysfs: str = SYSFS) -> str:
    """One sentence about what is here in place of the tag, and what to do about it."""
    head = f"tag {tag} is not here" if timeout == 0 else f"tag {tag} did not come in {timeout:g} s"
    by_tag = os.path.join(run_dir, "by-tag")
    try:
        names = sorted(os.listdir(by_tag))
    except FileNotFoundError:
        what = "does not exist" if not os.path.isdir(run_dir) else "has no by-tag directory"
        reason = (
            f"run directory {run_dir} {what}: no host agent has run with it; "
            "start `tagmem host`, or set TAGMEM_RUN_DIR"
        )
    except OSError as error:
        reason = f"{by_tag} cannot be read: {error.strerror}"
    else:
        if str(tag) in names:
            reason = f"{by_tag}/{tag} is there, but its attributes (size, align) cannot be read"
        elif names:
            shown = ", ".join(names[:_TAGS_NAMED_MAX])
            more = (
                f" and {len(names) - _TAGS_NAMED_MAX} more" if len(names) > _TAGS_NAMED_MAX else ""
            )
            reason = f"{by_tag} has {shown}{more}, not this one; is it attached to another host?"
        else:
            reason = (
                f"{by_tag} is empty: nothing is attached to this host; "
                f"see `tagmem capacity show {tag}`"
            )
    if not os.path.isdir(os.path.join(sysfs, "bus/dax/devices")):
        return f"{head}: {reason} (and the kernel has no DAX devices)"
    return f"{head}: {reason} (and no DAX device of the kernel has it)"


def descriptor(device: Device, *, writable: bool) -> int:
    """An open file descriptor of the tag's media; the caller closes it. Raises OSError-derived or
    tagmem errors; Unsupported where the media are by DPA, for then only a device model maps them.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    try:
        return os.open(device.path, flags)
    except FileNotFoundError:
        if not device.emulated:
            raise
    raise Unsupported(
        f"tag {device.tag}: the appliance keeps its media by DPA, for a device model to map; "
        'for applications it needs `layout = "by-tag"`'
    )


def _in_run_dir(tag: Tag, run_dir: str) -> Device | None:
    try:
        target = os.readlink(f"{run_dir}/by-tag/{tag}")
    except OSError:
        return None
    path = os.path.normpath(os.path.join(run_dir, "by-tag", target))
    folder = os.path.dirname(path)
    try:
        size = _integer(_attribute(folder, "size"))
        align = _integer(_attribute(folder, "align"))
        read_only = _attribute(folder, "read_only") not in ("", "0")
        whole = f'[{{"offset":0,"length":{size}}}]'
        plain = os.path.exists(path) and _attribute(folder, "extents") in ("", whole)
        pieces = ((0, size),) if plain else _pieces(folder, size)
        # In a guest the name stands for a device of the kernel's, which has nothing to write back.
        emulated = _attribute(folder, "mode") != "bar" and not _is_device(path)
        stale = emulated and os.path.exists(f"{folder}/stale_caches")
        sharing = _attribute(folder, "sharing")
    except (OSError, ValueError):
        # Half made or half gone: the agent makes the link last and takes it away first.
        return None
    return Device(
        tag,
        path,
        size,
        align,
        read_only=read_only,
        emulated=emulated,
        pieces=pieces,
        stale_caches=stale,
        sharing=sharing,
    )


def _is_device(path: str) -> bool:
    import stat

    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _in_sysfs(tag: Tag, sysfs: str, dev: str) -> Device | None:
    root = f"{sysfs}/bus/dax/devices"
    try:
        names = os.listdir(root)
    except OSError:
        return None
    for name in names:
        folder = f"{root}/{name}"
        try:
            if _attribute(folder, "uuid").lower() != tag:
                continue
            size = _integer(_attribute(folder, "size"))
            align = _integer(_attribute(folder, "align") or "2097152")
        except (OSError, ValueError):
            continue
        if size > 0:
            # fstat says 0 bytes of a character device, so the size can only come from here.
            return Device(
                tag,
                f"{dev}/{name}",
                size,
                align,
                read_only=False,
                emulated=False,
                pieces=((0, size),),
            )
    return None


def _attribute(folder: str, name: str) -> str:
    """The value of one attribute; empty when the device has no such attribute."""
    try:
        descriptor = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        return os.read(descriptor, 4096).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)


def _integer(text: str) -> int:
    value = int(text, 0)
    if value < 0:
        raise ValueError(text)
    return value


def _pieces(folder: str, size: int) -> tuple[tuple[int, int], ...]:
    """The `extents` attribute: pieces of the media, in sequence order. Raises ValueError when they
    are not `size`.
    """
    import json

    with open(f"{folder}/extents", encoding="utf-8") as file:
        listed = json.load(file)
    try:
        pieces = tuple((int(item["offset"]), int(item["length"])) for item in listed)
    except (KeyError, TypeError):
        raise ValueError(folder) from None
    if sum(length for _, length in pieces) != size or any(o < 0 or n <= 0 for o, n in pieces):
        raise ValueError(folder)
    return pieces


def _refusal(tag: Tag, run_dir: str) -> str | None:
    """The sentence that the agent left when it refused the tag."""
    try:
        descriptor = os.open(f"{run_dir}/refused/{tag}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(descriptor, _REASON_BYTES_MAX).decode("utf-8", "replace").strip()
    finally:
        os.close(descriptor)
    return text or "no reason given"
