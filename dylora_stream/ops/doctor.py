"""The doctor: small checks of what the daemon stands on, each with what to do when it fails.

A probe returns what it found, in one line, or raises a DyloraError whose text says what to do. Those that need a
client, a database or a model are given by `bootstrap`; those of the machine are here.
"""

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from dylora_stream.core.errors import DyloraError
from dylora_stream.ops.ask import open_directly
from dylora_stream.ops.http import SERVER_NAME, HttpConfig, family_of, port_refusal, url_of

__all__ = ["Check", "Probe", "examine", "machine_probes"]

FREE_DISK_BYTES = 1_000_000_000  # the model's folder and some hundred experts
PYTHONS = ((3, 11), (3, 13))

Probe = Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a probe found, or why it failed and what to do."""

    name: str
    is_ok: bool
    detail: str


def examine(probes: Mapping[str, Probe]) -> list[Check]:
    """Run every probe; one that fails does not keep the others from running."""
    return [_check(name, probe) for name, probe in probes.items()]


def machine_probes(folder: Path, http: HttpConfig, threads: int) -> dict[str, Probe]:
    """The probes that need nothing but this machine."""
    return {
        "python": probe_python,
        "cores": lambda: probe_cores(threads),
        "data folder": lambda: probe_folder(folder),
        "http ports": lambda: probe_ports(folder, http),
    }


def probe_python() -> str:
    """The interpreter is one that the libraries have builds for."""
    found, (least, most) = sys.version_info[:2], PYTHONS
    if not least <= found <= most:
        wanted = f"{least[0]}.{least[1]} to {most[0]}.{most[1]}"
        raise DyloraError(f"this is Python {found[0]}.{found[1]}; use {wanted}")
    return sys.version.split()[0]


def probe_cores(threads: int) -> str:
    """Torch's threads fit the machine."""
    cores = os.cpu_count() or 1
    if threads > cores:
        raise DyloraError(
            f"model.threads is {threads} on {cores} cores: that is slower; set it to {cores} or to 0"
        )
    return f"{cores} cores, model.threads {threads or 'left to torch'}"


def probe_folder(folder: Path) -> str:
    """The data folder can be written to, and there is room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise DyloraError(
            f"{folder} cannot be written ({error.strerror}); set store.folder to one that can"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < FREE_DISK_BYTES:
        raise DyloraError(
            f"{folder} has {free / 1e9:.1f} GB left; free some, or set store.folder to a larger disk"
        )
    return f"{folder.absolute()}, {free / 1e9:.0f} GB free"


def probe_ports(folder: Path, http: HttpConfig) -> str:
    """The operator's two ports are free, or taken by the daemon of this data folder."""
    if not http.is_enabled or http.port == 0:
        return "off" if not http.is_enabled else "any free ones"
    ports = {"serve": http.port, "learn": http.port + 1}
    return ", ".join(_port_of(role, port, folder, http.host) for role, port in ports.items())


def _port_of(role: str, port: int, folder: Path, host: str) -> str:
    try:
        with socket.socket(family_of(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        told = folder / f"{role}.http"
        if not _is_daemon(f"{url_of(host, port)}/healthz"):
            raise DyloraError(port_refusal(host, port, error)) from error
        if not told.is_file() or told.read_text().rpartition(":")[2] != str(port):
            raise DyloraError(
                f"http.port {port}, for {role}, is taken by a daemon that {folder} is not the data folder of: "
                "set another http.port here, or 0 for any free one"
            ) from error
        return f"{role}'s {host}:{port} is ours: a daemon is running"
    return f"{role}'s {host}:{port} is free"


def _is_daemon(url: str) -> bool:
    try:
        with open_directly(url, timeout=2) as response:
            return str(response.headers["Server"]).startswith(SERVER_NAME)
    except HTTPError as error:
        return str(error.headers["Server"]).startswith(SERVER_NAME)
    except (OSError, HTTPException):
        return False


def _check(name: str, probe: Probe) -> Check:
    try:
        return Check(name=name, is_ok=True, detail=probe())
    except DyloraError as error:
        return Check(name=name, is_ok=False, detail=str(error))
    except Exception as error:  # noqa: BLE001 - the others are run, whatever this one met
        return Check(name=name, is_ok=False, detail=f"unexpected {type(error).__name__}: {error}")
