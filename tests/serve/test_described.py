"""Whatever the server's own description (OpenAPI) allows or forbids a request to be: the answer is as described."""

from __future__ import annotations

import json

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
seen: dict[int, int] = {}  # how many answers there were, by status


DESCRIPTION = application(Client(Options({}), Limits(), Metrics("tiny")), "tiny", {}).openapi()
schema = schemathesis.openapi.from_dict(DESCRIPTION)


def test_it_describes_itself(server: Running) -> None:
    assert server.http.get("/openapi.json").json() == DESCRIPTION
    answers = {
        status for path in DESCRIPTION["paths"].values() for call in path.values() for status in call["responses"]
    }
    assert answers == {"200", "400", "401", "404", "413", "429", "500", "503", "504"}


@schema.parametrize()
@settings(max_examples=40)
def test_any_request_is_answered_as_described(server: Running, case: schemathesis.Case) -> None:
    if case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE:
        if isinstance(case.body, dict) and case.body.get("model"):
            case.body["model"] = "tiny"  # else no answer but "not found" would be seen
        if "name" in case.path_parameters:
            case.path_parameters["name"] = "tiny"
    response = case.call(base_url=server.url, timeout=TIMEOUT_S)
    case.validate_response(response, checks=CHECKS)
    seen[response.status_code] = seen.get(response.status_code, 0) + 1
    if response.status_code >= 400 and response.content:
        told = response.json()["error"]
        assert set(told) == {"message", "type", "param", "code"}
        assert told["message"]
        assert "\n" not in told["message"]
    elif response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and line != "data: [DONE]"]
        assert response.text.endswith("data: [DONE]\n\n") or "error" in events[-1]


def test_both_kinds_were_seen_and_nothing_is_held(server: Running) -> None:
    """Of the test above: requests that got an answer, and requests that were refused."""
    assert seen[200] > 50
    assert seen[400] > 50
    server.until(server.nothing_held)
    assert server.metrics()["kvlab:failed_steps_total"] == 0
