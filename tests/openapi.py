"""``docs/openapi.yaml``, the description of the API, and a host that checks each answer
against the description."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema_rs import Draft202012Validator
from twisted.internet.defer import Deferred, inlineCallbacks

from .contract import Answer, Host, OperatorHost, User
from .contract.base import Requests

PATH = Path(__file__).parents[1] / "docs" / "openapi.yaml"


class Description:
    """The OpenAPI document, with checks of requests and answers.

    Attributes:
        seen: operation id, status and errcode of each answer that was checked.
    """

    def __init__(self) -> None:
        self.document: dict[str, Any] = yaml.safe_load(PATH.read_text())
        self.seen: set[tuple[str, int, str | None]] = set()
        self._validators: dict[str, Draft202012Validator] = {}
        self._paths = {
            re.compile(self._prefix(item) + re.sub(r"\{\w+\}", "[^/]+", path)): item
            for path, item in self.document["paths"].items()
        }

    def check(self, method: str, target: str, body: bytes, answer: Answer) -> None:
        """Check an answer, and the request's body if the answer is a 200.

        Raises:
            AssertionError: The answer or the accepted body is not described.
        """
        where = f"{method} {target[:200]}: {answer}"
        item = self._find(target.partition("?")[0])
        operation = item and item.get({"HEAD": "get"}.get(method, method.lower()))
        if operation is None:
            status = 404 if item is None else 405
            assert answer.status == status, where
            assert method == "HEAD" or answer.json["errcode"] == "M_UNRECOGNIZED", where
            return
        described = operation["responses"].get(str(answer.status))
        assert described is not None, f"not described: {where}"
        self._check_answer(method, operation, self._follow(described), answer, where)
        taken = self._follow(operation.get("requestBody", {})).get("content")
        if taken is not None and answer.status == 200:
            sent = json.loads(body or b"{}")
            self._validate(taken["application/json"]["schema"], sent, where)

    def described(self) -> set[tuple[str, int]]:
        """Return the operation id and the status of each described answer."""
        return {
            (operation["operationId"], int(status))
            for item in self.document["paths"].values()
            for operation in item.values()
            if "operationId" in operation
            for status in operation["responses"]
        }

    def _check_answer(
        self,
        method: str,
        operation: Mapping[str, Any],
        described: Mapping[str, Any],
        answer: Answer,
        where: str,
    ) -> None:
        """Check headers and body of an answer, and note the answer in `seen`."""
        for name in described.get("headers", {}):
            assert name.lower() in answer.headers, where
        errcode = None
        if "content" not in described:
            assert not answer.body, where
        elif method != "HEAD":
            kind = answer.headers["content-type"]
            schema = described["content"][kind]["schema"]
            # In a stream of lines, each line is a JSON value of the schema.
            is_stream = kind == "application/x-ndjson"
            texts = answer.body.splitlines() if is_stream else [answer.body]
            for text in texts:
                self._validate(schema, json.loads(text), where)
            errcode = answer.json.get("errcode") if answer.status >= 400 else None
        name = operation.get("operationId")
        if name is not None and method != "HEAD":
            self.seen.add((name, answer.status, errcode))

    def _find(self, path: str) -> dict[str, Any] | None:
        """Return the path item that describes a path, or None."""
        found = (i for pattern, i in self._paths.items() if pattern.fullmatch(path))
        return next(found, None)

    def _prefix(self, item: Mapping[str, Any]) -> str:
        """Return a regular expression of the prefixes of a path item: its own server's
        or, without one, that of the document, with each value of a variable."""
        [server] = item.get("servers", self.document["servers"])
        prefix: str = server["url"]
        for name, variable in server.get("variables", {}).items():
            prefix = prefix.replace(f"{{{name}}}", f"(?:{'|'.join(variable['enum'])})")
        return prefix

    def _follow(self, value: Any) -> Any:
        """Return a part of the document, with a `$ref` replaced by its target."""
        if "$ref" not in value:
            return value
        found: Any = self.document
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return found

    def _validate(self, schema: Any, value: Any, where: str) -> None:
        """Check a value against a schema; validators are cached by schema."""
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            self._validators[key] = Draft202012Validator(whole)
        error = next(self._validators[key].iter_errors(value), None)
        assert error is None, f"{error}: {where}"


class _DescribedRequests:
    """An address whose answers are checked against the description."""

    def __init__(self, requests: Requests, description: Description) -> None:
        self._requests = requests
        self._description = description

    @inlineCallbacks
    def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Generator[Deferred[Any], Any, Answer]:
        """Send a request, check the answer and fire with the answer."""
        answer: Answer = yield self._requests.request(
            method, path, token=token, body=body, headers=headers
        )
        self._description.check(method, path, body or b"", answer)
        return answer


class DescribedHost(_DescribedRequests):
    """A host that checks each answer of another host against the description."""

    def __init__(self, host: Host, description: Description) -> None:
        super().__init__(host, description)
        self._host = host

    def new_user(self) -> User:
        """Create a user, as `Host.new_user` does."""
        return self._host.new_user()

    def new_guest(self) -> User:
        """Create a guest, as `Host.new_guest` does."""
        return self._host.new_guest()


class DescribedOperatorHost(_DescribedRequests):
    """The interface for operators of a host, with each answer checked against the
    description.

    Attributes:
        clients: the same server for clients, with checks too.
    """

    def __init__(self, host: OperatorHost, description: Description) -> None:
        super().__init__(host, description)
        self.clients = DescribedHost(host.clients, description)
        self._host = host

    def new_operator(self) -> User:
        """Create an operator, as `OperatorHost.new_operator` does."""
        return self._host.new_operator()

    def wait(self) -> Deferred[None]:
        """Wait, as `OperatorHost.wait` does."""
        return self._host.wait()
