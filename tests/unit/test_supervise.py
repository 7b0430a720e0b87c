"""The parent of several processes: who is replaced and when, what ends the whole, and who hears which signal."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from quictunnel.app.supervise import MESSAGE_LIMIT, Hopeless, Parent, Supervisor, one_of_many
from quictunnel.options import CommandError
from tests.support.forge import Family, Forge, alive
from tests.support.processes import poll

# The families. Each function runs in a process of its own; what it prints is what the tests look at.


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def told(index: int, message: dict[str, object]) -> None:
    say("told", index, message["kind"], message.get("pid", 0))


def until_told(index: int, parent: Parent) -> int:
    """Work until SIGTERM, a moment longer, and end well."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    signal.signal(signal.SIGHUP, lambda *_: say("hangup", index, os.getpid()))
    say("up", index, os.getpid())
    parent.is_ready(pid=os.getpid())
    while not stopped:
        time.sleep(0.01)
    time.sleep(0.05)
    say("done", index, os.getpid())
    return 0


def family(main: Callable[[int, Parent], int], count: int = 2, **options: object) -> int:
    supervisor = Supervisor(main, word="child", on_message=told, **options)  # type: ignore[arg-type]
    for index in range(count):
        supervisor.start(index)
    try:
        return supervisor.run()
    except CommandError as error:
        say("failed", error)
        return 3


def diligent() -> int:
    return family(until_told)


def crashing() -> int:
    def main(index: int, parent: Parent) -> int:
        say("up", time.monotonic())
        raise RuntimeError("a bug")

    return family(main, 1)


def hopeless() -> int:
    def main(index: int, parent: Parent) -> int:
        if index == 1:
            raise CommandError("the certificate is of yesterday")
        return until_told(index, parent)

    return family(main)


def unreadable() -> int:
    def main(index: int, parent: Parent) -> int:
        return os.open("/nowhere/token", os.O_RDONLY)

    return family(main, 3)


def starting_again() -> int:
    """Work that has begun once, then cannot begin twice, and then never will."""
    lives: list[int] = []

    def main(index: int, parent: Parent) -> int:
        def work() -> int:
            say("life", len(lives))
            if not lives:
                return 1
            raise Hopeless("revoked") if len(lives) == 3 else OSError(2, "No such file", "/nowhere/key")

        parent.tell("life")
        return one_of_many(work, others_work=bool(lives))

    supervisor = Supervisor(main, word="child", on_message=lambda index, message: lives.append(index))
    supervisor.start(0)
    try:
        return supervisor.run()
    except CommandError as error:
        say("failed", error)
        return 3


def deaf() -> int:
    def main(index: int, parent: Parent) -> int:
        signal.signal(signal.SIGTERM, lambda *_: say("heard", index))
        say("up", index, os.getpid())
        while True:
            time.sleep(1)

    return family(main)


def deaf_for_a_moment() -> int:
    def main(index: int, parent: Parent) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say("up", index, os.getpid())
        while True:
            time.sleep(1)

    return family(main, stop_time=0.2)


def leaving() -> int:
    """The first ends because it is told to, the second as its work is taken over, the third says no reason."""
    lives: list[int] = []

    def main(index: int, parent: Parent) -> int:
        say("life", index)
        if index == 0:
            return until_told(index, parent)
        if index == 1:
            parent.leave()
        return 0

    def tick() -> None:
        lives.append(1)
        if len(lives) == 1:
            supervisor.stop(0)
        say("indices", *supervisor.indices)

    supervisor = Supervisor(main, word="child", on_tick=tick, tick=0.05)
    for index in range(3):
        supervisor.start(index)
    return supervisor.run()


def watchful() -> int:
    def main(index: int, parent: Parent) -> int:
        say("up", index, os.getpid())
        assert os.read(parent.life, 1) == b""
        say("orphaned", index)
        return 0

    return family(main)


def babbling() -> int:
    def main(index: int, parent: Parent) -> int:
        for junk in (b"\xff\n", b"[1]\n", b'{"no": "kind"}\n', b"x" * (3 * MESSAGE_LIMIT)):
            os.write(parent._messages, junk)
            time.sleep(0.02)
        os.write(parent._messages, b"\n")
        with pytest.raises(ValueError, match="bytes"):
            parent.tell("much", text="x" * MESSAGE_LIMIT)
        lost = 0
        while parent.tell("flood", text="x" * 3000) and lost < 10_000:
            lost += 1
        return until_told(index, parent)

    return family(main, 1)


# The tests.


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    with Forge("tests.unit.test_supervise", tmp_path_factory.mktemp("forge")) as forge:
        yield forge


def pids(lines: list[str]) -> list[int]:
    return [int(line.split()[-1]) for line in lines]


def all_gone(family: Family, word: str = "up") -> None:
    poll(lambda: not any(map(alive, pids(family.lines(word)))), what=f"the end of every child: {family}")


def test_child_that_is_killed_is_replaced_at_once_and_the_others_do_not_notice(forge: Forge) -> None:
    family = forge.family("diligent")
    family.said("told", 2)
    killed, other = (pid for _, pid in sorted(zip(family.lines("up"), pids(family.lines("up")), strict=True)))
    began = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    line = family.said("up", 3)[2]
    assert time.monotonic() - began < 5
    assert line.split()[0] == "0", "the replacement has its index"
    assert pids([line])[0] not in (killed, other)
    assert "child 0 (process" in family.output
    assert "was killed by SIGKILL: another is started in 0.1 s" in family.output
    family.said("told", 3)
    family.signal(signal.SIGTERM)
    assert family.exited() == 0
    assert sorted(pids(family.lines("done"))) == sorted([other, pids([line])[0]])


def test_child_that_dies_again_and_again_is_started_less_and_less_often(forge: Forge) -> None:
    family = forge.family("crashing")
    at = [float(line) for line in family.said("up", 4)]
    waits = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert waits[0] >= 0.1
    assert waits[1] >= 0.2
    assert waits[2] >= 0.4
    assert "a bug" in family.output
    assert "ended with status 1: another is started in 0.2 s" in family.output
    family.signal(signal.SIGTERM)
    assert family.exited() == 0, "between two starts, too"


def test_what_no_child_can_do_ends_the_whole_with_its_words(forge: Forge) -> None:
    family = forge.family("hopeless")
    assert family.exited() == 3
    assert family.lines("failed") == ["the certificate is of yesterday"]
    all_gone(family)
    assert "another is started" not in family.output


def test_replacement_that_cannot_begin_tries_again_and_ends_the_whole_only_when_it_is_hopeless(forge: Forge) -> None:
    family = forge.family("starting_again")
    assert family.exited() == 3
    assert family.lines("life") == ["0", "1", "2", "3"]
    assert family.output.count("cannot start: /nowhere/key: No such file") == 2
    assert family.lines("failed") == ["revoked"]


def test_several_that_fail_for_one_reason_say_it_once(forge: Forge) -> None:
    family = forge.family("unreadable")
    assert family.exited() == 3
    assert family.lines("failed") == ["/nowhere/token: No such file or directory"]


def test_ctrl_c_ends_every_child_gracefully(forge: Forge) -> None:
    family = forge.family("diligent")
    family.said("told", 2)
    os.killpg(family.pid, signal.SIGINT)  # a terminal sends it to parent and children alike
    assert family.exited() == 0
    assert len(family.lines("done")) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_kills(forge: Forge, number: signal.Signals) -> None:
    family = forge.family("deaf")
    family.said("up", 2)
    family.signal(number)
    family.said("heard", 2)
    family.signal(number)
    assert family.exited() == -number, "as a process without children would have ended"
    all_gone(family)


def test_child_that_does_not_end_is_killed_in_the_end(forge: Forge) -> None:
    family = forge.family("deaf_for_a_moment")
    family.said("up", 2)
    family.signal(signal.SIGTERM)
    assert family.exited() == 0
    assert "does not end: it is killed" in family.output
    all_gone(family)


def test_who_leaves_for_a_reason_is_not_replaced(forge: Forge) -> None:
    family = forge.family("leaving")
    poll(lambda: family.lines("life").count("2") == 3, what="two replacements")
    assert (family.lines("life").count("0"), family.lines("life").count("1")) == (1, 1)
    assert "child 2 (process" in family.output
    assert "ended with status 0: another is started" in family.output
    poll(lambda: family.lines("indices")[-1] == "2", what=f"{family}")
    family.signal(signal.SIGTERM)
    assert family.exited() == 0


def test_hangup_reaches_all_and_whoever_is_born_later(forge: Forge) -> None:
    family = forge.family("diligent")
    family.said("told", 2)
    family.signal(signal.SIGHUP)
    first = pids(family.said("hangup", 2))
    os.kill(first[0], signal.SIGKILL)
    later = pids(family.said("hangup", 3))[2]
    assert later not in first
    family.signal(signal.SIGTERM)
    assert family.exited() == 0


def test_children_end_when_their_parent_is_killed(forge: Forge) -> None:
    family = forge.family("watchful")
    family.said("up", 2)
    family.signal(signal.SIGKILL)
    family.said("orphaned", 2)
    all_gone(family)


def test_what_is_no_message_is_passed_over(forge: Forge) -> None:
    family = forge.family("babbling")
    family.said("told", 1)
    poll(lambda: "0 ready" in "".join(family.lines("told")), what=f"{family}")
    assert family.output.count("says what is no message") >= 3
    family.signal(signal.SIGTERM)
    assert family.exited() == 0
