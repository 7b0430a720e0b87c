"""Tokens: what they open, when they stop, and that no accident with their file opens or ends anything."""

import hashlib
import json
import multiprocessing
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.trust import tokens
from quictunnel.trust.files import TrustError
from quictunnel.trust.tokens import TokenRefused, TokenStore, parse_duration

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "state")


def refused(store: TokenStore, secret: str, tunnel: str = "team-a", now: datetime = NOW) -> TokenRefused:
    with pytest.raises(TokenRefused) as error:
        store.verify(secret, tunnel, now)
    return error.value


# What opens.


def test_a_token_opens_the_tunnels_of_its_patterns(store: TokenStore) -> None:
    new = store.create(["team-*", "Demo"], 30 * DAY, NOW, hosts=["*.example.com", "App.example.org."])
    grant = store.verify(new.secret, "TEAM-a", NOW)
    assert (grant.token_id, grant.tunnel, grant.expires) == (new.id, "team-a", NOW + 30 * DAY)
    assert store.verify(new.secret, "demo", NOW).tunnel == "demo"
    assert grant.allows_host("A.example.com.") and grant.allows_host("app.example.org")
    assert not grant.allows_host("a.b.example.com") and not grant.allows_host("bad host")


def test_a_wildcard_is_allowed_by_itself_alone(store: TokenStore) -> None:
    new = store.create(["*"], None, NOW, hosts=["*.example.com", "a.example.org"])
    grant = store.verify(new.secret, "a", NOW)
    assert grant.allows_host("*.Example.com.")
    for host in ("*.a.example.com", "*.example.org", "*.com", "*", "*.a.example.org"):
        assert not grant.allows_host(host), host


def test_a_token_holds_what_it_is_good_for_while_it_is_good(store: TokenStore) -> None:
    new = store.create(["team-*"], DAY, NOW, hosts=["*.example.com"])
    assert store.holds(new.id, "tunnel", "team-a", NOW) and store.holds(new.id, "host", "a.example.com", NOW)
    assert store.holds(new.id, "host", "*.example.com", NOW)
    assert not store.holds(new.id, "tunnel", "other", NOW), "a scope may have become narrower"
    assert not store.holds(new.id, "host", "example.com", NOW)
    assert not store.holds(new.id, "tunnel", "team-a", NOW + DAY)
    assert not store.holds("aaaaaaaa", "tunnel", "team-a", NOW)
    store.revoke(new.id, NOW)
    assert not store.holds(new.id, "tunnel", "team-a", NOW)
    store.path.write_text("not json")
    with pytest.raises(TrustError):
        store.reload_if_changed()
    with pytest.raises(TrustError):
        store.holds(new.id, "tunnel", "team-a", NOW)


def test_a_token_of_no_hosts_allows_none(store: TokenStore) -> None:
    grant = store.verify(store.create(["*"], None, NOW).secret, "a", NOW)
    assert not grant.allows_host("app.example.com")


def test_out_of_scope_says_what_the_token_is_for(store: TokenStore) -> None:
    error = refused(store, store.create(["team-*"], None, NOW).secret, "other")
    assert error.kind == "scope"
    assert "not for tunnel other" in error.text and "team-*" in error.text


def test_a_bad_tunnel_name_is_out_of_scope(store: TokenStore) -> None:
    error = refused(store, store.create(["*"], None, NOW).secret, "no.such\x1b")
    assert error.kind == "scope" and error.text.isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda secret: secret[:-1] + ("A" if secret[-1] != "A" else "B"),
        lambda secret: secret[:-1],
        lambda secret: secret + "A",
        lambda secret: secret + "\n",
        lambda secret: " " + secret,
        lambda secret: "qtk_aaaaaaaa_" + secret[13:],
        lambda secret: "",
        lambda secret: "\ud800",
        lambda secret: "x" * 1_000_000,
    ],
)
def test_anything_but_the_token_is_unknown(store: TokenStore, change: Callable[[str], str]) -> None:
    secret = store.create(["*"], None, NOW).secret
    error = refused(store, change(secret))
    assert error.kind == "unknown" and secret[13:] not in str(error)


@given(st.text())
def test_garbage_is_unknown_and_nothing_else(text: str) -> None:
    assert refused(TokenStore(Path("/nowhere")), text).kind == "unknown"


def test_a_token_ends_at_its_time(store: TokenStore) -> None:
    new = store.create(["*"], DAY, NOW)
    grant = store.verify(new.secret, "a", NOW + DAY - timedelta(seconds=1))
    error = refused(store, new.secret, "a", NOW + DAY)
    assert error.kind == "expired" and "2030-01-03 03:04 UTC" in error.text
    with pytest.raises(TokenRefused, match="expired"):
        store.recheck(grant, NOW + DAY)
    assert [token.state(NOW + DAY) for token in store.tokens] == ["expired"]


def test_times_of_any_zone_are_the_same_moment(store: TokenStore) -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
    store.create(["*"], DAY, elsewhere)
    assert store.tokens[0].created == NOW and store.tokens[0].created.tzinfo is UTC


def test_a_revoked_token_is_refused_at_once_and_stays_revoked(store: TokenStore) -> None:
    new = store.create(["*"], DAY, NOW)
    grant = store.verify(new.secret, "a", NOW)
    assert store.revoke(new.id, NOW).revoked == NOW
    assert store.revoke(new.id, NOW + DAY).revoked == NOW
    assert refused(store, new.secret, "a", NOW + 2 * DAY).kind == "revoked"
    with pytest.raises(TokenRefused, match="revoked"):
        store.recheck(grant, NOW)
    assert store.tokens[0].state(NOW + 2 * DAY) == "revoked"


def test_revoking_what_is_not_there_says_so(store: TokenStore) -> None:
    with pytest.raises(TrustError, match="has no token 'nosuchid'"):
        store.revoke("nosuchid", NOW)


# A running server.


def test_a_running_server_sees_what_another_process_changes(store: TokenStore) -> None:
    server = TokenStore(store.path.parent)
    server.load()
    assert not server.reload_if_changed()
    new = store.create(["*"], None, NOW)
    assert server.reload_if_changed() and not server.reload_if_changed()
    grant = server.verify(new.secret, "a", NOW)
    server.recheck(grant, NOW)
    store.revoke(new.id, NOW)
    assert server.reload_if_changed()
    with pytest.raises(TokenRefused, match="revoked"):
        server.recheck(grant, NOW)


def test_a_token_taken_out_of_the_file_is_unknown(store: TokenStore) -> None:
    new = store.create(["*"], None, NOW)
    grant = store.verify(new.secret, "a", NOW)
    store.path.write_text(json.dumps({"version": 1, "tokens": []}))
    assert store.reload_if_changed()
    with pytest.raises(TokenRefused, match="does not know"):
        store.recheck(grant, NOW)


def test_an_id_that_another_token_took_does_not_hold_the_grant(store: TokenStore) -> None:
    new = store.create(["*"], None, NOW)
    grant = store.verify(new.secret, "a", NOW)
    edit(store.path, lambda entry: entry.update(sha256=hashlib.sha256(b"other").hexdigest()))
    store.reload_if_changed()
    with pytest.raises(TokenRefused, match="does not know"):
        store.recheck(grant, NOW)


def test_a_scope_made_narrower_ends_the_grant(store: TokenStore) -> None:
    grant = store.verify(store.create(["*"], None, NOW).secret, "a", NOW)
    edit(store.path, lambda entry: entry.update(tunnels=["b"]))
    store.reload_if_changed()
    with pytest.raises(TokenRefused, match="not for tunnel a"):
        store.recheck(grant, NOW)


# The file.


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document["tokens"][0])
    path.write_text(json.dumps(document))


def test_the_file_holds_no_secret_and_is_its_owners_alone(store: TokenStore) -> None:
    new = store.create(["*"], None, NOW, note="for Ada")
    text = store.path.read_text()
    assert new.secret not in text and new.secret[13:] not in text
    assert hashlib.sha256(new.secret.encode()).hexdigest() in text
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    for shown in (repr(new), repr(store), repr(store.tokens), repr(store.verify(new.secret, "a", NOW))):
        assert new.secret[13:] not in shown and "sha256" not in shown and "digest" not in shown


def test_what_was_written_is_read_again(store: TokenStore) -> None:
    store.create(["a", "a", "B*"], DAY, NOW, hosts=["*.Example.com"], note="x")
    store.create(["*"], None, NOW)
    store.revoke(store.tokens[0].id, NOW)
    assert [token.state(NOW) for token in store.tokens] == ["revoked", "active"]
    again = TokenStore(store.path.parent)
    again.load()
    assert again.tokens == store.tokens
    assert again.tokens[0].tunnels == ("a", "b*") and again.tokens[0].hosts == ("*.example.com",)


def test_no_file_holds_no_tokens(store: TokenStore) -> None:
    store.load()
    assert store.tokens == () and not store.reload_if_changed()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        '{"tokens": []}',
        '{"version": 2, "tokens": []}',
        '{"version": 1, "tokens": [1]}',
        '{"version": 1, "tokens": [{}]}',
        '{"version": 1, "tokens": {}}',
        b"\xff\xfe",
    ],
)
def test_a_corrupt_file_is_a_clear_error_and_grants_nothing(store: TokenStore, text: str | bytes) -> None:
    new = store.create(["*"], None, NOW)
    grant = store.verify(new.secret, "a", NOW)
    good = store.path.read_bytes()
    store.path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TrustError, match=r"tokens\.json"):
        store.reload_if_changed()
    assert not store.reload_if_changed()  # said once, not each second
    # Not TokenRefused: a client must not be told for good that its token is nothing.
    with pytest.raises(TrustError, match=r"tokens\.json"):
        store.verify(new.secret, "a", NOW)
    with pytest.raises(TrustError, match=r"tokens\.json"):
        store.recheck(grant, NOW)
    with pytest.raises(TrustError):
        TokenStore(store.path.parent).load()
    with pytest.raises(TrustError):
        TokenStore(store.path.parent).create(["*"], None, NOW)  # it would overwrite what can still be saved
    store.path.write_bytes(good)
    assert store.reload_if_changed()
    store.recheck(grant, NOW)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("revoked"),
        lambda entry: entry.pop("expires"),
        lambda entry: entry.update(expires="soon"),
        lambda entry: entry.update(expires=12),
        lambda entry: entry.update(expires="2030-01-01T00:00:00"),
        lambda entry: entry.update(created=None),
        lambda entry: entry.update(id="../x"),
        lambda entry: entry.update(id=["abcdefgh"]),
        lambda entry: entry.update(sha256="00"),
        lambda entry: entry.update(tunnels="*"),
        lambda entry: entry.update(tunnels=[1]),
        lambda entry: entry.update(tunnels=["a.b"]),
        lambda entry: entry.update(hosts=[None]),
        lambda entry: entry.update(note=1),
    ],
)
def test_an_entry_that_cannot_be_understood_spoils_the_file(
    store: TokenStore, change: Callable[[dict[str, Any]], Any]
) -> None:
    store.create(["*"], None, NOW)
    edit(store.path, change)
    with pytest.raises(TrustError, match="entry 1 is not a token"):
        store.load()


def test_an_id_twice_spoils_the_file(store: TokenStore) -> None:
    store.create(["*"], None, NOW)
    document = json.loads(store.path.read_text())
    document["tokens"] *= 2
    store.path.write_text(json.dumps(document))
    with pytest.raises(TrustError, match="entry 2 repeats the id"):
        store.load()


def test_a_file_that_goes_away_ends_nothing_for_good(store: TokenStore) -> None:
    new = store.create(["*"], None, NOW)
    grant = store.verify(new.secret, "a", NOW)
    moved = store.path.rename(store.path.with_suffix(".moved"))
    with pytest.raises(TrustError, match="is gone"):
        store.reload_if_changed()
    assert not store.reload_if_changed()
    with pytest.raises(TrustError, match="is gone"):
        store.recheck(grant, NOW)
    moved.rename(store.path)
    assert store.reload_if_changed()
    store.recheck(grant, NOW)


def test_a_file_that_cannot_be_looked_at_is_read_as_soon_as_it_can(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = store.create(["*"], None, NOW)

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", denied)
        with pytest.raises(TrustError, match="Permission denied"):
            store.reload_if_changed()
    assert store.reload_if_changed()
    store.verify(new.secret, "a", NOW)


def _create_ten(directory: Path) -> None:
    store = TokenStore(directory)
    for _ in range(10):
        store.create(["*"], None, NOW)


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_create_ten, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = TokenStore(tmp_path)
    store.load()
    assert len(store.tokens) == 30


# What is asked for.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"patterns": []}, "at least one"),
        ({"patterns": ["a.b"]}, "tunnel pattern"),
        ({"patterns": [f"a{number}" for number in range(65)]}, "at most 64"),
        ({"hosts": ["*"]}, "host name"),
        ({"hosts": ["127.0.0.1"]}, "address"),
        ({"note": "x" * 201}, "note"),
        ({"note": "\x1b[31m"}, "note"),
        ({"expires": timedelta(0)}, "lasts"),
        ({"expires": timedelta(days=40_000)}, "lasts"),
    ],
)
def test_a_token_that_cannot_be_is_not_made(store: TokenStore, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        store.create(**{"patterns": ["*"], "expires": None, "now": NOW, **arguments})
    assert not store.path.exists()


def test_the_number_of_tokens_is_bounded(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "TOKENS_LIMIT", 1)
    store.create(["*"], None, NOW)
    with pytest.raises(TrustError, match="full"):
        store.create(["*"], None, NOW)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("never", None),
        ("NEVER ", None),
        ("30d", 30 * DAY),
        ("12h", DAY / 2),
        ("90m", timedelta(minutes=90)),
        ("45s", timedelta(seconds=45)),
        ("2w", 14 * DAY),
        ("1d12h", 1.5 * DAY),
    ],
)
def test_durations_are_read(text: str, duration: timedelta | None) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text", ["", "30", "d", "0s", "-1d", "1.5d", "1y", "1 d", "99999999999w", "1" * 5000 + "s", "\u0663d", "1d never"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)
