"""Spawned simulator processes that work off jobs: start, talk over pipes, notice a death, replace, stop.

Knows nothing of episodes. The parent's side is `WorkerPool` and `run_jobs`, the process's side is `serve_jobs`.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Set before a simulator process starts: it is one of several on the machine's cores.
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
CLOSE_SECONDS = 5.0  # a worker gets this long to end by itself


@dataclass(frozen=True)
class Ready:
    """A worker's first message: what it found out about its simulator."""

    facts: Any


@dataclass(frozen=True)
class Ask:
    """A question in the middle of a job; the worker waits for the answer."""

    question: Any


@dataclass(frozen=True)
class Done:
    result: Any


@dataclass(frozen=True)
class Failed:
    """An exception ended the job (or, before `Ready`, the start); the worker lives on."""

    error: str

    def __str__(self) -> str:
        return self.error


@dataclass(frozen=True)
class Died:
    """Comes from `WorkerPool.receive` instead of a message when a worker's process ended unasked."""

    exit_code: int | None  # negative: killed by this signal

    def __str__(self) -> str:
        if self.exit_code is not None and self.exit_code < 0:
            return f"simulator process killed by {signal.Signals(-self.exit_code).name}"
        return f"simulator process ended with exit code {self.exit_code}"


class WorkerPool:
    """`num_workers` processes that each run `target(connection, *arguments)` until the connection closes.

    Spawned, never forked: a fork would copy a GL context and torch's threads. `target` is a module-level function of a
    torch-free module. A worker that dies is reported once as `Died` and replaced, `max_restarts` times in all.
    """

    def __init__(
        self, num_workers: int, target: Callable[..., None], arguments: tuple[Any, ...] = (), *, max_restarts: int = 10
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"workers is {num_workers}; at least 1 simulator process is needed.")
        self._context = multiprocessing.get_context("spawn")
        self._target, self._arguments = target, arguments
        self._restarts_left = max_restarts
        self._processes: list[Any] = [None] * num_workers
        self._connections: list[Connection | None] = [None] * num_workers
        for worker in range(num_workers):
            self._start(worker)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def alive(self) -> list[int]:
        """Workers that can be sent to."""
        return [worker for worker, connection in enumerate(self._connections) if connection is not None]

    def send(self, worker: int, message: Any) -> None:
        """Hand `message` to a worker; if it has died, `receive` will say so."""
        connection = self._connections[worker]
        if connection is None:
            raise RuntimeError(f"Worker {worker} is gone and was not replaced.")
        try:
            connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the death itself is reported by receive()

    def receive(self, timeout_s: float | None = None) -> list[tuple[int, Any]]:
        """All (worker, message) waiting now, blocking up to `timeout_s` for the first; `Died` where a process ended."""
        owners = {connection: worker for worker, connection in enumerate(self._connections) if connection is not None}
        messages: list[tuple[int, Any]] = []
        for connection in wait(list(owners), timeout_s):
            worker = owners[connection]
            try:
                messages.append((worker, connection.recv()))
            except (EOFError, ConnectionResetError):
                messages.append((worker, Died(self._bury(worker))))
                if self._restarts_left > 0:
                    self._restarts_left -= 1
                    self._start(worker)
        return sorted(messages, key=lambda message: message[0])

    def close(self) -> None:
        """End every process: ask by closing the pipe, then terminate, then kill."""
        for connection in self._connections:
            if connection is not None:
                connection.close()
        for end in ("join", "terminate", "kill"):
            for process in self._processes:
                if process.is_alive():
                    if end != "join":
                        getattr(process, end)()
                    process.join(CLOSE_SECONDS if end == "join" else 1.0)
        self._connections = [None] * len(self._connections)

    def _start(self, worker: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_run, args=(self._target, theirs, self._arguments), daemon=True)
        with _environment_variables(WORKER_ENVIRONMENT):
            process.start()
        theirs.close()  # so that the process's death reads as end of file here
        self._processes[worker], self._connections[worker] = process, ours

    def _bury(self, worker: int) -> int | None:
        self._connections[worker].close()
        self._connections[worker] = None
        process = self._processes[worker]
        process.join(CLOSE_SECONDS)
        return process.exitcode


def run_jobs(
    pool: WorkerPool,
    next_job: Callable[[Any], Any],
    *,
    started: Callable[[Any], None],
    finished: Callable[[Any, Done | Failed | Died], None],
    answer: Callable[[list[Any]], list[Any]] | None = None,
) -> None:
    """Work off jobs until `next_job` gives None to every idle worker.

    next_job(last): a job for a worker whose last job was `last` (None at first), or None; asked again for idle workers
    after every message. started(facts) per worker; finished(job, outcome) per job, in the parent.
    answer(questions): answers to all workers that wait now, in one batch.
    Raises ChildProcessError if a simulator cannot start or if too many died.
    """
    jobs: dict[int, Any] = {}  # running
    idle: dict[int, Any] = {}  # worker -> its last job
    while True:
        for worker in sorted(idle):
            job = next_job(idle[worker])
            if job is not None:
                del idle[worker]
                jobs[worker] = job
                pool.send(worker, job)
        if not jobs and idle:
            return
        if not pool.alive:
            raise ChildProcessError("Simulator processes keep dying; see above. `vla doctor` checks rendering.")
        asked: list[tuple[int, Any]] = []
        for worker, message in pool.receive():
            match message:
                case Ask(question):
                    asked.append((worker, question))
                case Ready(facts):
                    started(facts)
                    idle[worker] = None
                case Failed(error) if worker not in jobs:
                    raise ChildProcessError(f"The simulator could not start: {error}")
                case Done() | Failed():
                    idle[worker] = jobs[worker]
                    finished(jobs.pop(worker), message)
                case Died():
                    idle.pop(worker, None)
                    if worker in jobs:
                        finished(jobs.pop(worker), message)
        if asked:
            for (worker, _), reply in zip(asked, answer([question for _, question in asked]), strict=True):
                pool.send(worker, reply)


def serve_jobs(connection: Connection, start: Callable[[], tuple[Any, Callable[[Any], Any]]]) -> None:
    """A worker's life. start() -> (facts for the parent, function that does a job); ends when the parent hangs up."""
    try:
        facts, do_job = start()
    except Exception as error:  # the border of the process: it becomes the parent's error
        connection.send(Failed(describe(error)))
        return
    connection.send(Ready(facts))
    while True:
        job = connection.recv()
        try:
            outcome = Done(do_job(job))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise  # the parent hung up
        except Exception as error:  # the border of the job: an exception is an error row, never a failed episode
            outcome = Failed(describe(error))
        connection.send(outcome)


def describe(error: BaseException) -> str:
    """One line: type, text and the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _run(target: Callable[..., None], connection: Connection, arguments: tuple[Any, ...]) -> None:
    """A worker's main function. Ctrl-C is the parent's business: it closes the pipe and the worker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        target(connection, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent closed the pipe


def _end_with_parent() -> None:
    """End this process at once when its parent does, killed or not, even in the middle of an episode."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _environment_variables(values: dict[str, str]):
    """Set variables for the processes started inside; a value the user has set wins."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
