"""A blocking HTTP client, for tests and servers without a reactor."""

import urllib.request
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Any

from .contract import Answer

_TIMEOUT_SECONDS = 30.0


class _ReturnErrors(urllib.request.HTTPErrorProcessor):
    """Return a response of any status to the caller instead of raising an error."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response


#: Ignores the proxies of the environment, and follows no redirect.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _ReturnErrors())


def send(
    method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
) -> Answer:
    """Send one request over a new connection, and return the answer, whatever its
    status.

    Raises:
        URLError: The connection failed before the answer began.
        OSError: The connection failed while the answer was read.
    """
    request = urllib.request.Request(url, body, dict(headers), method=method)
    response: HTTPResponse
    with _opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
        got = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, got, response.read())
