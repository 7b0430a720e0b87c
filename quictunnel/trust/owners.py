"""The book of names: which token a tunnel's name, or a custom host, belongs to.

A name belongs to the first token that registers it, for as long as that token is good for it: without a client, after
a restart, and whichever of a server's processes is asked. So the book is a file, ``names.db`` in the state directory,
and whatever changes it is one transaction: of two processes that want a name for two tokens, one gets it.

A host below a wildcard that another token holds is that token's: nobody else gets it by name. The other way round,
who holds a host by name keeps it when somebody else gets the wildcard above it.

A book that cannot be understood gives away nothing: it is a TrustError until it is put right. It is SQLite's, in its
write-ahead mode: readers wait for nobody, and a writer for no disk, at the price that a power cut may take the last
claims with it, never the book.
"""

import os
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from quictunnel.trust.files import TrustError, give_to_owner_of, locked, private_directory
from quictunnel.trust.tokens import NameKind

__all__ = ["FILE_NAME", "Claim", "Held", "NameTaken", "NamesFull", "Owners", "Stands"]

FILE_NAME: Final = "names.db"
NAMES_LIMIT: Final = 100_000
"names and hosts of all tokens together"

WAIT: Final = 0.1
"seconds to wait for another process that is writing; a claim takes a fraction of a millisecond"

FRESH: Final = 60
"seconds that a name which nobody asked for is left alone after it was last registered, though its token needs room"

_APPLICATION: Final = 0x7174_6E62
_VERSION: Final = 1
_SWEPT: Final = 500  # rows that are looked at when there is no room for another one

_SCHEMA: Final = f"""
CREATE TABLE names (
    kind TEXT NOT NULL, name TEXT NOT NULL, token TEXT NOT NULL, tunnel TEXT NOT NULL,
    fleeting INTEGER NOT NULL, since INTEGER NOT NULL, used INTEGER NOT NULL,
    PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE INDEX names_of_token ON names (token);
CREATE INDEX hosts_of_tunnel ON names (tunnel) WHERE tunnel <> '';
CREATE TABLE counts (token TEXT PRIMARY KEY, names INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counts VALUES ('', 0);
CREATE TRIGGER comes AFTER INSERT ON names BEGIN
    INSERT INTO counts VALUES (new.token, 1) ON CONFLICT DO UPDATE SET names = names + 1;
    UPDATE counts SET names = names + 1 WHERE token = '';
END;
CREATE TRIGGER goes AFTER DELETE ON names BEGIN
    UPDATE counts SET names = names - 1 WHERE token IN (old.token, '');
    DELETE FROM counts WHERE token = old.token AND names = 0;
END;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""
_LOOK: Final = "SELECT kind, name, token, tunnel, fleeting, since, used FROM names"

Stands: TypeAlias = Callable[[str, NameKind, str], bool]
"Whether the token of that id is still good for a tunnel or a host."


class NameTaken(Exception):
    """A name is another token's."""

    def __init__(self, kind: NameKind, name: str, under: str = "") -> None:
        """``under`` is the wildcard that the host ``name`` is part of."""
        self.kind, self.name, self.under = kind, name, under
        what = "the name" if kind == "tunnel" else "the host"
        if under:
            super().__init__(f"the host {name} is part of {under}, which belongs to another token")
        else:
            super().__init__(f"{what} {name} belongs to another token")


class NamesFull(Exception):
    """There is no room for another name."""


class Held(NamedTuple):
    """A line of the book."""

    kind: NameKind
    name: str
    "in its one form"

    token: str
    "its id"

    tunnel: str
    "for a host: the tunnel that it leads to, empty for none"

    fleeting: bool
    "nobody asked for this name: the server made it up for one run of a client"

    since: int
    used: int
    "when it was registered first and, to the minute for a fleeting one, last; seconds since 1970"


class Claim(NamedTuple):
    """What a client registers for: all of it or nothing."""

    token: str
    tunnel: str
    hosts: Sequence[str] = ()
    fleeting: bool = False
    others: Collection[str] = ()
    "hosts of the same tunnel by other clients of the token, who are there now"


class Owners:
    """The book of one state directory. Not for more than one thread, nor to be carried into a forked process."""

    def __init__(self, directory: Path, *, wait: float = WAIT) -> None:
        """Open the book, a new one if there is none. Raises TrustError."""
        self.path = directory / FILE_NAME
        self._swept = ("", "")  # how far the book has been looked through for what may go
        private_directory(directory)
        if not self.path.exists():
            with locked(directory / f".{FILE_NAME}.lock"):
                if not self.path.exists():
                    _make(self.path)
        with _understood(self.path):
            self._book = sqlite3.connect(self.path, timeout=wait, isolation_level=None)
        try:
            self._inode = self._check()
        except BaseException:
            self._book.close()
            raise

    def __repr__(self) -> str:
        return f"<Owners {self.path}>"

    def close(self) -> None:
        """Let go of the file; again is no error."""
        with suppress(sqlite3.Error):  # what could not be written is in the write-ahead log
            self._book.close()

    # Looking

    def look(self, kind: NameKind, name: str) -> Held | None:
        """Who has a name, however good its token is by now. Raises TrustError."""
        with _understood(self.path):
            row = self._book.execute(f"{_LOOK} WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        return None if row is None else Held(*row)

    def all(self) -> list[Held]:
        """The whole book, by token and name. Raises TrustError."""
        with _understood(self.path):
            return [Held(*row) for row in self._book.execute(f"{_LOOK} ORDER BY token, kind DESC, name")]

    def only(self) -> Held | None:
        """The only tunnel's name that there is. Raises TrustError."""
        with _understood(self.path):
            rows = self._book.execute(f"{_LOOK} WHERE kind = 'tunnel' LIMIT 2").fetchall()
        return Held(*rows[0]) if len(rows) == 1 else None

    # Writing

    def claim(self, claim: Claim, now: float, *, limit: int, stands: Stands, in_use: Callable[[str], bool]) -> None:
        """Have the names be their claimant's, all or none; hosts that nobody of the tunnel serves now lead nowhere.

        ``limit`` is how many names a token may have; ``in_use`` says of a fleeting name whether somebody is there who
        serves it. Raises NameTaken, NamesFull and TrustError.
        """
        if self._is_settled(claim, now):
            return  # nearly always: only the first link of a session has anything to write
        with self._writing():
            self._take("tunnel", claim.tunnel, claim, int(now), limit, stands, in_use)
            for host in claim.hosts:
                self._take("host", host, claim, int(now), limit, stands, in_use)
            for held in self._hosts_of(claim.tunnel):
                if held.token != claim.token or not (held.name in claim.hosts or held.name in claim.others):
                    self._run("UPDATE names SET tunnel = '' WHERE kind = 'host' AND name = ?", held.name)

    def release(self, name: str) -> list[Held]:
        """Make a tunnel's name, or a host, anybody's again; what was given free. Raises TrustError."""
        with self._writing():
            found = [Held(*row) for row in self._book.execute(f"{_LOOK} WHERE name = ?", (name,))]
            self._run("DELETE FROM names WHERE name = ?", name)
        return found

    # Beneath

    def _is_settled(self, claim: Claim, now: float) -> bool:
        """Whether the book says all that a claim wants it to say."""
        tunnel = self.look("tunnel", claim.tunnel)
        if tunnel is None or tunnel.token != claim.token or tunnel.fleeting > claim.fleeting:
            return False
        if tunnel.fleeting and not tunnel.used <= now < tunnel.used + FRESH:
            return False
        with _understood(self.path):
            hosts = self._hosts_of(claim.tunnel)
        names = {held.name for held in hosts}
        return all(held.token == claim.token for held in hosts) and names - {*claim.others} <= {*claim.hosts} <= names

    def _hosts_of(self, tunnel: str) -> list[Held]:
        return [Held(*row) for row in self._book.execute(f"{_LOOK} WHERE tunnel = ? AND tunnel <> ''", (tunnel,))]

    def _take(
        self,
        kind: NameKind,
        name: str,
        claim: Claim,
        now: int,
        limit: int,
        stands: Stands,
        in_use: Callable[[str], bool],
    ) -> None:
        held = self.look(kind, name)
        tunnel = claim.tunnel if kind == "host" else ""
        if held is not None and held.token == claim.token:
            # A name that was once asked for stays, whoever comes to it by chance later.
            fleeting = kind == "tunnel" and held.fleeting and claim.fleeting
            update = "UPDATE names SET tunnel = ?, fleeting = ?, used = ? WHERE kind = ? AND name = ?"
            self._run(update, tunnel, fleeting, now, kind, name)
            return
        if held is not None and stands(held.token, kind, name):
            raise NameTaken(kind, name)
        if kind == "host":
            self._check_wildcard(name, claim.token, stands)
        self._run("DELETE FROM names WHERE kind = ? AND name = ?", kind, name)
        self._make_room(claim.token, limit, now, stands, in_use)
        fleeting = kind == "tunnel" and claim.fleeting
        self._run("INSERT INTO names VALUES (?, ?, ?, ?, ?, ?, ?)", kind, name, claim.token, tunnel, fleeting, now, now)

    def _check_wildcard(self, host: str, token: str, stands: Stands) -> None:
        first, _, parent = host.partition(".")
        if first == "*":
            return
        wildcard = self.look("host", f"*.{parent}")
        if wildcard is not None and wildcard.token != token and stands(wildcard.token, "host", wildcard.name):
            raise NameTaken("host", host, under=wildcard.name)

    def _make_room(self, token: str, limit: int, now: int, stands: Stands, in_use: Callable[[str], bool]) -> None:
        if self._count(token) >= limit and not self._drop_fleeting(token, now, in_use):
            raise NamesFull(
                f"token {token} holds {self._count(token)} names, as many as it may; on the server, "
                "`quictunnel token release NAME` gives one free"
            )
        if self._count("") >= NAMES_LIMIT:
            self._sweep(now, stands, in_use)
            if self._count("") >= NAMES_LIMIT:
                raise NamesFull(f"the server's book of names is full with {NAMES_LIMIT}")

    def _drop_fleeting(self, token: str, now: int, in_use: Callable[[str], bool]) -> bool:
        """Forget the name made up for a token that was not needed for longest; whether there was one."""
        rows = self._book.execute(
            f"{_LOOK} WHERE token = ? AND fleeting AND used < ? ORDER BY used", (token, now - FRESH)
        )
        for held in map(Held._make, rows):
            if not in_use(held.name):
                self._run("DELETE FROM names WHERE kind = ? AND name = ?", held.kind, held.name)
                return True
        return False

    def _sweep(self, now: int, stands: Stands, in_use: Callable[[str], bool]) -> None:
        """Forget what is nobody's any more, and names that nobody asked for, in the next part of the book."""
        rows = self._book.execute(
            f"{_LOOK} WHERE (kind, name) > (?, ?) ORDER BY kind, name LIMIT {_SWEPT}", self._swept
        ).fetchall()
        self._swept = (rows[-1][0], rows[-1][1]) if len(rows) == _SWEPT else ("", "")
        for held in map(Held._make, rows):
            idle = held.fleeting and held.used < now - FRESH and not in_use(held.name)
            if idle or not stands(held.token, held.kind, held.name):
                self._run("DELETE FROM names WHERE kind = ? AND name = ?", held.kind, held.name)

    def _count(self, token: str) -> int:
        row = self._book.execute("SELECT names FROM counts WHERE token = ?", (token,)).fetchone()
        return 0 if row is None else int(row[0])

    def _run(self, statement: str, *values: Any) -> None:
        self._book.execute(statement, values)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, begun as a writer: what is read in it stays so until it is over."""
        self._check_place()
        with _understood(self.path):
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._run("ROLLBACK")
                raise

    def _check(self) -> int:
        """The file's inode, once it has proved to be a whole book of this version."""
        with _understood(self.path):
            book = self._book
            book.execute("PRAGMA synchronous = NORMAL")
            marks = [book.execute(f"PRAGMA {mark}").fetchone()[0] for mark in ("application_id", "user_version")]
            if marks[0] != _APPLICATION:
                raise TrustError(f"{self.path} is not a book of names; {_ADVICE}")
            if marks[1] != _VERSION:
                raise TrustError(f"{self.path} is of another version of quictunnel; use that version, or {_ADVICE}")
            if book.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise TrustError(f"{self.path} is damaged; {_ADVICE}")
            book.execute(f"{_LOOK} LIMIT 1").fetchone()
        return self.path.stat().st_ino

    def _check_place(self) -> None:
        # In a file that was removed one could go on writing, beside whoever makes a new one.
        try:
            there = self.path.stat().st_ino == self._inode
        except OSError:
            there = False
        if not there:
            raise TrustError(f"{self.path} is gone, or another one; put it back, and restart the server")


_ADVICE: Final = "restore it from a copy, or move it away: then each name is whoever's registers it first"


def _make(path: Path) -> None:
    """Put an empty book at ``path``, at once: an empty file is never taken for one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with _understood(path):
        try:
            # SQLite gives the files that it makes beside this one the same owner and mode.
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
                give_to_owner_of(path.parent, descriptor)
            finally:
                os.close(descriptor)
            book = sqlite3.connect(temporary, isolation_level=None)
            try:
                book.execute("PRAGMA journal_mode = WAL")
                book.executescript(_SCHEMA)
            finally:
                book.close()
            temporary.replace(path)
        finally:
            for left in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    temporary.with_name(temporary.name + left).unlink()


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """What goes wrong with the file, as a TrustError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise TrustError(f"another process has held {path} for too long; try again") from None
        if isinstance(error, sqlite3.OperationalError):
            raise TrustError(f"cannot use {path}: {error}") from None
        raise TrustError(f"{path} is damaged ({error}); {_ADVICE}") from None
    except OSError as error:
        raise TrustError(f"cannot use {path}: {error.strerror or error}") from None
