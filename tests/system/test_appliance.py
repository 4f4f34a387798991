"""The appliance as a real process: real sockets, real bytes, and kill -9 wherever it hurts."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.system.appliance_client import Appliance, B, Client, Refused

from tagmem.base.ids import Tag
from tagmem.wire import fmapi, generic, memdev
from tagmem.wire.cci import Category, CciMessage, Opcode, ReturnCode
from tagmem.wire.generic import DcEventType

T1 = Tag("5be13bce-ae34-4a77-b6c3-16df975fcf1a")
T2 = Tag("00000000-0000-4000-8000-000000000002")


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # Socket paths are short, so not the long directory that a test gets.
    directory = Path(tempfile.mkdtemp(prefix="tm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def media() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="tm", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=["by-tag", "by-dpa"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def appliance(root: Path, media: Path) -> Iterator[Appliance]:
    appliance = Appliance(root, media)
    appliance.start()
    yield appliance
    appliance.close()


def test_bytes_of_a_life_are_wiped_and_read_back(root: Path, media: Path, layout: str) -> None:
    appliance = Appliance(root, media, layout)
    appliance.start()
    try:
        fm, host = appliance.client("fm"), appliance.client("w1")
        assert fm.add(0, T1, 4) == 0
        with pytest.raises(Refused):
            host.media(T1)
        extents = host.accept()
        where, descriptor = host.media(T1)
        (piece,) = where.pieces
        os.pwrite(descriptor, b"secret" * 1000, piece.media_offset)
        assert fm.release(0, T1, 4) == 0
        (record,) = host.wait_for_records(1)
        assert record.type == DcEventType.RELEASE_CAPACITY
        assert host.give_back(extents) == 0
        kinds = [record.type for record in fm.wait_for_records(2)]
        assert kinds == [DcEventType.ADD_CAPACITY_RESPONSE, DcEventType.CAPACITY_RELEASED]
        report = fm.sanitised(T1)
        assert (report.state, report.read_back_bytes) == (2, 4 * B)
        assert not os.pread(descriptor, 4096, piece.media_offset).strip(b"\0")
        os.close(descriptor)
    finally:
        appliance.close()


def test_a_link_stands_in_the_hosts_directory_while_it_has_the_tag(appliance: Appliance) -> None:
    fm, host = appliance.client("fm"), appliance.client("w1")
    link = appliance.media / "hosts" / "w1" / T1
    assert fm.add(0, T1, 2) == 0
    assert not link.exists()
    extents = host.accept()
    assert link.stat().st_size == 2 * B
    # memcached, for one, cuts its file; wiping takes what is there.
    os.truncate(link, B)
    assert host.give_back(extents) == 0
    fm.wait_for_records(2)
    assert not link.exists()
    assert list((appliance.media / "media").iterdir()) == []


@pytest.mark.parametrize("layout", ["by-tag"])
def test_killed_at_each_step_it_comes_back_the_same(root: Path, media: Path, layout: str) -> None:
    appliance = Appliance(root, media, layout)
    appliance.start()

    def again() -> tuple[Client, Client]:
        before = appliance.client("fm").lists()
        appliance.kill()
        appliance.start()
        fm, host = appliance.client("fm"), appliance.client("w1")
        assert fm.lists() == before
        return fm, host

    try:
        fm = appliance.client("fm")
        assert fm.add(0, T1, 4, region=1) == 0
        fm, host = again()
        extents = host.accept()
        _, descriptor = host.media(T1)
        os.pwrite(descriptor, b"data", 0)
        fm, host = again()
        assert host.extents() == extents
        assert (media / "hosts" / "w1" / T1).read_bytes()[:4] == b"data"
        assert fm.share(1, T1, 2) == 0
        fm, host = again()
        second = appliance.client("w2")
        shared = second.accept()
        assert [e.sequence for e in shared] == [0]
        assert shared[0].start_dpa != extents[0].start_dpa
        where, descriptor = second.media(T1)
        assert where.read_only
        assert os.pread(descriptor, 4, 0) == b"data"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, b"x", 0)
        assert not (media / "hosts" / "w2" / T1).exists()
        fm, host = again()
        assert host.give_back(extents) == 0
        assert not (media / "hosts" / "w1" / T1).exists()
        fm, host = again()
        assert appliance.client("w2").give_back(shared) == 0
        appliance.kill()
        appliance.start()
        fm = appliance.client("fm")
        released = [r for r in fm.wait_for_records(4) if r.type == DcEventType.CAPACITY_RELEASED]
        assert [r.host_id for r in released] == [0, 1]
        assert fm.sanitised(T1).state == 2
        assert list((media / "media").iterdir()) == []
    finally:
        appliance.close()


def test_lost_media_leave_an_empty_appliance(appliance: Appliance) -> None:
    fm, host = appliance.client("fm"), appliance.client("w1")
    assert fm.add(0, T1, 4) == 0
    host.accept()
    generation = fm.lists()[0].generation
    appliance.kill()
    shutil.rmtree(appliance.media)
    appliance.start()
    lists = appliance.client("fm").lists()
    assert lists[0].extents == ()
    assert lists[0].generation != generation
    assert lists[-1] == []
    assert "are gone" in appliance.log.read_text()


def test_a_fence_cuts_a_mapping_off(appliance: Appliance) -> None:
    fm, host = appliance.client("fm"), appliance.client("w1")
    assert fm.add(0, T1, 1) == 0
    host.accept()
    link = appliance.media / "hosts" / "w1" / T1
    touch = (
        "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); m[0] = 7\n"
        "print('ready', flush=True); sys.stdin.readline(); print(m[0])"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", touch, str(link)], stdin=pipe, stdout=pipe, stderr=pipe
    ) as mapper:
        assert mapper.stdout is not None
        assert mapper.stdout.readline() == b"ready\n"
        assert fm.fence(0, T1) == 0
        assert not link.exists()
        with pytest.raises(Refused):
            host.media(T1)
        out, _ = mapper.communicate(b"\n")
        assert (mapper.returncode, out) == (-7, b"")
    assert fm.release(0, T1, 1, forced=True) == 0
    kinds = [record.type for record in host.wait_for_records(1)]
    assert kinds == [DcEventType.FORCED_CAPACITY_RELEASE]
    fm.wait_for_records(2)
    assert fm.sanitised(T1).state == 2


def test_by_dpa_a_forced_release_waits_for_who_maps_it(root: Path, media: Path) -> None:
    appliance = Appliance(root, media, "by-dpa")
    appliance.start()
    try:
        fm, host = appliance.client("fm"), appliance.client("w1")
        assert fm.add(0, T1, 1) == 0
        host.accept()
        where, descriptor = host.media(T1)
        with mmap.mmap(descriptor, B, offset=where.pieces[0].media_offset) as window:
            window[:3] = b"abc"
            assert fm.fence(0, T1) == ReturnCode.BUSY
            assert fm.release(0, T1, 1, forced=True) == 0
            assert fm.sanitised(T1).state == 1
            assert fm.add(0, T2, 1) == 0
            assert fm.sanitised(T1).state == 1
            assert window[:3] == b"abc"
        os.close(descriptor)
        fm.wait_for_records(2)
        assert fm.sanitised(T1).state == 2
    finally:
        appliance.close()


def test_garbage_never_ends_it(appliance: Appliance) -> None:
    for data in (b"\x00" * 10_000, os.urandom(20_000), b"~" * 5_000, b"~\x01\xff" + b"a" * 300):
        rogue = socket.socket(socket.AF_UNIX)
        rogue.connect(str(appliance.root / "fm"))
        try:
            rogue.sendall(data)
            rogue.shutdown(socket.SHUT_WR)
            while rogue.recv(1 << 16):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        rogue.close()
    assert appliance.client("fm").lists()[-1] == []


def test_a_new_session_displaces_the_old_one(appliance: Appliance) -> None:
    old = appliance.client("w1")
    assert old.extents() == ()
    new = appliance.client("w1")
    assert new.extents() == ()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        old.extents()


def test_a_second_process_is_told_who_is_there(appliance: Appliance) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "tagmem", "appliance", "--config", str(appliance.config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode != 0
    assert "in use by process" in second.stderr
    assert "Traceback" not in second.stderr


def test_it_ends_in_order_and_leaves_no_socket(appliance: Appliance) -> None:
    assert appliance.stop() == 0
    assert not (appliance.root / "fm").exists()


def test_commands_of_an_ld_pass_through_the_tunnel(appliance: Appliance) -> None:
    fm, host = appliance.client("fm"), appliance.client("w1")
    assert fm.add(0, T1, 1) == 0
    host.accept()
    inner = memdev.GetDcExtentListRequest(10).encode()
    message = CciMessage(Category.REQUEST, 5, Opcode.GET_DC_EXTENT_LIST, inner).encode()
    for target, count in ((0, 1), (1, 0)):
        request = fmapi.TunnelRequest(target, fmapi.TunnelTarget.PORT_OR_LD, message)
        answer = CciMessage.decode(fm.ask(request, fmapi.TunnelResponse).message)
        assert (answer.category, answer.tag, answer.return_code) == (Category.RESPONSE, 5, 0)
        assert memdev.GetDcExtentListResponse.decode(answer.payload).extents_total == count
    unknown = CciMessage(Category.REQUEST, 1, 0x4400, b"").encode()
    request = fmapi.TunnelRequest(0, fmapi.TunnelTarget.PORT_OR_LD, unknown)
    answer = CciMessage.decode(fm.ask(request, fmapi.TunnelResponse).message)
    assert answer.return_code == ReturnCode.UNSUPPORTED
    for bad in (
        fmapi.TunnelRequest(9, fmapi.TunnelTarget.PORT_OR_LD, message),
        fmapi.TunnelRequest(0, fmapi.TunnelTarget.LD_POOL_CCI, message),
        fmapi.TunnelRequest(0, fmapi.TunnelTarget.PORT_OR_LD, b"short"),
    ):
        assert fm.do(bad) == ReturnCode.INVALID_INPUT


def test_the_effects_log_lists_what_is_answered(appliance: Appliance) -> None:
    for port, wanted in (("fm", Opcode.INITIATE_DC_ADD), ("w1", Opcode.ADD_DC_RESPONSE)):
        client = appliance.client(port)
        (entry,) = client.ask(
            generic.GetSupportedLogsRequest(), generic.GetSupportedLogsResponse
        ).logs
        request = generic.GetLogRequest(entry.identifier, 0, entry.size_bytes)
        log = client.ask(request, generic.GetLogResponse).data
        opcodes = [int.from_bytes(log[at : at + 2], "little") for at in range(0, len(log), 4)]
        assert wanted in opcodes
        assert (Opcode.TUNNEL in opcodes) == (port == "fm")
