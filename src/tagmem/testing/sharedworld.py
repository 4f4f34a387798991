"""Worlds in which tags are shared: handed over, published, retained, reset, let go in any order.

Apart from `world`, whose seeds stay what they are. What is looked at besides is the bytes: what a
host has written is there for the next one, and a reader never finds it gone.
"""

from __future__ import annotations

from uuid import UUID

from tagmem.base.units import MIB, MILLISECOND, SECOND
from tagmem.domain import effects
from tagmem.domain.device_records import AllocState, HeadReset, RegionSpec
from tagmem.domain.extent import InvariantViolated
from tagmem.domain.records import AttachmentState, MoveStep, Reference, Sharing
from tagmem.testing.pod import APPLIANCE
from tagmem.testing.world import BLOCK_BYTES, POOL_BYTES, Client, World

SHARED = tuple(Sharing)[1:]


class SharedWorld(World):
    """Three hosts, media of every kind of sharing, and a client who uses all of it."""

    regions = (
        RegionSpec(0, POOL_BYTES, BLOCK_BYTES, sharable=True),
        RegionSpec(0, POOL_BYTES, BLOCK_BYTES, sharable=True, read_only=True),
        RegionSpec(2, POOL_BYTES, BLOCK_BYTES, sharable=True, hardware_coherent=True),
    )
    names = ("w1", "w2", "w3")

    def make_client(self) -> Client:
        """One who shares."""
        self._carried: dict[tuple[str, int], int] = {}
        """How often the media had been wiped when a move of loaded media began."""
        return SharingClient(self)

    def check(self) -> None:
        """Also: every holder is in the device's own list, and bytes stay where they were promised
        to stay.
        """
        super().check()
        if not (self.appliance.alive and self.orchestrator.alive):
            return
        self._check_lists()
        media = self.media[APPLIANCE]
        for tag, capacity in self.state.capacities.items():
            move = capacity.move
            if move is None:
                continue
            key = (tag, move.began_ns)
            wipes = media.wipes.get(tag, 0)
            if capacity.reference is Reference.HELD and move.active:
                self._carried.setdefault(key, wipes)
            arrived = move.step is MoveStep.DONE and move.ended_ns == self.sim.now_ns
            if arrived and self._carried.get(key, wipes) != wipes:
                raise InvariantViolated(f"{tag} was moved, and wiped on the way")

    def _check_lists(self) -> None:
        """A host that the books call attached stands in the device's list, unless that is news."""
        rows = self.appliance.machine.state.allocations.values()
        listed = {
            (row.tag, holder.ld) for row in rows for holder in row.holders if not holder.pending
        }
        live = {row.tag for row in rows if row.state is AllocState.LIVE}
        for tag, capacity in self.state.capacities.items():
            hosts = [
                record
                for record in self.state.attachments.get(tag, {}).values()
                if record.state is AttachmentState.ATTACHED
            ]
            sharers = [ld for name, ld in listed if name == tag]
            if len(sharers) > 1 and capacity.sharing is Sharing.NONE:
                raise InvariantViolated(f"{tag} is not shared and on LDs {sharers}")
            if hosts and capacity.reference is Reference.HELD and tag not in live:
                raise InvariantViolated(f"{tag} has a reference, and the device does not know it")


class SharingClient(Client):
    """Somebody who shares, changes their mind, and resets a head now and then."""

    def something(self) -> None:
        """Mostly what only shared memory can do."""
        random = self.sim.random
        choice = random.random()
        if self.ending or not self.tags or choice > 0.55:
            super().something()
            return
        tag = random.choice(self.tags)
        one, other = random.sample(self.world.names, 2)
        deadlines = {"ask": 200 * MILLISECOND, "stop": 300 * MILLISECOND, "detach": SECOND}
        up_to = random.choice(("stop", "detach", "force"))
        if choice < 0.2:
            self.ask(effects.HandOver(tag, one, other, up_to, deadlines))
        elif choice < 0.35:
            self.ask(effects.PublishCapacity(tag, (one, other), up_to, deadlines))
        elif choice < 0.45:
            self.ask(effects.RetainCapacity(tag, random.random() < 0.6))
        elif choice < 0.52:
            self.ask(effects.ReleaseCapacity(tag, one, up_to, deadlines))
        elif self.world.appliance.alive:
            ld = random.randrange(len(self.world.names))
            self.sim.say(f"head {ld} is reset")
            self.world.appliance.post(HeadReset(ld))
        self.begin()

    def create(self) -> None:
        """Of every kind of sharing, for one host or several."""
        random = self.sim.random
        tag = str(UUID(int=random.getrandbits(128), version=4))
        self.tags.append(tag)
        sharing = random.choice(SHARED)
        several = 1 if sharing is Sharing.READ_ONLY else random.choice((1, 2, 3))
        hosts = tuple(random.sample(self.world.names, several))
        size = random.choice((1, 1, 2, 3, 4)) * BLOCK_BYTES
        event = effects.CreateCapacity(
            tag,
            size,
            hosts,
            sharing=sharing,
            contiguous=random.random() < 0.5,
            retain=random.random() < 0.3,
        )
        self.sim.say(f"client: create {tag[:8]} {size // MIB} MiB {sharing.value} {hosts}")
        self.ask(event)
