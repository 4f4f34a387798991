"""What hosts say and run: registration, sessions of their agents, observations, workloads.

An observation tells what a host has, never what an appliance has: it makes an attachment ready or
proved, names holders and reasons, but only the appliance's word moves extents. One with an older
revision than what is wanted now is of the past and is dropped.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from tagmem.base.errors import InvalidInput
from tagmem.base.ids import HostId, parse_name
from tagmem.base.limits import COMMAND_ARGUMENTS_MAX, COMMAND_BYTES_MAX, HOSTS_PER_APPLIANCE_MAX
from tagmem.domain import attachment as attachments
from tagmem.domain import ladder
from tagmem.domain.effects import (
    HostConnected,
    HostDisconnected,
    HostObserved,
    LaunchWorkload,
    RegisterHost,
    StopWorkload,
)
from tagmem.domain.outcome import Outcome, Reply
from tagmem.domain.records import (
    AttachmentRecord,
    AttachmentState,
    HostRecord,
    WorkloadSpec,
    WorkloadStatus,
)
from tagmem.domain.requests import problem, refusal, unknown_host, unknown_tag
from tagmem.domain.turn import Turn

HOSTS_MAX = 4096
"""One orchestrator serves one CXL pod."""
REASON_LENGTH_MAX = 1000
HOLDERS_KEPT_MAX = 16
WORKLOAD_ID_LENGTH_MAX = 128
NOT_CONNECTED = "host not connected"


# ---- registration and sessions


def register(turn: Turn, event: RegisterHost) -> Reply:
    """Name a host and its LDs; more links may be added later, none changed."""
    state = turn.state
    try:
        name = HostId(parse_name(event.id, "id"))
    except InvalidInput as error:
        return problem(Outcome.NAME_IS_MALFORMED, "id", error.limit, event.id[:80])
    for appliance, ld in event.links.items():
        if not 0 <= ld < HOSTS_PER_APPLIANCE_MAX:
            limit = f"between 0 and {HOSTS_PER_APPLIANCE_MAX - 1}"
            return problem(Outcome.FIELD_OUT_OF_RANGE, f"links.{appliance[:63]}", limit, ld)
    for appliance in event.links:
        if appliance not in state.appliances:
            limit = "the name of a registered appliance"
            return problem(Outcome.APPLIANCE_IS_UNKNOWN, "links", limit, appliance[:80])
    present = state.hosts.get(name)
    if present is not None and present.links == event.links:
        return Reply(Outcome.ALREADY_SO, name)
    wrong = _wrong_links(turn, present, event)
    if wrong is not None:
        return wrong
    if present is None and len(state.hosts) >= HOSTS_MAX:
        return problem(Outcome.FIELD_OUT_OF_RANGE, "id", f"one of at most {HOSTS_MAX} hosts", name)
    record = present or HostRecord(name, {}, turn.now)
    turn.put("host", name, replace(record, links=dict(event.links)))
    turn.note("host.registered", name, links=dict(event.links))
    return Reply(Outcome.CREATED if present is None else Outcome.OK, name)


def _wrong_links(turn: Turn, present: HostRecord | None, event: RegisterHost) -> Reply | None:
    outcome = Outcome.NAME_EXISTS_WITH_OTHER_PARAMETERS
    for present_on, ld in present.links.items() if present else ():
        if event.links.get(present_on) != ld:
            limit = f"{present_on} LD {ld}, as registered"
            return problem(outcome, "links", limit, event.links.get(present_on), event.id)
    for appliance, ld in event.links.items():
        other = turn.state.ld_hosts.get((appliance, ld))
        if other is not None and other != event.id:
            limit = f"not {appliance} LD {ld}, which is {other}'s"
            return problem(outcome, "links", limit, ld, event.id)
    return None


def connected(turn: Turn, event: HostConnected) -> Reply:
    """An agent is there; the caller sends it all of `desired_for` next."""
    record = turn.state.hosts.get(event.host)
    if record is None:
        return unknown_host(event.host[:80])
    for appliance, ld in event.links.items():
        if record.links.get(appliance) != ld:
            limit = f"{record.links.get(appliance)} for {appliance[:63]}, as registered"
            outcome = Outcome.NAME_EXISTS_WITH_OTHER_PARAMETERS
            return problem(outcome, "links", limit, ld, event.host)
    turn.state.connected.add(event.host)
    if record.boot_id != event.boot_id:
        if record.boot_id:
            turn.note("host.restarted", event.host)
        turn.put("host", event.host, replace(record, boot_id=event.boot_id[:128]))
    turn.note("host.connected", event.host)
    for attachment in _leaving(turn, event.host):
        if attachment.reason == NOT_CONNECTED:
            turn.put_attachment(replace(attachment, reason=""))
    return Reply(Outcome.OK, event.host)


def disconnected(turn: Turn, event: HostDisconnected) -> None:
    """The agent's session ended; the host may go on using what it has."""
    if event.host not in turn.state.connected:
        return
    turn.state.connected.discard(event.host)
    turn.note("host.disconnected", event.host)
    for attachment in _leaving(turn, event.host):
        if not attachment.proved and not attachment.reason:
            turn.put_attachment(replace(attachment, reason=NOT_CONNECTED))


def _leaving(turn: Turn, host: str) -> list[AttachmentRecord]:
    tags = turn.state.by_host.get(host, ())
    found = (turn.state.attachment(tag, host) for tag in tags)
    return [r for r in found if r is not None and r.state in attachments.LEAVING]


# ---- observations


def observed(turn: Turn, event: HostObserved) -> None:
    """Take over what an agent says about one tag."""
    record = turn.state.attachment(event.tag, event.host)
    if record is None:
        if event.phase == "refused" and event.reason:
            # Not ours to lend, but somebody offered it: people want to know what the host said.
            reason = event.reason[:REASON_LENGTH_MAX]
            turn.note("host.refused", event.host, tag=event.tag, reason=reason)
        return
    if event.revision < record.revision:
        return
    status = _workload_status(turn, record, event.workload)
    changes: dict[str, Any] = {} if status is None else {"workload_status": status}
    if record.state in attachments.WANTED:
        changes |= _wanted(turn, record, event)
    elif record.state in attachments.LEAVING:
        changes |= _leaving_changes(turn, record, event)
    elif record.state is AttachmentState.REFUSED and event.phase == "refused" and event.reason:
        changes["reason"] = event.reason[:REASON_LENGTH_MAX]
    updated = replace(record, **changes)
    if updated != record:
        turn.put_attachment(updated)


def _wanted(turn: Turn, record: AttachmentRecord, event: HostObserved) -> dict[str, Any]:
    ready = event.phase == "attached"
    changes: dict[str, Any] = {
        "ready": ready,
        "dax_path": event.dax_path[:REASON_LENGTH_MAX] if ready else "",
        "reason": event.reason[:REASON_LENGTH_MAX],
    }
    if ready and not record.ready and record.state is AttachmentState.ATTACHED:
        turn.note("capacity.ready", record.tag, host=record.host, dax_path=event.dax_path)
    return changes


def _leaving_changes(turn: Turn, record: AttachmentRecord, event: HostObserved) -> dict[str, Any]:
    if event.proved and event.phase in ("released", "absent"):
        if not record.proved:
            turn.note("capacity.proved", record.tag, host=record.host)
        # From here the appliance has the next word, under the deadline of sanitising.
        return {
            "proved": True,
            "holders": (),
            "reason": "",
            "dax_path": "",
            "rung": "",
            "rung_deadline_ns": 0,
        }
    if record.proved:
        return {}
    changes: dict[str, Any] = {"holders": event.holders[:HOLDERS_KEPT_MAX]}
    if event.reason:
        changes["reason"] = event.reason[:REASON_LENGTH_MAX]
    elif record.reason == NOT_CONNECTED:
        changes["reason"] = ""
    if event.rung and ladder.rank(event.rung) > ladder.rank(record.rung):
        changes["rung"] = event.rung
        turn.note("capacity.rung", record.tag, host=record.host, rung=event.rung)
    if event.holders and event.holders != record.holders:
        holders = [f"{h.name} (pid {h.pid}, {h.how})" for h in event.holders[:HOLDERS_KEPT_MAX]]
        turn.note("capacity.held", record.tag, host=record.host, holders=holders)
    return changes


def _workload_status(
    turn: Turn, record: AttachmentRecord, status: WorkloadStatus | None
) -> WorkloadStatus | None:
    """The status if it is news about the workload that was asked for."""
    if status is None or record.workload is None or status.id != record.workload.id:
        return None
    if status == record.workload_status:
        return None
    before = record.workload_status
    if before is None or before.state != status.state:
        turn.note(
            f"workload.{status.state}",
            record.tag,
            host=record.host,
            workload=status.id,
            pid=status.pid,
            exit_code=status.exit_code,
            reason=status.reason[:REASON_LENGTH_MAX],
        )
    return replace(status, reason=status.reason[:REASON_LENGTH_MAX])


# ---- workloads


def launch(turn: Turn, event: LaunchWorkload) -> Reply:
    """Run a command on an attached capacity."""
    wrong = _wrong_command(event)
    if wrong is not None:
        return wrong
    record = _holder(turn, event.tag, event.host)
    if isinstance(record, Reply):
        return record
    capacity = turn.state.capacities[record.tag]
    if not capacity.tagged:
        detail = "untagged capacity is the host's ordinary memory: it has no device to run on"
        return refusal(Outcome.NOT_SUPPORTED, record.tag, detail)
    if capacity.leaving or record.state in attachments.LEAVING:
        return refusal(Outcome.TAG_IS_BEING_RELEASED, record.tag, "nothing starts on it any more")
    if record.state is not AttachmentState.ATTACHED:
        detail = f"on {record.host} it is {record.state.value}"
        return refusal(Outcome.TAG_IS_NOT_ATTACHED, record.tag, detail)
    present = record.workload
    if present is not None:
        if present.id == event.workload:
            same = present.command == event.command and present.environment == event.environment
            if same:
                return Reply(Outcome.ALREADY_SO, event.workload)
            outcome = Outcome.NAME_EXISTS_WITH_OTHER_PARAMETERS
            return refusal(outcome, event.workload, "this workload has another command")
        status = record.workload_status
        if status is None or status.state in ("pending", "running"):
            return refusal(Outcome.WORKLOAD_IS_RUNNING, record.tag, f"{present.id} runs on it")
    spec = WorkloadSpec(event.workload, event.command, dict(event.environment))
    turn.put_attachment(
        replace(record, workload=spec, workload_status=None, revision=turn.revision())
    )
    turn.tell(record.host, record.tag)
    turn.note("workload.launched", record.tag, host=record.host, workload=event.workload)
    return Reply(Outcome.ACCEPTED, event.workload)


def _wrong_command(event: LaunchWorkload) -> Reply | None:
    out = Outcome.FIELD_OUT_OF_RANGE
    if len(event.command) > COMMAND_ARGUMENTS_MAX:
        limit = f"at most {COMMAND_ARGUMENTS_MAX} arguments"
        return problem(out, "command", limit, len(event.command))
    words = [*event.command, *event.environment, *event.environment.values()]
    size = sum(len(word.encode(errors="surrogatepass")) + 1 for word in words)
    if size > COMMAND_BYTES_MAX:
        limit = f"at most {COMMAND_BYTES_MAX} bytes with its environment"
        return problem(out, "command", limit, size)
    if any("\0" in word for word in words):
        return problem(out, "command", "free of NUL characters", "a NUL character")
    if not 0 < len(event.workload) <= WORKLOAD_ID_LENGTH_MAX:
        limit = f"1 to {WORKLOAD_ID_LENGTH_MAX} characters"
        return problem(out, "workload", limit, len(event.workload))
    if not event.command or not event.command[0]:
        return problem(Outcome.COMMAND_IS_EMPTY, "command", "at least one word", "none")
    return None


def _holder(turn: Turn, tag: str, host: str) -> AttachmentRecord | Reply:
    if host not in turn.state.hosts:
        return unknown_host(host[:80])
    if tag not in turn.state.capacities:
        return unknown_tag(tag)
    record = turn.state.attachment(tag, host)
    if record is None or record.state in attachments.OVER:
        limit = "a host that holds the tag"
        return problem(Outcome.HOST_DOES_NOT_HOLD_TAG, "host", limit, host, tag)
    return record


def stop(turn: Turn, event: StopWorkload) -> Reply:
    """Have the workload stopped; the capacity stays."""
    record = _holder(turn, event.tag, event.host)
    if isinstance(record, Reply):
        return record
    if record.workload is None:
        return refusal(Outcome.WORKLOAD_IS_UNKNOWN, record.tag, "nothing was launched on it")
    if record.workload.stop:
        return Reply(Outcome.ALREADY_SO, record.workload.id)
    turn.put_attachment(
        replace(record, workload=replace(record.workload, stop=True), revision=turn.revision())
    )
    turn.tell(record.host, record.tag)
    turn.note("workload.stopping", record.tag, host=record.host, workload=record.workload.id)
    return Reply(Outcome.ACCEPTED, record.workload.id)
