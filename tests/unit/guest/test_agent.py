"""The agent on recorded trees and with real processes: names, commands, releases and their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.guest.trees import PMEM, SIZE, VHOST, bind, plug, plug_raw_namespace, unplug
from tests.unit.guest.world import HOLD, World

import tagmem
from tagmem.wire import guest as w

T = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"


def attach(world: World, tag: str = PMEM, tree: str = "pmem") -> w.Memory:
    plug(world.base, tree)
    answer = world.ask(w.Attach(0, tag))
    assert isinstance(answer, w.Attached), answer
    return answer.memory


def holder_command(world: World, path: str, *, deaf: str = "", tag: str = PMEM) -> int:
    number = world.send(w.Exec(0, (sys.executable, "-S", "-c", HOLD, path, deaf), tag=tag))
    world.until(lambda: any(isinstance(a, w.Output) for a in world.answers(number)))
    return number


# ---- names


def test_the_host_is_greeted(world: World) -> None:
    world.until(lambda: world.told(w.Hello))
    [hello] = world.told(w.Hello)
    assert (hello.version, hello.boot_id) == (w.VERSION, "boot-1")
    assert "exec" in hello.features
    again = world.ask(w.Greet(0))
    assert again == hello._replace(id=again.id)


def test_a_tag_that_is_there_gets_the_names_that_a_host_gives(world: World) -> None:
    memory = attach(world)
    folder = f"{world.roots.run}/dax0.0"
    values = {n: Path(folder, n).read_text() for n in ("size", "align", "uuid", "read_only")}
    assert values == {
        "size": "534773760\n",
        "align": "2097152\n",
        "uuid": f"{PMEM}\n",
        "read_only": "0\n",
    }
    assert os.path.realpath(f"{world.roots.run}/by-tag/{PMEM}") == memory.path


def test_the_client_library_opens_it_as_on_a_host(world: World) -> None:
    plug(world.base, "ivshmem")
    told = w.Told(T, slot="7", size_bytes=SIZE)
    answer = world.ask(w.Attach(0, T, told=told))
    assert isinstance(answer, w.Attached)
    with tagmem.open(T, timeout=0, run_dir=world.roots.run) as capacity:
        capacity.view[:5] = b"hello"
        assert capacity.size == SIZE
    with open(answer.memory.path, "rb") as file:
        assert file.read(5) == b"hello"


def test_a_tag_is_waited_for(world: World) -> None:
    number = world.send(w.Attach(0, PMEM))
    for _ in range(3):
        world.turn()
    assert world.answers(number) == []
    plug(world.base, "pmem")
    world.until(lambda: world.answers(number))
    assert isinstance(world.answers(number)[0], w.Attached)


def test_a_tag_that_does_not_come_says_what_is_there(world: World) -> None:
    attach(world, VHOST, "vhost-pmem")
    answer = world.ask(w.Attach(0, PMEM, wait_ms=1))
    assert (answer.code, VHOST in answer.reason) == ("absent", True)


@pytest.mark.parametrize("driver", ["", "kmem"])
def test_a_device_that_nobody_can_map_is_claimed_once(world: World, driver: str) -> None:
    plug(world.base, "hmem")
    bind(world.base, "dax4.0", driver)
    assert world.ask(w.Attach(0, PMEM, wait_ms=1)).code == "absent"
    assert world.system.claimed == []
    told = w.Told(T, resource=0x100000000)
    assert world.ask(w.Attach(0, T, told=told)).memory.name == "dax4.0"
    assert world.system.claimed == [("dax4.0", driver)]


def test_a_header_that_came_too_late_is_found(world: World) -> None:
    plug_raw_namespace(world.base, "namespace7.0")
    world.agent.adopt()
    number = world.send(w.Attach(0, PMEM))
    world.until(lambda: world.agent._attaching)
    plug_raw_namespace(world.base, "namespace0.0")
    world.until(lambda: world.answers(number))
    assert isinstance(world.answers(number)[0], w.Attached)
    assert world.system.rebound == ["namespace0.0"], "what was there before us is not touched"


def test_what_comes_unexpected_is_named_and_told(world: World) -> None:
    plug(world.base, "pmem")
    world.until(lambda: world.told(w.Attached))
    assert world.by_tag() == [PMEM]


def test_what_goes_unasked_is_told(world: World) -> None:
    attach(world)
    unplug(world.base, "dax0.0")
    world.agent._next_scan = 0.0
    world.until(lambda: world.told(w.Vanished))
    assert world.by_tag() == []


def test_two_tags_are_told_apart(world: World) -> None:
    first, second = attach(world), attach(world, VHOST, "vhost-pmem")
    assert {first.path, second.path} == {f"{world.roots.dev}/dax{n}.0" for n in (0, 1)}
    found = world.ask(w.Find(0))
    assert {memory.tag for memory in found.memory} == {PMEM, VHOST}


def test_an_agent_that_is_started_anew_finds_everything_again(world: World) -> None:
    attach(world)
    plug(world.base, "ivshmem")
    told = w.Told(T, acpi_index=101)
    assert isinstance(world.ask(w.Attach(0, T, told=told)), w.Attached)
    world.hang_up()
    world.restart()
    assert world.by_tag() == sorted([PMEM, T])
    world.until(lambda: len(world.told(w.Hello)) == 2)
    before, after = world.told(w.Hello)
    assert before.instance != after.instance
    assert after.tags == tuple(sorted([PMEM, T]))


def test_names_of_what_has_gone_meanwhile_go(world: World) -> None:
    attach(world)
    unplug(world.base, "dax0.0")
    world.restart()
    assert world.by_tag() == []
    assert not os.path.exists(f"{world.roots.run}/dax0.0")


# ---- commands


def test_a_command_says_what_it_says_and_ends(world: World) -> None:
    script = "import sys; sys.stdout.write(sys.stdin.read()); sys.stderr.write('e'); sys.exit(7)"
    number = world.send(w.Exec(0, (sys.executable, "-S", "-c", script), input=b"in\xff\0"[:2]))
    world.until(lambda: number not in world.session.outstanding)
    answers = world.answers(number)
    assert isinstance(answers[0], w.Started)
    outputs = [a for a in answers if isinstance(a, w.Output)]
    assert {o.stream: o.data for o in outputs} == {1: b"in", 2: b"e"}
    assert answers[-1] == w.Exited(number, 7)


def test_a_command_is_told_of_its_tag(world: World) -> None:
    attach(world)
    script = "echo {dax} {size} $TAGMEM_TAG $TAGMEM_DAX $TAGMEM_SIZE {other}"
    number = world.send(w.Exec(0, ("/bin/sh", "-c", script), tag=PMEM))
    world.until(lambda: number not in world.session.outstanding)
    [output] = [a for a in world.answers(number) if isinstance(a, w.Output)]
    dax = f"{world.roots.run}/dax0.0/dax0.0"
    assert output.data.decode().split() == [dax, "534773760", PMEM, dax, "534773760", "{other}"]


def test_a_command_that_took_up_a_tag_by_itself_is_asked_too(world: World) -> None:
    memory = attach(world)
    number = holder_command(world, memory.path, tag="")
    answer = world.ask(w.Detach(0, PMEM, ask_ms=8_000, stop_ms=0))
    assert isinstance(answer, w.Released)
    world.until(lambda: number not in world.session.outstanding)
    [exited] = [a for a in world.answers(number) if isinstance(a, w.Exited)]
    assert exited.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (w.Exec(0, ("no-such-command-here",)), "absent"),
        (w.Exec(0, ("/",)), "failed"),
        (w.Exec(0, ("true",), tag=T), "absent"),
        (w.Signal(0, 999, 15), "absent"),
        (w.Eject(0), "invalid"),
        (w.Eject(0, tag=T), "absent"),
        (w.Eject(0, slot="../../x"), "invalid"),
        (w.Eject(0, slot="99"), "absent"),
    ],
)
def test_what_cannot_be_done_is_refused(world: World, request_: w.Request, code: str) -> None:
    if isinstance(request_, w.Eject) and "/" in request_.slot:
        world.until(lambda: world.link is not None)
        assert world.link is not None
        world.link.sendall(w.frame(b'{"kind":"eject","id":5,"slot":"../../x"}'))
        world.until(lambda: any(getattr(a, "id", 0) == 5 for a in world.heard))
        [late] = world.answers(5)
        assert late.answer.code == code
        return
    answer = world.ask(request_)
    assert isinstance(answer, w.Failed)
    assert answer.code == code


def test_output_beyond_its_bound_is_dropped_and_counted(world: World) -> None:
    script = "import os; os.write(1, b'x' * 60000)"
    request = w.Exec(0, (sys.executable, "-S", "-c", script), output_max=1000)
    number = world.send(request)
    world.until(lambda: number not in world.session.outstanding)
    answers = world.answers(number)
    assert sum(len(a.data) for a in answers if isinstance(a, w.Output)) == 1000
    assert answers[-1] == w.Exited(number, 0, 59000)


def test_a_lot_of_output_comes_whole(world: World) -> None:
    script = "import os\nfor n in range(64): os.write(1, bytes([n]) * 16384)"
    number = world.send(w.Exec(0, (sys.executable, "-S", "-c", script)))
    world.until(lambda: number not in world.session.outstanding)
    data = b"".join(a.data for a in world.answers(number) if isinstance(a, w.Output))
    assert data == b"".join(bytes([n]) * 16384 for n in range(64))


def test_a_command_is_signalled(world: World) -> None:
    number = world.send(w.Exec(0, ("sleep", "60")))
    world.until(lambda: world.answers(number))
    assert isinstance(world.ask(w.Signal(0, number, signal.SIGUSR1)), w.Done)
    world.until(lambda: number not in world.session.outstanding)
    assert world.answers(number)[-1].code == 128 + signal.SIGUSR1


def test_nothing_of_a_command_outlives_it(world: World) -> None:
    number = world.send(w.Exec(0, ("/bin/sh", "-c", "sleep 60 & echo $!")))
    world.until(lambda: number not in world.session.outstanding)
    [output] = [a for a in world.answers(number) if isinstance(a, w.Output)]
    world.until(lambda: _ended(int(output.data)))


def _ended(pid: int) -> bool:
    """Whether a process runs no more: reaped, or waiting for it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_guest_may_refuse_commands(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = World(tmp_path_factory.mktemp("quiet"), commands=False)
    answer = world.ask(w.Exec(0, ("true",)))
    features = world.told(w.Hello)[0].features
    world.close()
    assert answer.code == "unsupported"
    assert "exec" not in features


# ---- release


def test_an_idle_tag_is_released_at_once(world: World) -> None:
    attach(world)
    answer = world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0))
    assert answer == w.Released(answer.id, PMEM, present=True)
    assert world.by_tag() == []


def test_what_was_given_back_is_not_named_again_unasked(world: World) -> None:
    attach(world)
    world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0))
    world.agent._next_scan = 0.0
    for _ in range(3):
        world.turn()
    assert world.by_tag() == []
    assert isinstance(world.ask(w.Attach(0, PMEM)), w.Attached)
    assert world.by_tag() == [PMEM]
    assert world.system.claimed == []


def test_a_holder_is_named_and_keeps_what_it_has(world: World) -> None:
    memory = attach(world)
    child = world.hold(memory.path)
    answer = world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0))
    assert isinstance(answer, w.Held)
    assert [(h.pid, h.how) for h in answer.holders] == [(child.pid, "maps")]
    assert answer.holders[0].name.startswith("python")
    assert answer.complete
    assert world.by_tag() == [PMEM]
    assert child.poll() is None


def test_somebody_elses_process_is_not_signalled_unless_everyone_is_meant(world: World) -> None:
    memory = attach(world)
    child = world.hold(memory.path)
    assert isinstance(world.ask(w.Detach(0, PMEM, ask_ms=20, stop_ms=5000)), w.Held)
    assert child.poll() is None
    answer = world.ask(w.Detach(0, PMEM, ask_ms=5000, stop_ms=0, everyone=True))
    assert answer == w.Released(answer.id, PMEM, present=True)
    assert child.wait(5) == -signal.SIGTERM


def test_who_does_not_listen_is_stopped(world: World) -> None:
    memory = attach(world)
    child = world.hold(memory.path, "deaf")
    answer = world.ask(w.Detach(0, PMEM, ask_ms=30, stop_ms=5000, everyone=True))
    assert isinstance(answer, w.Released)
    assert [holder.pid for holder in answer.stopped] == [child.pid]
    assert child.wait(5) == -signal.SIGKILL


def test_what_the_host_started_is_asked_to_end(world: World) -> None:
    memory = attach(world)
    number = holder_command(world, memory.path)
    answer = world.ask(w.Detach(0, PMEM, ask_ms=5000, stop_ms=0))
    assert answer == w.Released(answer.id, PMEM, present=True)
    assert world.answers(number)[-1] == w.Exited(number, 128 + signal.SIGTERM)


def test_what_the_host_started_on_the_tag_holds_it_even_without_mapping_it(world: World) -> None:
    attach(world)
    number = world.send(w.Exec(0, ("sleep", "60"), tag=PMEM))
    world.until(lambda: world.answers(number))
    answer = world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0))
    assert [holder.name for holder in answer.holders] == ["sleep"]


def test_a_holder_of_what_has_gone_is_still_named(world: World) -> None:
    plug(world.base, "ivshmem")
    told = w.Told(T, slot="7")
    memory = world.ask(w.Attach(0, T, told=told)).memory
    child = world.hold(f"{memory.path}_wc")
    answer = world.ask(w.Detach(0, T, ask_ms=0, stop_ms=0, force=True))
    assert world.system.ejected == ["7"]
    assert isinstance(answer, w.Held), "a BAR's mapping outlives its device"
    assert [holder.pid for holder in answer.holders] == [child.pid]
    again = world.ask(w.Detach(0, T, ask_ms=0, stop_ms=0))
    assert isinstance(again, w.Held)
    child.kill()
    child.wait(5)
    assert isinstance(world.ask(w.Detach(0, T, ask_ms=0, stop_ms=0)), w.Released)


def test_an_eject_takes_the_device_out_after_the_proof(world: World) -> None:
    attach(world)
    answer = world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0, eject=True))
    assert answer == w.Released(answer.id, PMEM, present=False)
    assert world.system.ejected == ["0-2"]


def test_a_held_tag_is_not_ejected_without_force(world: World) -> None:
    memory = attach(world)
    child = world.hold(memory.path)
    held = world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0, eject=True))
    assert isinstance(held, w.Held)
    assert world.system.ejected == []
    forced = world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0, force=True))
    assert isinstance(forced, w.Released)
    assert [holder.pid for holder in forced.revoked] == [child.pid]
    assert not forced.present


def test_an_eject_that_the_kernel_refuses_is_told(world: World) -> None:
    attach(world)
    world.system.refusal = "power: Input/output error"
    answer = world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0, eject=True))
    assert (answer.code, answer.reason) == ("busy", "power: Input/output error")
    world.system.refusal = ""
    assert isinstance(world.ask(w.Eject(0, tag=PMEM)), w.Done)


def test_what_was_never_here_is_released(world: World) -> None:
    answer = world.ask(w.Detach(0, T, ask_ms=0, stop_ms=0))
    assert answer == w.Released(answer.id, T, present=False)


# ---- the end


def test_a_reset_leaves_nothing(world: World) -> None:
    memory = attach(world)
    number = world.send(w.Exec(0, ("sleep", "60")))
    child = world.hold(memory.path)
    assert isinstance(world.ask(w.Reset(0)), w.Done)
    world.until(lambda: number not in world.session.outstanding)
    assert world.by_tag() == []
    assert child.wait(5) == -signal.SIGTERM


def test_a_guest_gives_everything_back_before_it_goes(world: World) -> None:
    memory = attach(world)
    child = world.hold(memory.path)
    world.agent._leave("SIGTERM", 2000, 0, lambda _: None)
    world.until(lambda: world.told(w.Leaving))
    assert world.told(w.Leaving) == [w.Leaving(0, "SIGTERM")]
    assert child.wait(5) == -signal.SIGTERM


def test_what_cannot_be_given_back_is_named_at_the_end(world: World) -> None:
    memory = attach(world)
    world.hold(memory.path, "deaf")
    world.agent._leave("SIGTERM", 20, 0, lambda _: None)
    world.until(lambda: world.told(w.Leaving))
    assert world.told(w.Leaving) == [w.Leaving(0, "SIGTERM", (PMEM,))]


def test_a_shutdown_waits_for_the_tags(world: World) -> None:
    memory = attach(world)
    child = world.hold(memory.path, "deaf")
    held = world.ask(w.Shutdown(0, "reboot", ask_ms=20, stop_ms=0))
    assert [holder.pid for holder in held.holders] == [child.pid]
    assert isinstance(world.ask(w.Shutdown(0, "reboot", ask_ms=20, stop_ms=5000)), w.Done)
    assert world.agent.run() == 0
    assert world.system.ended == ["reboot"]
    world.agent = world.start()


# ---- the wire


def test_halves_and_garbage_do_not_matter(world: World) -> None:
    world.until(lambda: world.link is not None)
    assert world.link is not None
    world.link.sendall(b"\0\xff login: " + w.encode(w.Find(3))[:-5])
    assert isinstance(world.ask(w.Find(0)), w.Found)


def test_a_host_that_comes_again_is_greeted_again(world: World) -> None:
    world.until(lambda: world.told(w.Hello))
    world.hang_up()
    world.until(lambda: len(world.told(w.Hello)) == 2)
    assert isinstance(world.ask(w.Find(0)), w.Found)


def test_a_request_of_another_version_is_answered(world: World) -> None:
    world.until(lambda: world.link is not None)
    assert world.link is not None
    world.link.sendall(w.frame(b'{"kind":"teleport","id":9}'))
    world.until(lambda: world.answers(9))
    [late] = world.answers(9)
    assert late.answer.code == "unsupported"


def test_the_agent_needs_the_standard_library_alone() -> None:
    script = (
        "import sys, tagmem.guest.__main__, tagmem.guest.dcdctl\n"
        "bad = [n for n in sys.modules if n.partition('.')[0] in "
        "('msgspec', 'click', 'asyncio', 'uuid', 'logging', 'apsw')]\n"
        "allowed = ('tagmem.base', 'tagmem.wire', 'tagmem.wire.guest', 'tagmem.io', "
        "'tagmem.io.holders', 'tagmem.client')\n"
        "bad += [n for n in sys.modules if n.startswith('tagmem.') and n not in allowed "
        "and not n.startswith(('tagmem.base.', 'tagmem.guest', 'tagmem.client.'))]\n"
        "print(bad)"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# ---- parting


def test_a_host_takes_the_devices_of_a_guest_that_leaves(world: World) -> None:
    world.agent._options = world.agent._options._replace(hand_back_seconds=30.0)
    attach(world)
    world.agent._leave("SIGTERM", 0, 0, lambda _: None)
    world.until(lambda: world.told(w.Leaving))
    assert world.ask(w.Attach(0, PMEM)).code == "busy"
    assert isinstance(world.ask(w.Detach(0, PMEM, ask_ms=0, stop_ms=0)), w.Released)
    assert not world.agent._ended
    unplug(world.base, "dax0.0")
    world.until(lambda: world.agent._ended)
    assert world.system.ejected == []


def test_what_no_host_takes_is_ejected_at_the_end(world: World) -> None:
    attach(world)
    world.agent._leave("SIGTERM", 0, 0, lambda _: None)
    world.until(lambda: world.agent._ended)
    assert world.system.ejected == ["0-2"]


def test_what_is_held_is_neither_ejected_nor_waited_for(world: World) -> None:
    memory = attach(world)
    world.hold(memory.path, "deaf")
    world.agent._leave("SIGTERM", 0, 0, lambda _: None)
    world.until(lambda: world.agent._ended)
    assert world.system.ejected == []
    assert world.by_tag() == [PMEM]


def test_what_was_told_of_a_device_goes_with_it(world: World) -> None:
    plug(world.base, "ivshmem")
    memory = world.ask(w.Attach(0, T, told=w.Told(T, slot="7"))).memory
    world.ask(w.Detach(0, T, ask_ms=0, stop_ms=0))
    os.unlink(memory.path)
    world.agent._next_scan = 0.0
    world.turn()
    assert world.agent._told == {}


def test_the_newest_word_of_a_device_counts(world: World) -> None:
    plug(world.base, "ivshmem")
    world.ask(w.Attach(0, T, told=w.Told(T, slot="7")))
    world.ask(w.Detach(0, T, ask_ms=0, stop_ms=0))
    answer = world.ask(w.Attach(0, PMEM, told=w.Told(PMEM, slot="7")))
    assert isinstance(answer, w.Attached)
    assert world.by_tag() == [PMEM]
