"""Load on loopback: chunks per second and latency for 1, 8, 64 clients, against the same server answering one at a time.

Closed loop: a client asks again as soon as it is answered. With `--minutes` a soak instead, which may lose nothing; then
`--kill` kills the worker in its middle. Overload: four times as many clients as the queue holds, without patience.
"""

import argparse
import os
import signal
import time

from serve.protocol.refusal import Code
from tests.benchmarks.harness import parser, quiet_machine, report
from tests.benchmarks.serving_load import (
    Outcome,
    ServerProcess,
    TemporaryPolicy,
    grpc_message,
    histogram_between,
    load,
    observations,
)
from vla.policy import PolicyAssets


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--policy", type=str, default=None, help="checkpoint folder; default: an untrained one of --preset")
    arguments.add_argument("--preset", default="desk", choices=["debug", "desk-s", "desk"])
    arguments.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    arguments.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    arguments.add_argument("--max_batch", type=int, default=16)
    arguments.add_argument("--max_wait_ms", type=float, default=20.0)
    arguments.add_argument("--minutes", type=float, default=0.0, help="soak for so long with --soak_clients, instead")
    arguments.add_argument("--soak_clients", type=int, default=8)
    arguments.add_argument("--kill", action="store_true", help="in the soak: kill -9 the worker in the middle")
    options = arguments.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with TemporaryPolicy(options.policy, options.preset) as policy, quiet_machine():
        messages = [grpc_message(observation) for observation in observations(PolicyAssets.load(policy)[0].spec, 16)]
        if options.minutes:
            return soak(policy, messages, options)
        rows = throughput(policy, messages, options)
        overload_facts = overload(policy, messages, options)
    columns = [
        "clients", "server", "chunks/s", "p50 ms", "p99 ms", "p99 / p50", "against one at a time", "batches by size", "errors"
    ]
    report("serving", columns, rows, options.output, overload=overload_facts, seconds=options.seconds, threads=options.threads)
    return 0


def throughput(policy: str, messages: list[bytes], options: argparse.Namespace) -> list[list]:
    """Both servers are up all the time and measured in turn, so that the machine's other load hits them alike."""
    batching = [
        f"--batching.max_batch={options.max_batch}", f"--batching.max_wait_ms={options.max_wait_ms}", "--batching.queue=256"
    ]
    single = ["--batching.max_batch=1", "--batching.max_wait_ms=0", "--batching.queue=256"]
    rows = []
    with ServerProcess(f"--policy.path={policy}", *batching) as batched, ServerProcess(
        f"--policy.path={policy}", *single
    ) as one:
        for clients in options.clients:
            measured: dict[str, tuple[Outcome, dict[str, int]]] = {}
            for name, server in (("batched", batched), ("one at a time", one)):
                load(server.grpc_address, messages, clients, min(2.0, options.seconds / 4))
                before = server.batch_histogram()
                outcome = load(server.grpc_address, messages, clients, options.seconds)
                measured[name] = outcome, histogram_between(before, server.batch_histogram())
            reference = measured["one at a time"][0].per_second
            for name, (outcome, batches) in measured.items():
                p50, p99 = outcome.percentile(50), outcome.percentile(99)
                ratio = outcome.per_second / reference
                rows.append([clients, name, outcome.per_second, p50, p99, p99 / p50, ratio, str(batches), str(outcome.errors)])
    return rows


def overload(policy: str, messages: list[bytes], options: argparse.Namespace) -> dict[str, float]:
    """How soon a full server says no, and whether it serves as before afterwards."""
    queue = 2 * options.max_batch
    arguments = [f"--policy.path={policy}", f"--batching.max_batch={options.max_batch}", f"--batching.queue={queue}"]
    with ServerProcess(*arguments) as server:
        flooded = load(server.grpc_address, messages, 4 * queue, min(options.seconds, 10.0))
        after = load(server.grpc_address, messages, 1, min(options.seconds, 5.0))
    if not flooded.refused_ms:
        raise ArithmeticError(f"{4 * queue} clients did not overload a queue of {queue}.")
    refused = sorted(flooded.refused_ms)
    facts = {
        "clients": 4 * queue,
        "queue": queue,
        "answered": len(flooded.latencies_ms),
        "refused": len(refused),
        "refusal p50 ms": refused[len(refused) // 2],
        "refusal p99 ms": refused[int(0.99 * len(refused))],
        "other errors": sum(flooded.errors.values()),
        "p50 ms afterwards": after.percentile(50),
        "errors afterwards": sum(after.errors.values()) + len(after.refused_ms),
    }
    print(f"overload ({Code.OVERLOADED.value.grpc}): " + ", ".join(f"{name} {value:.4g}" for name, value in facts.items()))
    return facts


def soak(policy: str, messages: list[bytes], options: argparse.Namespace) -> int:
    """Closed loop for minutes: every request is answered, memory stays where it was after a tenth of the time."""
    recovery: dict[str, float] = {}
    with ServerProcess(f"--policy.path={policy}", f"--batching.max_batch={options.max_batch}") as server:

        def kill() -> None:
            pid, began = server.worker_pid, time.monotonic()
            os.kill(pid, signal.SIGKILL)
            while server.ready():
                time.sleep(0.005)
            while not server.ready():
                time.sleep(0.02)
            recovery["seconds"] = time.monotonic() - began

        seconds = 60 * options.minutes
        warm = load(server.grpc_address, messages, options.soak_clients, seconds / 10)
        memory_before = server.resident_mb()
        meanwhile = kill if options.kill else None
        outcome = load(server.grpc_address, messages, options.soak_clients, seconds, meanwhile=meanwhile)
        memory_after = server.resident_mb()
    answered, errors = len(outcome.latencies_ms), sum(outcome.errors.values())
    row = [options.minutes, options.soak_clients, answered, errors, str(outcome.errors)]
    row += [outcome.percentile(50), outcome.percentile(99), memory_before, memory_after]
    row += [recovery.get("seconds", float("nan")), server.exit_code]
    columns = ["minutes", "clients", "answered", "errors", "by status", "p50 ms", "p99 ms"]
    columns += ["MB before", "MB after", "back after s", "exit code"]
    report("serving-soak", columns, [row], options.output, warm_up=len(warm.latencies_ms), killed=options.kill)
    return 0 if errors == 0 or options.kill else 1


if __name__ == "__main__":
    raise SystemExit(main())
