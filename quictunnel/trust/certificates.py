"""The CA of a server, and the certificates that it signs.

A directory holds ``ca.pem`` and ``ca.key``, ``server.pem`` and ``server.key``: PEM, keys in PKCS #8, each file mode
0600. The CA lasts ten years, because clients hold its pin; what it signs lasts months and is renewed without them. The
pin is the SHA-256 of the CA certificate's DER: whoever has it can take the certificate itself from anywhere.

Every ``now`` is an aware datetime.
"""

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from quictunnel.trust.files import TrustError, locked, private_directory, read_bounded, write_private
from quictunnel.trust.pins import FILE_LIMIT, check_dates
from quictunnel.wire.names import normalise_host_pattern

__all__ = [
    "AUTHORITY_DAYS",
    "SERVER_DAYS",
    "CertificatePaths",
    "Description",
    "Ensured",
    "Issuer",
    "TrustError",
    "authority_pin",
    "check_pair",
    "describe",
    "diagnose",
    "ensure_authority",
    "ensure_server_certificate",
    "init",
    "issue",
    "load_authorities",
    "show",
]

AUTHORITY_NAME: Final = "quictunnel CA"
AUTHORITY_DAYS: Final = 3650
SERVER_DAYS: Final = 90
"as public CAs do it; renewed when a third is left"

AUTHORITY_DAYS_LIMIT: Final = 36_500
SERVER_DAYS_LIMIT: Final = 397
"what browsers accept at most"

NAMES_LIMIT: Final = 100
SIZE_LIMIT: Final = 8192
"bytes of DER: half of what QUIC libraries buffer of a handshake"

CLOCK_SKEW: Final = timedelta(hours=1)
"that a new certificate is dated back, for clients whose clock is behind"

_COMMON_NAME_LIMIT: Final = 64
"characters (RFC 5280 appendix A.1, ub-common-name)"

_PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class CertificatePaths(NamedTuple):
    """A certificate (PEM, with its chain behind it if it has one) and the key that belongs to it."""

    certificate: Path
    key: Path


class Ensured(NamedTuple):
    """What ``ensure_server_certificate`` found or made."""

    authority: Path
    certificate: Path
    key: Path
    pin: bytes
    "of the CA"

    changed: bool
    "whether the server certificate is a new one"

    reason: str
    "why it was issued, as a phrase for a log; empty when it was not"


@dataclass(frozen=True, slots=True)
class Description:
    """What ``certs show`` says of one certificate; ``str()`` gives it as lines of text."""

    kind: Literal["authority", "server"]
    subject: str
    issuer: str
    names: tuple[str, ...]
    "DNS names and IP addresses it is for; none for a CA"

    not_before: datetime
    not_after: datetime
    days_left: int
    "whole days; negative when it has expired"

    fingerprint: str
    "SHA-256 of the DER, as ``openssl x509 -fingerprint -sha256`` writes it"

    pin: bytes | None
    "of the CA: its own, or of the CA that signed it where that is known"

    def __str__(self) -> str:
        left = f"{self.days_left} days left" if self.days_left >= 0 else "EXPIRED"
        rows = [
            ("kind", "certificate authority" if self.kind == "authority" else "server certificate"),
            ("subject", self.subject),
            ("issuer", self.issuer),
            ("names", ", ".join(self.names)),
            ("not before", f"{self.not_before:%Y-%m-%d %H:%M} UTC"),
            ("not after", f"{self.not_after:%Y-%m-%d %H:%M} UTC ({left})"),
            ("fingerprint", self.fingerprint),
            ("CA pin", self.pin.hex() if self.pin else ""),
        ]
        return "\n".join(f"{label + ':':<12} {value}" for label, value in rows if value)


# What the command line does.


def init(
    directory: Path, *, common_name: str = AUTHORITY_NAME, days: int = AUTHORITY_DAYS, now: datetime | None = None
) -> Path:
    """Make a CA in the directory; the path of its certificate. Raises TrustError when there is one: none is replaced.

    Raises ValueError for a name of other than 1 to 64 printable characters, or days out of 1 to 36,500.
    """
    _check_days(days, AUTHORITY_DAYS_LIMIT)
    if not 0 < len(common_name) <= _COMMON_NAME_LIMIT or not common_name.isprintable():
        raise ValueError(f"the name of a CA has 1 to {_COMMON_NAME_LIMIT} printable characters")
    with _directory_locked(directory):
        path = directory / "ca.pem"
        if path.exists():
            raise TrustError(f"{path} is already there, and clients rely on it; move it away, or use another directory")
        _make_authority(directory, common_name, days, _moment(now))
    return path


def issue(
    directory: Path,
    names: Iterable[str],
    *,
    days: int = SERVER_DAYS,
    out: Path | None = None,
    now: datetime | None = None,
) -> CertificatePaths:
    """Sign a server certificate for the names (DNS names, ``*.`` wildcards, IP addresses) with the directory's CA.

    It goes to ``out`` (``server.pem`` in the directory) and its key beside it, with the suffix ``.key``, in place
    of what is there. It never outlives the CA. Raises TrustError, and ValueError for a name, an ``out`` or days (1 to
    397) that cannot be.
    """
    _check_days(days, SERVER_DAYS_LIMIT)
    alternatives = _parse_names(names)
    paths = _paths(directory / "server.pem" if out is None else out)
    if paths.certificate == paths.key or paths.certificate.with_suffix("").absolute() == (directory / "ca").absolute():
        raise ValueError(f"{paths.certificate} is no place for a certificate: its key, or the CA, would be overwritten")
    with _directory_locked(directory):
        _issue(_Authority.load(directory, _moment(now)), alternatives, days, paths, _moment(now))
    return paths


def show(path: Path, now: datetime | None = None) -> list[Description]:
    """Describe the certificates of a file, or of a directory's ``ca.pem`` and ``server.pem``. Raises TrustError."""
    moment = _moment(now)
    if not path.is_dir():
        return [describe(certificate, moment) for certificate in _load_certificates(path)]
    files = [file for file in (path / "ca.pem", path / "server.pem") if file.exists()]
    if not files:
        raise TrustError(f"{path} holds no certificates; `quictunnel certs init` makes a CA there")
    certificates = [certificate for file in files for certificate in _load_certificates(file)]
    authorities = [certificate for certificate in certificates if _is_authority(certificate)]
    return [describe(certificate, moment, authorities) for certificate in certificates]


# What a server and a client do.


def ensure_authority(directory: Path, now: datetime) -> tuple[Path, bool]:
    """The path of the directory's CA certificate, and whether it had to be made. Raises TrustError."""
    path = directory / "ca.pem"
    with _directory_locked(directory):
        return path, _ensure_authority(directory, now)


def ensure_server_certificate(
    directory: Path, names: Iterable[str], now: datetime, *, days: int = SERVER_DAYS
) -> Ensured:
    """See that the directory has a CA and a server certificate of it that is good for all the names.

    A new one is issued when there is none, when it is unusable or does not cover a name, and when less than a third of
    its life is left. Names that the present one has beside those wanted stay. Raises TrustError, ValueError.
    """
    _check_days(days, SERVER_DAYS_LIMIT)
    wanted = _parse_names(names)
    paths = _paths(directory / "server.pem")
    with _directory_locked(directory):
        _ensure_authority(directory, now)
        authority = _Authority.load(directory, now)
        reason, present = _why_issue(authority, paths, wanted, now)
        if reason:
            _issue(authority, _joined(wanted, present), days, paths, now)
    return Ensured(directory / "ca.pem", *paths, authority_pin(authority.certificate), bool(reason), reason)


def check_pair(certificate: Path, key: Path, now: datetime) -> Description:
    """See that a server can use these files, before it does. Raises TrustError that says what is wrong with which."""
    leaf = _load_certificates(certificate)[0]
    private = _load_key(key)
    if _public_bytes(leaf.public_key()) != _public_bytes(private.public_key()):
        raise TrustError(f"the key {key} does not belong to the certificate {certificate}; give two made together")
    _check_dates(leaf, f"the certificate {certificate}", now, "issue a new one with `quictunnel certs issue`")
    return describe(leaf, now)


def load_authorities(path: Path, now: datetime) -> bytes:
    """The PEM of the CA certificates in a file, for ``load_verify_locations(cadata=...)``. Raises TrustError.

    Those of a bundle that have expired are left out; a file in which nothing is left is an error.
    """
    certificates = _load_certificates(path)
    authorities = [certificate for certificate in certificates if _is_authority(certificate)]
    if not authorities:
        raise TrustError(f"{path} holds no CA certificate; give the server's ca.pem, not its server.pem")
    current = [each for each in authorities if each.not_valid_before_utc <= now <= each.not_valid_after_utc]
    if not current:
        _check_dates(authorities[0], f"the CA certificate {path}", now, "get the server's present ca.pem")
    return b"".join(each.public_bytes(Encoding.PEM) for each in current)


def diagnose(certificate: bytes, host: str, authorities: bytes | None, now: datetime) -> str:
    """Why a client refused a server's certificate, as a sentence; QUIC libraries have one word for all reasons.

    ``certificate`` is its DER, ``host`` the name or address that was dialled, ``authorities`` the PEM of the CAs that
    were trusted (None: those of the system). It explains a refusal; it never is the check.
    """
    try:
        leaf = x509.load_der_x509_certificate(certificate)
        _check_dates(leaf, "the server's certificate", now, "renew it on the server")
        if not _covered(_parse_name(host), _names(leaf)):
            names = ", ".join(str(name.value) for name in _names(leaf)[:5]) or "no name"
            return f"the server's certificate is for {names}, not for {host}: dial a name it is for, or issue another"
        if authorities is None:
            return "the server's certificate is not of a CA that this machine trusts: give a join string or the CA"
        signers = [each for each in x509.load_pem_x509_certificates(authorities) if _signed(each, leaf)]
        if not signers:
            return "the server's certificate is not of the given CA: it has another now, or something else answers"
        _check_dates(signers[0], "the server's CA", now, "make a new CA on the server")
    except TrustError as error:
        return str(error)
    except (TypeError, ValueError):
        return "the server's certificate cannot be understood"
    return "the server's certificate is of a kind that the QUIC library does not accept"


def authority_pin(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's DER, 32 bytes."""
    return certificate.fingerprint(hashes.SHA256())


def describe(certificate: x509.Certificate, now: datetime, authorities: Sequence[x509.Certificate] = ()) -> Description:
    """What there is to say of a certificate; ``authorities`` are those among which its signer is looked for."""
    is_authority = _is_authority(certificate)
    signer = certificate if is_authority else next((each for each in authorities if _signed(each, certificate)), None)
    return Description(
        kind="authority" if is_authority else "server",
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        names=tuple(str(name.value) for name in _names(certificate)),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        days_left=(certificate.not_valid_after_utc - now).days,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(":").upper(),
        pin=authority_pin(signer) if signer else None,
    )


class Issuer:
    """A directory's CA, read once, and the certificates for single names that it signs into memory."""

    def __init__(self, directory: Path, now: datetime) -> None:
        """Raises TrustError."""
        self._authority = _Authority.load(directory, now)
        _authority_identifier(self._authority.certificate)

    def issue(self, name: str, now: datetime, *, days: int = SERVER_DAYS) -> bytes:
        """A certificate for ``name`` and its key, PEM, in less than a millisecond. Raises ValueError."""
        certificate, key = _sign(self._authority, [_parse_name(name)], days, now)
        return certificate.public_bytes(Encoding.PEM) + _private_bytes(key)


# Making certificates.


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: _PrivateKey

    @classmethod
    def load(cls, directory: Path, now: datetime) -> "_Authority":
        path, key_path = _paths(directory / "ca.pem")
        certificate, key = _load_certificates(path)[0], _load_key(key_path)
        if not _is_authority(certificate):
            raise TrustError(f"{path} is not a CA certificate; `quictunnel certs init` makes one")
        if _public_bytes(certificate.public_key()) != _public_bytes(key.public_key()):
            raise TrustError(f"the key {key_path} does not belong to {path}; restore the two that were made together")
        _check_dates(certificate, f"the CA {path}", now, "move it away, make a new one and give clients the new pin")
        return cls(certificate, key)


def _ensure_authority(directory: Path, now: datetime) -> bool:
    if (directory / "ca.pem").exists():
        return False
    _make_authority(directory, AUTHORITY_NAME, AUTHORITY_DAYS, now)
    return True


def _make_authority(directory: Path, common_name: str, days: int, now: datetime) -> None:
    path, key_path = _paths(directory / "ca.pem")
    # A key alone is what a crash between the two writes leaves, or somebody's own: it is used, never overwritten.
    key = _load_key(key_path) if key_path.exists() else ec.generate_private_key(ec.SECP256R1())
    subject = _subject(common_name)
    builder = _builder(subject, subject, key, now - CLOCK_SKEW, now - CLOCK_SKEW + timedelta(days=days))
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_pair(CertificatePaths(path, key_path), certificate, key)


def _issue(
    authority: _Authority, names: list[x509.GeneralName], days: int, paths: CertificatePaths, now: datetime
) -> None:
    certificate, key = _sign(authority, names, days, now)
    private_directory(paths.certificate.parent)
    _write_pair(paths, certificate, key)


def _sign(
    authority: _Authority, names: list[x509.GeneralName], days: int, now: datetime
) -> tuple[x509.Certificate, _PrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    start = max(now - CLOCK_SKEW, authority.certificate.not_valid_before_utc)
    end = min(start + timedelta(days=days), authority.certificate.not_valid_after_utc)
    first = str(names[0].value)
    subject = _subject(first if len(first) <= _COMMON_NAME_LIMIT else "quictunnel server")
    builder = _builder(subject, authority.certificate.subject, key, start, end)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_authority_identifier(authority.certificate), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    if len(certificate.public_bytes(Encoding.DER)) > SIZE_LIMIT:
        raise ValueError("these names are too many for one certificate; use a wildcard")
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: _PrivateKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "quictunnel"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    # A CA made elsewhere may form its identifier in its own way; the two must agree (RFC 5280 section 4.2.1.1).
    try:
        identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        raise TrustError("the CA has no subject key identifier; `quictunnel certs init` makes one that has") from None
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _write_pair(paths: CertificatePaths, certificate: x509.Certificate, key: _PrivateKey) -> None:
    # Two files cannot be replaced at once. Who reads in between, and a crash in between, sees two that do not belong
    # together: check_pair says so, and ensure_server_certificate mends it.
    write_private(paths.key, _private_bytes(key))
    write_private(paths.certificate, certificate.public_bytes(Encoding.PEM))


def _private_bytes(key: _PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# Reading and judging them.


def _why_issue(
    authority: _Authority, paths: CertificatePaths, wanted: list[x509.GeneralName], now: datetime
) -> tuple[str, list[x509.GeneralName]]:
    """Why a new certificate is due (empty: it is not), and the names of the present one that is to be replaced."""
    if not paths.certificate.exists() or not paths.key.exists():
        return "there is none", []
    try:
        certificate, key = _load_certificates(paths.certificate)[0], _load_key(paths.key)
    except TrustError as error:
        return str(error), []
    if not _signed(authority.certificate, certificate):
        return "the present one is of another CA", []
    present = _names(certificate)
    if _public_bytes(certificate.public_key()) != _public_bytes(key.public_key()):
        return "the present one and its key do not belong together", present
    missing = [str(name.value) for name in wanted if not _covered(name, present)]
    if missing:
        return "the present one is not for " + ", ".join(missing), present
    end = certificate.not_valid_after_utc
    left, life = end - now, end - certificate.not_valid_before_utc
    # One that ends with its CA cannot be renewed to a later day.
    if left < life / 3 and end < authority.certificate.not_valid_after_utc:
        state = "has expired" if left < timedelta(0) else f"has {left.days} days left"
        return f"the present one {state}", present
    if certificate.not_valid_before_utc > now:
        return "the present one is not valid yet", present
    return "", present


def _covered(name: x509.GeneralName, present: list[x509.GeneralName]) -> bool:
    if name in present:
        return True
    value = name.value
    if not isinstance(value, str) or value.startswith("*."):
        return False
    return x509.DNSName("*." + value.partition(".")[2]) in present


def _joined(wanted: list[x509.GeneralName], present: list[x509.GeneralName]) -> list[x509.GeneralName]:
    return list(dict.fromkeys([*wanted, *present]))[:NAMES_LIMIT]


def _parse_names(names: Iterable[str]) -> list[x509.GeneralName]:
    """The names in their one form, in order, without repeats. Raises ValueError."""
    parsed = list(dict.fromkeys(_parse_name(name.strip()) for name in names))
    if not 0 < len(parsed) <= NAMES_LIMIT:
        raise ValueError(f"a certificate is for 1 to {NAMES_LIMIT} names, not {len(parsed)}")
    return parsed


def _parse_name(name: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return _parse_dns_name(name)
    if address.is_unspecified:
        raise ValueError(f"{name} stands for every address and cannot be dialled: name those that clients dial")
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise ValueError(f"{name!a} names a network interface, which no certificate can: leave out what follows the %")
    return x509.IPAddress(address)


def _parse_dns_name(name: str) -> x509.DNSName:
    form = normalise_host_pattern(name)
    # TLS libraries refuse such a wildcard, and some the whole certificate with it, whatever other name was asked for.
    if form.startswith("*.") and form.count(".") < 2:
        raise ValueError(f"{form} is too wide: a wildcard needs a name of two parts behind it, as *.example.com")
    return x509.DNSName(form)


def _load_certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(read_bounded(path, FILE_LIMIT))
    except FileNotFoundError:
        raise TrustError(f"there is no certificate {path}; `quictunnel certs init` and `issue` make them") from None
    except ValueError:
        raise TrustError(f"{path} is not a PEM certificate; it should begin with -----BEGIN CERTIFICATE-----") from None


def _load_key(path: Path) -> _PrivateKey:
    try:
        key = load_pem_private_key(read_bounded(path, FILE_LIMIT), None)
    except FileNotFoundError:
        raise TrustError(f"there is no key {path}; it belongs beside its certificate") from None
    except TypeError:
        raise TrustError(f"the key {path} has a password; save it without: openssl pkcs8 -topk8 -nocrypt") from None
    except (ValueError, UnsupportedAlgorithm):
        raise TrustError(f"{path} is not a PEM private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise TrustError(f"the key {path} is neither ECDSA nor RSA: not every QUIC library can use it")
    return key


def _check_dates(certificate: x509.Certificate, what: str, now: datetime, advice: str) -> None:
    check_dates(certificate.not_valid_before_utc, certificate.not_valid_after_utc, what, now, advice)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _signed(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, TypeError, ValueError, UnsupportedAlgorithm):
        return False
    return True


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [name for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def _public_bytes(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        return b""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _check_days(days: int, limit: int) -> None:
    if not 1 <= days <= limit:
        raise ValueError(f"a lifetime of {days} days is not between 1 and {limit}")


def _moment(now: datetime | None) -> datetime:
    return datetime.now(UTC) if now is None else now


def _paths(certificate: Path) -> CertificatePaths:
    return CertificatePaths(certificate, certificate.with_suffix(".key"))


@contextmanager
def _directory_locked(directory: Path) -> Iterator[None]:
    private_directory(directory)
    with locked(directory / ".lock"):
        yield
