"""The CA and what it signs: sane, renewed in time, and taken by both QUIC libraries for names and for addresses."""

import hashlib
import importlib
import os
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from quictunnel.trust.certificates import (
    Issuer,
    TrustError,
    authority_pin,
    check_pair,
    describe,
    diagnose,
    ensure_authority,
    ensure_server_certificate,
    init,
    issue,
    load_authorities,
    show,
)
from quictunnel.trust.pins import pinned_authority

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY = timedelta(days=1)
NAMES = ["localhost", "127.0.0.1", "::1", "*.tunnel.example.com"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def extension(certificate: x509.Certificate, kind: type[Any]) -> Any:
    return certificate.extensions.get_extension_for_class(kind).value


# What is made.


def test_a_ca_signs_certificates_and_nothing_beneath_it_does(directory: Path) -> None:
    ca = load(init(directory, common_name="My CA", now=NOW))
    assert ca.subject == ca.issuer and ca.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "My CA"
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = extension(ca, x509.KeyUsage)
    assert usage.key_cert_sign and not usage.digital_signature
    assert ca.not_valid_after_utc - ca.not_valid_before_utc == 3650 * DAY
    assert ca.not_valid_before_utc < NOW
    key = ca.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def test_a_server_certificate_is_for_its_names_and_for_servers_only(directory: Path) -> None:
    ca = load(init(directory, now=NOW))
    leaf = load(issue(directory, [*NAMES, "LOCALHOST.", "[::1]"], now=NOW).certificate)
    assert describe(leaf, NOW).names == ("localhost", "127.0.0.1", "::1", "*.tunnel.example.com")
    assert extension(leaf, x509.ExtendedKeyUsage) == x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    assert extension(leaf, x509.BasicConstraints).ca is False
    usage = extension(leaf, x509.KeyUsage)
    assert usage.digital_signature and not usage.key_cert_sign
    identifier = extension(leaf, x509.AuthorityKeyIdentifier).key_identifier
    assert identifier == extension(ca, x509.SubjectKeyIdentifier).digest
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == 90 * DAY
    leaf.verify_directly_issued_by(ca)


def test_files_are_their_owners_alone(directory: Path) -> None:
    init(directory, now=NOW)
    paths = issue(directory, NAMES, now=NOW)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for name in os.listdir(directory):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600, name
    assert paths.key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")


def test_a_ca_is_never_replaced(directory: Path) -> None:
    path = init(directory, now=NOW)
    before = path.read_bytes(), path.with_suffix(".key").read_bytes()
    with pytest.raises(TrustError, match=r"ca\.pem is already there"):
        init(directory, now=NOW)
    assert ensure_authority(directory, NOW) == (path, False)
    assert (path.read_bytes(), path.with_suffix(".key").read_bytes()) == before


def test_a_key_that_a_crash_left_alone_becomes_the_cas(directory: Path) -> None:
    path = init(directory, now=NOW)
    key = path.with_suffix(".key").read_bytes()
    path.unlink()
    assert ensure_authority(directory, NOW) == (path, True)
    assert path.with_suffix(".key").read_bytes() == key
    issue(directory, NAMES, now=NOW)


def test_a_certificate_never_outlives_its_ca(directory: Path) -> None:
    ca = load(init(directory, days=10, now=NOW))
    leaf = load(issue(directory, NAMES, days=90, now=NOW).certificate)
    assert leaf.not_valid_after_utc == ca.not_valid_after_utc


def test_out_goes_where_it_is_told_and_never_over_the_ca(directory: Path, tmp_path: Path) -> None:
    init(directory, now=NOW)
    paths = issue(directory, NAMES, out=tmp_path / "new" / "web.crt", now=NOW)
    assert paths == (tmp_path / "new" / "web.crt", tmp_path / "new" / "web.key")
    check_pair(*paths, NOW)
    for bad in ("ca.pem", "ca.crt", "x.key"):
        with pytest.raises(ValueError, match="overwritten"):
            issue(directory, NAMES, out=directory / bad, now=NOW)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "1 to 100 names"),
        ([f"a{number}.example.com" for number in range(101)], "1 to 100 names"),
        ([f"{'x' * 60}.{'x' * 60}.{number}.example.com" for number in range(100)], "too many"),
        (["*.localhost"], "too wide"),
        (["*"], "host name"),
        (["a.*.example.com"], "host name"),
        (["0.0.0.0"], "stands for every address"),
        (["::"], "stands for every address"),
        (["fe80::1%eth0"], "network interface"),
        (["1.2.3.400"], "last part is a number"),
        (["bücher.example"], "xn--"),
        (["a b"], "host name"),
        ([""], "host name"),
    ],
)
def test_a_name_that_no_client_could_dial_is_refused(directory: Path, names: list[str], says: str) -> None:
    init(directory, now=NOW)
    with pytest.raises(ValueError, match=says):
        issue(directory, names, now=NOW)
    assert not (directory / "server.pem").exists()


@pytest.mark.parametrize("days", [0, -1, 398])
def test_a_lifetime_that_browsers_refuse_is_refused(directory: Path, days: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 397"):
        issue(directory, NAMES, days=days, now=NOW)


@pytest.mark.parametrize("arguments", [{"days": 0}, {"days": 36_501}, {"common_name": ""}, {"common_name": "x" * 65}])
def test_a_ca_that_cannot_be_is_not_made(directory: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        init(directory, now=NOW, **arguments)
    assert not directory.exists()


def test_a_certificate_for_one_name_stays_in_memory(directory: Path) -> None:
    ca = load(init(directory, now=NOW))
    before = {path: path.read_bytes() for path in directory.iterdir()}
    issuer = Issuer(directory, NOW)
    pem = issuer.issue("app.localhost", NOW)
    leaf = x509.load_pem_x509_certificate(pem)
    leaf.verify_directly_issued_by(ca)
    assert describe(leaf, NOW).names == ("app.localhost",)
    assert extension(leaf, x509.ExtendedKeyUsage) == x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    assert leaf.not_valid_before_utc < NOW < leaf.not_valid_after_utc == leaf.not_valid_before_utc + 90 * DAY
    key = load_pem_private_key(pem, None)
    assert key.public_key() == leaf.public_key()
    assert issuer.issue("app.localhost", NOW) != pem, "no key is for two certificates"
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_a_certificate_in_memory_never_outlives_its_ca(directory: Path) -> None:
    ca = load(init(directory, days=10, now=NOW))
    leaf = x509.load_pem_x509_certificate(Issuer(directory, NOW).issue("app.localhost", NOW))
    assert leaf.not_valid_after_utc == ca.not_valid_after_utc


@pytest.mark.parametrize("name", ["", "a b", "*.localhost", "a..b"])
def test_no_certificate_is_made_for_what_is_no_name(directory: Path, name: str) -> None:
    init(directory, now=NOW)
    with pytest.raises(ValueError):
        Issuer(directory, NOW).issue(name, NOW)


def test_an_issuer_without_a_ca_is_told(directory: Path) -> None:
    with pytest.raises(TrustError, match=r"ca\.pem"):
        Issuer(directory, NOW)


# Renewal.


def test_the_first_run_makes_everything_and_the_next_nothing(directory: Path) -> None:
    first = ensure_server_certificate(directory, NAMES, NOW)
    assert first.changed and first.reason == "there is none"
    assert first.pin == authority_pin(load(first.authority))
    check_pair(first.certificate, first.key, NOW)
    content = first.certificate.read_bytes()
    again = ensure_server_certificate(directory, NAMES, NOW + 59 * DAY)
    assert not again.changed and again.reason == "" and again.pin == first.pin
    assert first.certificate.read_bytes() == content


def test_less_than_a_third_of_its_life_left_renews_it_under_the_same_ca(directory: Path) -> None:
    first = ensure_server_certificate(directory, NAMES, NOW)
    again = ensure_server_certificate(directory, ["localhost"], NOW + 61 * DAY)
    assert again.changed and again.reason == "the present one has 28 days left" and again.pin == first.pin
    leaf = load(again.certificate)
    assert leaf.not_valid_after_utc > NOW + 150 * DAY
    assert set(describe(leaf, NOW).names) == set(NAMES)  # a renewal takes no name away
    assert ensure_server_certificate(directory, NAMES, NOW + 300 * DAY).reason == "the present one has expired"


def test_a_name_that_is_not_covered_issues_anew(directory: Path) -> None:
    ensure_server_certificate(directory, ["localhost", "*.example.com"], NOW)
    assert not ensure_server_certificate(directory, ["a.example.com"], NOW).changed
    again = ensure_server_certificate(directory, ["example.com", "a.b.example.com"], NOW)
    assert again.changed and again.reason == "the present one is not for example.com, a.b.example.com"
    assert not ensure_server_certificate(directory, ["localhost", "example.com", "*.example.com"], NOW).changed


def test_one_that_ends_with_its_ca_is_not_renewed_again_and_again(directory: Path) -> None:
    init(directory, days=10, now=NOW)
    assert ensure_server_certificate(directory, NAMES, NOW).changed
    assert not ensure_server_certificate(directory, NAMES, NOW + 9 * DAY).changed
    with pytest.raises(TrustError, match=r"the CA .* expired on 2030-01-12"):
        ensure_server_certificate(directory, NAMES, NOW + 11 * DAY)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / "server.key").unlink(), "there is none"),
        (lambda path: (path / "server.pem").write_text("garbage"), "not a PEM certificate"),
        (lambda path: (path / "server.key").write_text("garbage"), "not a PEM private key"),
        (lambda path: (path / "ca.key").replace(path / "server.key"), "do not belong together"),
        (lambda path: [(path / "ca.pem").unlink(), (path / "ca.key").unlink()], "is of another CA"),
    ],
)
def test_one_that_cannot_be_used_is_issued_anew(directory: Path, spoil: Callable[[Path], object], reason: str) -> None:
    ensure_server_certificate(directory, NAMES, NOW)
    key = (directory / "ca.key").read_bytes()
    spoil(directory)
    if not (directory / "ca.key").exists() and (directory / "ca.pem").exists():
        (directory / "ca.key").write_bytes(key)
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    assert ensured.changed and reason in ensured.reason
    check_pair(ensured.certificate, ensured.key, NOW)


def test_a_clock_that_was_ahead_is_put_right(directory: Path) -> None:
    init(directory, now=NOW)
    ensure_server_certificate(directory, NAMES, NOW + 100 * DAY)
    assert ensure_server_certificate(directory, NAMES, NOW).reason == "the present one is not valid yet"


# What cannot be used is told what, where, and what to do.


def test_a_good_pair_is_described(directory: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    assert check_pair(ensured.certificate, ensured.key, NOW).days_left == 89


def test_a_key_of_another_certificate_is_told(directory: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    with pytest.raises(TrustError, match=r"the key .*ca\.key does not belong to the certificate .*server\.pem"):
        check_pair(ensured.certificate, directory / "ca.key", NOW)


@pytest.mark.parametrize(("when", "says"), [(NOW + 91 * DAY, "expired on 2030-04-02"), (NOW - DAY, "not valid before")])
def test_a_certificate_out_of_its_time_is_told(directory: Path, when: datetime, says: str) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    with pytest.raises(TrustError, match=says):
        check_pair(ensured.certificate, ensured.key, when)


def test_a_file_that_is_not_what_it_should_be_is_told(directory: Path, tmp_path: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    pem, key = ensured.certificate, ensured.key
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for arguments, says in [
        ((garbage, key), "not a PEM certificate"),
        ((key, key), "not a PEM certificate"),
        ((tmp_path / "none", key), "there is no certificate"),
        ((tmp_path, key), "Is a directory"),
        ((pem, pem), "not a PEM private key"),
        ((pem, tmp_path / "none"), "there is no key"),
    ]:
        with pytest.raises(TrustError, match=says):
            check_pair(*arguments, NOW)


def test_a_key_with_a_password_is_told(directory: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    key = load_pem_private_key(ensured.key.read_bytes(), None)
    ensured.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")))
    with pytest.raises(TrustError, match="has a password"):
        check_pair(ensured.certificate, ensured.key, NOW)


def test_a_kind_of_key_that_not_every_library_takes_is_told(directory: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    key = ed25519.Ed25519PrivateKey.generate()
    ensured.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(TrustError, match="neither ECDSA nor RSA"):
        check_pair(ensured.certificate, ensured.key, NOW)


def test_what_is_no_ca_signs_nothing(directory: Path, tmp_path: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    (tmp_path / "ca.pem").write_bytes(ensured.certificate.read_bytes())
    (tmp_path / "ca.key").write_bytes(ensured.key.read_bytes())
    with pytest.raises(TrustError, match="is not a CA certificate"):
        issue(tmp_path, NAMES, now=NOW)
    (tmp_path / "ca.pem").write_bytes(ensured.authority.read_bytes())
    with pytest.raises(TrustError, match="does not belong to"):
        issue(tmp_path, NAMES, now=NOW)


def test_a_ca_without_an_identifier_is_told(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plain")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + DAY)
    plain = builder.add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256())
    (tmp_path / "ca.pem").write_bytes(plain.public_bytes(Encoding.PEM))
    (tmp_path / "ca.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(TrustError, match="no subject key identifier"):
        issue(tmp_path, NAMES, now=NOW)


def test_a_certificate_without_extensions_is_of_no_ca_and_for_no_name(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plain")])
    plain = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + DAY).sign(key, None)
    description = describe(plain, NOW, [plain])
    assert (description.kind, description.names, description.days_left) == ("server", (), 1)


def test_authorities_are_the_present_ones_of_a_bundle(directory: Path, tmp_path: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    old = init(tmp_path / "old", days=1, now=NOW - 5 * DAY)
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(ensured.certificate.read_bytes() + old.read_bytes() + ensured.authority.read_bytes())
    assert load_authorities(bundle, NOW) == ensured.authority.read_bytes()
    with pytest.raises(TrustError, match=r"the CA certificate .* expired"):
        load_authorities(old, NOW)
    with pytest.raises(TrustError, match=r"holds no CA certificate; give the server's ca\.pem"):
        load_authorities(ensured.certificate, NOW)


# The pin.


def sha256_of(pem: bytes) -> bytes:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).digest()


def test_only_the_pinned_certificate_is_taken_from_a_stranger(directory: Path, tmp_path: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    mine, other = ensured.authority.read_bytes(), init(tmp_path / "other", now=NOW).read_bytes()
    assert pinned_authority(mine, ensured.pin, NOW) == mine
    assert pinned_authority(other + mine + b"junk", ensured.pin, NOW) == mine
    for pem, pin, when, says in [
        (other, ensured.pin, NOW, "not the one in the join string"),
        (mine, b"", NOW, "not the one in the join string"),
        (b"", ensured.pin, NOW, "sent no CA"),
        (b"\xff" * 100, ensured.pin, NOW, "sent no CA"),
        (mine, ensured.pin, NOW + 4000 * DAY, "expired"),
        (mine.replace(b"MII", b"MIJ", 1), sha256_of(mine.replace(b"MII", b"MIJ", 1)), NOW, "not a CA's"),
        (ensured.certificate.read_bytes(), authority_pin(load(ensured.certificate)), NOW, "not a CA's"),
    ]:
        with pytest.raises(TrustError, match=says):
            pinned_authority(pem, pin, when)


# What is shown.


def test_show_describes_a_directory_with_the_pin_of_its_ca(directory: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    ca, server = show(directory, NOW)
    assert (ca.kind, server.kind) == ("authority", "server")
    assert ca.pin == server.pin == ensured.pin
    assert ca.fingerprint.replace(":", "").lower() == ensured.pin.hex()
    assert show(ensured.certificate, NOW)[0].pin is None
    text = str(server)
    for part in ("server certificate", "localhost, 127.0.0.1, ::1", "89 days left", ensured.pin.hex()):
        assert part in text
    assert "EXPIRED" in str(show(ensured.certificate, NOW + 100 * DAY)[0])


def test_show_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="certs init"):
        show(tmp_path)
    with pytest.raises(TrustError, match="there is no certificate"):
        show(tmp_path / "none.pem")


# Real handshakes, in memory, on each pair of QUIC libraries.

SERVER, CLIENT = ("127.0.0.1", 4433), ("127.0.0.1", 50_000)
BAD_CERTIFICATE, CERTIFICATE_EXPIRED = 0x100 + 42, 0x100 + 45  # RFC 9001 section 4.8, RFC 8446 section 6


@dataclass
class Outcome:
    completed: bool
    error: int | None
    reason: str
    certificate: bytes
    "DER, as the client has it even when it refused it"


def handshake(engines: tuple[str, str], directory: Path, host: str, authorities: bytes) -> Outcome:
    server_module, client_module = (importlib.import_module(f"{name}.quic.connection") for name in engines)
    configurations = [importlib.import_module(f"{name}.quic.configuration").QuicConfiguration for name in engines]
    server_options = configurations[0](is_client=False, alpn_protocols=["quictunnel/1"])
    server_options.load_cert_chain(str(directory / "server.pem"), str(directory / "server.key"))
    client_options = configurations[1](is_client=True, alpn_protocols=["quictunnel/1"], server_name=host)
    client_options.load_verify_locations(cadata=authorities)
    client = client_module.QuicConnection(configuration=client_options)
    client.connect(SERVER, now=0.0)
    original = client.original_destination_connection_id
    retry = _retry(client) if engines[0] == "qh3" else None
    server = server_module.QuicConnection(
        configuration=server_options, original_destination_connection_id=original, retry_source_connection_id=retry
    )
    return _converse(server, client)


def _retry(client: Any) -> bytes:
    """Validate the client's address first: qh3's server cannot answer all first flights otherwise."""
    from aioquic.buffer import Buffer
    from aioquic.quic.packet import encode_quic_retry, pull_quic_header

    first, _ = client.datagrams_to_send(now=0.0)[0]
    header = pull_quic_header(Buffer(data=bytes(first)), host_cid_length=8)
    packet = encode_quic_retry(
        version=1,
        source_cid=b"\x01" * 8,
        destination_cid=header.source_cid,
        original_destination_cid=header.destination_cid,
        retry_token=b"token",
    )
    client.receive_datagram(packet, SERVER, now=0.0)
    return b"\x01" * 8


def _converse(server: Any, client: Any) -> Outcome:
    now, completed, terminated = 0.0, {server: False, client: False}, None
    for turn in range(40):
        now += 0.005 if turn < 10 else 0.5  # first the round trips, then until closing has timed out
        for data, _ in client.datagrams_to_send(now=now):
            server.receive_datagram(bytes(data), CLIENT, now=now)
        for data, _ in server.datagrams_to_send(now=now):
            client.receive_datagram(bytes(data), SERVER, now=now)
        for end in (server, client):
            if (timer := end.get_timer()) is not None and timer <= now:
                end.handle_timer(now=now)
            while (event := end.next_event()) is not None:
                completed[end] |= type(event).__name__ == "HandshakeCompleted"
                if end is client and type(event).__name__ == "ConnectionTerminated":
                    terminated = event
        if all(completed.values()) or terminated:
            break
    peer = client.tls._peer_certificate
    der = peer.public_bytes(Encoding.DER) if isinstance(peer, x509.Certificate) else bytes(peer.public_bytes())
    if terminated is None:
        return Outcome(all(completed.values()), None, "", der)
    return Outcome(all(completed.values()), int(terminated.error_code), terminated.reason_phrase, der)


@pytest.fixture
def today() -> datetime:
    """The libraries look at the clock themselves."""
    return datetime.now(UTC)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "a.tunnel.example.com"])
def test_a_client_takes_the_certificate_for_names_and_addresses(
    engines: tuple[str, str], directory: Path, today: datetime, host: str
) -> None:
    ensured = ensure_server_certificate(directory, NAMES, today)
    outcome = handshake(engines, directory, host, ensured.authority.read_bytes())
    assert outcome.completed, outcome


@pytest.mark.parametrize(
    ("host", "age", "other_ca", "says"),
    [
        ("wrong.example.com", 0, False, "is for localhost, 127.0.0.1, ::1"),
        ("127.0.0.2", 0, False, "not for 127.0.0.2"),
        ("a.b.tunnel.example.com", 0, False, "not for a.b.tunnel.example.com"),
        ("localhost", 0, True, "not of the given CA"),
        ("localhost", 91, False, "the server's certificate expired on"),
        ("localhost", -2, False, "is the clock right"),
    ],
)
def test_a_client_refuses_and_can_say_why(
    engines: tuple[str, str],
    directory: Path,
    tmp_path: Path,
    today: datetime,
    host: str,
    age: int,
    other_ca: bool,
    says: str,
) -> None:
    authority = init(directory, now=today - 100 * DAY)
    issue(directory, NAMES, now=today - age * DAY)
    trusted = (init(tmp_path / "other", now=today) if other_ca else authority).read_bytes()
    outcome = handshake(engines, directory, host, trusted)
    assert not outcome.completed
    out_of_time = age != 0 and engines[1] == "aioquic"  # qh3 has one code, and one reason, for everything
    assert outcome.error == (CERTIFICATE_EXPIRED if out_of_time else BAD_CERTIFICATE), outcome
    assert says in diagnose(outcome.certificate, host, trusted, today)


def test_a_diagnosis_has_a_word_for_everything(directory: Path) -> None:
    ensured = ensure_server_certificate(directory, NAMES, NOW)
    der = load(ensured.certificate).public_bytes(Encoding.DER)
    trusted = ensured.authority.read_bytes()
    assert "does not accept" in diagnose(der, "localhost", trusted, NOW)
    assert "that this machine trusts" in diagnose(der, "localhost", None, NOW)
    assert "cannot be understood" in diagnose(b"garbage", "localhost", trusted, NOW)
    assert "cannot be understood" in diagnose(der, "localhost", b"garbage", NOW)
    assert "cannot be understood" in diagnose(der, "not a host", trusted, NOW)
    bare = load(ensured.authority).public_bytes(Encoding.DER)
    assert "is for no name" in diagnose(bare, "localhost", trusted, NOW)
