"""The join string: what goes in comes out, whatever a paste went through, and accidents are told apart."""

import base64
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.trust.join import JoinString, split_address

PIN = bytes(range(32))
TOKEN = "qtk_abcdefgh_" + "s" * 43
JOIN = JoinString("tunnel.example.com:4433", PIN, TOKEN)


@pytest.mark.parametrize(
    ("address", "form", "host", "port"),
    [
        ("Tunnel.Example.com.:4433", "tunnel.example.com:4433", "tunnel.example.com", 4433),
        ("127.0.0.1:1", "127.0.0.1:1", "127.0.0.1", 1),
        ("[::0001]:65535", "[::1]:65535", "::1", 65535),
    ],
)
def test_what_goes_in_comes_out(address: str, form: str, host: str, port: int) -> None:
    join = JoinString.parse(JoinString(address, PIN, TOKEN).encode())
    assert (join.address, join.host, join.port) == (form, host, port)
    assert (join.ca_pin, join.token) == (PIN, TOKEN)


@given(st.binary(min_size=32, max_size=32), st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_any_pin_and_token_come_out(pin: bytes, token: str) -> None:
    join = JoinString("localhost:4433", pin, token)
    assert JoinString.parse(join.encode()) == join
    assert re.fullmatch("qt1_[A-Za-z0-9_-]+", join.encode())


@pytest.mark.parametrize("wrap", ["  {}\n", "'{}'", '"{}"\r\n', "`{}`", "\u201c{}\u201d", "\ufeff{}\u200b\u00a0"])
def test_what_surrounds_a_paste_does_not_matter(wrap: str) -> None:
    assert JoinString.parse(wrap.format(JOIN.encode())) == JOIN


def test_line_breaks_of_a_narrow_terminal_do_not_matter() -> None:
    text = JOIN.encode()
    assert JoinString.parse("\r\n  ".join(text[at : at + 40] for at in range(0, len(text), 40))) == JOIN


def test_a_paste_that_lost_its_end_is_incomplete_at_every_length() -> None:
    text = JOIN.encode()
    for length in range(len(text)):
        with pytest.raises(ValueError, match="incomplete"):
            JoinString.parse(text[:length])


def test_a_wrong_character_is_noticed_wherever_it_is() -> None:
    text = JOIN.encode()
    for at in range(len("qt1_"), len(text)):
        wrong = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        with pytest.raises(ValueError, match=r"damaged|incomplete|behind its end"):
            JoinString.parse(wrong)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (JOIN.encode() + "AAAA", "behind its end"),
        (JOIN.encode().replace("qt1_", "qt2_"), "another version"),
        (TOKEN, "this is a token"),
        ("hello", "does not begin with qt1_"),
        (JOIN.encode()[:20] + "%" + JOIN.encode()[20:], "position 21"),
        ("qt1_" + "A" * 5000, "too long"),
        ("", "incomplete"),
    ],
)
def test_other_accidents_are_told_apart(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        JoinString.parse(text)


@given(st.one_of(st.text(), st.binary().map(lambda data: "qt1_" + base64.urlsafe_b64encode(data).decode())))
def test_garbage_gives_a_value_error_and_nothing_else(text: str) -> None:
    with pytest.raises(ValueError):
        JoinString.parse(text)


def test_a_right_checksum_over_wrong_parts_is_refused() -> None:
    for body in (
        b"",
        b"\x00" + PIN + b"t",
        b"\xff" + PIN,
        b"\x04a:\xff1" + PIN + b"t",
        b"\x0blocalhost:0" + PIN + b"t",
    ):
        data = hashlib.sha256(b"qt1_" + body).digest()[:4] + body
        text = "qt1_" + base64.urlsafe_b64encode(len(data).to_bytes(2) + data).decode().rstrip("=")
        with pytest.raises(ValueError, match="was not made by quictunnel"):
            JoinString.parse(text)


def test_no_message_and_no_repr_holds_the_token() -> None:
    assert TOKEN not in repr(JOIN) and TOKEN[13:] not in str(JOIN)
    for text in (TOKEN, TOKEN[4:], "qt1_" + TOKEN, JOIN.encode()[:-1], JOIN.encode() + "!"):
        with pytest.raises(ValueError) as error:
            JoinString.parse(text)
        assert "sss" not in str(error.value) and error.value.__context__ is None


@pytest.mark.parametrize(
    "address",
    ["", "localhost", ":1", "localhost:", "localhost:0", "localhost:65536", "localhost:\u0661", "localhost:-1", "a b:1",
     "::1:4433", "[127.0.0.1]:1", "[localhost]:1", "[::1]", "[fe80::1%eth0]:1", "localhost:000001"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError):
        split_address(address)
    with pytest.raises(ValueError):
        JoinString(address, PIN, TOKEN)


@pytest.mark.parametrize(
    ("pin", "token"), [(b"", TOKEN), (PIN + b"x", TOKEN), (PIN, ""), (PIN, "a\n"), (PIN, "ü"), (PIN, "x" * 513)]
)
def test_a_pin_or_token_that_cannot_be_is_refused(pin: bytes, token: str) -> None:
    with pytest.raises(ValueError):
        JoinString("localhost:1", pin, token)
