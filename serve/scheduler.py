"""Who gets a slot, whose prompt is read, who decodes: decisions on plain numbers, no tensor in sight.

First come, first served. A slot holds a whole context, so an admitted request can always finish and nothing is ever pre-empted;
what does not fit waits, and a queue that is full refuses.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import QueueFull


@dataclass(frozen=True)
class PromptPart:
    """Positions start .. stop - 1 of a prompt, to be read in this step."""

    id: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """One step."""

    admitted: tuple[tuple[int, int], ...]  # (request id, slot)
    prompts: tuple[PromptPart, ...]
    decoding: tuple[int, ...]  # request ids in the order of their slots


class Scheduler:
    """Waiting queue, slots, and how far each prompt has been read."""

    def __init__(self, num_slots: int, max_waiting: int, prefill_chunk: int) -> None:
        self.max_waiting, self.prefill_chunk = max_waiting, prefill_chunk
        self._waiting: deque[int] = deque()
        self._length: dict[int, int] = {}  # prompt positions of every request that is here
        self._whole: dict[int, list[tuple[int, int]]] = {}  # runs of them that must be read at once
        self._read: dict[int, int] = {}  # of every admitted request, in order of admission: prompt positions read
        self._slot: dict[int, int] = {}
        self._free = list(range(num_slots))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._slot)

    def offer(
        self, request_id: int, prompt_length: int, retry_after: float = 1.0, whole: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Queue a request. whole: runs (start, stop) of its prompt that must be read in one part, however long they are.

        Raises QueueFull when no slot is free and the queue is at its limit.
        """
        if len(self._waiting) >= self.max_waiting + len(self._free):
            raise QueueFull(len(self._waiting), retry_after)
        self._waiting.append(request_id)
        self._length[request_id] = prompt_length
        self._whole[request_id] = list(whole)

    def plan(self) -> Plan:
        """Admit into free slots, lowest first; spend the chunk on prompts, oldest first; decode whoever was read before."""
        admitted = []
        while self._waiting and self._free:
            request_id = self._waiting.popleft()
            self._slot[request_id] = self._free.pop(0)
            self._read[request_id] = 0
            admitted.append((request_id, self._slot[request_id]))
        decoding = [request_id for request_id, read in self._read.items() if read == self._length[request_id]]
        budget, prompts = self.prefill_chunk, []
        for request_id, read in self._read.items():
            stop = self._stop(request_id, read, budget) if budget > 0 else read
            if stop > read:
                prompts.append(PromptPart(request_id, read, stop))
                budget -= stop - read
        return Plan(tuple(admitted), tuple(prompts), tuple(sorted(decoding, key=self._slot.__getitem__)))

    def was_read(self, part: PromptPart) -> bool:
        """Record a part; True if the prompt is complete."""
        self._read[part.id] = part.stop
        return part.stop == self._length[part.id]

    def leave(self, request_id: int) -> None:
        """The request is over, wherever it stood; its slot is free."""
        if request_id in self._slot:
            self._free.append(self._slot.pop(request_id))
            self._free.sort()
            del self._read[request_id]
        else:
            self._waiting.remove(request_id)
        del self._length[request_id], self._whole[request_id]

    def _stop(self, request_id: int, read: int, budget: int) -> int:
        """Where to stop reading: within the budget, but outside of runs that must be read at once unless one stands first."""
        stop = min(self._length[request_id], read + budget)
        for first, end in self._whole[request_id]:
            if first < stop < end:
                return end if first <= read else first
        return stop
