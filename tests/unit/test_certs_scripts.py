"""The scripts in certs/: one command makes a set that works, and again it renews it."""

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from quictunnel.trust.certificates import check_pair, show

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the scripts, in a path with a space: they write beside themselves."""
    tree = tmp_path / "a tree"
    shutil.copytree(ROOT / "certs", tree / "certs", ignore=shutil.ignore_patterns("dev", "prod"))
    return tree


def run(tree: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [tree / "certs" / script, *arguments],
        cwd=tree.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "names"),
    [
        ("dev.sh", [], ("localhost", "127.0.0.1", "::1")),
        (
            "prod.sh",
            ["tunnel.example.com", "203.0.113.7", "other.example.org"],
            ("tunnel.example.com", "*.tunnel.example.com", "203.0.113.7", "other.example.org"),
        ),
    ],
)
def test_one_command_makes_a_set_and_again_renews_it_under_the_same_ca(
    tree: Path, script: str, arguments: list[str], names: tuple[str, ...]
) -> None:
    directory = tree / "certs" / script.removesuffix(".sh")
    first = run(tree, script, *arguments)
    assert first.returncode == 0, first.stderr
    authority, server = show(directory)
    assert server.names == names
    assert server.pin == authority.pin and authority.pin is not None and authority.pin.hex() in first.stdout
    check_pair(directory / "server.pem", directory / "server.key", datetime.now(UTC))
    again = run(tree, script, *arguments)
    assert again.returncode == 0, again.stderr
    authority_again, server_again = show(directory)
    assert authority_again == authority
    assert server_again.fingerprint != server.fingerprint


@pytest.mark.parametrize("arguments", [[], [""], ["-h"], ["localhost"], ["*.example.com"], [".example.com"]])
def test_what_is_no_domain_is_refused_before_anything_is_made(tree: Path, arguments: list[str]) -> None:
    result = run(tree, "prod.sh", *arguments)
    assert result.returncode == 2 and "certs/prod.sh" in result.stderr
    assert not (tree / "certs" / "prod").exists()


def test_a_failure_stops_the_script_with_its_error(tree: Path) -> None:
    result = run(tree, "prod.sh", "tunnel.example.com", "0.0.0.0")
    assert result.returncode != 0 and "stands for every address" in result.stderr
    assert not (tree / "certs" / "prod" / "server.pem").exists()
