"""Asking a running daemon over its HTTP port: a program of this operator's, which no proxy stands before."""

import json
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from dylora_stream.core.errors import DyloraError

__all__ = ["ask", "open_directly"]

TIMEOUT_S = 30.0  # a score waits for the batch at hand

open_directly = build_opener(ProxyHandler({})).open


def ask(url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object at `url`; with a body it is a POST. DyloraError says what the daemon said, or that it is away."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310 - our own address
    try:
        with open_directly(request, timeout=TIMEOUT_S) as response:
            answer = json.loads(response.read())
    except HTTPError as error:
        raise DyloraError(f"{url}: {_reason(error)}") from error
    except (URLError, OSError, ValueError, HTTPException) as error:
        raise DyloraError(f"nothing answers at {url} ({error}); is `dylora-stream run` running?") from error
    if not isinstance(answer, dict):
        raise DyloraError(f"{url} answered something else than an object; is it another program's port?")
    return answer


def _reason(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error)
