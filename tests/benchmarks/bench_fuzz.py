"""Hostile traffic on every wire of a `vla serve` process: no crash, no hang, no 5xx but a named overload, memory flat.

The kinds of traffic and the judge are tests/serving_fuzz.py's. Ends with exit code 1 at the first answer that must not be.
"""

import time
from collections import Counter
from collections.abc import Callable

from tests.benchmarks.harness import parser, report
from tests.benchmarks.serving_load import ServerProcess
from tests.serving_fuzz import fuzz_grpc, fuzz_sockets, fuzz_websocket, summary
from tests.serving_fuzz_http import fuzz_http, fuzz_inference

SHARES = {"OpenAPI document": 0.05, "inference bodies": 0.25, "gRPC": 0.3, "WebSocket": 0.3, "sockets": 0.1}
PARTS = 5  # every kind is run so many times, with other seeds; memory is read between


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=100_000)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args(argv)
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in SHARES}
    seconds = dict.fromkeys(SHARES, 0.0)
    memory = []
    limits = ["--limits.header_s=2", "--limits.body_s=2"]
    with ServerProcess("--policy.factory=tests.odd_policy:OddPolicy", *limits) as server:
        worker = server.worker_pid
        port = int(server.http.rpartition(":")[2])
        kinds: dict[str, Callable[[int, int], Counter[str]]] = {
            "OpenAPI document": lambda count, seed: fuzz_http(server.http, count, seed),
            "inference bodies": lambda count, seed: fuzz_inference(server.http, count, seed),
            "gRPC": lambda count, seed: fuzz_grpc(server.grpc_address, count, seed),
            "WebSocket": lambda count, seed: fuzz_websocket(server.ws, count, seed),
            "sockets": lambda count, seed: fuzz_sockets(port, count, seed),
        }
        for part in range(PARTS):
            for kind, run in kinds.items():
                began = time.monotonic()
                answers[kind] += run(max(1, round(options.requests * SHARES[kind] / PARTS)), options.seed + 1000 * part)
                seconds[kind] += time.monotonic() - began
            memory.append(server.resident_mb())
            print(f"part {part + 1} of {PARTS}: {sum(map(sum_of, answers.values()))} answers, {memory[-1]:.0f} MB")
        if server.worker_pid != worker or not server.ready():
            print("the worker was restarted, or the server is not ready any more")
            return 1
    rows = [[kind, sum_of(answers[kind]), seconds[kind], summary(answers[kind])] for kind in SHARES]
    columns = ["traffic", "answers", "seconds", "by status"]
    report("fuzz", columns, rows, options.output, memory_mb=memory, exit_code=server.exit_code)
    return 0 if server.exit_code == 0 else 1


def sum_of(answers: Counter[str]) -> int:
    return sum(answers.values())


if __name__ == "__main__":
    raise SystemExit(main())
