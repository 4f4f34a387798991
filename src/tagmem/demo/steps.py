"""The seven steps with a real memcached, each told and checked as it happens.

Every claim is checked by looking, not by asking alone: at the DAX device in the host's directory,
at the bytes in the appliance's media, at /proc for who holds them. A failed check raises Mismatch.
"""

from __future__ import annotations

import os
import time
import uuid
from itertools import islice
from pathlib import Path

import tagmem
from tagmem.base.errors import TagmemError
from tagmem.base.units import MIB, format_size
from tagmem.cli.extents import draw
from tagmem.client.session import Client, UnknownThing
from tagmem.demo import proof
from tagmem.demo.cache import Address, Cache, command
from tagmem.demo.chaos import Chaos
from tagmem.demo.console import Console
from tagmem.demo.layout import APPLIANCE, HOSTS, Layout
from tagmem.demo.patience import insist, until
from tagmem.demo.record import sanitise_record
from tagmem.wire import rest
from tagmem.wire.vendor import SanitiseMethod, SanitiseState

TAG_BYTES = 128 * MIB
REGION = 0
_FIRST, _SECOND, *_ = HOSTS
_SAMPLES = 50
_ATTEMPTS_MAX = 5
_MAP_COLUMNS = 66
_RUNGS = {
    "ask": "the workload is sent SIGTERM",
    "stop": "the workload is killed",
    "detach": "the DAX device is taken away",
}
_MEANS = {
    "capacity.created": "placed and committed, before anybody outside knows of it",
    "capacity.offered": "5604h answered: the host is being shown the extents",
    "capacity.attached": "type 4 record: the host took them (4802h)",
    "capacity.ready": "the host's DAX device is there",
    "capacity.releasing": "the host is told to give it back",
    "capacity.proved": "the host proved that nothing maps or holds it",
    "attachment.released": "the host gave the extents back (4803h)",
    "capacity.sanitising": "no host has it; the media are being wiped",
    "capacity.released": "type 5 record: wiped, read back, free",
}
"""What the orchestrator's events say, for people who meet them for the first time."""


class Mismatch(TagmemError):
    """What was seen is not what was claimed."""


class Steps:
    """One run of the demo against a running system."""

    up_to = "stop"
    """The highest rung that giving back may take."""

    def __init__(
        self,
        console: Console,
        layout: Layout,
        client: Client,
        records: dict[bytes, bytes],
        chaos: Chaos,
    ) -> None:
        self._say = console
        self._layout = layout
        self._client = client
        self._records = records
        self._chaos = chaos
        self._tag = str(uuid.uuid4())
        self._next_tag = str(uuid.uuid4())
        self._told_until = insist(client.last_event)
        self._cache_at: Address = str(layout.volatile / "memcached.sock")
        self._places: dict[bytes, tuple[int, bytes]] = {}
        self._held: rest.CapacityDocument | None = None

    def run(self) -> None:
        """All steps. Raises Mismatch, or whatever else went wrong."""
        self._decide()
        self._offer()
        device = self._accept()
        self._launch(device)
        self._load(device)
        self._give_back(device)
        self._wipe()
        self._offer_again()

    # ---- 1

    def _decide(self) -> None:
        with self._say.step(
            f"Decide: memcached on {_FIRST} needs {format_size(TAG_BYTES)}"
        ) as came_to:
            self._moment("decide", "before")
            plan = until(self._plan, "the pool has room", 30.0)
            self._moment("decide", "during")
            self._say.fact("placement", plan.sentence)
            self._say.fact("tag", f"{self._tag}  (chosen by the client)")
            came_to.append(f"{format_size(TAG_BYTES)} of {APPLIANCE} for {_FIRST}")

    def _plan(self) -> rest.ExplanationDocument | None:
        """Where it would go; nothing goes anywhere while the appliance is in doubt."""
        plan = self._client.explain(self._request(_FIRST))
        return plan if plan.fits else None

    # ---- 2

    def _offer(self) -> None:
        with self._say.step(
            f"Offer: {APPLIANCE} shows the extents to {_FIRST} under the tag"
        ) as came_to:
            self._moment("offer", "before")
            created = insist(lambda: self._client.create(self._request(_FIRST), self._tag))
            self._moment("offer", "during")
            self._check(created.guaranteed, "tagged capacity is not marked as guaranteed")
            for extent in created.extents:
                self._say.fact("extent", f"pool bytes {_span(extent.start, extent.length)}")
            self._say.fact("map", "\n".join(self._map()))
            came_to.append(f"tag {self._tag}, {_plural(len(created.extents), 'extent')}")

    # ---- 3

    def _accept(self) -> Path:
        with self._say.step(f"Accept: {_FIRST} checks the offer and takes it") as came_to:
            self._moment("accept", "before")
            held = self._until_ready(self._tag, _FIRST)
            self._moment("accept", "during")
            attachment = held.attachments[0]
            self._held = held
            self._events(self._tag)
            for dpa, length in attachment.dpas:
                self._say.fact("accepted", f"DPA {_span(dpa, length)} in {_FIRST}'s address space")
            device = Path(attachment.dax_path)
            for name in ("size", "align", "uuid"):
                text = (device.parent / name).read_text(encoding="ascii").strip()
                self._say.fact(f"dax {name}", text)
            named = self._layout.run_dir(_FIRST) / "by-tag" / self._tag
            self._check(named.resolve() == device.resolve(), f"{named} is not {device}")
            self._check(device.stat().st_size == TAG_BYTES, f"{device} has another size")
            self._check(
                (device.parent / "uuid").read_text(encoding="ascii").strip() == self._tag,
                f"{device} says another tag",
            )
            self._say.proof("DAX device", f"{device}")
            came_to.append(f"DAX device {device.name} on {_FIRST}")
            return device

    # ---- 4

    def _launch(self, device: Path) -> None:
        with self._say.step("Launch: Debian's memcached, unmodified, on the tag") as came_to:
            self._moment("launch", "before")
            argv = command(TAG_BYTES, str(self._cache_at))
            request = rest.WorkloadRequest(command=argv, id=f"demo-{self._tag[:8]}")
            insist(lambda: self._client.launch(self._tag, _FIRST, request))
            self._moment("launch", "during")
            pid = until(self._workload_pid, "memcached runs")
            cache = Cache(self._cache_at)
            self._say.fact("command", " ".join(argv))
            self._say.fact("memcached", f"version {cache.version}, pid {pid}")
            cache.close()
            self._check(device.stat().st_size == TAG_BYTES, "memcached changed the device's size")
            holders = proof.holders(device)
            # The host's agent starts it under a small shell, which notes how it ends.
            ours = [p for p, _ in holders if pid in (p, proof.parent(p))]
            self._check(bool(ours), f"memcached does not map {device}")
            self._events(self._tag)
            self._say.proof("mapped by", ", ".join(f"{name} (pid {p})" for p, name in holders))
            came_to.append(f"memcached {cache.version}, pid {pid}")

    def _workload_pid(self) -> int | None:
        held = self._client.capacity(self._tag)
        workload = held.attachments[0].workload
        if workload is None or workload.state == "pending":
            return None
        self._check(
            workload.state == "running",
            f"memcached {workload.state}, exit code {workload.exit_code}: {workload.reason} "
            f"(its output: {workload.log_path})",
        )
        return workload.pid

    # ---- 5

    def _load(self, device: Path) -> None:
        count = len(self._records)
        with self._say.step(f"Load: {count:,} records of Debian's own files") as came_to:
            self._moment("load", "before")
            cache = Cache(self._cache_at)
            begun = time.monotonic()
            cache.store(self._records)
            stored = time.monotonic()
            self._moment("load", "during")
            wrong = cache.differing(self._records)
            read = time.monotonic()
            items, evicted = cache.counters()
            cache.close()
            self._check(not wrong, f"{wrong:,} records came back missing or changed")
            self._check(items >= count and not evicted, f"{items:,} items, {evicted:,} evicted")
            key, value = next(islice(self._records.items(), count // 2, None))
            self._say.fact("for example", f"{key.decode()}\n{value.decode()[:80]}")
            self._say.fact("written", f"{count:,} records in {stored - begun:.2f} s")
            self._say.proof("read back", f"{count:,} of {count:,} equal in {read - stored:.2f} s,")
            self._look_for_records(device)
            came_to.append(f"{count:,} records written, read back, found in the extents")

    def _look_for_records(self, device: Path) -> None:
        """Find the records in the bytes of the tag, and say where some of them lie."""
        self._places = proof.find_items(device)
        missing = sum(
            self._places.get(key, (0, b""))[1] != value for key, value in self._records.items()
        )
        self._check(not missing, f"{missing:,} records are not in the tag's bytes")
        files = proof.media_files(self._layout.bytes)
        self._check(
            any(path.samefile(device) for path in files), f"{device} is not the appliance's media"
        )
        count = len(self._records)
        self._say.proof("in the media", f"{count:,} of {count:,} found in the tag's extents,")
        for key in self._samples()[:: _SAMPLES // 2]:
            offset = self._places[key][0]
            dpa, media = self._address(offset)
            self._say.fact("", f"DPA {dpa:#x} (pool byte {media:#x}, tag offset {offset:#x})")
            self._say.fact("", f"   {key.decode()[:72]}")

    def _address(self, offset: int) -> tuple[int, int]:
        """(DPA on the first host, offset in the pool) of a byte of the tag."""
        assert self._held is not None
        rest_bytes = offset
        for extent, (dpa, length) in zip(
            self._held.extents, self._held.attachments[0].dpas, strict=True
        ):
            if rest_bytes < length:
                return dpa + rest_bytes, extent.start + rest_bytes
            rest_bytes -= length
        raise Mismatch(f"offset {offset:#x} lies behind the last extent")

    def _samples(self) -> list[bytes]:
        keys = list(self._records)
        return keys[:: max(1, len(keys) // _SAMPLES)][:_SAMPLES]

    # ---- 6

    def _give_back(self, device: Path) -> None:
        with self._say.step(f"Give back: {_FIRST} stops memcached and proves release") as came_to:
            self._moment("give back", "before")
            status = device.stat()
            # A name is no hold: it neither maps the bytes nor has them open.
            self._layout.witness.hardlink_to(device)
            release = lambda: self._client.release(self._tag, up_to=self.up_to)  # noqa: E731
            try:
                insist(release)
            except UnknownThing:
                pass  # asked twice, and done after the first
            self._moment("give back", "during")
            until(self._proved, "the tag comes back", 60.0)
            events = self._events(self._tag)
            rungs = [str(e.data["rung"]) for e in events if e.type == "capacity.rung"]
            self._check(bool(rungs), "the release climbed no rung")
            # The appliance itself has them open while it wipes them.
            appliance = str(self._layout.config(APPLIANCE))
            left = [
                (pid, name)
                for pid, name in proof.holders_of_inode(status.st_dev, status.st_ino)
                if appliance not in proof.command_line(pid)
            ]
            self._check(not left, f"still held by {left}")
            self._check(not os.path.lexists(device), f"{device} is still there")
            self._say.proof("holders", "no process maps the bytes or has them open,")
            came_to.append(f"memcached {self._how_it_ended(rungs)}; nobody holds the bytes")

    def _how_it_ended(self, rungs: list[str]) -> str:
        return "had to be killed" if "stop" in rungs else "ended when asked"

    def _proved(self) -> bool | None:
        """True when the host has proved that it no longer uses the tag."""
        return any(
            event.type == "capacity.proved" and event.subject.partition("/")[0] == self._tag
            for event in self._client.history(self._told_until)
        ) or self._is_gone(self._tag)

    # ---- 7

    def _wipe(self) -> None:
        with self._say.step(
            f"Wipe: {APPLIANCE} sanitises the extents and reads them back"
        ) as came_to:
            self._moment("wipe", "before")
            until(lambda: self._is_gone(self._tag), "the bytes are sanitised", 60.0)
            self._moment("wipe", "during")
            self._events(self._tag)
            self._look_at_media()
            self._ask_for_record()
            region = self._region()
            self._say.fact(
                "pool", f"{format_size(region.free_bytes)} of region {REGION} free again"
            )
            came_to.append("no record left in the media")

    def _look_at_media(self) -> None:
        """Search what the appliance has, and the very file that held the records, for records."""
        files = proof.media_files(self._layout.bytes)
        samples = self._samples()
        needles = [*samples, *(self._records[key] for key in samples)]
        witness = self._layout.witness
        everywhere = [*files, witness] if witness.stat().st_size else files
        found = proof.count_needles(everywhere, needles)
        found += sum(len(proof.find_items(path)) for path in everywhere)
        self._check(not found, f"{found} records are still in the media")
        dirty = [path.name for path in everywhere if proof.nonzero_file(path) >= 0]
        self._check(not dirty, f"media that do not read zero: {dirty}")
        blocks = witness.stat().st_blocks
        self._check(blocks == 0, f"the file that held the tag still has {blocks} blocks")
        self._say.proof("media", f"searched for {len(needles)} keys and definitions, found none,")
        self._say.proof("that file", "under the name kept aside: no block of memory is left in it,")

    def _ask_for_record(self) -> None:
        """The device's own word: how it wiped, how much, and that it read zeros back."""
        record = insist(lambda: sanitise_record(self._layout.fm_socket, self._tag))
        self._check(
            record.state == SanitiseState.VERIFIED_ZERO, f"the device says {record.state!r} (C001h)"
        )
        self._check(record.sanitised_bytes >= TAG_BYTES, f"wiped {record.sanitised_bytes} bytes")
        method = SanitiseMethod(record.method).name.lower()
        self._say.proof(
            "device says",
            f"{record.sanitised_bytes:,} bytes wiped ({method}), "
            f"{record.read_back_bytes:,} read back as zero (C001h)",
        )
        until(
            lambda: self._client.appliance(APPLIANCE).state == "ready" or None, "it is back", 30.0
        )

    # ---- and the next owner

    def _offer_again(self) -> None:
        with self._say.step(f"Re-offer: the same bytes of the pool go to {_SECOND}") as came_to:
            assert self._held is not None
            self._moment("re-offer", "before")
            insist(lambda: self._client.create(self._request(_SECOND), self._next_tag))
            self._moment("re-offer", "during")
            held = self._until_ready(self._next_tag, _SECOND)
            self._say.fact("tag", self._next_tag)
            for extent in held.extents:
                self._say.fact("extent", f"pool bytes {_span(extent.start, extent.length)}")
            self._check(held.extents == self._held.extents, "these are other bytes of the pool")
            self._say.fact("map", "\n".join(self._map()))
            self._read_as_next()
            insist(lambda: self._client.release(self._next_tag, up_to=self.up_to))
            until(lambda: self._is_gone(self._next_tag), f"{_SECOND}'s tag comes back", 60.0)
            region = self._region()
            self._check(
                region.free_bytes == region.size_bytes,
                f"{region.size_bytes - region.free_bytes} bytes of the pool did not come back",
            )
            came_to.append(f"{_SECOND} read {format_size(TAG_BYTES)} of zeros; all given back")

    def _read_as_next(self) -> None:
        run_dir = str(self._layout.run_dir(_SECOND))
        with tagmem.open(self._next_tag, run_dir=run_dir, timeout=10.0) as capacity:
            size = len(capacity.view)
            self._check(size == TAG_BYTES, f"{_SECOND} sees {size} bytes")
            dirty = proof.first_nonzero(capacity.view)
        self._check(dirty < 0, f"{_SECOND} reads something at offset {dirty:#x}")
        self._say.proof(f"read on {_SECOND}", f"{TAG_BYTES:,} bytes through tagmem.open, all zero,")

    # ---- what the steps share

    def _request(self, host: str) -> rest.CapacityRequest:
        return rest.CapacityRequest(
            size_bytes=TAG_BYTES,
            hosts=(host,),
            appliance=APPLIANCE,
            region=REGION,
            owner="demo",
        )

    def _until_ready(self, tag: str, host: str) -> rest.CapacityDocument:
        """The capacity once its device is there. A host that refused is asked again at times."""
        refusals: list[str] = []

        def look() -> rest.CapacityDocument | None:
            held = self._client.capacity(tag)
            attachment = held.attachments[0]
            if attachment.state == "refused":
                refusals.append(attachment.reason)
                self._check(len(refusals) <= _ATTEMPTS_MAX, f"{host} refuses: {refusals}")
                self._say.fact("refused", f"{attachment.reason}; offered again")
                self._client.attach(tag, host)
                return None
            return held if attachment.state == "attached" and attachment.ready else None

        return until(look, f"{host} has tag {tag}", 60.0)

    def _is_gone(self, tag: str) -> bool | None:
        try:
            held = self._client.capacity(tag)
        except UnknownThing:
            return True
        self._check(held.state != "quarantined", f"tag {tag} is quarantined: {held.fault}")
        return None

    def _region(self) -> rest.RegionDocument:
        regions = insist(lambda: self._client.appliance(APPLIANCE)).regions
        return next(region for region in regions if region.index == REGION)

    def _map(self) -> list[str]:
        """The pool that the tag lies in, drawn."""
        whole = insist(lambda: self._client.appliance_map(APPLIANCE))
        pools = tuple(pool for pool in whole.pools if REGION in pool.regions)
        return draw(rest.ApplianceMapDocument(whole.appliance, pools), _MAP_COLUMNS)

    def _events(self, tag: str) -> list[rest.EventDocument]:
        """Tell, and return, what the orchestrator recorded about a tag since it was last asked."""
        happened = list(insist(lambda: list(self._client.history(self._told_until))))
        if not happened:
            return []
        self._told_until = happened[-1].id
        ours = [event for event in happened if event.subject.partition("/")[0] == tag]
        for event in ours:
            at_ms = (event.time_ns - ours[0].time_ns) / 1e6
            facts = {name: event.data.get(name) for name in ("pid", "exit_code", "reason")}
            rung = str(event.data.get("rung", ""))
            known = f"{rung}: {_RUNGS.get(rung, 'by force')}" if rung else _MEANS.get(event.type)
            meaning = known or ", ".join(
                f"{name} {value}" for name, value in facts.items() if value not in (None, "")
            )
            self._say.fact("", f"{at_ms:+7.1f} ms  {event.type:<20} {meaning}".rstrip())
        return ours

    def _moment(self, step: str, moment: str) -> None:
        killed = self._chaos(step, moment)
        if killed:
            self._say.fact("kill -9", killed)

    def _check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise Mismatch(otherwise)


def _span(start: int, length: int) -> str:
    return f"{start:#012x} to {start + length:#012x} ({format_size(length)})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
