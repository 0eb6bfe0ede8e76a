"""Hostile HTTP for a server: requests made from its OpenAPI document, and inference requests with odd values."""

import copy
import json
import random
from collections import Counter
from typing import Any

import hypothesis
import numpy as np
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from tests.odd_policy import odd_observation
from tests.serving_fuzz import TIMEOUT_S, judge_http, mutated

NOT_FUZZED = ("/admin/reload",)  # starts a process each time; tests/test_serving_security.py does
KNOWN_NAMES = {"name": "policy"}


def fuzz_http(url: str, count: int, seed: int) -> Counter[str]:
    """About `count` requests made from the server's own OpenAPI document, valid ones and invalid ones; answers by status."""
    answers: Counter[str] = Counter()
    with requests.Session() as session:
        document = session.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()
        schema = schemathesis.openapi.from_dict(document)
        operations = [result.ok() for result in schema.get_all_operations()]
        operations = [operation for operation in operations if operation.path not in NOT_FUZZED]
        modes = [(operation, mode) for operation in operations for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
        for index, (operation, mode) in enumerate(modes):
            share = max(1, round(count / len(modes)))
            _fuzz_operation(operation, mode, url, session, share, seed + index, answers)
    return answers


def _fuzz_operation(
    operation: Any, mode: GenerationMode, url: str, session: requests.Session, count: int, seed: int, answers: Counter[str]
) -> None:
    names = {parameter.name for parameter in operation.path_parameters}
    fixed = {name: value for name, value in KNOWN_NAMES.items() if name in names}  # else nearly all would be "no such model"
    checks = [content_type_conformance, response_schema_conformance]
    if mode is GenerationMode.POSITIVE:
        checks.append(status_code_conformance)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode, path_parameters=fixed))
    def run(case: Any) -> None:
        response = case.call(base_url=url, session=session, timeout=TIMEOUT_S)
        judge_http(response.status_code, response.content, f"{case.method} {case.formatted_path} {str(case.body)[:300]}")
        case.validate_response(response, checks=checks)
        answers[str(response.status_code)] += 1

    try:
        run()
    except Unsatisfiable:
        pass  # nothing can be wrong about it: no parameter, no body


def fuzz_inference(url: str, count: int, seed: int) -> Counter[str]:
    """Inference requests with a few values of a valid one replaced, as JSON and with binary tensors; answers by status."""
    generator, answers = random.Random(seed), Counter[str]()
    observation = odd_observation()
    tensors = {
        **{f"observation.images.{name}": ("UINT8", image[None]) for name, image in observation.images.items()},
        "observation.state": ("FP32", observation.state[None]),
        "known": ("FP32", np.zeros((1, 2, 7), np.float32)),
        "seed": ("INT64", np.zeros(1, np.int64)),
    }
    with requests.Session() as session:
        for _ in range(count):
            binary = generator.random() < 0.5
            inputs: list[Any] = [{"name": "task", "datatype": "BYTES", "shape": [1], "data": ["go"]}]
            tail = b""
            for name, (datatype, array) in tensors.items():
                entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
                if binary:
                    entry["parameters"] = {"binary_data_size": array.nbytes}
                    tail += array.tobytes()
                else:
                    entry["data"] = array.tolist() if generator.random() < 0.5 else array.ravel().tolist()
                inputs.append(entry)
            body: Any = {"id": "1", "inputs": inputs, "parameters": {"timeout_ms": 20_000}}
            for _ in range(generator.randrange(3)):
                _replace_somewhere(body, generator)
            head = json.dumps(body).encode()
            head = mutated(head, generator) if generator.random() < 0.1 else head
            headers = {
                "Inference-Header-Content-Length": str(len(head) + generator.choice((0, 0, 0, 0, -1, 3)))
            } if binary else {}
            path = "/v2/models/policy/infer" if generator.random() < 0.9 else "/v1/chat/completions"
            response = session.post(url + path, data=head + tail, headers=headers, timeout=TIMEOUT_S)
            judge_http(response.status_code, response.content, f"{path} {head[:300]!r}")
            answers[str(response.status_code)] += 1
    return answers


def _replace_somewhere(node: Any, generator: random.Random) -> None:
    """Replace, remove or double one value somewhere in a tree of lists and dicts."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = generator.choice(keys)
    if isinstance(node[key], dict | list) and node[key] and generator.random() < 0.7:
        _replace_somewhere(node[key], generator)
        return
    match generator.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node.insert(key, node[key])
        case _:
            node[key] = copy.deepcopy(generator.choice(ODD_VALUES))  # the next replacement may go into it


ODD_NUMBERS = (True, 0, -1, 1, 255, 256, 2**31, 2**63, 2**64, -(2**70), 1e39, 1e400, float("nan"))
ODD_TEXTS = ("", "x", "\0", "\ud800", "observation.state", "FP32", "FP16", "BYTES", "9" * 5000)
ODD_VALUES: tuple[Any, ...] = (None, *ODD_NUMBERS, *ODD_TEXTS, [], [[]], [1, 2], [[1], [2, 3]], {}, {"a": {}})
