import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.wire.fields import (
    HOP_BY_HOP,
    Forwarding,
    content_length,
    end_to_end,
    field_lines,
    forward_once,
    is_token,
    members,
    parse_host,
    trailer_fields,
    tunnel_name,
    upgrade_protocols,
)
from quictunnel.wire.frames import Fields

ACCEPT = (b"accept", b"*/*")

# Tokens and lines


@pytest.mark.parametrize("name", [b"a", b"X-Y", b"!#$%&'*+-.^_`|~", b"0"])
def test_a_token_is_a_token(name: bytes) -> None:
    assert is_token(name)


@pytest.mark.parametrize("name", [b"", b"a b", b"a:", b"a\r", b"(", b"\x00", b"\xc3", b'"', b"a/b", b"@"])
def test_anything_else_is_no_token(name: bytes) -> None:
    assert not is_token(name)


def test_lines_keep_order_repeats_and_bytes() -> None:
    fields = [(b"set-cookie", b"a=1"), (b"x", b"\xe9\t "), (b"set-cookie", b"b=2"), (b"empty", b"")]
    assert field_lines(fields) == b"set-cookie: a=1\r\nx: \xe9\t \r\nset-cookie: b=2\r\nempty: \r\n"
    assert field_lines([]) == b""


@pytest.mark.parametrize("byte", [b for b in range(256) if (b < 0x20 and b != 9) or b == 0x7F])
def test_a_control_byte_in_a_value_is_refused(byte: int) -> None:
    with pytest.raises(ValueError, match="value"):
        field_lines([ACCEPT, (b"x", b"a%cb" % byte)])


@pytest.mark.parametrize("name", [b"", b"a b", b"a:b", b"a\r\nb", b"a\x00", b":status", b"\xe9", b"Content-Length"])
def test_a_name_that_is_no_lower_case_token_is_refused(name: bytes) -> None:
    with pytest.raises(ValueError, match="name"):
        field_lines([(name, b"x"), ACCEPT])


@given(st.lists(st.tuples(st.binary(max_size=6), st.binary(max_size=12))))
def test_what_is_not_refused_has_one_line_a_field(fields: Fields) -> None:
    try:
        lines = field_lines(fields)
    except ValueError:
        return
    assert lines.count(b"\n") == lines.count(b"\r") == len(fields)
    assert [tuple(line.split(b": ", 1)) for line in lines.split(b"\r\n")[:-1]] == fields


# End to end


@pytest.mark.parametrize("name", sorted(HOP_BY_HOP))
def test_a_hop_by_hop_field_goes_no_further(name: bytes) -> None:
    assert end_to_end([ACCEPT, (name, b"x"), (b"b", b"")]) == [ACCEPT, (b"b", b"")]


@pytest.mark.parametrize(
    ("connection", "left"),
    [
        ([b"x-a"], [b"x-b", b"x-c"]),
        ([b"X-A, close ,\tx-B"], [b"x-c"]),
        ([b"x-a", b"x-c"], [b"x-b"]),
        ([b",,"], [b"x-a", b"x-b", b"x-c"]),
        ([b"keep-alive"], [b"x-a", b"x-b", b"x-c"]),
        ([b"Upgrade"], [b"x-a", b"x-b", b"x-c"]),
        ([b""], [b"x-a", b"x-b", b"x-c"]),
    ],
)
def test_what_connection_names_goes_no_further(connection: list[bytes], left: list[bytes]) -> None:
    fields = [(b"x-a", b"1"), *((b"connection", value) for value in connection), (b"x-b", b"2"), (b"x-c", b"3")]
    assert [name for name, _ in end_to_end(fields)] == left


def test_connection_cannot_take_away_the_length() -> None:
    length = (b"content-length", b"5")
    assert end_to_end([(b"connection", b"content-length"), length]) == [length]


@pytest.mark.parametrize("te", [b"trailers", b"gzip, Trailers", b"trailers ,deflate;q=0.5"])
def test_te_says_trailers_and_no_more(te: bytes) -> None:
    assert end_to_end([(b"te", te), (b"connection", b"TE")]) == [(b"te", b"trailers")]


def test_te_without_trailers_goes_no_further() -> None:
    assert end_to_end([(b"te", b"gzip;q=1")]) == []


@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"b", b"te", b"connection"]), st.sampled_from([b"a", b"b", b"", b"x"])))
)
def test_end_to_end_is_stable(fields: Fields) -> None:
    once = end_to_end(fields)
    assert end_to_end(once) == once


def test_trailers_carry_nothing_that_frames_routes_or_claims() -> None:
    names = [b"content-length", b"transfer-encoding", b"host", b"x-forwarded-for", b"x_forwarded_for", b"authorization"]
    names += [b"x-forwarded-user", b"x_forwarded_user"]
    assert trailer_fields([*((name, b"x") for name in names), (b"grpc-status", b"0")]) == [(b"grpc-status", b"0")]


def test_members_join_lines_and_leave_out_empty_ones() -> None:
    fields = [(b"upgrade", b"a, b"), ACCEPT, (b"upgrade", b",c\t,")]
    assert members(fields, b"upgrade") == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"websocket", [b"websocket"]),
        (b"a/1,, B ,\tc/2.0", [b"a/1", b"B", b"c/2.0"]),
        (b"h2c", []),
        (b"H2C, websocket, h2/1, h2", [b"websocket"]),
        (b'"h2c", h2c x, h2c;q=1, a/b/c, a/, /a, a@b, a\x00, \r\n', []),
        (b"h2cx", [b"h2cx"]),
        (b"", []),
    ],
)
def test_protocols_are_tokens_and_never_http_2(value: bytes, expected: list[bytes]) -> None:
    assert upgrade_protocols(value) == expected


def test_max_forwards_is_counted_down() -> None:
    assert forward_once([ACCEPT]) == [ACCEPT]
    assert forward_once([(b"max-forwards", b"010"), ACCEPT]) == [(b"max-forwards", b"9"), ACCEPT]
    assert forward_once([(b"max-forwards", b"0")]) is None


@pytest.mark.parametrize("value", [b"", b"-1", b"+1", b"1.0", b"x", b"\xb2", b"1" * 19])
def test_max_forwards_that_is_no_number_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="Max-Forwards"):
        forward_once([(b"max-forwards", value)])


def test_two_max_forwards_are_refused() -> None:
    with pytest.raises(ValueError, match="Max-Forwards"):
        forward_once([(b"max-forwards", b"1")] * 2)


# Lengths


def test_a_length_is_its_digits() -> None:
    assert content_length([ACCEPT]) is None
    assert content_length([(b"content-length", b"0")]) == 0
    assert content_length([(b"content-length", b"0012")]) == 12
    assert content_length([(b"content-length", b"9" * 18)]) == 10**18 - 1


@pytest.mark.parametrize(
    "value",
    [b"", b"+5", b"-5", b"0x5", b"5,5", b"5, 5", b" 5", b"5 ", b"5.0", b"1_0", b"five", b"9" * 19, b"\xb2", b"5\x00"],
)
def test_a_malformed_length_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="Content-Length"):
        content_length([(b"content-length", value)])


@pytest.mark.parametrize("second", [b"5", b"6"])
def test_two_lengths_are_refused(second: bytes) -> None:
    with pytest.raises(ValueError, match="more than one"):
        content_length([(b"content-length", b"5"), (b"content-length", second)])


# Hosts


@pytest.mark.parametrize(
    ("value", "host", "port"),
    [
        (b"example.com", "example.com", None),
        (b"EXAMPLE.com:8080", "example.com", 8080),
        (b"example.com.", "example.com", None),
        (b"example.com.:1", "example.com", 1),
        (b"example.com:", "example.com", None),
        (b"a_b.c-d", "a_b.c-d", None),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example", None),
        (b"127.0.0.1:80", "127.0.0.1", 80),
        (b"[::1]", "[::1]", None),
        (b"[0:0::1]:65535", "[::1]", 65535),
        (b"[2001:DB8::A]:", "[2001:db8::a]", None),
        (b"[::ffff:192.0.2.1]", "[::ffff:c000:201]", None),
    ],
)
def test_a_host_has_one_form(value: bytes, host: str, port: int | None) -> None:
    found, number = parse_host(value)
    if "ffff" in host:
        assert ipaddress.ip_address(found[1:-1]) == ipaddress.ip_address(host[1:-1])
    else:
        assert found == host
    assert number == port


@pytest.mark.parametrize(
    "value",
    [
        *b":80 . a..b .a a.-b -a a- a,b a/b a@b user@a a?b a#b a:80:80 a:-1 a:+1 a:0x50 a:65536 a:123456 a:8a".split(),
        *rb"a%41 a\b [ [] [::1 ::1 [::1]a [::1]:x [::1%eth0] [v1.a] [g::] [127.0.0.1] a.. *".split(),
        *(b"", b"a b", b"a: 80", b" a", b"a ", b"\xc3\xa9", b"a\x00", b"a" * 254),
    ],
)
def test_a_malformed_host_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="malformed"):
        parse_host(value)


@given(st.binary(max_size=24))
def test_a_host_is_taken_or_refused(value: bytes) -> None:
    try:
        host, _ = parse_host(value)
    except ValueError:
        return
    assert host == host.lower()
    assert parse_host(host.encode()) == (host, None)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("app.example.com", "app"),
        ("example.com", None),
        ("a.b.example.com", "a.b"),
        ("app.example.org", None),
        ("appexample.com", None),
        ("[::1]", None),
    ],
)
def test_a_tunnels_name_is_what_stands_before_the_domain(host: str, name: str | None) -> None:
    assert tunnel_name(host, "example.com") == name


# Forwarding


def test_a_stranger_is_described_and_its_claims_are_gone() -> None:
    claims = (
        b"x-forwarded-for x-forwarded-host x-forwarded-proto x-forwarded-port forwarded x-real-ip via proxy-status "
        b"host x-tunnel-session x_forwarded_for x-forwarded_for content_length transfer_encoding x_real_ip keep_alive "
        b"x-forwarded x-forwarded-user x-forwarded-client-cert x_forwarded_user x-forwarded_user x_forwarded-user"
    ).split()
    forwarding = Forwarding("192.0.2.7", b"https", trusted=False)
    assert forwarding.client == "192.0.2.7"
    fields = [ACCEPT, *((name, b"spoof") for name in claims), (b"my_own", b"1")]
    assert forwarding.apply(fields, b"a.example:8443") == [
        ACCEPT,
        (b"my_own", b"1"),
        (b"x-forwarded-for", b"192.0.2.7"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-host", b"a.example:8443"),
        (b"forwarded", b'for=192.0.2.7;host="a.example:8443";proto=https'),
        (b"via", b"1.1 quictunnel"),
    ]


def test_each_request_is_described_by_its_own_authority() -> None:
    forwarding = Forwarding("192.0.2.7", b"http", trusted=False)
    for authority in (b"a", b"b", b"a"):
        assert dict(forwarding.apply([], authority))[b"x-forwarded-host"] == authority


def test_an_old_visitor_without_a_host_has_none_said_of_it() -> None:
    found = Forwarding("192.0.2.7", b"http", trusted=False).apply([], b"", b"1.0")
    assert found == [
        (b"x-forwarded-for", b"192.0.2.7"),
        (b"x-forwarded-proto", b"http"),
        (b"forwarded", b"for=192.0.2.7;proto=http"),
        (b"via", b"1.0 quictunnel"),
    ]


@pytest.mark.parametrize(
    ("address", "client", "node"),
    [
        ("2001:db8::1", "2001:db8::1", b'for="[2001:db8::1]"'),
        ("fe80::1%eth0", "fe80::1", b'for="[fe80::1]"'),
        ("::ffff:192.0.2.1", "192.0.2.1", b"for=192.0.2.1"),
        ("", "unknown", b"for=unknown"),
    ],
)
def test_an_address_is_written_as_rfc_7239_has_it(address: str, client: str, node: bytes) -> None:
    found = dict(Forwarding(address, b"http", trusted=False).apply([], b""))
    assert found[b"x-forwarded-for"] == client.encode()
    assert found[b"forwarded"].split(b";")[0] == node


def test_a_trusted_proxy_is_believed_and_added() -> None:
    told = [
        (b"x-forwarded-for", b"203.0.113.9"),
        (b"x-forwarded-for", b"198.51.100.1"),
        (b"x-forwarded-proto", b"https"),
        (b"forwarded", b"for=203.0.113.9"),
        (b"via", b"2 front"),
        (b"x-real-ip", b"203.0.113.9"),
        (b"x-forwarded-user", b"someone"),
        (b"x_forwarded_for", b"spoof"),
        (b"x-forwarded_user", b"spoof"),
        (b"x-tunnel-session", b"app"),
    ]
    found = Forwarding("192.0.2.7", b"http", trusted=True).apply(told, b"a.example")
    assert sorted(found) == [
        (b"forwarded", b'for=203.0.113.9, for=192.0.2.7;host="a.example";proto=http'),
        (b"via", b"2 front, 1.1 quictunnel"),
        (b"x-forwarded-for", b"203.0.113.9, 198.51.100.1, 192.0.2.7"),
        (b"x-forwarded-host", b"a.example"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-user", b"someone"),
        (b"x-real-ip", b"203.0.113.9"),
    ]


def test_a_trusted_proxy_that_says_nothing_is_described() -> None:
    stranger, trusted = (
        Forwarding("192.0.2.7", b"http", trusted=trusted).apply([ACCEPT], b"a") for trusted in (False, True)
    )
    assert sorted(trusted) == sorted(stranger)
