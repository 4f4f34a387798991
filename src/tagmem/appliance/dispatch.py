"""Opcodes to the device's rules and answers back to bytes: the one place that knows both.

Pure. For each request a port gets an Immediate answer, or an Ask: an event for the machine and how
to put its Answer into words. What is not in a port's table is Unsupported. Whatever a command
returns in pages is cut to what the port's payload can carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import msgspec

from tagmem.base.ids import NIL_TAG, tag_from_bytes, tag_to_bytes
from tagmem.base.limits import CCI_PAYLOAD_BYTES_MAX
from tagmem.base.units import Bytes, Dpa, align_up
from tagmem.domain import device_records as d
from tagmem.ports import Event
from tagmem.wire import fmapi, generic, memdev, vendor
from tagmem.wire.cci import Category, CciMessage, Opcode, ReturnCode
from tagmem.wire.commands import COMMANDS, Unsupported, decode_request
from tagmem.wire.exchange import Malformed
from tagmem.wire.extent import WireExtent
from tagmem.wire.fields import DecodeError, WrongSize
from tagmem.wire.layout import WireStruct

Said = tuple[int, WireStruct | None]
"""Return code and payload."""
Words = Callable[[Any], WireStruct | None]
"""A successful Answer's value in wire words."""
Body = WireStruct | Unsupported | Malformed

VENDOR_ID = 0x1E98
"""The CXL consortium's, which its DVSECs carry: nobody's hardware is claimed."""
DEVICE_ID = 0x7A61
DSMAD_HANDLES = range(1, 9)
"""Region n's DSMAS has handle n + 1, which no other structure of a CDAT would have."""


class Immediate(msgspec.Struct, frozen=True):
    """An answer that needs no device."""

    code: int
    body: WireStruct | None = None
    reason: str = ""


class Ask(msgspec.Struct, frozen=True):
    """A question for the machine."""

    event: Event
    words: Words
    wrap: Callable[[Said], Said] | None = None
    """Set by a tunnel: puts the inner answer into the outer one."""

    def said(self, answer: d.Answer) -> Said:
        """The machine's answer for the wire."""
        if answer.code == d.Code.SUCCESS:
            said: Said = (ReturnCode.SUCCESS, self.words(answer.value))
        else:
            said = (answer.code, None)
        return said if self.wrap is None else self.wrap(said)


Plan = Immediate | Ask


def nothing(_: Any) -> None:
    """The words of a success without payload."""
    return


class Identity(msgspec.Struct, frozen=True):
    """What a device says of itself."""

    name: str
    version: str
    spec: d.DeviceSpec
    by_dpa: bool = False

    @property
    def serial_number(self) -> int:
        """The same for the same name, for ever."""
        return int.from_bytes(uuid5(NAMESPACE_OID, f"tagmem:{self.name}").bytes[:8], "little")

    @property
    def capacity_bytes(self) -> Bytes:
        """All pools, each once, in whole units of 256 MiB."""
        pools = {region.pool: region.size_bytes for region in self.spec.regions}
        return align_up(sum(pools.values()), generic.CAPACITY_UNIT_BYTES)


class PortDispatch:
    """The commands that both kinds of port have."""

    def __init__(self, identity: Identity, port: int, payload_bytes: Bytes) -> None:
        self.identity = identity
        self.port = port
        self.payload_bytes = payload_bytes
        self._table: dict[int, Callable[[Any], Plan]] = {
            Opcode.IDENTIFY: self._identify,
            Opcode.GET_EVENT_RECORDS: self._get_events,
            Opcode.CLEAR_EVENT_RECORDS: self._clear_events,
            Opcode.GET_EVENT_INTERRUPT_POLICY: self._get_policy,
            Opcode.SET_EVENT_INTERRUPT_POLICY: self._set_policy,
            Opcode.GET_SUPPORTED_LOGS: self._get_logs,
            Opcode.GET_LOG: self._get_log,
        }

    def plan(self, opcode: int, body: Body) -> Plan:
        """What to do with a request."""
        handler = self._table.get(opcode)
        if handler is None or isinstance(body, Unsupported):
            return Immediate(ReturnCode.UNSUPPORTED, None, f"opcode {opcode:04x}h")
        if isinstance(body, Malformed):
            return Immediate(body.return_code, None, body.reason)
        return handler(body)

    def _query(self, words: Words, name: str, *args: int | str) -> Ask:
        return Ask(d.Query(name, args), words)

    def _fitting(self, head: int, each: int, wanted: int) -> int:
        return max(0, min(wanted, (self.payload_bytes - head) // each))

    # ---- generic commands

    def _identify(self, _: generic.IdentifyRequest) -> Plan:
        return Immediate(
            ReturnCode.SUCCESS,
            generic.IdentifyResponse(
                vendor_id=VENDOR_ID,
                device_id=DEVICE_ID,
                subsystem_vendor_id=0,
                subsystem_id=0,
                serial_number=self.identity.serial_number,
                message_size_log2=self.payload_bytes.bit_length() - 1,
                component_type=generic.ComponentType.TYPE3,
            ),
        )

    def _get_events(self, request: generic.GetEventRecordsRequest) -> Plan:
        count = self._fitting(32, 128, 0xFFFF)
        return self._query(_events, "events", self.port, request.log, count)

    def _clear_events(self, request: generic.ClearEventRecordsRequest) -> Plan:
        event = d.ClearEvents(self.port, request.log, tuple(request.handles), request.clear_all)
        return Ask(event, nothing)

    def _get_policy(self, _: generic.GetEventInterruptPolicyRequest) -> Plan:
        return self._query(
            lambda value: generic.GetEventInterruptPolicyResponse(*value), "policy", self.port
        )

    def _set_policy(self, request: generic.SetEventInterruptPolicyRequest) -> Plan:
        return Ask(d.SetInterruptPolicy(self.port, request.encode()), nothing)

    def effects_log(self) -> bytes:
        """The Command Effects Log of this port."""
        entries = [COMMANDS[opcode] for opcode in sorted(self._table)]
        return b"".join(generic.CelEntry(c.opcode, c.effects).encode() for c in entries)

    def _get_logs(self, _: generic.GetSupportedLogsRequest) -> Plan:
        log = generic.SupportedLog(generic.CEL_UUID, len(self.effects_log()))
        return Immediate(ReturnCode.SUCCESS, generic.GetSupportedLogsResponse((log,)))

    def _get_log(self, request: generic.GetLogRequest) -> Plan:
        if request.identifier != generic.CEL_UUID:
            return Immediate(ReturnCode.INVALID_LOG, None, request.identifier.hex())
        log = self.effects_log()
        end = request.offset + request.length_bytes
        if end > len(log) or request.length_bytes > self.payload_bytes:
            return Immediate(ReturnCode.INVALID_INPUT, None, f"bytes to {end} of {len(log)}")
        return Immediate(ReturnCode.SUCCESS, generic.GetLogResponse(log[request.offset : end]))


class HostDispatch(PortDispatch):
    """One LD's mailbox."""

    def __init__(self, identity: Identity, ld: int, payload_bytes: Bytes) -> None:
        super().__init__(identity, ld, payload_bytes)
        self._table |= {
            Opcode.IDENTIFY_MEMORY_DEVICE: self._identify_memory_device,
            Opcode.GET_DC_CONFIGURATION: self._configuration,
            Opcode.GET_DC_EXTENT_LIST: self._extents,
            Opcode.ADD_DC_RESPONSE: self._respond,
            Opcode.RELEASE_DC: self._release,
            Opcode.GET_EXTENT_MEDIA: self._media,
        }

    def _identify_memory_device(self, _: generic.IdentifyMemoryDeviceRequest) -> Plan:
        version = f"tagmem {self.identity.version}".encode()[:16]
        records = self.identity.spec.lds[self.port].log_records
        return Immediate(
            ReturnCode.SUCCESS,
            generic.IdentifyMemoryDeviceResponse(
                version.ljust(16, b"\0"), dynamic_capacity_log_records=records
            ),
        )

    def _configuration(self, request: memdev.GetDcConfigurationRequest) -> Plan:
        first, total = request.first_region, len(self.identity.spec.regions)

        def words(found: d.Configuration) -> WireStruct:
            shown = found.regions[first : first + request.regions_wanted]
            return memdev.GetDcConfigurationResponse(
                len(found.regions),
                tuple(
                    memdev.DcRegion(
                        region.base,
                        region.decode_bytes,
                        region.size_bytes,
                        region.block_bytes,
                        DSMAD_HANDLES[region.index],
                        region.sanitise,
                    )
                    for region in shown
                ),
                *_counts(found.counts),
            )

        if first >= total:
            return Immediate(ReturnCode.INVALID_INPUT, None, f"region {first} of {total}")
        return self._query(words, "configuration", self.port, 1)

    def _extents(self, request: memdev.GetDcExtentListRequest) -> Plan:
        count = self._fitting(16, 40, request.extents_wanted)

        def words(page: d.ExtentPage) -> WireStruct:
            extents = _wire_extents(page.extents)
            return memdev.GetDcExtentListResponse(extents, page.total, page.generation)

        return self._query(words, "extents", self.port, request.first_extent, count, 1)

    def _respond(self, request: memdev.AddDcResponseRequest) -> Plan:
        return Ask(d.Respond(self.port, _ranges(request), request.more), nothing)

    def _release(self, request: memdev.ReleaseDcRequest) -> Plan:
        return Ask(d.HostRelease(self.port, _ranges(request), request.more), nothing)

    def _media(self, request: vendor.GetExtentMediaRequest) -> Plan:
        by_dpa = self.identity.by_dpa

        def words(view: d.MediaView) -> WireStruct:
            pieces = tuple(
                vendor.MediaPiece(p.start if by_dpa else p.at, p.length) for p in view.pieces
            )
            layout = vendor.MediaLayout.BY_DPA if by_dpa else vendor.MediaLayout.BY_TAG
            return vendor.GetExtentMediaResponse(layout, view.read_only, pieces)

        return self._query(words, "media", self.port, tag_from_bytes(request.tag))


class FmDispatch(PortDispatch):
    """The fabric manager's port, which is the LD Pool CCI of a device with one head per LD."""

    def __init__(
        self,
        identity: Identity,
        hosts: tuple[HostDispatch, ...],
        payload_bytes: Bytes = CCI_PAYLOAD_BYTES_MAX,
    ) -> None:
        super().__init__(identity, d.FM_PORT, payload_bytes)
        self._hosts = hosts
        self._table |= {
            Opcode.TUNNEL: self._tunnel,
            Opcode.GET_LD_INFO: self._ld_info,
            Opcode.GET_LD_ALLOCATIONS: self._ld_allocations,
            Opcode.GET_MULTI_HEADED_INFO: self._multi_headed,
            Opcode.GET_HEAD_INFO: self._head_info,
            Opcode.GET_DCD_INFO: self._dcd_info,
            Opcode.GET_HOST_DC_REGION_CONFIGURATION: self._configuration,
            Opcode.SET_DC_REGION_CONFIGURATION: self._set_region,
            Opcode.GET_DC_REGION_EXTENT_LISTS: self._extents,
            Opcode.INITIATE_DC_ADD: self._add,
            Opcode.INITIATE_DC_RELEASE: self._release,
            Opcode.DC_ADD_REFERENCE: self._add_reference,
            Opcode.DC_REMOVE_REFERENCE: self._remove_reference,
            Opcode.DC_LIST_TAGS: self._tags,
            Opcode.GET_SANITISE_RECORD: self._sanitise_record,
            Opcode.GET_POOL_MAP: self._pool_map,
            Opcode.FENCE: self._fence,
        }

    # ---- 5300h

    def _tunnel(self, request: fmapi.TunnelRequest) -> Plan:
        if request.target_type != fmapi.TunnelTarget.PORT_OR_LD:
            return Immediate(ReturnCode.INVALID_INPUT, None, "this is the LD pool's CCI already")
        if request.target_id >= len(self._hosts):
            return Immediate(ReturnCode.INVALID_INPUT, None, f"LD {request.target_id}")
        try:
            inner = CciMessage.decode(request.message)
        except DecodeError as error:
            return Immediate(ReturnCode.INVALID_INPUT, None, f"inner message: {error}")
        if inner.category != Category.REQUEST:
            return Immediate(ReturnCode.INVALID_INPUT, None, "the inner message is no request")

        def wrap(said: Said) -> Said:
            code, body = said
            payload = b"" if body is None else body.encode()
            if len(payload) > self.payload_bytes - 16:
                code, payload = ReturnCode.INTERNAL_ERROR, b""
            message = CciMessage(Category.RESPONSE, inner.tag, inner.opcode, payload, code)
            return ReturnCode.SUCCESS, fmapi.TunnelResponse(message.encode())

        host = self._hosts[request.target_id]
        # A descriptor cannot pass through a tunnel, nor does the command that is about one.
        known = inner.opcode != Opcode.GET_EXTENT_MEDIA
        plan = host.plan(inner.opcode, _decoded(inner) if known else Unsupported(inner.opcode))
        if isinstance(plan, Ask):
            return msgspec.structs.replace(plan, wrap=wrap)
        code, body = wrap((plan.code, plan.body))
        return Immediate(code, body, plan.reason)

    # ---- 54xxh, 55xxh

    def _ld_info(self, _: fmapi.GetLdInfoRequest) -> Plan:
        identity = self.identity
        body = fmapi.GetLdInfoResponse(identity.capacity_bytes, len(identity.spec.lds))
        return Immediate(ReturnCode.SUCCESS, body)

    def _ld_allocations(self, request: fmapi.GetLdAllocationsRequest) -> Plan:
        count = len(self.identity.spec.lds)
        if request.first_ld >= count:
            return Immediate(ReturnCode.INVALID_INPUT, None, f"LD {request.first_ld} of {count}")
        shown = min(request.lds_max, count - request.first_ld, 255)
        # All capacity is dynamic: no LD has static memory.
        none = fmapi.LdAllocation(0, 0)
        body = fmapi.GetLdAllocationsResponse(
            min(count, 255), fmapi.LdGranularity.MIB_256, request.first_ld, (none,) * shown
        )
        return Immediate(ReturnCode.SUCCESS, body)

    def _multi_headed(self, request: fmapi.GetMultiHeadedInfoRequest) -> Plan:
        count = len(self.identity.spec.lds)
        if request.first_ld >= count:
            return Immediate(ReturnCode.INVALID_INPUT, None, f"LD {request.first_ld} of {count}")
        last = min(count, request.first_ld + request.lds_max, 255)
        heads = tuple(range(request.first_ld, last))
        body = fmapi.GetMultiHeadedInfoResponse(
            min(count, 255), min(count, 255), request.first_ld, heads
        )
        return Immediate(ReturnCode.SUCCESS, body)

    def _head_info(self, request: fmapi.GetHeadInfoRequest) -> Plan:
        count = len(self.identity.spec.lds)
        if request.first_head >= count:
            reason = f"head {request.first_head} of {count}"
            return Immediate(ReturnCode.INVALID_INPUT, None, reason)
        last = min(count, request.first_head + request.heads_wanted, 255)
        heads = tuple(fmapi.HeadInfo(port) for port in range(request.first_head, last))
        return Immediate(ReturnCode.SUCCESS, fmapi.GetHeadInfoResponse(heads))

    # ---- 56xxh

    def _dcd_info(self, _: fmapi.GetDcdInfoRequest) -> Plan:
        identity = self.identity

        def words(regions: tuple[d.RegionInfo, ...]) -> WireStruct:
            masks = [region.block_sizes for region in regions]
            return fmapi.GetDcdInfoResponse(
                host_count=min(len(identity.spec.lds), 255),
                region_count=len(regions),
                add_policies=0b111,
                removal_policies=0b11,
                capacity_bytes=identity.capacity_bytes,
                block_size_masks=tuple(masks + [0] * (8 - len(masks))),
                sanitise_configurable=(1 << len(regions)) - 1,
            )

        return self._query(words, "regions")

    def _configuration(self, request: fmapi.GetHostDcRegionConfigurationRequest) -> Plan:
        first, total = request.first_region, len(self.identity.spec.regions)

        def words(found: d.Configuration) -> WireStruct:
            shown = found.regions[first : first + request.regions_wanted]
            return fmapi.GetHostDcRegionConfigurationResponse(
                request.host_id,
                len(found.regions),
                tuple(
                    fmapi.HostDcRegion(
                        region.base,
                        region.decode_bytes,
                        region.size_bytes,
                        region.block_bytes,
                        _attributes(region),
                        region.sanitise,
                    )
                    for region in shown
                ),
                *_counts(found.counts),
            )

        if first >= total:
            return Immediate(ReturnCode.INVALID_INPUT, None, f"region {first} of {total}")
        return self._query(words, "configuration", request.host_id, 0)

    def _set_region(self, request: fmapi.SetDcRegionConfigurationRequest) -> Plan:
        setting = (request.region, request.block_bytes, request.sanitise_on_release)
        return Ask(
            d.SetRegionConfig(*setting),
            lambda _: fmapi.SetDcRegionConfigurationResponse(*setting),
        )

    def _extents(self, request: fmapi.GetDcRegionExtentListsRequest) -> Plan:
        count = self._fitting(24, 40, request.extents_wanted)

        def words(page: d.ExtentPage) -> WireStruct:
            return fmapi.GetDcRegionExtentListsResponse(
                request.host_id,
                request.first_extent,
                _wire_extents(page.extents),
                page.total,
                page.generation,
            )

        return self._query(words, "extents", request.host_id, request.first_extent, count, 0)

    def _add(self, request: fmapi.InitiateDcAddRequest) -> Plan:
        event = d.Add(
            request.host_id,
            int(request.policy),
            request.region,
            request.length_bytes,
            tag_from_bytes(request.tag),
            _asked(request.extents),
        )
        return Ask(event, nothing)

    def _release(self, request: fmapi.InitiateDcReleaseRequest) -> Plan:
        event = d.Release(
            request.host_id,
            int(request.policy),
            request.forced,
            request.sanitise,
            request.length_bytes,
            tag_from_bytes(request.tag),
            _asked(request.extents),
        )
        return Ask(event, nothing)

    def _add_reference(self, request: fmapi.DcAddReferenceRequest) -> Plan:
        return Ask(d.AddReference(tag_from_bytes(request.tag)), nothing)

    def _remove_reference(self, request: fmapi.DcRemoveReferenceRequest) -> Plan:
        return Ask(d.RemoveReference(tag_from_bytes(request.tag)), nothing)

    def _tags(self, request: fmapi.DcListTagsRequest) -> Plan:
        count = self._fitting(16, 84, request.tags_max)

        def words(page: d.TagPage) -> WireStruct:
            tags = tuple(
                fmapi.DcTagInfo(
                    tag_to_bytes(entry.tag),
                    entry.referenced,
                    _bitmap(entry.added),
                    _bitmap(entry.pending),
                )
                for entry in page.entries
            )
            return fmapi.DcListTagsResponse(page.generation, page.total, tags)

        return self._query(words, "tags", request.first_tag, count)

    # ---- C001h to C003h

    def _sanitise_record(self, request: vendor.GetSanitiseRecordRequest) -> Plan:
        def words(report: d.SanitiseReport) -> WireStruct:
            return vendor.GetSanitiseRecordResponse(
                vendor.SanitiseState(report.state),
                vendor.SanitiseMethod(report.method),
                report.sanitised_bytes,
                report.read_back_bytes,
                report.finished_ns,
            )

        return self._query(words, "sanitised", tag_from_bytes(request.tag))

    def _pool_map(self, request: vendor.GetPoolMapRequest) -> Plan:
        spec = self.identity.spec
        if request.ld >= len(spec.lds):
            return Immediate(ReturnCode.INVALID_INPUT, None, f"LD {request.ld}")
        pools = [region.pool for region in spec.regions]
        order = vendor.PoolOrder(int(spec.lds[request.ld].mirrored))
        body = vendor.GetPoolMapResponse(order, len(pools), tuple(pools + [0] * (8 - len(pools))))
        return Immediate(ReturnCode.SUCCESS, body)

    def _fence(self, request: vendor.FenceRequest) -> Plan:
        tag = tag_from_bytes(request.tag)
        if tag != NIL_TAG and (request.start_dpa or request.length_bytes):
            return Immediate(ReturnCode.INVALID_INPUT, None, "a tag and a range")
        event = d.Fence(request.ld, tag, Dpa(request.start_dpa), request.length_bytes)
        return Ask(event, nothing)


def _decoded(message: CciMessage) -> Body:
    try:
        return decode_request(message.opcode, message.payload)
    except WrongSize as error:
        return Malformed(ReturnCode.INVALID_PAYLOAD_LENGTH, str(error))
    except DecodeError as error:
        return Malformed(ReturnCode.INVALID_INPUT, str(error))


def _counts(counts: d.Counts) -> tuple[int, int, int, int]:
    return counts.extents, counts.extents_available, counts.tags, counts.tags_available


def _attributes(region: d.RegionInfo) -> int:
    flags = fmapi.RegionAttribute.NONE
    if region.sharable:
        flags |= fmapi.RegionAttribute.SHARABLE
    if region.hardware_coherent:
        flags |= fmapi.RegionAttribute.HARDWARE_COHERENT
    if region.read_only:
        flags |= fmapi.RegionAttribute.READ_ONLY
    return int(flags)


def _wire_extents(held: tuple[d.HeldExtent, ...]) -> tuple[WireExtent, ...]:
    return tuple([WireExtent(e.start, e.length, tag_to_bytes(e.tag), e.sequence) for e in held])


def _asked(extents: tuple[WireExtent, ...]) -> tuple[d.AskedExtent, ...]:
    return tuple(
        [
            d.AskedExtent(Dpa(e.start_dpa), e.length_bytes, tag_from_bytes(e.tag), e.sequence)
            for e in extents
        ]
    )


def _ranges(request: memdev.AddDcResponseRequest | memdev.ReleaseDcRequest) -> tuple[d.Range, ...]:
    return tuple([d.Range(Dpa(e.start_dpa), e.length_bytes) for e in request.extents])


def _bitmap(lds: tuple[int, ...]) -> bytes:
    return sum(1 << ld for ld in lds).to_bytes(32, "little")


def _events(page: d.LogPage) -> WireStruct:
    records = tuple(
        [
            generic.DynamicCapacityRecord(
                header=generic.EventHeader(record.handle, record.at_ns),
                type=generic.DcEventType(record.type),
                extent=WireExtent(
                    record.start, record.length, tag_to_bytes(record.tag), record.sequence
                ),
                more=record.more,
                host_id=record.ld if record.type >= d.EventType.ADD_RESPONSE else 0,
                region=record.region if record.type == d.EventType.REGION_UPDATED else 0,
                available_valid=True,
                extents_available=record.extents_available,
                tags_available=record.tags_available,
            )
            for record in page.records
        ]
    )
    return generic.GetEventRecordsResponse(
        records,
        page.more,
        page.overflow_count > 0,
        min(page.overflow_count, 0xFFFF),
        page.overflow_first_ns,
        page.overflow_last_ns,
    )
