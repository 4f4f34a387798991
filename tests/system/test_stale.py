"""A region whose hosts' caches lie, with real daemons: what is published is seen, what is not is
not, and a host flushes before it gives a tag away.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.system.test_demo import a_system, tagmem
from tests.system.waiting import wait_until

import tagmem as library
from tagmem import shared
from tagmem.demo.configs import config_texts
from tagmem.demo.layout import APPLIANCE, Layout
from tagmem.shared.stale import lines_of

SIZE = 4 << 20


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layout]:
    state = tmp_path_factory.mktemp("stale")
    before = Layout.of(state)
    path = before.config(APPLIANCE)
    text = config_texts(before, tcp=False)[path]
    head, sharable, tail = text.partition("sharable = true\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{sharable}stale_caches = 11\n{tail}", encoding="utf-8")
    with a_system(state) as found:
        yield found


def command(layout: Layout, *arguments: str) -> str:
    ended = tagmem(*arguments, TAGMEM_STATE_DIR=str(layout.state))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def create(layout: Layout, hosts: str = "w1,w2") -> str:
    tag = str(uuid.uuid4())
    command(
        layout, "capacity", "create", "--size", "4MiB", "--share", "software-coherent",
        "--host", hosts, "--tag", tag,
    )  # fmt: skip
    return tag


def test_objects_are_right_where_caches_lie(layout: Layout) -> None:
    tag = create(layout)
    one, two = layout.run_dir("w1"), layout.run_dir("w2")
    with shared.create(tag, run_dir=one) as writer:
        writer.put("first", b"1" * 1000)
        with shared.open(tag, run_dir=two) as reader:
            assert bytes(reader.get("first")) == b"1" * 1000
            writer.put("second", b"2" * 1000)
            assert bytes(reader.get("second")) == b"2" * 1000
    command(layout, "capacity", "release", tag)
    assert not [path for path in (*one.iterdir(), *two.iterdir()) if ".kept" in path.name]


def seen(layout: Layout, tag: str) -> bytes:
    """What a careful program sees on w2. It lets go of the tag: a proof looks at this process."""
    with library.open(tag, run_dir=layout.run_dir("w2")) as there:
        assert there.stale_caches
        lines = lines_of(there)
        lines.invalidate(4096, 4)
        found = bytes(there.view[4096:4100])
        lines.release()
    return found


def test_what_is_handed_over_is_seen_although_nobody_flushed_or_invalidated(
    layout: Layout,
) -> None:
    tag = create(layout, "w1")
    with library.open(tag, run_dir=layout.run_dir("w1")) as here:
        assert here.sharing == "software-coherent"
        here.view[4096:4100] = b"lost"
    command(layout, "capacity", "hand-over", tag, "--from", "w1", "--to", "w2")
    with library.open(tag, run_dir=layout.run_dir("w2")) as there:
        assert there.stale_caches
        assert bytes(there.view[4096:4100]) == b"lost", "its cache was empty until w1's was flushed"
    command(layout, "capacity", "release", tag)


def test_a_store_without_a_flush_is_seen_when_its_host_lets_go(layout: Layout) -> None:
    tag = create(layout)
    media = layout.bytes / tag
    with library.open(tag, run_dir=layout.run_dir("w1")) as here:
        here.view[4096:4100] = b"lost"
    assert seen(layout, tag) == bytes(4)
    assert media.read_bytes()[4096:4100] == bytes(4)
    command(layout, "capacity", "release", tag, "--host", "w1")
    assert media.read_bytes()[4096:4100] == b"lost", "the host's agent wrote it back"
    assert seen(layout, tag) == b"lost"
    view: Path = layout.run_dir("w2") / "by-tag" / tag
    resolved = view.resolve()
    command(layout, "capacity", "release", tag)
    wait_until(lambda: not resolved.exists(), "the view to be gone")
