"""Brokers that are started here: noida-db's binary, the default on one machine, and Apache Kafka from a folder.

The embedded broker has gaps that the daemon must know of (`pacing` answers one). Another is answered here: after an
aborted transaction a tailing `read_committed` reader can skip later commits of the same producer. So `EmbeddedIds`
takes a new transactional id for every producer, remembers it in a file, and gives the one before out once, to be
initialised, which aborts what its producer left open.

Each broker runs in a session of its own, so that Ctrl-C reaches it through its owner only.
"""

import importlib.util
import json
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from dylora_stream.core.errors import BrokerError, BrokerUnreachable

__all__ = [
    "ApacheKafka", "EmbeddedBroker", "EmbeddedIds", "free_port", "glibc_problem", "is_embedded", "noida_binary",
]  # fmt: skip

GLIBC_NEEDED = (2, 34)  # what the binary's symbols ask for, whatever its wheel says
MARKER = "broker.json"
KNOWN = "broker-{}.json"  # of one whose data lie elsewhere, by its port
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 9092
READY_S = 60.0
STOP_S = 15.0
POLL_S = 0.05
HEAP = "512m"
SINGLE_NODE = (  # what is 1 where there is one node
    "num.partitions",
    "offsets.topic.replication.factor",
    "transaction.state.log.replication.factor",
    "transaction.state.log.min.isr",
    "share.coordinator.state.topic.replication.factor",
    "share.coordinator.state.topic.min.isr",
)
LOG4J = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
"""


def free_port(count: int = 1) -> int:
    """The first of `count` neighbouring free ports on loopback."""
    while True:
        with socket.socket() as first:
            first.bind((LOOPBACK, 0))
            port: int = first.getsockname()[1]
        if port + count < 65536 and all(_is_free(port + step) for step in range(count)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) != 0


def glibc_problem() -> str | None:
    """Why the embedded broker cannot run here, or None."""
    library, version = platform.libc_ver()
    if library != "glibc":
        return f"the embedded broker needs Linux with glibc; this is {platform.system()} {library}. Use a real Kafka"
    if tuple(int(part) for part in version.split(".")[:2]) < GLIBC_NEEDED:
        needed = ".".join(map(str, GLIBC_NEEDED))
        return f"the embedded broker needs glibc {needed}; this machine has {version}. Use a real Kafka"
    return None


def noida_binary() -> Path:
    """The server inside the noida-db package; its Python wrapper would orphan it on SIGTERM."""
    spec = importlib.util.find_spec("noida_db")
    found = Path(spec.origin).parent / "noida-db" if spec is not None and spec.origin else None
    if found is None or not found.is_file():
        raise BrokerError(
            "the embedded broker is not installed: pip install noida-db, or name a Kafka of your own"
        )
    return found


def is_embedded(bootstrap_servers: str, data_dir: Path) -> bool:
    """Whether these servers are the embedded broker that keeps its data in `data_dir`, or is known there."""
    for path in (data_dir / MARKER, *data_dir.glob(KNOWN.format("*"))):
        with suppress(OSError, ValueError, KeyError, TypeError):
            marker = json.loads(path.read_text())
            is_here = marker["bootstrap_servers"] == _as_marked(bootstrap_servers)
            if marker["kind"] == "embedded" and is_here:
                return True
    return False


def _as_marked(bootstrap_servers: str) -> str:
    """The servers as a marker names them: this machine by its address, and always with a port."""
    host, _, port = bootstrap_servers.strip().partition(":")
    return f"{LOOPBACK if host == 'localhost' else host}:{port or DEFAULT_PORT}"


class _Server:
    """A broker process with a data folder: start, wait, stop. Subclasses say what the command is.

    `known_in` is another folder that `is_embedded` may be asked about: the daemon's own, where data lies elsewhere.
    """

    kind = ""

    def __init__(self, data_dir: Path, port: int | None = None, known_in: Path | None = None) -> None:
        self.data_dir = data_dir
        self._known_in = known_in or data_dir
        self.port = port if port is not None else self._last_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """What clients connect to."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def log_file(self) -> Path:
        """What the server wrote."""
        return self.data_dir / "broker.log"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it accepts connections. BrokerError says why it did not."""
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._refuse_a_second_one()
            self._prepare()
            log = self.log_file.open("ab")
        except OSError as error:
            raise BrokerError(
                f"the broker's folder {self.data_dir} cannot be written ({error.strerror}): name another with "
                "--data, or set store.folder"
            ) from error
        with log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.data_dir,
                start_new_session=True,
            )
        try:
            self.mark(self._process.pid)
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def mark(self, pid: int) -> None:
        """Leave the files that `is_embedded` looks at."""
        marker = {"kind": self.kind, "pid": pid, "bootstrap_servers": self.bootstrap_servers}
        text = json.dumps(marker | {"data_dir": str(self.data_dir.absolute())})
        self.data_dir.mkdir(parents=True, exist_ok=True)
        (self.data_dir / MARKER).write_text(text)
        if self._known_in.absolute() != self.data_dir.absolute():
            self._known_in.mkdir(parents=True, exist_ok=True)
            (self._known_in / KNOWN.format(self.port)).write_text(text)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL when that takes too long. May be called twice."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """SIGKILL: what a power cut does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def wait(self) -> int:
        """Block until the server ends; its exit code."""
        return self._process.wait() if self._process is not None else 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _refuse_a_second_one(self) -> None:
        """Two servers on one folder would break it; one can outlive an owner that was killed."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            marker = json.loads((self.data_dir / MARKER).read_text())
            servers, pid = str(marker["bootstrap_servers"]), int(marker["pid"])
            if marker.get("data_dir", "") not in ("", str(self.data_dir.absolute())):
                return
            if not _is_free(int(servers.rpartition(":")[2])) and Path(f"/proc/{pid}").exists():
                raise BrokerError(
                    f"a broker (process {pid}) already serves {self.data_dir} at {servers}: use it, or `kill {pid}`"
                )

    def _last_port(self) -> int:
        """The port of the last run where it is free, so that a restart keeps its address."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            last = int(
                json.loads((self.data_dir / MARKER).read_text())["bootstrap_servers"].rpartition(":")[2]
            )
            if _is_free(last):
                return last
        return free_port(2)

    def _prepare(self) -> None:
        if not _is_free(self.port):
            raise BrokerError(f"port {self.port} is taken; stop what listens there, or choose another port")

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]") -> None:
        end = time.monotonic() + READY_S
        while _is_free(self.port):
            if process.poll() is not None:
                tail = self.log_file.read_text(errors="replace")[-500:].strip()
                raise BrokerError(
                    f"the broker ended with code {process.returncode}; {self.log_file} ends with: {tail}"
                )
            if time.monotonic() > end:
                raise BrokerUnreachable(
                    f"the broker did not listen within {READY_S:g} s; see {self.log_file}"
                )
            time.sleep(POLL_S)


class EmbeddedBroker(_Server):
    """noida-db's Kafka on a loopback port. Persists in `data_dir`; for one machine, not for proofs of exactly-once."""

    kind = "embedded"

    def _prepare(self) -> None:
        problem = glibc_problem()
        if problem is not None:
            raise BrokerError(problem)
        super()._prepare()

    def _command(self) -> list[str]:
        options = {"--only": "kafka", "--host": LOOPBACK, "--kafka-port": str(self.port)}
        options["--data-dir"] = str((self.data_dir / "noida").absolute())
        return [str(noida_binary()), "start", *(part for option in options.items() for part in option)]


class ApacheKafka(_Server):
    """One Apache Kafka node in KRaft mode from a folder with `libs/`; needs Java 17. `properties` override ours."""

    kind = "apache"

    def __init__(
        self, home: Path, data_dir: Path, port: int | None = None, properties: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(data_dir, port)
        self._classpath = str((home / "libs").absolute() / "*")
        if not (home / "libs").is_dir():
            raise BrokerError(f"{home} holds no libs/: KAFKA_HOME is a folder of an unpacked Apache Kafka")
        self._properties = self._defaults() | dict(properties or {})

    def _defaults(self) -> dict[str, str]:
        controller = f"{LOOPBACK}:{self.port + 1}"
        single = dict.fromkeys(SINGLE_NODE, "1")
        return single | {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "listeners": f"PLAINTEXT://{self.bootstrap_servers},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap_servers}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,"
            "SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str((self.data_dir / "log").absolute()),
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
        }

    def _prepare(self) -> None:
        super()._prepare()
        if shutil.which("java") is None:
            raise BrokerError("Apache Kafka needs Java 17 on the PATH")
        lines = [f"{name}={value}" for name, value in self._properties.items()]
        (self.data_dir / "server.properties").write_text("\n".join(lines) + "\n")
        (self.data_dir / "log4j2.properties").write_text(LOG4J)
        if not (self.data_dir / "log" / "meta.properties").exists():
            (self.data_dir / "log").mkdir(exist_ok=True)
            cluster = self._tool("kafka.tools.StorageTool", "random-uuid").strip().splitlines()[-1]
            self._tool(
                "kafka.tools.StorageTool",
                "format",
                "-t",
                cluster,
                "-c",
                str(self.data_dir / "server.properties"),
            )

    def _java(self) -> list[str]:
        logging = f"-Dlog4j2.configurationFile={(self.data_dir / 'log4j2.properties').absolute()}"
        return [
            "java",
            "-Xms128m",
            f"-Xmx{HEAP}",
            "-Djava.awt.headless=true",
            logging,
            "-cp",
            self._classpath,
        ]

    def _tool(self, *arguments: str) -> str:
        done = subprocess.run([*self._java(), *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BrokerError(
                f"{' '.join(arguments[:2])} failed: {(done.stderr or done.stdout)[-500:].strip()}"
            )
        return done.stdout

    def _command(self) -> list[str]:
        return [*self._java(), "kafka.Kafka", str((self.data_dir / "server.properties").absolute())]


class EmbeddedIds:
    """Transactional ids for the embedded broker: a new one each time, `{base}-{n}`, the last one kept in `memory`."""

    def __init__(self, base: str, memory: Path) -> None:
        self._base, self._memory = base, memory

    def previous(self) -> str | None:
        """The id last taken, by this process or one before it, to be initialised once."""
        number = self._last()
        return None if number == 0 else f"{self._base}-{number}"

    def take(self) -> str:
        """A new id, on disk before it is used."""
        number = self._last() + 1
        aside = self._memory.with_name(self._memory.name + ".new")
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(str(number))
        aside.replace(self._memory)
        return f"{self._base}-{number}"

    def _last(self) -> int:
        with suppress(OSError, ValueError):
            return int(self._memory.read_text())
        return 0
