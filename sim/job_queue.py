"""Which job a simulator process does next, and how many exceptions a run bears. Data only, no processes."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

J = TypeVar("J")
MAX_ERRORS = 10  # exceptions of a run after which it stops


class JobQueue(Generic[J]):
    """Jobs in order, dealt so that a process keeps to the model it has built.

    model_of(job): what a process must build for it, by default its task; a new one costs seconds.
    """

    def __init__(self, jobs: Iterable[J], model_of: Callable[[J], Hashable] = lambda job: job.task) -> None:
        self._model_of = model_of
        self._waiting: dict[Hashable, list[J]] = {}
        for job in jobs:
            self._waiting.setdefault(model_of(job), []).append(job)
        self._running = dict.fromkeys(self._waiting, 0)
        self._failed: set[J] = set()

    def __len__(self) -> int:
        """Jobs that nobody has taken."""
        return sum(map(len, self._waiting.values()))

    def next_job(self, last: J | None) -> J | None:
        """For a process whose last job was `last`; None if nothing waits."""
        counts = {model: len(jobs) for model, jobs in self._waiting.items()}
        model = choose_task(counts, None if last is None else self._model_of(last), self._running)
        if model is None:
            return None
        self._running[model] += 1
        return self._waiting[model].pop(0)

    def finish(self, job: J) -> None:
        self._running[self._model_of(job)] -= 1

    def fail(self, job: J) -> bool:
        """A job that was taken has failed: once it is put back behind the others of its model, for what has to do with the
        process; True if it had failed before, and is given up.
        """
        self.finish(job)
        given_up = job in self._failed
        if not given_up:
            self._failed.add(job)
            self._waiting[self._model_of(job)].append(job)
        return given_up


class ErrorCount:
    """Exceptions of a run, each said; one too many ends it."""

    def __init__(self, say: Callable[[str], Any], most: int = MAX_ERRORS) -> None:
        self._say, self._most, self.count = say, most, 0

    def add(self, job: str, error: object) -> None:
        """Raises ChildProcessError at the `most`-th."""
        self.count += 1
        self._say(f"{job}: {error}")
        if self.count >= self._most:
            raise ChildProcessError(f"{self.count} jobs ended with an exception; the last, {job}: {error}.")


def choose_task(num_waiting: Mapping[Any, int], last_task: Any, running: Mapping[Any, int]) -> Any:
    """Task of a worker's next job: its own again (a new task costs a model build), else the one with most to do.

    num_waiting, running: per task the jobs nobody has taken and the workers on it; among equals the first counts. None if
    nothing waits.
    """
    waiting = [task for task, count in num_waiting.items() if count > 0]
    if last_task in waiting:
        return last_task
    return min(waiting, key=lambda task: (running.get(task, 0), -num_waiting[task]), default=None)
