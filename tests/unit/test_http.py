"""The operator's HTTP port: what it shows, and what it refuses."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dylora_stream.core.errors import BadRecord, DyloraError, ExpertUnknown, SettingsError, StoreError
from dylora_stream.core.messages import Novelty
from dylora_stream.ops.ask import ask
from dylora_stream.ops.doctor import probe_ports
from dylora_stream.ops.http import CONNECTIONS, SCORES, Health, HttpConfig, HttpPort, HttpRoutes, Score
from dylora_stream.stream.broker import free_port

BUSY = "dictionary changed size during iteration"
READY = Health(is_alive=True, is_ready=True, details={"registry": 3})


def novelty_of(text: str, tenant: str) -> Novelty:
    """A scorer for which long texts are novel; it refuses `bad` and fails on `worse`."""
    if text == "bad":
        raise BadRecord("input_too_long", "the input is too long")
    if text == "far":
        return Novelty(score=float("inf"), p_value=0.0, entropy=0.5, nearest=None, is_novel=True)
    if text == "worse":
        raise StoreError("the index is gone")
    if text == "odd":
        raise TypeError("no such kind of text")
    return Novelty(score=float(len(text)), p_value=None, entropy=0.5, nearest=tenant, is_novel=len(text) > 5)


def rows() -> Mapping[str, Any]:
    """What a role holds."""
    return {"rows": {"waiting": 2}}


def busy() -> Mapping[str, Any]:
    """A role that is just changing what it holds."""
    raise RuntimeError(BUSY)


def has_ipv6() -> bool:
    """Whether loopback has an IPv6 address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@contextmanager
def port(
    health: Health = READY,
    score: Score | None = novelty_of,
    retire: Callable[[str], None] | None = None,
    stats: Callable[[], Mapping[str, Any]] = rows,
    **config: Any,
) -> Iterator[HttpPort]:
    """A port on a free number, closed afterwards."""
    routes = HttpRoutes(
        health=lambda: health,
        metrics=lambda: b"dylora_x 1\n",
        score=score,
        retire=retire,
        stats=stats,
    )
    opened = HttpPort(HttpConfig(port=0, **config), routes)
    try:
        yield opened
    finally:
        opened.close()


def address_of(opened: HttpPort) -> tuple[str, int]:
    """Where to connect."""
    host, _, number = opened.address.removeprefix("http://").rpartition(":")
    return host, int(number)


def until_answered(opened: HttpPort) -> Any:
    """What `/stats` says once there is a thread for it; pytest's time limit is the only other end."""
    while True:
        status, found = call(opened, "GET", "/stats")
        if status == 200:
            return found


def call(
    opened: HttpPort, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and body, the body as JSON where it is."""
    connection = http.client.HTTPConnection(opened.address.removeprefix("http://"), timeout=5)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(text) if is_json else text


def test_metrics_are_passed_through() -> None:
    """What the metrics give is what a scrape gets."""
    with port() as opened:
        assert call(opened, "GET", "/metrics") == (200, b"dylora_x 1\n")


@pytest.mark.parametrize(
    ("is_alive", "is_ready", "healthz", "readyz"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, True, 503, 503)],
)
def test_health_and_readiness_differ(is_alive: bool, is_ready: bool, healthz: int, readyz: int) -> None:
    """A worker that starts is alive and not ready; one that hangs is neither."""
    with port(Health(is_alive=is_alive, is_ready=is_ready, details={"registry": 3})) as opened:
        assert call(opened, "GET", "/healthz") == (healthz, {"ok": healthz == 200, "registry": 3})
        assert call(opened, "GET", "/readyz") == (readyz, {"ok": readyz == 200, "registry": 3})


def test_an_input_is_scored() -> None:
    """POST /novelty answers with the novelty, and the tenant is passed on."""
    with port() as opened:
        assert ask(f"{opened.address}/novelty", {"input": "something", "tenant": "acme"}) == {
            "score": 9.0, "p_value": None, "entropy": 0.5, "nearest": "acme", "is_novel": True,
        }  # fmt: skip


def test_beyond_every_number_is_null() -> None:
    """JSON has no infinity."""
    with port() as opened:
        assert ask(f"{opened.address}/novelty", {"input": "far"})["score"] is None


def test_stats_are_shown() -> None:
    """GET /stats is the role's own summary."""
    with port() as opened:
        assert ask(f"{opened.address}/stats") == {"rows": {"waiting": 2}}


def test_an_error_that_nobody_expected_is_answered_too() -> None:
    """A client that hears nothing does not know whether to ask again."""
    with port(stats=busy) as opened:
        found, answer = call(opened, "GET", "/stats")
        assert (found, answer["error"]) == (500, f"unexpected RuntimeError: {BUSY}")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[1]", 400, "not an object"),
        (b'{"input": 3}', 400, "`input`"),
        (b'{"input": "  "}', 400, "`input`"),
        (b'{"input": "x", "tenant": 3}', 400, "`tenant`"),
        (b'{"input": "x", "inptu": 3}', 400, "inptu"),
        (b'{"input": "bad"}', 400, "too long"),
        (b'{"input": "worse"}', 503, "index is gone"),
        (b'{"input": "odd"}', 500, "no such kind of text"),
        (b'{"input": "\\ud800"}', 400, "not JSON"),
        (b'{"input": ' + b"[" * 80, 400, "not JSON"),
        (b'{"input": "' + b"x" * 200 + b'"}', 413, "100 bytes"),
    ],
)
def test_a_wrong_question_gets_a_sentence(body: bytes, status: int, said: str) -> None:
    """Status and reason tell the caller what to change."""
    with port(max_body_bytes=100) as opened:
        found, answer = call(opened, "POST", "/novelty", body)
        assert (found, said in answer["error"]) == (status, True), answer


def test_a_body_without_length_is_refused() -> None:
    """A chunked body could be endless."""
    with port() as opened:
        found, _ = call(opened, "POST", "/novelty", None, **{"Transfer-Encoding": "chunked"})
        assert found == 411


@pytest.mark.parametrize(("length", "status"), [("²", 411), ("-1", 411), ("9" * 5000, 413)])
def test_an_odd_length_is_refused(length: str, status: int) -> None:
    """Whatever Python takes for a number."""
    with port() as opened, socket.create_connection(address_of(opened)) as client:
        client.sendall(f"POST /novelty HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode("latin-1"))
        assert client.recv(100).split()[1] == str(status).encode()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9464", 200),
        ("127.0.0.1", 200),
        ("[::1]:9464", 200),
        ("metrics.example.com", 421),
        ("", 421),
    ],
)
def test_a_page_of_another_site_learns_nothing(host: str, status: int) -> None:
    """A browser asks loopback under the name that the site's owner has pointed here."""
    with port() as opened:
        assert call(opened, "GET", "/stats", Host=host)[0] == status


def test_a_port_for_every_interface_is_asked_by_any_name() -> None:
    """A container's, as its network knows it."""
    with port(host="0.0.0.0") as opened:
        assert call(opened, "GET", "/stats", Host="dylora:9464")[0] == 200


def test_inputs_that_wait_for_the_model_leave_room_for_health() -> None:
    """So many wait; one more is told to come back, and a probe is answered as ever."""
    is_free, waiting = threading.Event(), threading.Semaphore(0)

    def slow(text: str, tenant: str) -> Novelty:
        waiting.release()
        is_free.wait(20)
        return novelty_of(text, tenant)

    body = json.dumps({"input": "x"}).encode()
    with port(score=slow) as opened, ThreadPoolExecutor(SCORES) as pool:
        try:
            asked = [pool.submit(call, opened, "POST", "/novelty", body) for _ in range(SCORES)]
            for _ in asked:
                assert waiting.acquire(timeout=20)
            found, answer = call(opened, "POST", "/novelty", body)
            assert (found, "come back" in answer["error"]) == (503, True)
            assert call(opened, "GET", "/healthz")[0] == 200
        finally:
            is_free.set()
        assert {each.result()[0] for each in asked} == {200}
        assert call(opened, "POST", "/novelty", body)[0] == 200


def test_more_connections_than_threads_are_told_to_come_back() -> None:
    """Clients that hold on to connections do not use up the daemon."""
    with port() as opened, ExitStack() as held:
        for _ in range(CONNECTIONS):
            client = held.enter_context(socket.create_connection(address_of(opened)))
            client.sendall(b"GET /stats")
        with socket.create_connection(address_of(opened)) as refused:
            assert refused.recv(100).split()[1] == b"503"
        held.close()
        assert "rows" in until_answered(opened)


def test_unknown_paths_are_told_what_there_is() -> None:
    """404 lists the routes."""
    with port() as opened:
        for method, path in (("GET", "/"), ("POST", "/metrics")):
            found, answer = call(opened, method, path)
            assert (found, "/novelty" in answer["error"]) == (404, True)


def test_a_role_without_model_or_not_ready_does_not_score() -> None:
    """503 with the reason, in both cases."""
    body = json.dumps({"input": "x"}).encode()
    with port(score=None) as opened:
        assert call(opened, "POST", "/novelty", body)[0] == 503
    with port(Health(is_alive=True, is_ready=False)) as opened:
        assert call(opened, "POST", "/novelty", body)[0] == 503


def test_an_expert_is_retired_by_name() -> None:
    """The role is told which, and the caller that it was accepted; one that nobody knows is 404."""
    asked: list[str] = []

    def retire(expert: str) -> None:
        if expert != "e-1":
            raise ExpertUnknown("there are: e-1")
        asked.append(expert)

    with port(retire=retire) as opened:
        assert ask(f"{opened.address}/experts/retire", {"expert": "e-1"}) == {"retiring": "e-1"}
        assert asked == ["e-1"]
        with pytest.raises(DyloraError, match="there are: e-1"):
            ask(f"{opened.address}/experts/retire", {"expert": "e-2"})


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b'{"expert": "e-1"}', "text/plain", 415),
        (b'{"expert": 3}', "application/json", 400),
        (b'{"expert": "e-1", "all": true}', "application/json", 400),
        (b"e-1", "application/json", 400),
        (b'{"expert": "e-1"}', "application/json", 503),
    ],
)
def test_an_expert_is_not_retired_by_accident(body: bytes, content_type: str, status: int) -> None:
    """What a form of another site's page can send is refused, and so is what a role cannot do."""
    with port() as opened:
        headers = {"Content-Type": content_type}
        assert call(opened, "POST", "/experts/retire", body, **headers)[0] == status


def test_a_port_in_use_says_so(tmp_path: Path) -> None:
    """The second process on a port is told which setting to change; the doctor sees whose it is."""
    with port() as opened:
        number = int(opened.address.rpartition(":")[2])
        with pytest.raises(SettingsError, match=f"http.port {number}"):
            HttpPort(HttpConfig(port=number), HttpRoutes(health=lambda: READY, metrics=bytes))
        with pytest.raises(DyloraError, match="not the data folder of"):
            probe_ports(tmp_path, HttpConfig(port=number))
        (tmp_path / "serve.http").write_text(opened.address)
        assert f":{number} is ours" in probe_ports(tmp_path, HttpConfig(port=number))
        with pytest.raises(DyloraError, match=r"for learn, is taken|another program has it"):
            probe_ports(tmp_path, HttpConfig(port=number - 1))


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on loopback")
def test_an_ipv6_address_is_served(tmp_path: Path) -> None:
    """Its address has brackets, in the log and for whoever asks; the doctor recognises it."""
    with port(host="::1") as opened:
        assert opened.address.startswith("http://[::1]:")
        assert ask(f"{opened.address}/stats") == {"rows": {"waiting": 2}}
        number = int(opened.address.rpartition(":")[2])
        (tmp_path / "serve.http").write_text(opened.address)
        assert "ours" in probe_ports(tmp_path, HttpConfig(host="::1", port=number))


def test_a_host_that_is_not_this_machine_is_said_so() -> None:
    """And not that another program has the port."""
    config = HttpConfig(host="192.0.2.1", port=0)
    with pytest.raises(SettingsError, match=r"set http\.host to an address of this machine"):
        HttpPort(config, HttpRoutes(health=lambda: READY, metrics=bytes))


def test_the_second_role_takes_the_next_port() -> None:
    """Up to the last one there is; any free one stays any free one."""
    number = free_port(2)
    routes = HttpRoutes(health=lambda: READY, metrics=bytes)
    for config, expected in ((HttpConfig(port=number), number + 1), (HttpConfig(port=65_534), 65_535)):
        opened = HttpPort(config, routes, is_next=True)
        opened.close()
        assert opened.address.endswith(f":{expected}")


def test_a_closed_port_is_free_again() -> None:
    """close() ends the thread and gives the port back, and may be called twice."""
    with port() as opened:
        number = int(opened.address.rpartition(":")[2])
        opened.close()
        opened.close()
        with pytest.raises(DyloraError, match="nothing answers"):
            ask(f"{opened.address}/stats")
        with socket.create_server(("127.0.0.1", number)):
            pass


def test_a_daemon_is_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a record says is not for the proxy that this machine's other programs use."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    with port() as opened:
        assert ask(f"{opened.address}/stats") == rows()


def test_a_port_where_no_http_is_spoken_is_another_programs(tmp_path: Path) -> None:
    """Said in a line, by whoever asks and by the doctor."""

    def greet(server: socket.socket) -> None:
        for _ in range(2):
            connection, _address = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(1024)

    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        threading.Thread(target=greet, args=(server,), daemon=True).start()
        with pytest.raises(DyloraError, match="nothing answers"):
            ask(f"http://127.0.0.1:{number}/stats")
        with pytest.raises(DyloraError, match="another program has it"):
            probe_ports(tmp_path, HttpConfig(port=number))
