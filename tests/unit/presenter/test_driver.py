"""Attach whole or not at all; detach rung by rung: against a VM that is none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.unit.presenter.machines import ROOMY, TAG, FakeMachine, tagged

from tagmem.base.errors import Conflict, RemoteError, Unsupported
from tagmem.base.units import MIB, MILLISECOND, SECOND
from tagmem.presenter.choose import all_presenters
from tagmem.presenter.contract import Detached, MakeHeader, Presentation, Request
from tagmem.presenter.driver import perform
from tagmem.presenter.header import HEADER_AT, HEADER_SIZE, parse_dax_header
from tagmem.presenter.vhost_pmem import TRIES
from tagmem.wire import guest

WAYS = all_presenters()
MEMORY = guest.Memory(TAG, "vhost-pmem", "dax0.0", "/dev/dax0.0", 1, 1)
FOUND = guest.Attached(1, MEMORY)
RELEASED = guest.Released(1, TAG, present=True)
HELD = guest.Held(1, TAG, (guest.Holder(7, "app", "maps"),))
SHOWN = Presentation(tagged(), "vm1", "vhost-pmem", f"tm-{TAG}", "attached")


def detach(vm: FakeMachine, *, way: str = "vhost-pmem", **how: bool) -> Detached:
    shown = msgspec.structs.replace(SHOWN, presenter=way)
    return asyncio.run(WAYS[way].detach(shown, vm, deadline_ns=50 * MILLISECOND, **how))


def test_attach_goes_in_order_and_tells_the_path() -> None:
    vm = FakeMachine(ROOMY, FOUND)
    shown = asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm))
    assert vm.log == ["open", "chardev-add", "device_add", "mapped"]
    assert shown.guest_path == "/dev/dax0.0"


def test_what_fails_half_way_is_undone() -> None:
    vm = FakeMachine(ROOMY, refuse=("device_add",))
    with pytest.raises(RemoteError):
        asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm))
    assert vm.log == ["open", "chardev-add", "device_add", "chardev-remove", "close"]


def test_nothing_is_tried_that_cannot_be() -> None:
    vm = FakeMachine(msgspec.structs.replace(ROOMY, state="paused"))
    with pytest.raises(Unsupported):
        asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm))
    assert vm.log == []


def test_a_guest_that_looked_too_early_gets_it_anew() -> None:
    vm = FakeMachine(ROOMY, FOUND)
    assert vm.windows is not None
    vm.windows.looks = [None, None]
    shown = asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm))
    once = ["open", "chardev-add", "device_add", "mapped"]
    back = ["device_del", "chardev-remove", "close"]
    assert vm.log == [*once, *back, *once, *back, *once]
    assert shown.guest_path


def test_a_guest_that_always_looks_too_early_is_left_to_its_agent() -> None:
    vm = FakeMachine(ROOMY, FOUND)
    assert vm.windows is not None
    vm.windows.looks = [None] * 9
    assert asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm)).guest_path
    assert vm.log.count("device_add") == TRIES


def test_a_guest_that_has_not_looked_is_asked() -> None:
    vm = FakeMachine(ROOMY, FOUND)
    assert vm.windows is not None
    vm.windows.looks = [False]
    assert asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm)).guest_path
    assert vm.log.count("device_add") == 1


def test_a_guest_that_finds_nothing_gets_it_anew() -> None:
    absent = guest.Failed(1, "absent", "there is no tagged memory")
    vm = FakeMachine(ROOMY, absent, FOUND)
    assert vm.windows is not None
    vm.windows.looks = [False, False]
    assert asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm)).guest_path
    assert vm.log.count("device_add") == 2
    # Whose kernel has it, and whose agent is silent, keeps it.
    vm = FakeMachine(ROOMY, None)
    asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm))
    assert vm.log.count("device_add") == 1


def test_a_handshake_that_failed_is_made_again() -> None:
    broken = ("device_add", "vhost_backend_init failed: Protocol error")
    vm = FakeMachine(ROOMY, FOUND, refusals=[broken])
    assert asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm)).guest_path
    assert vm.log.count("device_add") == 2
    vm = FakeMachine(ROOMY, FOUND, refusals=[broken] * 9)
    with pytest.raises(RemoteError, match="Protocol error"):
        asyncio.run(WAYS["vhost-pmem"].attach(Request(tagged()), vm))
    assert vm.log[-2:] == ["chardev-remove", "close"]


def test_a_character_device_may_be_busy_for_a_moment() -> None:
    busy = ("chardev-remove", "Chardev 'c' is busy")
    vm = FakeMachine(ROOMY, RELEASED, refusals=[busy, busy])
    assert detach(vm).done
    assert vm.log.count("chardev-remove") == 3


def test_a_host_that_may_only_read_needs_the_header_to_be_there(tmp_path: Path) -> None:
    media = tmp_path / "media"
    with media.open("wb") as file:
        file.truncate(6 * MIB)
    step = MakeHeader(TAG, str(media), 0, 6 * MIB, read_only=True)
    with pytest.raises(Conflict, match="may only read"):
        asyncio.run(perform(step, FakeMachine()))
    assert media.read_bytes() == bytes(6 * MIB)
    asyncio.run(perform(msgspec.structs.replace(step, read_only=False), FakeMachine()))
    written = media.read_bytes()
    assert parse_dax_header(written[HEADER_AT:][:HEADER_SIZE]).tag == TAG
    media.chmod(0o400)
    asyncio.run(perform(step, FakeMachine()))
    assert media.read_bytes() == written


def test_the_guest_lets_go() -> None:
    ended = detach(FakeMachine(ROOMY, RELEASED))
    assert ended.done
    assert ended.rung == "unplug"


@pytest.mark.parametrize("way", ["vhost-pmem", "pmem", "ivshmem"])
def test_a_holder_is_named_and_nothing_is_unplugged(way: str) -> None:
    vm = FakeMachine(ROOMY, HELD)
    ended = detach(vm, way=way)
    assert not ended.done
    assert "process 7 (app) holds it" in ended.reason
    assert ended.holders[0].pid == 7
    assert vm.log == []


def test_force_takes_the_bytes_from_a_silent_guest() -> None:
    vm = FakeMachine(ROOMY, None)
    ended = detach(vm, force=True)
    assert ended.done
    assert ended.rung == "revoke"
    assert vm.log == ["revoke", "device_del", "chardev-remove", "close"]


def test_a_device_that_stays_is_kept_on_record() -> None:
    ended = detach(FakeMachine(ROOMY, None, leaves=False), force=True)
    assert ended.done
    assert ended.presentation is not None
    assert ended.presentation.state == "revoked"


def test_a_paused_vm_runs_for_the_moment_of_taking() -> None:
    vm = FakeMachine(msgspec.structs.replace(ROOMY, state="paused"))
    assert detach(vm, force=True).done
    assert vm.log == ["revoke", "cont", "revoke", "stop"]


def test_without_force_a_silent_guest_keeps_it() -> None:
    vm = FakeMachine(ROOMY, None)
    ended = detach(vm)
    assert not ended.done
    assert "did not answer" in ended.reason
    assert vm.log == []


def test_a_guest_that_is_busy_is_asked_again() -> None:
    busy = guest.Failed(1, "conflict", "it is being detached")
    shown = msgspec.structs.replace(SHOWN)
    vm = FakeMachine(ROOMY, busy, RELEASED)
    ended = asyncio.run(WAYS["vhost-pmem"].detach(shown, vm, deadline_ns=SECOND))
    assert ended.done


def test_a_vm_without_an_agent_is_not_guessed_about() -> None:
    vm = FakeMachine(ROOMY)
    vm.guest = None
    assert "no guest agent" in detach(vm).reason


def test_the_last_rung_is_taken_only_where_it_is_allowed() -> None:
    vm = FakeMachine(ROOMY, None, stuck=True)
    assert not detach(vm, force=True).done
    vm = FakeMachine(ROOMY, None, stuck=True)
    ended = detach(vm, force=True, may_stop_vm=True)
    assert ended.done
    assert ended.rung == "stop-vm"
    assert vm.log[-2:] == ["stop-vm", "close"]


def test_pmem_has_no_force_but_the_vms_end() -> None:
    vm = FakeMachine(ROOMY, None)
    assert not detach(vm, way="pmem", force=True).done
    assert "revoke" not in vm.log


def test_an_ended_qemu_holds_nothing() -> None:
    vm = FakeMachine(msgspec.structs.replace(ROOMY, state="gone"))
    assert detach(vm).done
