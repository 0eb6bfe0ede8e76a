"""Scheduling on plain numbers: first come first served, chunks within their budget, a full queue refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import QueueFull
from serve.scheduler import PromptPart, Scheduler


def test_slots_are_given_in_order_and_come_back():
    scheduler = Scheduler(num_slots=2, max_waiting=5, prefill_chunk=4)
    for request_id in range(4):
        scheduler.offer(request_id, 3)
    assert scheduler.plan().admitted == ((0, 0), (1, 1))
    scheduler.leave(0)
    scheduler.leave(2)  # while it waits
    assert scheduler.plan().admitted == ((3, 0),)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)


def test_a_prompt_is_read_in_parts_and_decodes_in_the_step_after():
    scheduler = Scheduler(num_slots=2, max_waiting=5, prefill_chunk=4)
    scheduler.offer(7, 6)
    scheduler.offer(8, 1)
    first = scheduler.plan()
    assert first.prompts == (PromptPart(7, 0, 4),) and not first.decoding
    assert not scheduler.was_read(first.prompts[0])
    second = scheduler.plan()
    assert second.prompts == (PromptPart(7, 4, 6), PromptPart(8, 0, 1))
    assert all([scheduler.was_read(part) for part in second.prompts])
    assert scheduler.plan().decoding == (7, 8) and not scheduler.plan().prompts


def test_a_whole_run_is_read_in_one_part():
    scheduler = Scheduler(num_slots=1, max_waiting=0, prefill_chunk=4)
    scheduler.offer(1, 14, whole=[(3, 9), (10, 14)])
    parts = []
    while prompts := scheduler.plan().prompts:
        parts.append((prompts[0].start, prompts[0].stop))
        scheduler.was_read(prompts[0])
    assert parts == [(0, 3), (3, 9), (9, 10), (10, 14)]


def test_a_full_queue_refuses_and_says_when_to_come_back():
    scheduler = Scheduler(num_slots=1, max_waiting=2, prefill_chunk=4)
    for request_id in range(3):
        scheduler.offer(request_id, 1)
    with pytest.raises(QueueFull) as caught:
        scheduler.offer(3, 1, retry_after=2.5)
    assert caught.value.retry_after == 2.5 and caught.value.code == "queue_full"
    scheduler.plan()
    assert scheduler.num_waiting == 2
    scheduler.leave(1)
    scheduler.offer(3, 1)


@given(st.lists(st.tuples(st.sampled_from(["offer", "plan", "leave"]), st.integers(1, 9)), max_size=60))
def test_no_slot_is_held_twice_and_nobody_is_forgotten(moves):
    scheduler = Scheduler(num_slots=3, max_waiting=4, prefill_chunk=5)
    slots: dict[int, int] = {}
    here: list[int] = []
    read: dict[int, int] = {}
    for number, (move, size) in enumerate(moves):
        if move == "offer":
            try:
                scheduler.offer(number, size)
                here.append(number)
            except QueueFull:
                assert len(here) - len(slots) >= 4
        elif move == "leave" and here:
            gone = here.pop(size % len(here))
            scheduler.leave(gone)
            slots.pop(gone, None)
        elif move == "plan":
            plan = scheduler.plan()
            for request_id, slot in plan.admitted:
                assert slot not in slots.values() and 0 <= slot < 3
                slots[request_id] = slot
            assert sum(part.stop - part.start for part in plan.prompts) <= 5
            for part in plan.prompts:
                assert part.start == read.get(part.id, 0) and part.id in slots
                read[part.id] = part.stop
                scheduler.was_read(part)
            assert set(plan.decoding) <= set(slots)
        assert scheduler.num_running == len(slots) and scheduler.num_waiting == len(here) - len(slots)
