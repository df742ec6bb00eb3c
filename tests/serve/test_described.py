"""Whatever the server's own description (OpenAPI) allows or forbids a request to be: the answer is as described."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import settings
from running import Running
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from lab.serve.app import application
from lab.serve.client import Client, Limits
from lab.serve.metrics import Metrics
from lab.serve.worker import Options

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
TIMEOUT_S = 30.0


DESCRIPTION = application(Client(Options({}), Limits(), Metrics("tiny")), "tiny", {}).openapi()
schema = schemathesis.openapi.from_dict(DESCRIPTION)


def test_it_describes_itself(server: Running) -> None:
    assert server.http.get("/openapi.json").json() == DESCRIPTION
    answers = {
        status for path in DESCRIPTION["paths"].values() for call in path.values() for status in call["responses"]
    }
    assert answers == {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}


@pytest.fixture
def seen(server: Running, request: pytest.FixtureRequest) -> Iterator[Counter[int]]:
    """How many answers a path gave, by status. In the end both kinds were seen, and nothing is held."""
    counted: Counter[int] = Counter()
    yield counted
    assert counted[200]
    if "POST" in request.node.name:  # which alone have anything to refuse but a method
        assert counted[200] > 20
        assert counted[400] > 50
    server.until(server.nothing_held)
    assert server.metrics()["kvlab:failed_steps_total"] == 0


@schema.parametrize()
@settings(max_examples=40)
def test_any_request_is_answered_as_described(server: Running, seen: Counter[int], case: schemathesis.Case) -> None:
    if case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # else no answer but "not found" would be seen
            case.body |= {"prompt": "A"} if case.body.get("prompt") == "" else {}  # nor any but "empty"
        if "name" in case.path_parameters:
            case.path_parameters["name"] = "tiny"
    response = case.call(base_url=server.url, timeout=TIMEOUT_S)
    case.validate_response(response, checks=CHECKS)
    seen[response.status_code] += 1
    if response.status_code >= 400 and response.content:
        told = response.json()["error"]
        assert set(told) == {"message", "type", "param", "code"}
        assert told["message"]
        assert "\n" not in told["message"]
    elif response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and line != "data: [DONE]"]
        assert response.text.endswith("data: [DONE]\n\n") or "error" in events[-1]
