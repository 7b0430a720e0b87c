"""The files in compose/: each is sound by itself, and what they say of each other and of the command line agrees."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from quictunnel import cli
from quictunnel.options import Settings, environment_name, load_settings
from quictunnel.settings import ConnectSettings, LoadSettings, ServeSettings
from quictunnel.trust.certificates import ensure_server_certificate
from quictunnel.trust.tokens import TokenRefused, TokenStore

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
OURS = ("server", "client", "load")
"the services that run a command of ours"


# What the files say


def interpolated(text: str) -> str:
    """``${NAME:-default}`` as where nothing is set."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


@cache
def composition() -> dict[str, Any]:
    loaded = yaml.safe_load(interpolated((COMPOSE / "compose.yaml").read_text("utf-8")))
    assert isinstance(loaded, dict)
    return loaded


def service(name: str) -> dict[str, Any]:
    found = composition()["services"][name]
    assert isinstance(found, dict)
    return found


@cache
def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (COMPOSE / name).read_text("utf-8"), flags=re.MULTILINE)
    lines = filter(None, (line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines()))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def last(name: str, instruction: str) -> str:
    return [rest for word, rest in instructions(name) if word == instruction][-1]


def exec_form(text: str) -> list[str]:
    """The words of ``["...", "..."]``, which runs without a shell: signals reach the process itself."""
    words = ast.literal_eval(text[text.index("[") :])
    assert isinstance(words, list) and all(isinstance(word, str) for word in words)
    return words


def image_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(last("Dockerfile", "ENV")))


def settings_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The options of a service as its command line and its environment give them."""
    assert exec_form(last("Dockerfile", "ENTRYPOINT")) == ["quictunnel"] and "entrypoint" not in service(name)
    for variable, value in image_environment().items():
        if variable != "PATH":
            monkeypatch.setenv(variable, value)
    command, flags = cli._parse(service(name)["command"])
    flags.pop("config", None)  # it is made when the services start
    return load_settings(command.settings, flags)


# The composition


def test_server_client_and_load_are_commands_that_the_command_line_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [type(settings_of(name, monkeypatch)) for name in OURS]
    assert kinds == [ServeSettings, ConnectSettings, LoadSettings]


def test_the_client_dials_what_the_server_advertises_and_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = settings_of("server", monkeypatch), settings_of("client", monkeypatch)
    assert isinstance(server, ServeSettings) and isinstance(client, ConnectSettings)
    [dialled] = client.server or ()
    assert dialled == server.advertise
    assert dialled[0] == "server" and dialled[1] == server.quic[1]
    assert server.quic[0] == server.http[0] == "0.0.0.0"
    assert last("Dockerfile", "EXPOSE").split() == [f"{server.http[1]}/tcp", f"{server.quic[1]}/udp"]
    assert set(service("server")["networks"]) & set(service("client")["networks"])


def test_the_client_forwards_to_httpbin_which_nobody_else_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    client = settings_of("client", monkeypatch)
    assert isinstance(client, ConnectSettings)
    backend, bind = urlsplit(client.backend), exec_form(last("httpbin.Dockerfile", "CMD"))[1]
    assert (backend.scheme, backend.hostname) == ("http", "httpbin") and bind == f"--bind=0.0.0.0:{backend.port}"
    (network,) = service("httpbin")["networks"]
    assert composition()["networks"][network] == {"internal": True}
    inside = [name for name, content in composition()["services"].items() if network in content.get("networks", ())]
    assert inside == ["client", "httpbin"] and "ports" not in service("httpbin")


def test_httpbin_keeps_idle_connections_longer_than_the_client_does(monkeypatch: pytest.MonkeyPatch) -> None:
    client = settings_of("client", monkeypatch)
    assert isinstance(client, ConnectSettings)
    (keep_alive,) = (word for word in exec_form(last("httpbin.Dockerfile", "CMD")) if "--keep-alive" in word)
    assert float(keep_alive.partition("=")[2]) > client.backend_keep_alive


def test_the_load_profile_runs_the_six_stages_through_the_clients_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    server, client, load = (settings_of(name, monkeypatch) for name in OURS)
    assert isinstance(server, ServeSettings) and isinstance(client, ConnectSettings) and isinstance(load, LoadSettings)
    assert (load.stages, load.duration, load.max_errors) == ("20,50,100,200,500,1000", 30.0, "0")
    target = urlsplit(load.url)
    assert (target.hostname, target.port) == ("server", server.http[1])
    assert load.header == (f"X-Tunnel-Session: {client.tunnel}",)
    assert service("load")["profiles"] == ["load"]
    assert [name for name, content in composition()["services"].items() if "profiles" in content] == ["load"]


def test_the_client_is_invited_to_its_own_tunnel_and_never_sees_the_servers_state() -> None:
    invite, client = service("invite"), service("client")
    script, arguments = invite["entrypoint"], invite["command"]
    assert script == ["sh", "/opt/quictunnel/invite.sh"]
    state, directory, tunnel = arguments
    assert state == image_environment()["QUICTUNNEL_STATE_DIR"]
    command = client["command"]
    assert command[command.index("--tunnel") + 1] == tunnel
    assert command[command.index("--config") + 1] == f"{directory}/connect.toml"
    assert client["volumes"] == [f"invite:{directory}:ro"]
    assert service("server")["volumes"] == [f"state:{state}"]


def test_every_volume_and_network_is_declared_and_its_place_belongs_to_the_user() -> None:
    services = composition()["services"].values()
    mounts = [mount.split(":") for content in services for mount in content.get("volumes", ())]
    assert {mount[0] for mount in mounts} == set(composition()["volumes"])
    assert {name for content in services for name in content.get("networks", ())} == set(composition()["networks"])
    (install,) = (rest for word, rest in instructions("Dockerfile") if word == "RUN" and "install --directory" in rest)
    assert "--owner=quictunnel --group=quictunnel --mode=0700" in install
    assert {mount[1] for mount in mounts} == set(re.findall(r" (/[a-z]+)(?= |$)", install.partition("--mode=0700")[2]))


def test_each_service_waits_for_one_that_can_be_waited_for() -> None:
    for name, content in composition()["services"].items():
        for other, how in content.get("depends_on", {}).items():
            once = service(other).get("restart") == "no"
            assert how == {"condition": "service_completed_successfully" if once else "service_healthy"}, name
            assert service(other).get("healthcheck") == {"disable": True} if once else True


def test_requests_in_flight_may_finish_before_a_container_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("server", "client"):
        settings = settings_of(name, monkeypatch)
        assert isinstance(settings, ServeSettings | ConnectSettings)
        assert float(service(name)["stop_grace_period"].removesuffix("s")) > settings.grace


def test_no_container_may_do_more_than_it_must() -> None:
    for name, content in composition()["services"].items():
        assert content["read_only"] and content["cap_drop"] == ["ALL"], name
        assert content["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "pid", "user", "devices"} & set(content), name
        assert all(port.startswith("127.0.0.1:") for port in content.get("ports", ())), name


def test_every_service_is_built_from_a_dockerfile_that_is_there() -> None:
    for name, content in composition()["services"].items():
        build = content["build"]
        assert (COMPOSE / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file(), name
        declared = {
            rest.partition("=")[0] for word, rest in instructions(Path(build["dockerfile"]).name) if word == "ARG"
        }
        assert set(build["args"]) == declared, name
        assert {value for variable, value in build["args"].items() if variable != "BASE"} == {None}, name


def compose_command() -> list[str] | None:
    """Docker Compose as a plug-in or as a program of its own, whichever is here."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            return command
    return None


def test_docker_compose_takes_the_file() -> None:
    command = compose_command()
    if command is None:
        pytest.skip("docker compose is not here")
    file = str(COMPOSE / "compose.yaml")
    result = subprocess.run([*command, "-f", file, "config", "--quiet"], capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stderr


# The Dockerfiles


@pytest.mark.parametrize("name", ["Dockerfile", "httpbin.Dockerfile"])
def test_an_image_is_made_from_the_base_given_and_does_not_run_as_root(name: str) -> None:
    assert instructions(name)[0] == ("ARG", "BASE=python:3.12-slim")
    assert {rest.split()[0] for word, rest in instructions(name) if word == "FROM"} == {"${BASE}"}
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last(name, "USER"))
    words = [word for word, _ in instructions(name)]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))


@pytest.mark.parametrize("name", ["Dockerfile", "httpbin.Dockerfile"])
def test_what_an_image_copies_is_there_and_is_sent_to_the_builder(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split("\n")
    assert "*" in ignored
    sent = {line[1:] for line in ignored if line.startswith("!")}
    for word, rest in instructions(name):
        if word == "COPY" and not rest.startswith("--from="):
            *sources, _ = rest.split()
            assert set(sources) <= sent and all((ROOT / source).exists() for source in sources), rest


def test_what_is_sent_to_the_builder_is_what_the_images_copy() -> None:
    copied = {
        source
        for name in ("Dockerfile", "httpbin.Dockerfile")
        for word, rest in instructions(name)
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split("\n")
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


def test_the_image_serves_by_default_and_its_variables_are_options_of_that() -> None:
    command, flags = cli._parse(exec_form(last("Dockerfile", "CMD")))
    assert (command.settings, flags) == (ServeSettings, {})
    known = {environment_name(ServeSettings, name) for name in ServeSettings.model_fields}
    assert set(image_environment()) - {"PATH"} <= known


def test_health_checks_run_a_script_that_is_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: dict[str, list[str]] = {
        "Dockerfile": exec_form(last("Dockerfile", "HEALTHCHECK")),
        "httpbin.Dockerfile": exec_form(last("httpbin.Dockerfile", "HEALTHCHECK")),
    }
    for name, check in checks.items():
        home = Path(check[1]).parent
        assert check[0] == "python" and Path(check[1]).name == "health.py"
        assert any(
            "compose/health.py" in rest and rest.endswith(f"{home}/")
            for word, rest in instructions(name)
            if word == "COPY"
        )
    kind, *client = service("client")["healthcheck"]["test"]
    assert kind == "CMD" and client[:2] == checks["Dockerfile"]
    server, settings = settings_of("server", monkeypatch), settings_of("client", monkeypatch)
    assert isinstance(server, ServeSettings) and isinstance(settings, ConnectSettings)
    target = urlsplit(client[2])
    assert (target.hostname, target.port) == ("server", server.http[1]) and client[3] == settings.tunnel


def test_no_file_names_a_package_index_or_a_registry() -> None:
    for path in (*COMPOSE.iterdir(), ROOT / ".dockerignore"):
        if path.is_file():
            hosts = {urlsplit(url).hostname for url in re.findall(r"https?://[^\s\"'`,)\]]+", path.read_text("utf-8"))}
            assert hosts <= {"server", "httpbin", "127.0.0.1", "web.localhost"}, path


# The scripts


@pytest.fixture
def quictunnel_on_path(tmp_path: Path) -> Mapping[str, str]:
    """An environment whose PATH has the command, installed or not."""
    shim = tmp_path / "bin" / "quictunnel"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m quictunnel "$@"\n', "utf-8")
    shim.chmod(0o755)
    return {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def invite(environment: Mapping[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(COMPOSE / "invite.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)


def make_authority(state: Path) -> bytes:
    return ensure_server_certificate(state, ["localhost"], datetime.now(UTC)).authority.read_bytes()


def connect_settings(directory: Path) -> ConnectSettings:
    return load_settings(ConnectSettings, {"backend": "3000", "config": str(directory / "connect.toml")})


def test_an_invitation_is_good_for_its_tunnel_alone_and_is_not_shown(
    tmp_path: Path, quictunnel_on_path: Mapping[str, str]
) -> None:
    state, directory = tmp_path / "the state", tmp_path / "an invite"
    directory.mkdir()
    authority = make_authority(state)
    result = invite(quictunnel_on_path, state, directory, "web")
    assert result.returncode == 0, result.stderr
    settings, now = connect_settings(directory), datetime.now(UTC)
    assert settings.token is not None and isinstance(settings.ca, Path)
    assert settings.ca.read_bytes() == authority
    secret = settings.token.get_secret_value()
    store = TokenStore(state)
    store.load()
    store.verify(secret, "web", now)
    with pytest.raises(TokenRefused):
        store.verify(secret, "other", now)
    assert secret not in result.stdout + result.stderr
    files = sorted(directory.iterdir())
    assert [file.name for file in files] == ["ca.pem", "connect.toml"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_an_invitation_stays_while_its_server_does_and_is_made_anew_for_a_new_one(
    tmp_path: Path, quictunnel_on_path: Mapping[str, str]
) -> None:
    directory = tmp_path / "invite"
    directory.mkdir()
    make_authority(tmp_path / "one")
    assert invite(quictunnel_on_path, tmp_path / "one", directory, "web").returncode == 0
    first = (directory / "connect.toml").read_bytes()
    assert invite(quictunnel_on_path, tmp_path / "one", directory, "web").returncode == 0
    assert (directory / "connect.toml").read_bytes() == first
    authority = make_authority(tmp_path / "two")
    assert invite(quictunnel_on_path, tmp_path / "two", directory, "web").returncode == 0
    assert (directory / "connect.toml").read_bytes() != first
    assert (directory / "ca.pem").read_bytes() == authority


def test_an_invitation_that_cannot_be_made_says_why_and_leaves_nothing(
    tmp_path: Path, quictunnel_on_path: Mapping[str, str]
) -> None:
    make_authority(tmp_path / "state")
    directory = tmp_path / "invite"
    directory.mkdir()
    result = invite(quictunnel_on_path, tmp_path / "state", directory, "not a name")
    assert result.returncode == 1 and "quictunnel: " in result.stderr
    assert list(directory.iterdir()) == []
    assert invite(quictunnel_on_path, tmp_path / "state").returncode == 2


class Answers(BaseHTTPRequestHandler):
    """Answers as its server's ``status`` says and keeps what was asked."""

    server: "Target"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"], self.headers["X-Tunnel-Session"]))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Target(HTTPServer):
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[tuple[str, str, str | None]] = []


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def health(*arguments: str, http: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMPOSE / "health.py"), *arguments]
    environment = {**os.environ, "QUICTUNNEL_HTTP": http}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize(("status", "exits"), [(200, 0), (302, 0), (404, 1), (502, 1), (503, 1)])
def test_a_tunnel_is_healthy_when_a_request_through_it_is_answered_well(
    target: Target, status: int, exits: int
) -> None:
    target.status = status
    result = health(f"http://127.0.0.1:{target.server_port}/status/200", "web")
    assert result.returncode == exits
    assert target.asked == [("/status/200", f"127.0.0.1:{target.server_port}", "web")]
    assert (f"answered {status}" in result.stderr) == bool(exits)


def test_a_server_is_healthy_when_it_answers_for_a_tunnel_that_nobody_has(target: Target) -> None:
    target.status = 404
    assert health(http=f"0.0.0.0:{target.server_port}").returncode == 0
    assert target.asked == [("/", "health.localhost", None)]


def test_what_does_not_answer_is_not_healthy(target: Target) -> None:
    port = target.server_port
    target.shutdown()
    target.server_close()
    for result in (health(f"http://127.0.0.1:{port}/", "web"), health(http=f"0.0.0.0:{port}")):
        assert result.returncode == 1 and "no answer" in result.stderr
