"""schemathesis over the whole API: whatever is sent, no 5xx, and every answer is as the OpenAPI document says. Bounded and repeatable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.api.served import House, house
from tests.people import ANSWER_SECONDS, Person
from worker.embedded import EmbeddedPostgres, EmbeddedValkey

EXAMPLES = 25
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def served(postgres: EmbeddedPostgres, migrated_template: str, valkey: EmbeddedValkey) -> Iterator[House]:
    with house(postgres, migrated_template, valkey) as made:
        yield made


@pytest.fixture(scope="module")
def person(served: House) -> Person:
    return served.person()


@pytest.fixture(scope="module")
def conversation(person: Person) -> int:
    """One that exists, so that what is sent gets further than a 404."""
    return int(person.start("here")["id"])


def test_every_answer_is_declared(served: House, person: Person, conversation: int, subtests: pytest.Subtests) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", wait_for_schema=5)
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path.endswith(("/events", "/stream")):  # they do not end
            continue
        asks = bool(operation.body or operation.query or operation.path_parameters)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if asks else (GenerationMode.POSITIVE,):
            with subtests.test(operation=operation.label, mode=mode.value):
                _fuzz(operation, mode, served, person, conversation)


def _fuzz(operation: Any, mode: GenerationMode, served: House, person: Person, conversation: int) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        for name in ("conversation_id", "session_id"):
            if name in case.path_parameters and operation.method.upper() != "DELETE":
                case.path_parameters[name] = str(conversation)
        headers = {**(case.headers or {}), "Authorization": f"Bearer {person.token}"}
        response = case.call(base_url=served.url, headers=headers, timeout=ANSWER_SECONDS)
        streamed = response.headers.get("content-type", [""])[0].startswith("text/event-stream")  # no JSON, so no schema to compare with
        case.validate_response(response, checks=[check for check in CHECKS if not (streamed and check is response_schema_conformance)])

    send()
