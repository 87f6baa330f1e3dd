"""The operator's HTTP port: metrics, health, "is this input new?", and taking an expert out of service.

    GET  /metrics           Prometheus text
    GET  /healthz           200 while the process works, 503 with the reason when it should be restarted
    GET  /readyz            200 when it takes records, 503 before
    GET  /stats             what this role holds, as JSON
    POST /novelty           {"input": "...", "tenant"?: "..."} -> {"score", "p_value", "entropy", "nearest", "is_novel"}
    POST /experts/retire    {"expert": "..."} -> 202; as application/json only, which no page of another site may send

A thread of the standard library's server; it knows no Kafka and no model, only the callables that it is given. Those
are called from its threads: whoever gives a `score` that is not thread-safe wraps it. It has no authentication, so it
listens on loopback unless told otherwise, and there answers no page of another site, which a browser would let ask
under a name that its owner points here (DNS rebinding).
"""

import errno
import ipaddress
import json
import math
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog
from pydantic_core import from_json

from dylora_stream.core.errors import BadRecord, DyloraError, ExpertUnknown, SettingsError
from dylora_stream.core.messages import DEFAULT_TENANT, Novelty

__all__ = ["Health", "HttpConfig", "HttpPort", "HttpRoutes", "family_of", "port_refusal", "url_of"]

log = structlog.get_logger(__name__)

METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"
SERVER_NAME = "dylora-stream"  # what the doctor recognises a running daemon by
LAST_PORT = 65_534  # there is one more, for learn
REQUEST_TIMEOUT_S = 10.0  # a client that sends nothing for so long is let go
CONNECTIONS = 64  # a thread each; more are told to come back
SCORES = 8  # inputs that wait for the model at once, so that health and metrics always find a thread
LENGTH_DIGITS = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Where the operator's port listens."""

    is_enabled: bool = True
    """Whether there is a port at all."""

    host: str = "127.0.0.1"
    """Loopback, because there is no authentication; 0.0.0.0 for a container whose network protects it. A name, or an
    IPv4 or IPv6 address."""

    port: int = 9464
    """0: any free one, told in the log. serve takes this port, learn on the same machine the next one."""

    max_body_bytes: int = 262_144
    """Bytes of a POST body; longer ones get 413."""

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise ValueError("host is empty: use 127.0.0.1, or 0.0.0.0 for every interface")
        if self.host.startswith("["):
            raise ValueError(f"host is {self.host}: write an IPv6 address without brackets")
        if not 0 <= self.port <= LAST_PORT:
            raise ValueError(
                f"port is {self.port}: use 1 to {LAST_PORT}, because learn takes the next one, or 0 for any free one"
            )
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes is {self.max_body_bytes}: it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How a role is: `is_alive` false means restart it, `is_ready` false means it takes no records (yet)."""

    is_alive: bool
    is_ready: bool
    details: Mapping[str, Any] = field(default_factory=dict)


Score = Callable[[str, str], Novelty]  # input, tenant; raises BadRecord for an input that cannot be scored
Retire = Callable[[str], None]  # an expert's id; raises ExpertUnknown; done soon after it returns


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRoutes:
    """What the port shows. `score` is None in a role that has no model, `retire` in one that decides nothing."""

    health: Callable[[], Health]
    metrics: Callable[[], bytes]
    score: Score | None = None
    retire: Retire | None = None
    stats: Callable[[], Mapping[str, Any]] = dict


def family_of(host: str) -> socket.AddressFamily:
    """IPv6 where the host is an address of it; names are looked up for IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def url_of(host: str, port: int) -> str:
    """`http://host:port`, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def port_refusal(host: str, port: int, error: OSError) -> str:
    """Why a port cannot be listened on, and which setting to change."""
    what = f"http.port {port} on http.host {host} cannot be used ({error.strerror or error})"
    if error.errno == errno.EADDRINUSE:
        return f"{what}: another program has it. Set another http.port, or 0 for any free one"
    return (
        f"{what}: set http.host to an address of this machine, and http.port to one that this user may take"
    )


class HttpPort:
    """Starts listening when constructed; `close` ends its thread. May be closed twice.

    `is_next`: one after `http.port`, for the second role of a machine. Raises SettingsError where that cannot be had.
    """

    def __init__(self, config: HttpConfig, routes: HttpRoutes, *, is_next: bool = False) -> None:
        known = {
            "routes": routes,
            "config": config,
            "scores": threading.BoundedSemaphore(SCORES),
        }
        handler = type("Handler", (_Exchange,), known)
        port = config.port + 1 if is_next and config.port else config.port
        try:
            self._server = _Server((config.host, port), handler)
        except OSError as error:
            raise SettingsError(port_refusal(config.host, port, error)) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="http", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """`http://host:port`, with the port that was taken."""
        host, port = self._server.server_address[:2]
        return url_of(str(host), port)

    def close(self) -> None:
        """Stop listening; a request in flight ends with the process at the latest."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = CONNECTIONS  # with the class's 5, of a burst the kernel holds some back for seconds

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = family_of(address[0])
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, or, with all taken, a line."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.sendall(
                b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
            )
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Refused(Exception):
    """Ends an exchange with a status and a sentence."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Exchange(BaseHTTPRequestHandler):
    """One request; the port that owns the class sets these three."""

    routes: HttpRoutes
    config: HttpConfig
    scores: threading.BoundedSemaphore
    server_version = SERVER_NAME
    sys_version = ""
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        """Metrics and health."""
        self._answer(self._shown)

    def do_POST(self) -> None:
        """The novelty of one input; an expert's end."""
        self._answer(self._done)

    def _answer(self, exchange: Callable[[], None]) -> None:
        """Every exchange ends with an answer, but for a client that is gone."""
        try:
            self._admit()
            exchange()
        except ExpertUnknown as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except _Refused as refused:
            self._refuse(refused.status, str(refused))
        except BadRecord as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except DyloraError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 - whoever asks is told, whatever it is
            log.warning("http_failed", path=self.path, kind=type(error).__name__)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"unexpected {type(error).__name__}: {error}")

    def _admit(self) -> None:
        """On loopback, who asks by a name of their own is a browser that was led here."""
        name = _host_of(self.headers.get("Host", self.config.host))
        if _is_local(self.config.host) and name != self.config.host and not _is_local_name(name):
            raise _Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this port is asked by its address or localhost, by no other name",
            )

    def _shown(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._send(HTTPStatus.OK, self.routes.metrics(), METRICS_TYPE)
        elif path in ("/healthz", "/readyz"):
            health = self.routes.health()
            is_good = health.is_alive if path == "/healthz" else health.is_alive and health.is_ready
            status = HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE
            self._send_json(status, {"ok": is_good, **health.details})
        elif path == "/stats":
            self._send_json(HTTPStatus.OK, self.routes.stats())
        else:
            self._refuse(
                HTTPStatus.NOT_FOUND,
                "there is GET /metrics, /healthz, /readyz, /stats and POST /novelty, /experts/retire",
            )

    def _done(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/novelty":
            self._send_json(HTTPStatus.OK, asdict(self._scored()))
        elif path == "/experts/retire":
            self._send_json(HTTPStatus.ACCEPTED, {"retiring": self._retired()})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is POST /novelty and /experts/retire")

    def _scored(self) -> Novelty:
        text, tenant = _question(self._body())
        if self.routes.score is None:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "this role has no model; ask a serve worker")
        if not self.routes.health().is_ready:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the model is not ready yet")
        if not self.scores.acquire(blocking=False):
            raise _Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{SCORES} inputs wait already: come back in a second"
            )
        try:
            return self.routes.score(text, tenant)
        finally:
            self.scores.release()

    def _retired(self) -> str:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send it as Content-Type: application/json")
        document = _document(self._body(), '{"expert": "id"}')
        expert = document.get("expert")
        if not isinstance(expert, str) or document.keys() != {"expert"}:
            raise _Refused(HTTPStatus.BAD_REQUEST, 'send {"expert": "id"}, and nothing else')
        if self.routes.retire is None:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "this role has no say in it; ask the learn worker")
        self.routes.retire(expert)
        return expert

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if len(length) > LENGTH_DIGITS or int(length) > self.config.max_body_bytes:
            self.close_connection = True
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body may have {self.config.max_body_bytes} bytes, not {length[:LENGTH_DIGITS]}",
            )
        return self.rfile.read(int(length))

    def _send(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_json(self, status: HTTPStatus, document: Mapping[str, Any]) -> None:
        self._send(
            status, json.dumps(_finite(document), default=float, allow_nan=False).encode(), "application/json"
        )

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send_json(status, {"error": message})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name for it
        """Scrapes every few seconds are not worth a log line."""


def _host_of(header: str) -> str:
    """The name or address of a Host header, without its port and an IPv6 address's brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0] if header.count(":") <= 1 else header


def _is_local(host: str) -> bool:
    """Whether a host to listen on is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_local_name(name: str) -> bool:
    """An address, which nobody can point elsewhere, or the name that every machine has for itself."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost"
    return True


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: both become null, as on the wire."""
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _document(body: bytes, form: str) -> dict[str, Any]:
    """The JSON object of a POST."""
    try:
        document = from_json(body)  # as strict as the stream: half of a surrogate pair is no text
    except ValueError as error:
        raise _Refused(HTTPStatus.BAD_REQUEST, f"not JSON ({error}); send {form} as UTF-8 JSON") from error
    if not isinstance(document, dict):
        raise _Refused(HTTPStatus.BAD_REQUEST, f"not an object; send {form} as UTF-8 JSON")
    return document


def _question(body: bytes) -> tuple[str, str]:
    """Input and tenant of a POST /novelty."""
    form = '{"input": "text", "tenant"?: "name"}'
    document, expected = _document(body, form), f"send {form} as UTF-8 JSON"
    if not isinstance(document.get("input"), str) or not document["input"].strip():
        raise _Refused(HTTPStatus.BAD_REQUEST, f"`input` must be a non-empty text; {expected}")
    tenant = document.get("tenant", DEFAULT_TENANT)
    if not isinstance(tenant, str) or not tenant:
        raise _Refused(HTTPStatus.BAD_REQUEST, f"`tenant` must be a text; {expected}")
    if unknown := sorted(document.keys() - {"input", "tenant"}):
        raise _Refused(HTTPStatus.BAD_REQUEST, f"unknown field {unknown[0]!r}; {expected}")
    return document["input"], tenant
