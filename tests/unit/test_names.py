"""Names of tunnels and hosts: one form each, and what a pattern covers."""

import fnmatch
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.wire.names import (
    host_matches,
    normalise_host,
    normalise_host_pattern,
    normalise_tunnel_name,
    normalise_tunnel_pattern,
    tunnel_matches,
)

LABELS = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=12).filter(
    lambda text: not text.startswith("-") and not text.endswith("-")
)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("a", "a"),
        ("My-App", "my-app"),
        ("0", "0"),
        ("a--b", "a--b"),
        ("x" * 63, "x" * 63),
        ("xn--bcher-kva", "xn--bcher-kva"),
    ],
)
def test_a_tunnel_name_has_one_form(text: str, form: str) -> None:
    assert normalise_tunnel_name(text) == form
    assert normalise_tunnel_name(form) == form


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("x" * 64, "64 characters"),
        ("-a", "neither begins"),
        ("a-", "neither begins"),
        ("a.b", "one DNS label"),
        ("a_b", "one DNS label"),
        ("a b", "one DNS label"),
        ("a\n", r"'a\n'"),
        ("a*", "one DNS label"),
        ("bücher", "xn--"),
        ("\u212aelvin", "outside ASCII"),
    ],
)
def test_what_is_no_tunnel_name_is_told_why(text: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        normalise_tunnel_name(text)
    assert says in str(error.value)
    assert str(error.value).isprintable() and str(error.value).isascii()


@given(st.text(max_size=100))
def test_any_text_gives_a_name_in_its_form_or_a_value_error(text: str) -> None:
    for normalise in (normalise_tunnel_name, normalise_tunnel_pattern, normalise_host, normalise_host_pattern):
        try:
            form = normalise(text)
        except ValueError as error:
            assert str(error).isprintable()
        else:
            assert normalise(form) == form


@pytest.mark.parametrize(
    ("pattern", "covered", "not_covered"),
    [
        ("*", ["a", "team-a"], []),
        ("team-*", ["team-a", "team-a-b"], ["team", "steam-a", "xteam-a"]),
        ("*-dev", ["a-dev"], ["dev", "a-dev2"]),
        ("a*b*c", ["abc", "axxbyyc", "abbcc"], ["ab", "acb", "abcd"]),
        ("exact", ["exact"], ["exactly", "inexact"]),
    ],
)
def test_a_pattern_covers(pattern: str, covered: list[str], not_covered: list[str]) -> None:
    assert normalise_tunnel_pattern(pattern.upper()) == pattern
    assert [name for name in covered + not_covered if tunnel_matches(pattern, name)] == covered


@given(st.text("ab-*", min_size=1, max_size=8), st.text("ab-", min_size=1, max_size=10))
def test_patterns_mean_what_shells_mean_by_a_star(pattern: str, name: str) -> None:
    assert tunnel_matches(pattern, name) == fnmatch.fnmatchcase(name, pattern)


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    start = time.process_time()
    assert not tunnel_matches("*a" * 31, "a" * 62 + "b")
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("text", ["?", "a[bc]", "a.*", "", "-*", "*-"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tunnel pattern"):
        normalise_tunnel_pattern(text)


def test_runs_of_stars_are_one_star() -> None:
    assert normalise_tunnel_pattern("a**b***") == "a*b*"


@pytest.mark.parametrize(
    ("text", "form"), [("App.Example.COM.", "app.example.com"), ("localhost", "localhost"), ("1.example", "1.example")]
)
def test_a_host_has_one_form(text: str, form: str) -> None:
    assert normalise_host(text) == form


@pytest.mark.parametrize(
    "text",
    ["", ".", "a..b", ".a", "a_b.com", "127.0.0.1", "a.1", "*.a.com", "-a.com", "x" * 64 + ".com", "a." * 127 + "a"],
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host name"):
        normalise_host(text)


def test_a_wildcard_host_covers_one_label() -> None:
    pattern = normalise_host_pattern("*.Example.com.")
    assert pattern == "*.example.com"
    assert host_matches(pattern, "a.example.com")
    for other in ("example.com", "a.b.example.com", "aexample.com", ".example.com", "*.example.com"):
        assert not host_matches(pattern, other)
    assert host_matches("a.example.com", "a.example.com") and not host_matches("a.example.com", "b.example.com")


@pytest.mark.parametrize("text", ["*", "*.", "a.*.com", "*a.com", "*.*.com"])
def test_what_is_no_host_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host name"):
        normalise_host_pattern(text)


@given(LABELS, LABELS.filter(lambda text: not text.isdigit()))
def test_a_wildcard_of_a_host_covers_that_host(label: str, rest: str) -> None:
    assert host_matches(normalise_host_pattern(f"*.{rest}"), normalise_host(f"{label}.{rest}"))
