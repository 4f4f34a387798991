"""Between the rules and one appliance's bytes: media offsets and DPAs, effects and commands.

An ApplianceMap is what an appliance said of itself when a session began (5600h, 5601h, C002h). It
turns effects into requests and what the appliance reports into the words of `domain.effects`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tagmem.base.ids import Tag, tag_from_bytes, tag_to_bytes
from tagmem.base.units import Dpa, MediaOffset
from tagmem.domain.dpa import from_dpa, region_at, to_dpa
from tagmem.domain.effects import (
    DurableEffect,
    FenceHost,
    HeldExtent,
    InitiateAdd,
    InitiateRelease,
    ListedTag,
    SetReference,
)
from tagmem.domain.records import Extent, LdRecord, RegionRecord
from tagmem.wire.extent import NIL_TAG_BYTES, WireExtent
from tagmem.wire.fmapi import (
    DcAddReferenceRequest,
    DcRemoveReferenceRequest,
    DcTagInfo,
    GetDcdInfoResponse,
    GetHostDcRegionConfigurationResponse,
    InitiateDcAddRequest,
    InitiateDcReleaseRequest,
    RegionAttribute,
    RemovalPolicy,
    SelectionPolicy,
    lds_from_bitmap,
)
from tagmem.wire.layout import WireStruct
from tagmem.wire.vendor import FenceRequest, GetPoolMapResponse, PoolOrder

_TAGS_REMEMBERED_MAX = 4_096


class Untranslatable(ValueError):
    """What was to be said, or was reported, names nothing that the appliance described."""


class ApplianceMap:
    """Regions, LDs and policies of one appliance, for one session."""

    def __init__(
        self,
        info: GetDcdInfoResponse,
        configurations: Sequence[GetHostDcRegionConfigurationResponse],
        pool_maps: Sequence[GetPoolMapResponse | None],
    ) -> None:
        """Both sequences by LD. Raises Untranslatable when LDs describe one region differently."""
        self._by_tag = bool(info.removal_policies >> RemovalPolicy.TAG_BASED & 1)
        self.regions = _regions(configurations[0], pool_maps[0])
        self.lds = tuple(
            LdRecord(
                ld,
                tuple(Dpa(region.base_dpa) for region in configuration.regions),
                pools is not None and pools.order is PoolOrder.MIRRORED,
            )
            for ld, (configuration, pools) in enumerate(zip(configurations, pool_maps, strict=True))
        )
        for configuration in configurations:
            self._check_alike(configuration)
        self._tags: dict[bytes, Tag] = {}

    def _check_alike(self, configuration: GetHostDcRegionConfigurationResponse) -> None:
        if len(configuration.regions) != len(self.regions):
            raise Untranslatable(
                f"LD {configuration.host_id} has {len(configuration.regions)} regions, "
                f"LD 0 has {len(self.regions)}"
            )
        for region, wire in zip(self.regions, configuration.regions, strict=True):
            sizes = (wire.length_bytes, wire.block_bytes)
            if sizes != (region.size_bytes, region.block_bytes):
                raise Untranslatable(
                    f"LD {configuration.host_id} has region {region.index} in size {sizes}, "
                    f"LD 0 in {(region.size_bytes, region.block_bytes)}"
                )

    # ---- to the appliance

    def _place(self, ld: int, region: int) -> tuple[LdRecord, RegionRecord]:
        if not 0 <= ld < len(self.lds):
            raise Untranslatable(f"ld must be below {len(self.lds)}, got {ld}")
        if not 0 <= region < len(self.regions):
            raise Untranslatable(f"region must be below {len(self.regions)}, got {region}")
        return self.lds[ld], self.regions[region]

    def _wire_extents(
        self, ld: int, region: int, tag: bytes, extents: Iterable[Extent]
    ) -> tuple[WireExtent, ...]:
        view, place = self._place(ld, region)
        try:
            return tuple(
                WireExtent(
                    to_dpa(view, place, extent), extent.length, tag, at if place.sharable else 0
                )
                for at, extent in enumerate(extents)
            )
        except ValueError as error:
            raise Untranslatable(str(error)) from error

    def add(self, effect: InitiateAdd) -> InitiateDcAddRequest:
        """5604h: prescriptive, or for a further host of shared capacity, enable shared access."""
        tag = tag_to_bytes(effect.tag) if effect.tagged else NIL_TAG_BYTES
        if effect.shared:
            self._place(effect.ld, effect.region)
            policy = SelectionPolicy.ENABLE_SHARED_ACCESS
            return InitiateDcAddRequest(effect.ld, policy, effect.region, 0, tag)
        extents = self._wire_extents(effect.ld, effect.region, tag, effect.extents)
        return InitiateDcAddRequest(effect.ld, SelectionPolicy.PRESCRIPTIVE, extents=extents)

    def release(self, effect: InitiateRelease) -> InitiateDcReleaseRequest:
        """5605h: by tag where there is one and the appliance can, else prescriptive."""
        _, region = self._place(effect.ld, effect.region)
        tag = tag_to_bytes(effect.tag) if effect.tagged else NIL_TAG_BYTES
        if effect.tagged and self._by_tag:
            length = sum(extent.length for extent in effect.extents)
            return InitiateDcReleaseRequest(
                effect.ld, RemovalPolicy.TAG_BASED, effect.forced, region.sanitise, length, tag
            )
        return InitiateDcReleaseRequest(
            effect.ld,
            RemovalPolicy.PRESCRIPTIVE,
            effect.forced,
            region.sanitise,
            extents=self._wire_extents(effect.ld, effect.region, tag, effect.extents),
        )

    def fence(self, effect: FenceHost) -> tuple[FenceRequest, ...]:
        """C003h: one for a tag, one for each extent of untagged capacity."""
        if effect.tagged:
            self._place(effect.ld, effect.region)
            return (FenceRequest(effect.ld, tag_to_bytes(effect.tag)),)
        extents = self._wire_extents(effect.ld, effect.region, NIL_TAG_BYTES, effect.extents)
        return tuple(
            FenceRequest(effect.ld, NIL_TAG_BYTES, wire.start_dpa, wire.length_bytes)
            for wire in extents
        )

    @staticmethod
    def reference(effect: SetReference) -> WireStruct:
        """5606h or 5607h."""
        tag = tag_to_bytes(effect.tag)
        return DcAddReferenceRequest(tag) if effect.wanted else DcRemoveReferenceRequest(tag)

    def requests(self, effect: DurableEffect) -> Sequence[WireStruct]:
        """The commands that carry an effect out, in order. Raises Untranslatable."""
        if isinstance(effect, SetReference):
            return (self.reference(effect),)
        if isinstance(effect, InitiateAdd):
            return (self.add(effect),)
        if isinstance(effect, InitiateRelease):
            return (self.release(effect),)
        return self.fence(effect)

    # ---- from the appliance

    def tag(self, raw: bytes) -> Tag:
        """The text form of a tag; remembered, because the same few tags come again and again."""
        known = self._tags.get(raw)
        if known is None:
            if len(self._tags) >= _TAGS_REMEMBERED_MAX:
                self._tags.clear()
            known = self._tags[raw] = tag_from_bytes(raw)
        return known

    def media(self, ld: int, wire: WireExtent) -> tuple[int, Extent]:
        """Region and media of a reported extent. Raises Untranslatable for what lies nowhere."""
        if not 0 <= ld < len(self.lds):
            raise Untranslatable(f"reported ld must be below {len(self.lds)}, got {ld}")
        view = self.lds[ld]
        region = region_at(view, self.regions, Dpa(wire.start_dpa))
        if region is None:
            raise Untranslatable(f"LD {ld} reports {wire.start_dpa:#x}, which is in no region")
        if wire.length_bytes == 0:
            # A refused offer: it has a place and no length. Where DPAs run backwards this is its
            # end.
            offset = wire.start_dpa - view.bases[region.index]
            start = region.size_bytes - offset if view.mirrored else offset
            return region.index, Extent(MediaOffset(start), 0)
        try:
            extent = from_dpa(view, region, Dpa(wire.start_dpa), wire.length_bytes)
        except ValueError as error:
            raise Untranslatable(f"LD {ld} reports an extent that cannot be: {error}") from error
        return region.index, extent

    def held(self, ld: int, wires: Iterable[WireExtent]) -> list[HeldExtent]:
        """What an LD's list says, in sequence order within each tag."""
        found: list[HeldExtent] = []
        for wire in sorted(wires, key=_sequence):
            region, extent = self.media(ld, wire)
            found.append(HeldExtent(ld, region, self.tag(wire.tag), extent))
        return found

    def listed(self, info: DcTagInfo) -> ListedTag:
        """One line of 5608h."""
        return ListedTag(
            self.tag(info.tag),
            lds_from_bitmap(info.reference_bitmap),
            lds_from_bitmap(info.pending_bitmap),
            info.fm_reference,
        )


def _sequence(wire: WireExtent) -> int:
    return wire.sequence


def _regions(
    configuration: GetHostDcRegionConfigurationResponse, pools: GetPoolMapResponse | None
) -> tuple[RegionRecord, ...]:
    return tuple(
        RegionRecord(
            index,
            index if pools is None else pools.pools[index],
            region.length_bytes,
            region.block_bytes,
            bool(region.attributes & RegionAttribute.SHARABLE),
            bool(region.attributes & RegionAttribute.HARDWARE_COHERENT),
            bool(region.attributes & RegionAttribute.READ_ONLY),
            region.sanitise_on_release,
        )
        for index, region in enumerate(configuration.regions)
    )
