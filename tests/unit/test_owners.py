"""The book of names: whose a name is, for how long, and that no accident with the book gives one away."""

import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from quictunnel.trust import owners as module
from quictunnel.trust.files import TrustError
from quictunnel.trust.owners import FRESH, Claim, Held, NamesFull, NameTaken, Owners
from quictunnel.trust.tokens import NameKind, TokenStore

NOW = 1_900_000_000.0


class Book:
    """A book with tokens ``a``, ``b``, … of which some are no good any more."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.owners = Owners(directory)
        self.gone: set[str] = set()
        self.in_use: set[str] = set()

    def stands(self, token: str, kind: NameKind, name: str) -> bool:
        return token not in self.gone

    def claim(
        self, token: str, tunnel: str, *hosts: str, fleeting: bool = False, now: float = 0, limit: int = 9
    ) -> None:
        claim = Claim(token, tunnel, hosts, fleeting)
        self.owners.claim(claim, NOW + now, limit=limit, stands=self.stands, in_use=self.in_use.__contains__)

    def refused(self, token: str, tunnel: str, *hosts: str) -> str:
        with pytest.raises(NameTaken) as taken:
            self.claim(token, tunnel, *hosts)
        return str(taken.value)

    def reopen(self) -> None:
        self.owners.close()
        self.owners = Owners(self.directory)

    @property
    def lines(self) -> dict[str, str]:
        """Who holds what, with the tunnel that a host leads to."""
        return {held.name: held.token + (f">{held.tunnel}" if held.tunnel else "") for held in self.owners.all()}


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    book = Book(tmp_path)
    yield book
    book.owners.close()


# Whose a name is


def test_name_is_the_first_tokens_for_as_long_as_that_is_good(book: Book) -> None:
    book.claim("a", "app")
    book.claim("a", "app")
    assert book.refused("b", "app") == "the name app belongs to another token"
    book.reopen()
    assert book.refused("b", "app")
    book.gone.add("a")
    book.claim("b", "app")
    book.gone.clear()
    assert book.refused("a", "app")
    assert book.lines == {"app": "b"}


def test_claim_is_for_all_of_its_names_or_for_none(book: Book) -> None:
    book.claim("a", "app", "two.example.com")
    assert book.refused("b", "web", "one.example.com", "two.example.com").startswith("the host two.example.com belongs")
    assert book.refused("b", "app", "one.example.com").startswith("the name app belongs")
    assert book.lines == {"app": "a", "two.example.com": "a>app"}


def test_tunnel_and_a_host_of_one_label_are_two_things(book: Book) -> None:
    book.claim("a", "app")
    book.claim("b", "web", "app")
    assert [(held.kind, held.name, held.token) for held in book.owners.all()] == [
        ("tunnel", "app", "a"),
        ("tunnel", "web", "b"),
        ("host", "app", "b"),
    ]


def test_host_leads_to_the_last_tunnel_of_its_token_and_nowhere_when_that_wants_it_no_more(book: Book) -> None:
    book.claim("a", "app", "one.example.com", "two.example.com")
    book.claim("a", "web", "two.example.com")
    assert book.lines["two.example.com"] == "a>web"
    book.claim("a", "app")
    assert book.lines == {"app": "a", "web": "a", "one.example.com": "a", "two.example.com": "a>web"}
    assert book.refused("b", "mine", "one.example.com"), "still its token's"


def test_hosts_of_a_name_that_passes_on_do_not_lead_to_its_new_owner(book: Book) -> None:
    book.claim("a", "app", "one.example.com")
    book.owners.release("app")
    book.claim("b", "app")
    assert book.lines == {"app": "b", "one.example.com": "a"}


def test_host_below_anothers_wildcard_is_not_to_be_had(book: Book) -> None:
    book.claim("a", "app", "*.example.com")
    text = book.refused("b", "web", "one.example.com")
    assert text == "the host one.example.com is part of *.example.com, which belongs to another token"
    book.claim("b", "web", "one.two.example.com", "example.com")
    book.claim("a", "app2", "one.example.com")
    book.gone.add("a")
    book.claim("b", "web", "one.example.com")


def test_host_held_by_name_stays_its_owners_below_anothers_later_wildcard(book: Book) -> None:
    book.claim("a", "app", "one.example.com")
    book.claim("b", "web", "*.example.com")
    book.claim("a", "app", "one.example.com")
    assert book.refused("b", "web", "*.example.com", "one.example.com") == (
        "the host one.example.com belongs to another token"
    )
    book.gone.add("a")
    assert book.refused("c", "new", "one.example.com").endswith("part of *.example.com, which belongs to another token")
    book.claim("b", "web", "*.example.com", "one.example.com")


def test_of_many_who_want_one_name_at_once_one_gets_it(tmp_path: Path) -> None:
    Owners(tmp_path).close()
    won: dict[str, list[str]] = {f"n{number}": [] for number in range(50)}
    start = threading.Barrier(4)

    def race(token: str) -> None:
        owners = Owners(tmp_path, wait=30.0)
        start.wait(30)
        for name in won:
            try:
                owners.claim(Claim(token, name), NOW, limit=99, stands=lambda *_: True, in_use=lambda _: False)
                won[name].append(token)
            except NameTaken:
                pass
        owners.close()

    threads = [threading.Thread(target=race, args=(token,)) for token in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    owners = Owners(tmp_path)
    assert won == {held.name: [held.token] for held in owners.all()}
    owners.close()


def test_two_books_of_one_directory_say_the_same_at_once(book: Book) -> None:
    other = Book(book.directory)
    book.claim("a", "app", "one.example.com")
    assert other.refused("b", "app")
    other.owners.release("app")
    other.claim("b", "app")
    assert book.refused("a", "app")
    other.owners.close()


def test_name_that_is_released_is_anybodys(book: Book) -> None:
    book.claim("a", "app", "app.example.com")
    assert [held.name for held in book.owners.release("app")] == ["app"]
    assert book.owners.release("app") == []
    assert book.owners.look("tunnel", "app") is None
    book.claim("b", "app")


# How many


def test_token_has_as_many_names_as_it_may(book: Book) -> None:
    book.claim("a", "one", "one.example.com", limit=2)
    with pytest.raises(NamesFull, match=r"token a holds 2 names, as many as it may; .*token release NAME"):
        book.claim("a", "two", limit=2)
    book.claim("a", "one", "one.example.com", limit=2)
    book.claim("b", "two", limit=2)
    book.owners.release("one.example.com")
    book.claim("a", "three", limit=2)


def test_made_up_name_makes_way_for_its_tokens_next_when_nobody_serves_it(book: Book) -> None:
    book.claim("a", "asked", limit=3)
    for number, name in enumerate(("old", "new")):
        book.claim("a", name, fleeting=True, now=number, limit=3)
    book.in_use.add("old")
    book.claim("a", "next", fleeting=True, now=FRESH + 2, limit=3)
    assert set(book.lines) == {"asked", "old", "next"}
    with pytest.raises(NamesFull):
        book.claim("a", "last", now=FRESH + 3, limit=3)


def test_made_up_name_that_was_registered_a_moment_ago_stays(book: Book) -> None:
    book.claim("a", "word", fleeting=True, limit=1)
    book.claim("a", "word", fleeting=True, now=FRESH, limit=1)
    with pytest.raises(NamesFull):
        book.claim("a", "next", fleeting=True, now=FRESH + FRESH // 2, limit=1)


def test_made_up_name_that_is_asked_for_stays(book: Book) -> None:
    book.claim("a", "word", fleeting=True)
    book.claim("a", "word")
    book.claim("a", "word", fleeting=True)
    held = book.owners.look("tunnel", "word")
    assert held is not None and not held.fleeting
    with pytest.raises(NamesFull):
        book.claim("a", "next", now=FRESH * 9, limit=1)


def test_full_book_takes_new_names_in_place_of_those_that_are_nobodys(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NAMES_LIMIT", 4)
    book.claim("a", "one", "one.example.com")
    book.claim("b", "two")
    book.claim("b", "word", fleeting=True)
    with pytest.raises(NamesFull, match="full with 4"):
        book.claim("c", "three")
    book.claim("c", "three", now=FRESH + 1)
    assert set(book.lines) == {"one", "one.example.com", "two", "three"}
    book.gone.add("a")
    book.claim("c", "four")
    assert set(book.lines) == {"two", "three", "four"}


@pytest.mark.slow
def test_hundred_thousand_names_are_all_there_is_room_for(book: Book) -> None:
    connection = sqlite3.connect(book.owners.path)
    lines = (("tunnel", f"n{number:06}", f"t{number % 500}", "", 0, 1, 1) for number in range(module.NAMES_LIMIT))
    with connection:
        connection.executemany("INSERT INTO names VALUES (?, ?, ?, ?, ?, ?, ?)", lines)
    connection.close()
    with pytest.raises(NamesFull):
        book.claim("a", "app")
    book.gone.add("t7")
    book.claim("a", "app")
    book.claim("t8", "n000008", "one.example.com", limit=10**6)
    assert book.refused("a", "n000009")
    book.reopen()
    assert book.owners.look("tunnel", "app") == Held("tunnel", "app", "a", "", False, int(NOW), int(NOW))


def test_no_question_looks_through_the_book(book: Book) -> None:
    asked = [
        (f"{module._LOOK} WHERE kind = ? AND name = ?", ("tunnel", "app")),
        (f"{module._LOOK} WHERE tunnel = ? AND tunnel <> ''", ("app",)),
        (f"{module._LOOK} WHERE token = ? AND fleeting AND used < ? ORDER BY used", ("a", 1)),
        (f"{module._LOOK} WHERE (kind, name) > (?, ?) ORDER BY kind, name LIMIT 500", ("", "")),
    ]
    for statement, values in asked:
        for row in book.owners._book.execute(f"EXPLAIN QUERY PLAN {statement}", values):
            assert not row[3].startswith("SCAN"), (statement, row[3])


# Accidents


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"what is this? " * 1000)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 + 10 : 5 * 4096] = bytes(4 * 4096 - 10)
    path.write_bytes(data)


def another_program(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE names (kind, name, token)")
    connection.close()


def without_its_table(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE names")
    connection.close()


def of_tomorrow(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "harm",
    [
        emptied,
        garbage,
        cut_short,
        overwritten,
        another_program,
        without_its_table,
        of_tomorrow,
        a_directory,
    ],
    ids=lambda harm: harm.__name__,
)
def test_book_that_cannot_be_understood_is_told_and_left_as_it_is(book: Book, harm: Callable[[Path], None]) -> None:
    book.claim("a", "app", "one.example.com")
    path = book.owners.path
    book.owners.close()
    harm(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(TrustError, match=r"names\.db"):
        Owners(book.directory)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_book_that_breaks_while_it_is_used_gives_nothing_away(book: Book) -> None:
    for number in range(200):
        book.claim(f"t{number}", f"n{number}", f"h{number}.example.com")
    book.reopen()
    book.owners._book.execute("PRAGMA cache_size = 0")
    overwritten(book.owners.path)
    refused = []
    for number in range(200):
        with pytest.raises((NameTaken, TrustError)) as error:
            book.claim("b", f"n{number}")
        refused.append(str(error.value))
    assert any("names.db is damaged" in text and "restore it" in text for text in refused)


def test_book_that_is_taken_away_is_not_written_to_any_more(book: Book) -> None:
    book.claim("a", "app")
    book.owners.path.unlink()
    with pytest.raises(TrustError, match=r"names\.db is gone, or another one; put it back"):
        book.claim("a", "web")
    assert book.owners.look("tunnel", "app")
    Owners(book.directory).close()
    with pytest.raises(TrustError, match="another one"):
        book.claim("b", "web")


def test_book_that_somebody_else_holds_is_waited_for_only_so_long(book: Book) -> None:
    book.claim("a", "app")
    other = sqlite3.connect(book.owners.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TrustError, match="another process has held"):
        book.claim("b", "web")
    book.claim("a", "app")  # nothing to write
    assert book.owners.look("tunnel", "app")
    other.execute("ROLLBACK")
    other.close()
    book.claim("b", "web")


def test_error_in_the_middle_of_a_claim_leaves_no_half_of_it(book: Book) -> None:
    book.claim("a", "app")

    def unreadable(token: str, kind: NameKind, name: str) -> bool:
        raise TrustError("tokens.json is not JSON")

    with pytest.raises(TrustError, match="not JSON"):
        book.owners.claim(Claim("b", "app"), NOW, limit=9, stands=unreadable, in_use=lambda _: False)
    book.claim("b", "web")
    assert book.lines == {"app": "a", "web": "b"}


def test_book_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        book = Book(tmp_path)
        book.claim("a", "app")
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(old)
    assert found == dict.fromkeys(("names.db", "names.db-wal", "names.db-shm", ".names.db.lock"), 0o600)
    book.owners.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files for others")
def test_what_root_makes_belongs_to_whom_the_directory_does(tmp_path: Path) -> None:
    os.chown(tmp_path, 4321, 4322)
    TokenStore(tmp_path).create(["*"], None, datetime.now(UTC))
    book = Book(tmp_path)
    book.claim("a", "app")
    found = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in tmp_path.iterdir()}
    assert set(found.values()) == {(4321, 4322)}
    assert {"tokens.json", ".tokens.json.lock", "names.db", "names.db-wal", "names.db-shm"} <= set(found)
    book.owners.close()
