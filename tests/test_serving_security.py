"""Who is let in and what is too much: keys, TLS, client certificates, origins, sizes, slow and idle connections."""

import asyncio
import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from websockets.exceptions import InvalidStatus

from serve.client import RemotePolicy
from serve.grpc_api import Health
from serve.policy_batcher import PolicySource
from serve.protocol import policy_pb2, policy_pb2_grpc
from serve.protocol.limits import Limits
from serve.security import SecurityConfig
from serve.server import ServeConfig, Server
from tests.odd_policy import odd_observation
from tests.openpi_client import OpenpiClient
from tests.serving import WEB, Running, running
from vla.cli import main as cli

ODD = PolicySource(factory="tests.odd_policy:OddPolicy")
KEY = "correct horse battery staple"
LIMITS = Limits(body_bytes=200_000, json_bytes=50_000, header_s=0.5, body_s=0.5, idle_s=0.5, streams=3)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY}\n")
    with running(ServeConfig(policy=ODD, security=SecurityConfig(key_file=path), limits=LIMITS)) as server:
        yield server


@pytest.fixture(scope="module")
def opened() -> Iterator[Running]:
    with running(ServeConfig(policy=ODD, limits=LIMITS)) as server:
        yield server


@pytest.mark.parametrize("wire", ["http", "grpc", "ws"])
def test_every_wire_asks_for_the_key(wire: str, keyed: Running, monkeypatch):
    monkeypatch.delenv("REMASK_API_KEY", raising=False)
    for wrong in ("", "wrong key of a robot"):
        with pytest.raises(PermissionError, match="needs a key"):
            RemotePolicy(getattr(keyed, wire), key=wrong)
    with RemotePolicy(getattr(keyed, wire), key=KEY) as remote:
        assert len(remote.act([odd_observation()])) == 1
    monkeypatch.setenv("REMASK_API_KEY", KEY)
    with RemotePolicy(getattr(keyed, wire)) as remote:
        assert len(remote.act([odd_observation()])) == 1


def test_openpi_sends_its_key_its_own_way(keyed: Running):
    client = OpenpiClient(keyed.ws, key=KEY)
    assert client.metadata["action_horizon"] == 4
    client.close()
    with pytest.raises(InvalidStatus) as caught:
        OpenpiClient(keyed.ws)
    assert caught.value.response.status_code == 401


def test_probes_and_the_page_need_no_key_and_nothing_else_is_open(keyed: Running):
    paths = WEB.get(f"{keyed.http}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()["paths"]
    openly = {"/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"}
    for path, methods in paths.items():
        url = keyed.http + path.replace("{name}", "policy").replace("{version}", "x").replace("{path}", "x").replace(
            "{model}", "x"
        )
        for method in methods:
            status = WEB.request(method.upper(), url).status_code
            assert (status == 200) if path in openly else (status == 401), (method, path, status)
    assert WEB.get(keyed.http).status_code == 200
    unauthorised = WEB.get(f"{keyed.http}/metrics")
    assert unauthorised.headers["www-authenticate"] == "Bearer" and "Bearer KEY" in unauthorised.json()["error"]
    assert WEB.get(f"{keyed.http}/v1/models").json()["error"]["type"] == "authentication_error"


def test_health_is_asked_without_a_key_and_watched_as_any_stream(keyed: Running):
    request, key = health_pb2.HealthCheckRequest(), (("authorization", f"Bearer {KEY}"),)
    with grpc.insecure_channel(keyed.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(health.Watch(request, timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        watchers = [health.Watch(request, timeout=60, metadata=key) for _ in range(LIMITS.streams)]
        assert [next(watcher).status for watcher in watchers] == LIMITS.streams * [health_pb2.HealthCheckResponse.SERVING]
        with pytest.raises(grpc.RpcError) as caught:
            next(health.Watch(request, timeout=10, metadata=key))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_who_watches_health_does_not_hold_up_a_drain():
    async def scenario() -> None:
        server = Server(ServeConfig(policy=ODD))  # its policy is not loaded
        watching = Health(server.services).Watch(health_pb2.HealthCheckRequest(), None)
        assert (await anext(watching)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        server.gate.close()
        async with asyncio.timeout(5):
            assert [answer async for answer in watching] == []

    asyncio.run(scenario())


def test_a_page_of_another_site_can_neither_write_nor_take_our_name(opened: Running):
    host = opened.http.partition("://")[2]
    for headers, status in (
        ({"host": "evil.example"}, 403),
        ({"host": f"localhost:{host.rpartition(':')[2]}"}, 200),
    ):
        assert WEB.get(f"{opened.http}/v2", headers=headers).status_code == status
    for origin, status in (("https://evil.example", 403), ("null", 403), (f"http://{host}", 400)):
        response = WEB.post(f"{opened.http}/watch", headers={"origin": origin}, json={"events": []})
        assert response.status_code == status, response.text


def certificates(folder: Path) -> SecurityConfig:
    """An authority, a server's and a robot's certificate, as PEM files."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def make(name: str, issuer, issuer_key, authority: bool):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(issuer_key or key, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{name}.key").write_bytes(private)
        return subject, key

    authority, authority_key = make("authority", None, None, True)
    make("server", authority, authority_key, False)
    make("robot", authority, authority_key, False)
    return SecurityConfig(
        tls_certificate=folder / "server.pem", tls_key=folder / "server.key", client_ca=folder / "authority.pem"
    )


def test_tls_and_client_certificates_hold_on_every_wire(tmp_path: Path):
    security = certificates(tmp_path)
    ca = tmp_path / "authority.pem"
    robot = {"ca": ca, "certificate": tmp_path / "robot.pem", "certificate_key": tmp_path / "robot.key"}
    with running(ServeConfig(policy=ODD, security=security)) as server:
        for url in (server.http, server.grpc, server.ws):
            assert url.partition("://")[0] in ("https", "grpcs", "wss")
            with RemotePolicy(url, **robot) as remote:
                assert len(remote.act([odd_observation()])) == 1
            for strangers in ({"ca": ca}, {}):  # without a certificate; not trusting the server's
                with pytest.raises(OSError):
                    RemotePolicy(url, timeout_s=1.0, **strangers)
            with pytest.raises(OSError):
                RemotePolicy(url.replace("s://", "://"), timeout_s=1.0)
    with running(ServeConfig(policy=ODD, security=replace(security, client_ca=None))) as server:
        for url in (server.http, server.grpc, server.ws):
            scheme, _, address = url.partition("://")
            for written in (url, f"{scheme.upper()}://{address}"):
                with RemotePolicy(written, ca=ca) as remote:
                    assert len(remote.act([odd_observation()])) == 1
                with pytest.raises(OSError):  # the system's authorities have not signed it
                    RemotePolicy(written, timeout_s=1.0)


def test_bodies_are_measured_before_they_are_read(opened: Running):
    url = f"{opened.http}/v2/models/policy/infer"

    def endless():
        while True:
            yield b"x" * 10_000

    announced = WEB.post(url, content=b"x" * 300_000)
    assert announced.status_code == 413 and "200000" in announced.json()["error"]
    try:
        assert WEB.post(url, content=endless()).status_code == 413
    except httpx.TransportError:
        pass  # the server hung up while we were still sending
    assert WEB.post(url, content=b"[" * 60_000).status_code == 413
    assert WEB.post(url, content=b"[" * 40_000).status_code == 400
    compressed = WEB.post(url, content=b"x", headers={"content-encoding": "gzip"})
    assert compressed.status_code == 415 and "compressed" in compressed.json()["error"]
    client = OpenpiClient(opened.ws)
    with pytest.raises(Exception, match="1009|too big|no close frame"):
        client.infer({"prompt": "x" * 300_000})
    with grpc.insecure_channel(opened.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        policy_pb2_grpc.PolicyServiceStub(channel).Act(policy_pb2.ActRequest(instruction="x" * 300_000), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert WEB.get(f"{opened.http}/readyz").status_code == 200


def closed_after(connection: socket.socket, timeout_s: float = 10.0) -> tuple[float, bytes]:
    """Seconds until the other side hangs up, and what it said."""
    began, said = time.monotonic(), b""
    connection.settimeout(timeout_s)
    while True:
        data = connection.recv(4096)
        if not data:
            return time.monotonic() - began, said
        said += data


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: x\r\nA: b"])
def test_a_connection_without_complete_headers_is_closed(sent: bytes, opened: Running):
    with socket.create_connection(("127.0.0.1", opened.server.port)) as connection:
        connection.sendall(sent)
        seconds, said = closed_after(connection)
    assert 0.3 < seconds < 5 and said == b""


def test_a_body_that_does_not_come_is_not_awaited(opened: Running):
    with socket.create_connection(("127.0.0.1", opened.server.port)) as connection:
        connection.sendall(
            b"POST /v2/models/policy/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n{"
        )
        seconds, said = closed_after(connection)
    assert seconds < 5 and said.startswith(b"HTTP/1.1 408")


def test_streams_are_counted_and_idle_ones_closed(opened: Running):
    clients = [OpenpiClient(opened.ws) for _ in range(3)]
    with pytest.raises(InvalidStatus) as caught:
        OpenpiClient(opened.ws)
    assert caught.value.response.status_code == 503
    time.sleep(1.0)  # idle_s is 0.5
    again = OpenpiClient(opened.ws)
    for client in (*clients, again):
        client.close()


def test_errors_never_show_a_traceback(opened: Running):
    observation = odd_observation("raise")
    with RemotePolicy(opened.http, timeout_s=5) as remote, pytest.raises(ConnectionError) as caught:
        remote.act([observation])
    assert "RuntimeError" in str(caught.value) and "secret" not in str(caught.value) and "File" not in str(caught.value)
    for path, method in (
        ("/v2/models/policy/infer", "DELETE"), ("/v1/x", "GET"), ("/a%00b", "GET"), ("/%ff", "GET"), ("/runs/x/episodes", "GET")
    ):
        response = WEB.request(method, opened.http + path)
        assert response.status_code in (404, 405) and "error" in response.json()
        if response.status_code == 405:
            assert response.headers["allow"] == "POST"


def test_a_failure_is_counted_under_its_route(opened: Running, monkeypatch):
    async def fail():
        raise ArithmeticError

    monkeypatch.setattr(opened.server.services, "swap", fail)
    assert WEB.post(f"{opened.http}/admin/reload").status_code == 500
    assert opened.run(opened.server.gate.drained(5.0))  # it is counted after its answer
    labels = {"protocol": "http", "method": "POST /admin/reload", "code": "500"}
    assert opened.server.metrics.registry.get_sample_value("remask_requests_total", labels) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Nothing to serve"),
        (["--host=0.0.0.0", "--policy.factory=tests.odd_policy:OddPolicy"], "Set a key"),
        (["--security.tls_key=/nowhere", "--policy.factory=tests.odd_policy:OddPolicy"], "TLS needs both"),
        (["--policy.factory=tests.odd_policy:OddPolicy", "--security.key_file=/nowhere", "--port=0"], "/nowhere"),
        ([
            "--policy.factory=tests.odd_policy:OddPolicy", "--host=203.0.113.1", "--port=0", "--grpc_port=null"
        ], "Cannot listen"),
    ],
)
def test_settings_that_cannot_be_served_are_one_line(arguments: list[str], says: str, monkeypatch, capsys):
    monkeypatch.setenv("REMASK_API_KEY", KEY if "203.0.113.1" in str(arguments) else "")
    assert cli(["serve", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line


def test_tls_refuses_old_protocols(tmp_path: Path):
    security = certificates(tmp_path)
    from serve.security import tls_context

    assert tls_context(security).minimum_version >= ssl.TLSVersion.TLSv1_2
    assert tls_context(security).verify_mode is ssl.CERT_REQUIRED
