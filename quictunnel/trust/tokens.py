"""Tokens: who may serve which tunnels.

A token is ``qtk_ID_SECRET``. ID is public: it names the token in lists and logs. SECRET is 256 random bits, so a plain
SHA-256 is all that the file needs: slow, salted hashes are for what people choose and others can guess, and nobody goes
through 2**256.

``tokens.json`` is changed by the command line while a server reads it. Writers hold a lock, change the newest version
and replace the file in one step; readers look whether it is another file than before. A file that cannot be understood
grants nothing and refuses nobody for good: it is a TrustError until it is put right, because taking it for an empty one
would tell every client to give up.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeAlias

from quictunnel.trust.files import TrustError, locked, private_directory, read_bounded, write_private
from quictunnel.wire.names import (
    host_matches,
    normalise_host_pattern,
    normalise_tunnel_name,
    normalise_tunnel_pattern,
    tunnel_matches,
)

__all__ = ["Grant", "NameKind", "NewToken", "RefusalKind", "Token", "TokenRefused", "TokenStore", "parse_duration"]

FILE_NAME: Final = "tokens.json"
FILE_LIMIT: Final = 16 * 1024 * 1024
"bytes"

FILE_VERSION: Final = 1
TOKENS_LIMIT: Final = 10_000
PATTERNS_LIMIT: Final = 64
"tunnel patterns, and as many host patterns, of one token"

NOTE_LIMIT: Final = 200
"characters"

SECRET_BYTES: Final = 32
LONGEST: Final = timedelta(days=36_525)
"of a duration: a hundred years keep every date within what the calendar can write"

_SECRET: Final = re.compile(r"qtk_([a-z2-7]{8})_[A-Za-z0-9_-]{43}")
_ID: Final = re.compile(r"[a-z2-7]{8}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_ID_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

RefusalKind: TypeAlias = Literal["unknown", "expired", "revoked", "scope"]
NameKind: TypeAlias = Literal["tunnel", "host"]
_Identity: TypeAlias = tuple[int, int, int] | None


class TokenRefused(Exception):
    """A token does not open what was asked: ``kind`` is for programs, ``text`` (without the secret) for people."""

    def __init__(self, kind: RefusalKind, text: str) -> None:
        self.kind: RefusalKind = kind
        self.text = text
        super().__init__(kind, text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Token:
    """What is stored of a token. Times are aware and in UTC."""

    id: str
    digest: bytes = field(repr=False)
    "SHA-256 of the whole token, ``qtk_`` included"

    tunnels: tuple[str, ...]
    "patterns of tunnel names"

    hosts: tuple[str, ...]
    "patterns of custom hosts"

    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    note: str = ""

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        """What ``token list`` shows. A revoked token stays so after it has expired."""
        if self.revoked is not None:
            return "revoked"
        if self.expires is not None and self.expires <= now:
            return "expired"
        return "active"


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token just made. The secret exists here and nowhere else: show it once."""

    id: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a verified token allows, to be checked again as long as it is relied on (``TokenStore.recheck``)."""

    token_id: str
    tunnel: str
    "the tunnel's name, in its one form"

    hosts: tuple[str, ...]
    "patterns of custom hosts"

    expires: datetime | None
    digest: bytes = field(repr=False)

    def allows_host(self, host: str) -> bool:
        """Whether a custom host, or a wildcard of hosts as such, in any spelling, is in the token's scope."""
        try:
            form = normalise_host_pattern(host)
        except ValueError:
            return False
        return _covers(self.hosts, form)


class TokenStore:
    """The tokens of one state directory, in memory and in its ``tokens.json``. Not for more than one thread."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self._lock = directory / f".{FILE_NAME}.lock"
        self._tokens: dict[str, Token] = {}
        self._identity: _Identity = None
        self._fault: str | None = None
        self.loads = 0
        "how often they have come to be other ones: whoever has held a grant against them need not again until then"

    def __repr__(self) -> str:
        return f"<TokenStore {self.path} tokens={len(self._tokens)} fault={self._fault!r}>"

    # Reading.

    @property
    def tokens(self) -> tuple[Token, ...]:
        """All of them, the oldest first."""
        return tuple(self._tokens.values())

    def get(self, token_id: str) -> Token | None:
        """The token of that id, good or not."""
        return self._tokens.get(token_id)

    def load(self) -> None:
        """Read the file; one that does not exist holds no tokens. Raises TrustError."""
        identity = self._stat()
        # The identity of before the read: what is written meanwhile is then seen as a change, never missed.
        self._identity = identity
        try:
            self._tokens = {} if identity is None else _parse(read_bounded(self.path, FILE_LIMIT), self.path)
        except FileNotFoundError:
            self._fail(f"{self.path} is gone; put it back, or remove the state directory to begin anew")
        except TrustError as error:
            self._fail(str(error))
        self._fault = None
        self.loads += 1

    def reload_if_changed(self) -> bool:
        """Read the file again if it is not the one read last; whether it was. One stat when it is.

        Raises TrustError once per change to a file that is not usable, or is gone; until the next change, nothing is
        granted.
        """
        identity = self._stat()
        if identity == self._identity:
            return False
        if identity is None:
            self._identity = None
            self._fail(f"{self.path} is gone; put it back, or restart the server to begin with no tokens")
        self.load()
        return True

    # Judging.

    def verify(self, secret: str, tunnel: str, now: datetime) -> Grant:
        """What a client's token allows it on the tunnel it asks for.

        Raises TokenRefused, and TrustError while the file is unusable.
        """
        match = _SECRET.fullmatch(secret)
        digest = hashlib.sha256(secret.encode()).digest() if match else b""
        token = self._find(match[1] if match else "", digest)
        self._check_time(token, now)
        return Grant(token.id, _in_scope(token, tunnel), token.hosts, token.expires, token.digest)

    def recheck(self, grant: Grant, now: datetime) -> datetime | None:
        """When a grant ends that still holds after the file has changed or time has passed. Raises as ``verify``."""
        token = self._find(grant.token_id, grant.digest)
        self._check_time(token, now)
        _in_scope(token, grant.tunnel)
        return token.expires

    def holds(self, token_id: str, kind: NameKind, name: str, now: datetime) -> bool:
        """Whether a token is good now, and for that tunnel or custom host, in its one form. Raises TrustError."""
        if self._fault is not None:
            raise TrustError(self._fault)
        token = self._tokens.get(token_id)
        if token is None or token.state(now) != "active":
            return False
        if kind == "tunnel":
            return any(tunnel_matches(pattern, name) for pattern in token.tunnels)
        return _covers(token.hosts, name)

    # Changing.

    def create(
        self,
        patterns: Iterable[str],
        expires: timedelta | None,
        now: datetime,
        hosts: Iterable[str] = (),
        note: str = "",
    ) -> NewToken:
        """Make a token for the tunnels, and custom hosts, that match a pattern; it lasts ``expires`` (None: for ever).

        Raises ValueError for a pattern, a note or a time that cannot be, and TrustError.
        """
        tunnels = _patterns([normalise_tunnel_pattern(pattern) for pattern in patterns], "tunnel")
        if not tunnels:
            raise ValueError("a token needs at least one tunnel pattern; * is for all tunnels")
        host_patterns = _patterns([normalise_host_pattern(pattern) for pattern in hosts], "host")
        if len(note) > NOTE_LIMIT or not note.isprintable():
            raise ValueError(f"a note is at most {NOTE_LIMIT} printable characters")
        if expires is not None and not timedelta(0) < expires <= LONGEST:
            raise ValueError("a token lasts longer than no time, and at most 100 years")
        now = now.astimezone(UTC)
        private_directory(self.path.parent)
        with locked(self._lock):
            self.load()
            if len(self._tokens) >= TOKENS_LIMIT:
                raise TrustError(f"{self.path} is full with {TOKENS_LIMIT} tokens; use another state directory")
            new = self._new_secret()
            digest = hashlib.sha256(new.secret.encode()).digest()
            until = None if expires is None else now + expires
            self._store(Token(new.id, digest, tunnels, host_patterns, now, until, note=note))
        return new

    def revoke(self, token_id: str, now: datetime) -> Token:
        """Make a token useless from now on, and return it; again is no error. Raises TrustError when there is none."""
        private_directory(self.path.parent)
        with locked(self._lock):
            self.load()
            token = self._tokens.get(token_id)
            if token is None:
                raise TrustError(f"{self.path} has no token {token_id[:80]!a}; `quictunnel token list` shows all")
            if token.revoked is None:
                token = replace(token, revoked=now.astimezone(UTC))
                self._store(token)
        return token

    # Beneath.

    def _find(self, token_id: str, digest: bytes) -> Token:
        if self._fault is not None:
            raise TrustError(self._fault)
        token = self._tokens.get(token_id)
        # The id is public and may be looked up; only the comparison of what is secret must not tell how far it got.
        if token is None or not hmac.compare_digest(token.digest, digest):
            raise TokenRefused("unknown", "the server does not know this token")
        return token

    @staticmethod
    def _check_time(token: Token, now: datetime) -> None:
        if token.revoked is not None:
            raise TokenRefused("revoked", f"token {token.id} was revoked on {_date(token.revoked)}")
        if token.expires is not None and token.expires <= now:
            raise TokenRefused("expired", f"token {token.id} expired on {_date(token.expires)}")

    def _new_secret(self) -> NewToken:
        while True:
            token_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
            if token_id not in self._tokens:
                return NewToken(token_id, f"qtk_{token_id}_{secrets.token_urlsafe(SECRET_BYTES)}")

    def _store(self, token: Token) -> None:
        tokens = {**self._tokens, token.id: token}
        write_private(self.path, _dump(tokens.values()))
        self._tokens, self._identity = tokens, self._stat()
        self.loads += 1

    def _stat(self) -> _Identity:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            # Not a file's identity: as soon as there is one again, it is another and is read.
            self._identity = (-1, -1, -1)
            self._fail(f"cannot read {self.path}: {error.strerror}")
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _fail(self, fault: str) -> NoReturn:
        self._tokens, self._fault = {}, fault
        self.loads += 1
        raise TrustError(fault) from None


def parse_duration(text: str) -> timedelta | None:
    """``30d``, ``12h``, ``90m``, ``45s``, ``2w`` or a sum as in ``1d12h``; None for ``never``. Raises ValueError."""
    word = text.strip().lower()
    if word == "never":
        return None
    if len(word) > 64 or not re.fullmatch(r"(?:[0-9]+[smhdw])+", word):
        raise ValueError(f"{text[:80]!a} is not a duration: write 45s, 90m, 12h, 30d, 2w, a sum as 1d12h, or never")
    seconds = sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"([0-9]+)([smhdw])", word))
    if not 0 < seconds <= LONGEST.total_seconds():
        raise ValueError(f"the duration {text[:80]!a} is not between a second and 100 years; write never for no end")
    return timedelta(seconds=seconds)


def _in_scope(token: Token, tunnel: str) -> str:
    try:
        name = normalise_tunnel_name(tunnel)
    except ValueError as error:
        raise TokenRefused("scope", str(error)) from None
    if not any(tunnel_matches(pattern, name) for pattern in token.tunnels):
        allowed = ", ".join(token.tunnels[:5]) + (", ..." if len(token.tunnels) > 5 else "")
        raise TokenRefused("scope", f"token {token.id} is not for tunnel {name}; it is for {allowed}")
    return name


def _covers(patterns: tuple[str, ...], host: str) -> bool:
    # A wildcard that is asked for as such is covered by the same one and by nothing else.
    return any(pattern == host or host_matches(pattern, host) for pattern in patterns)


def _patterns(patterns: list[str], what: str) -> tuple[str, ...]:
    if len(patterns) > PATTERNS_LIMIT:
        raise ValueError(f"a token has at most {PATTERNS_LIMIT} {what} patterns")
    return tuple(dict.fromkeys(patterns))


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


# The file.


def _dump(tokens: Iterable[Token]) -> bytes:
    entries = [
        {
            "id": token.id,
            "sha256": token.digest.hex(),
            "tunnels": token.tunnels,
            "hosts": token.hosts,
            "created": token.created.isoformat(),
            "expires": None if token.expires is None else token.expires.isoformat(),
            "revoked": None if token.revoked is None else token.revoked.isoformat(),
            "note": token.note,
        }
        for token in tokens
    ]
    return json.dumps({"version": FILE_VERSION, "tokens": entries}, indent=2).encode() + b"\n"


def _parse(data: bytes, path: Path) -> dict[str, Token]:
    advice = "restore it from a copy, or move it away and create new tokens"
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise TrustError(f"{path} is not JSON; {advice}") from None
    if not isinstance(document, dict) or not isinstance(document.get("tokens"), list):
        raise TrustError(f"{path} is not a list of tokens; {advice}")
    if document.get("version") != FILE_VERSION:
        raise TrustError(f"{path} is of another version of quictunnel; use that version, or move the file away")
    tokens: dict[str, Token] = {}
    for number, entry in enumerate(document["tokens"], 1):
        try:
            token = _token(entry)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise TrustError(f"{path}: entry {number} is not a token; {advice}") from None
        if token.id in tokens:
            raise TrustError(f"{path}: entry {number} repeats the id {token.id}; {advice}")
        tokens[token.id] = token
    return tokens


def _token(entry: Any) -> Token:
    """One entry of the file. Every member must be there: what is missing could be what revokes it."""
    if not (_ID.fullmatch(entry["id"]) and _HASH.fullmatch(entry["sha256"])):
        raise ValueError
    tunnels, hosts, note = entry["tunnels"], entry["hosts"], entry["note"]
    if not (isinstance(tunnels, list) and isinstance(hosts, list) and isinstance(note, str)):
        raise ValueError
    created = _moment(entry["created"])
    if created is None:
        raise ValueError
    return Token(
        id=entry["id"],
        digest=bytes.fromhex(entry["sha256"]),
        tunnels=tuple(normalise_tunnel_pattern(pattern) for pattern in tunnels),
        hosts=tuple(normalise_host_pattern(pattern) for pattern in hosts),
        created=created,
        expires=_moment(entry["expires"]),
        revoked=_moment(entry["revoked"]),
        note=note,
    )


def _moment(text: Any) -> datetime | None:
    if text is None:
        return None
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError
    return moment.astimezone(UTC)
