"""One tag on many hosts, as people use it: `tagmem up`, the commands of the README, real processes.

Each host is a process with an agent of its own; what maps a tag is a process that its agent started
or a child of the test that opens the host's device.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from bench import system as bench
from tests.system.test_demo import a_system, tagmem
from tests.system.waiting import wait_until

from tagmem import shared
from tagmem.base.errors import TagmemError
from tagmem.base.units import MIB
from tagmem.client.session import Client
from tagmem.demo import system
from tagmem.demo.cache import Cache
from tagmem.demo.chaos import kill, running
from tagmem.demo.dataset import records
from tagmem.demo.layout import Layout
from tagmem.wire import rest

ROOT = Path(__file__).parents[2]
WARM = ROOT / "examples" / "04-hand-over" / "warm-memcached.sh"
SIZE = 64 * MIB
WORD = b"published once, read by all"


class Pod:
    """A running system, and the commands that people give it."""

    def __init__(self, state: Path, layout: Layout) -> None:
        self.state = state
        self.layout = layout

    def tagmem(self, *arguments: str, code: int = 0) -> str:
        """A command's stdout and stderr; it ends with `code`."""
        ended = tagmem(*arguments, TAGMEM_STATE_DIR=str(self.state))
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def create(self, share: str, hosts: str, *more: str, size: str = "64MiB") -> str:
        tag = str(uuid.uuid4())
        self.tagmem(
            "capacity", "create", "--size", size, "--share", share, "--host", hosts,
            "--tag", tag, *more,
        )  # fmt: skip
        return tag

    def device(self, host: str, tag: str) -> Path:
        return self.layout.run_dir(host) / "by-tag" / tag

    def client(self) -> Client:
        """A session of its own: the orchestrator may have died since the last."""
        return Client(system.url(self.layout))

    def show(self, tag: str) -> rest.CapacityDocument:
        with self.client() as client:
            return client.capacity(tag)

    def attachment(self, tag: str, host: str) -> rest.AttachmentDocument | None:
        return next((each for each in self.show(tag).attachments if each.host == host), None)

    def ready(self, tag: str, host: str) -> bool:
        found = self.attachment(tag, host)
        return found is not None and found.ready

    def media(self, tag: str) -> Path:
        return self.layout.bytes / tag


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    state = tmp_path_factory.mktemp("sharing")
    with a_system(state) as layout:
        yield Pod(state, layout)


def put(path: Path, at: int, data: bytes, whole: int = SIZE) -> None:
    """Write through a mapping, as a program does."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), whole) as view:
        view[at : at + len(data)] = data


def read(path: Path, at: int, size: int, whole: int = SIZE) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), whole, prot=mmap.PROT_READ) as view:
        return view[at : at + size]


def in_child(act: Callable[[], None]) -> int:
    """Do it in a process of its own; how that ended, as `os.waitpid` has it."""
    child = os.fork()
    if child == 0:
        code = 99
        faulthandler.disable()  # A fault is what is looked for.
        try:
            act()
            code = 0
        except OSError as error:
            code = error.errno or 98
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


# ---- hand-over


def test_memcached_goes_on_warm_on_the_next_host_with_every_record(
    pod: Pod, tmp_path: Path
) -> None:
    wanted = records(limit=20_000)
    tag = pod.create("software-coherent", "w1")

    def run(number: int) -> Cache:
        address = str(tmp_path / f"{number}.sock")
        options = (str(tmp_path / "keep"), "-s", address, "-U", "0")
        pod.tagmem("run", "--detach", tag, "--", str(WARM), "{dax}", "{size}", *options)
        return Cache(address)

    cache = run(1)
    cache.store(wanted)
    assert cache.differing(wanted) == 0
    before = os.stat(pod.media(tag))
    cache.close()

    said = pod.tagmem("capacity", "hand-over", tag, "--from", "w1", "--to", "w2")
    steps = [said.index(f"step={step}") for step in ("securing", "offering", "ending", "surfacing")]
    assert steps == sorted(steps)
    assert not pod.device("w1", tag).exists()

    after = os.stat(pod.media(tag))
    assert (after.st_ino, after.st_blocks) == (before.st_ino, before.st_blocks), "no byte moved"
    cache = run(2)
    assert cache.differing(wanted) == 0
    assert cache.counters()[0] >= len(wanted)
    cache.close()
    [w1, w2] = pod.show(tag).attachments
    assert (w1.state, w2.state, w2.ready) == ("released", "attached", True)
    pod.tagmem("capacity", "release", tag)


@pytest.mark.parametrize("name", ["orchestrator", "a0", "w1", "w2"])
def test_a_hand_over_survives_the_death_of_any_part(pod: Pod, name: str) -> None:
    tag = pod.create("hardware-coherent", "w1")
    put(pod.device("w1", tag), 5 * MIB, WORD)
    with pod.client() as client:
        client.hand_over(tag, "w1", "w2")
    kill(pod.layout, name)
    wait_until(lambda: running(pod.layout).get(name, 0) != 0, f"{name} is back")

    def done() -> bool:
        shown = settled(pod, tag)
        return shown is not None and shown.move is not None and shown.move.step == "done"

    wait_until(done, "it is handed over", 60)
    wait_until(lambda: pod.device("w2", tag).exists(), "w2 has a device")
    assert read(pod.device("w2", tag), 5 * MIB, len(WORD)) == WORD
    pod.tagmem("capacity", "release", tag)


def settled(pod: Pod, tag: str) -> rest.CapacityDocument | None:
    """What the orchestrator says now; None while it is away."""
    try:
        return pod.show(tag)
    except TagmemError:
        return None


def test_who_refuses_leaves_it_with_who_has_it(pod: Pod) -> None:
    tag = pod.create("hardware-coherent", "w1")
    put(pod.device("w1", tag), 0, WORD)
    said = pod.tagmem("capacity", "hand-over", tag, "--from", "w2", "--to", "w3", code=3)
    assert "from must be a host that holds the tag, got w2" in said
    said = pod.tagmem("capacity", "hand-over", tag, "--from", "w1", "--to", "w1", code=2)
    assert "to must be another host than w1" in said
    alone = pod.create("none", "w1")
    said = pod.tagmem("capacity", "hand-over", alone, "--from", "w1", "--to", "w2", code=4)
    assert "it is not shared" in said
    both = pod.create("hardware-coherent", "w1,w2")
    said = pod.tagmem("capacity", "hand-over", both, "--from", "w1", "--to", "w2", code=4)
    assert "w2 has it already: release it on w1" in said
    assert read(pod.device("w1", tag), 0, len(WORD)) == WORD
    for each in (tag, alone, both):
        pod.tagmem("capacity", "release", each)


def test_a_process_that_does_not_let_go_keeps_the_hand_over_waiting_and_is_named(pod: Pod) -> None:
    tag = pod.create("software-coherent", "w1")
    with pod.device("w1", tag).open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as view:
        view[: len(WORD)] = WORD
        more = ("--from", "w1", "--to", "w2", "--timeout", "2s")
        said = pod.tagmem("capacity", "hand-over", tag, *more, code=5)
        assert f"held by pid {os.getpid()}" in said
        assert "the hand-over to w2 is ending" in said
        assert not pod.device("w2", tag).exists(), "two hosts would write"
    wait_until(lambda: pod.ready(tag, "w2"), "w2 has it")
    assert read(pod.device("w2", tag), 0, len(WORD)) == WORD
    pod.tagmem("capacity", "release", tag)


# ---- publish


@pytest.fixture
def published(pod: Pod) -> Iterator[str]:
    """What w1 has loaded, and three hosts read."""
    tag = pod.create("read-only", "w1")
    put(pod.device("w1", tag), 7 * MIB, WORD)
    pod.tagmem("capacity", "publish", tag, "--to", "w2,w3")
    yield tag
    pod.tagmem("capacity", "release", tag)


def test_everybody_reads_what_one_loaded(pod: Pod, published: str) -> None:
    for host in ("w1", "w2", "w3"):
        found = pod.attachment(published, host)
        assert found is not None
        assert found.read_only
        assert read(pod.device(host, published), 7 * MIB, len(WORD)) == WORD
    again = pod.tagmem("capacity", "publish", published, "--to", "w2,w3")
    assert '"published":true' in again


@pytest.mark.parametrize("host", ["w1", "w2"])
def test_a_reader_cannot_write(pod: Pod, published: str, host: str) -> None:
    path = pod.device(host, published)

    def write_the_mapping() -> None:
        fd = os.open(path, os.O_RDONLY)
        address = _map(fd)
        ctypes.memset(address, 1, 1)

    def protect_the_mapping_otherwise() -> None:
        address = _map(os.open(path, os.O_RDONLY))
        if _LIBC.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 3) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def map_writable() -> None:
        mmap.mmap(os.open(path, os.O_RDONLY), SIZE)

    def open_writable() -> None:
        os.open(path, os.O_RDWR)

    def open_again_writable() -> None:
        os.open(f"/proc/self/fd/{os.open(path, os.O_RDONLY)}", os.O_RDWR)

    def write_the_descriptor() -> None:
        os.write(os.open(path, os.O_RDONLY), WORD)

    def cut_it() -> None:
        os.truncate(path, 0)

    assert os.WTERMSIG(in_child(write_the_mapping)) == signal.SIGSEGV
    refused = {
        protect_the_mapping_otherwise: errno.EACCES,
        map_writable: errno.EACCES,
        open_writable: errno.EROFS,
        open_again_writable: errno.EROFS,
        write_the_descriptor: errno.EBADF,
        cut_it: errno.EROFS,
    }
    for attempt, reason in refused.items():
        assert os.waitstatus_to_exitcode(in_child(attempt)) == reason, attempt.__name__
    assert read(path, 7 * MIB, len(WORD)) == WORD


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p


def _map(fd: int) -> int:
    address: int = _LIBC.mmap(None, ctypes.c_size_t(SIZE), 1, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    return address


def test_the_writer_lets_go_before_anybody_reads(pod: Pod) -> None:
    tag = pod.create("read-only", "w1")
    with pod.device("w1", tag).open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as view:
        said = pod.tagmem("capacity", "publish", tag, "--to", "w2", "--timeout", "2s", code=5)
        assert f"held by pid {os.getpid()}" in said
        assert not pod.device("w2", tag).exists()
        view[: len(WORD)] = WORD
    wait_until(lambda: pod.ready(tag, "w2"), "w2 reads")
    assert read(pod.device("w2", tag), 0, len(WORD)) == WORD
    pod.tagmem("capacity", "release", tag)


# ---- references


def test_a_tag_outlives_its_last_host_where_that_was_asked_for(pod: Pod) -> None:
    tag = pod.create("hardware-coherent", "w1", "--retain")
    put(pod.device("w1", tag), 0, WORD)
    wait_until(lambda: pod.show(tag).reference == "held", "there is a reference")
    pod.tagmem("capacity", "release", tag, "--host", "w1")
    wait_until(lambda: pod.show(tag).state == "retained", "it is retained")
    pod.tagmem("capacity", "attach", tag, "--host", "w3")
    assert read(pod.device("w3", tag), 0, len(WORD)) == WORD
    pod.tagmem("capacity", "release", tag, "--host", "w3")
    pod.tagmem("capacity", "retain", tag, "--off")
    wait_until(lambda: pod.show(tag).state == "reserved", "it is wiped")
    pod.tagmem("capacity", "attach", tag, "--host", "w2")
    assert read(pod.device("w2", tag), 0, len(WORD)) == bytes(len(WORD))
    pod.tagmem("capacity", "release", tag)


# ---- what the README says


def readme(language: str) -> list[str]:
    """What stands in the chapter, fence by fence."""
    text = (ROOT / "README.md").read_text("utf-8")
    chapter = text.split("## One tag, many hosts")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", chapter, re.DOTALL)


def test_the_readmes_chapter_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after `. .venv/bin/activate`, for the daemons too.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    fences = readme("console")
    commands = [line.removeprefix("$ ") for fence in fences for line in fence.splitlines()]
    assert len(commands) == 17
    script = "\n".join(("set -e", *commands)).replace("/tmp/", f"{tmp_path}/")
    with a_system(tmp_path / "state"):
        ended = subprocess.run(
            ["bash", "-c", script],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=ROOT,
            env={
                **os.environ,
                "TAGMEM_STATE_DIR": str(tmp_path / "state"),
            },
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "moved  move=hand-over  source=w1  targets=w2" in ended.stderr
        assert "found 200000 orders; 3 of 3 buffers are in the tag" in ended.stdout
        assert "no access depended on luck: 5 schedules" in ended.stdout
        cache = Cache(str(tmp_path / "warm.sock"))
        assert cache.version
        cache.close()


@pytest.mark.parametrize("sharing", ["software-coherent", "hardware-coherent"])
def test_the_readmes_program_runs_as_it_stands(
    pod: Pod, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = pod.create(sharing, "w1,w2")
    *put_it, get_it = readme("python")[0].split("\n\n")
    names: dict[str, object] = {"tag": tag, "table": pa.table({"id": [1, 2, 3]})}
    monkeypatch.setenv("TAGMEM_RUN_DIR", str(pod.layout.run_dir("w1")))
    exec("\n".join(put_it), names)
    monkeypatch.setenv("TAGMEM_RUN_DIR", str(pod.layout.run_dir("w2")))
    exec(get_it, names)
    orders, catalogue = names.pop("orders"), names.pop("catalogue")
    assert isinstance(orders, pa.Table)
    assert isinstance(catalogue, shared.Shared)
    assert orders.equals(names["table"])
    assert catalogue.coherence == sharing, "the hosts' agents know how the tag is shared"
    del orders, catalogue
    pod.tagmem("capacity", "release", tag)


# ---- order


def test_eight_hosts_see_other_addresses_in_another_order_and_the_same_bytes() -> None:
    """Real agents, every other one seeing its addresses backwards, on a tag of several extents."""
    with bench.system(8, 16 * MIB, shared=True) as ready, ready.started():
        names = ready.hosts
        with Client(ready.api) as client:
            blockers = [str(uuid.uuid4()) for _ in range(8)]
            for tag in blockers:
                ask(client, tag, 2 * MIB, (names[0],))
            for tag in blockers[::2]:
                client.release(tag)
            wait_until(lambda: len(list(client.capacities())) == 4, "there are holes")
            shared = str(uuid.uuid4())
            ask(client, shared, 8 * MIB, names)
            document = client.capacity(shared)
        assert len(document.extents) == 4
        views = [attachment.dpas for attachment in document.attachments]
        assert len({view[0] for view in views}) > 1, "all see the same addresses"
        forward, backward = (sorted(range(4), key=view.__getitem__) for view in views[:2])
        assert forward == backward[::-1], "the second sees the extents in the opposite order"
        for number, host in enumerate(names):
            with_it = ready.run_dir(host) / "by-tag" / shared
            put(with_it, number * MIB + 17, host.encode(), 8 * MIB)
        for host in names:
            path = ready.run_dir(host) / "by-tag" / shared
            for number, other in enumerate(names):
                assert read(path, number * MIB + 17, len(other), 8 * MIB) == other.encode()


def ask(client: Client, tag: str, size: int, hosts: tuple[str, ...]) -> None:
    request = rest.CapacityRequest(
        size, hosts, sharing="hardware-coherent", contiguous=False, region=0
    )
    client.create(request, tag)

    def ready() -> bool:
        return all(attachment.ready for attachment in client.capacity(tag).attachments)

    wait_until(ready, f"{tag} is on {len(hosts)} hosts")
