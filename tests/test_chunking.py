"""Laws of the action queue: k of H in order, and a continuous motion when the tail is known."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.chunking import ActionQueue, RealtimeQueue


def play(queue: ActionQueue, action_horizon: int, num_steps: int) -> tuple[list[float], int]:
    """Actions executed, with chunk n proposing n * 100 + 0, 1, ...; honours the known tail. Also the chunks used."""
    executed, num_chunks = [], 0
    for _ in range(num_steps):
        if queue.needs_chunk:
            chunk = num_chunks * 100.0 + np.arange(action_horizon)[:, None]
            known = queue.known_tail()
            if known is not None:
                chunk[: len(known)] = known
            queue.push(chunk)
            num_chunks += 1
        executed.append(float(queue.pop()[0]))
    return executed, num_chunks


def test_open_loop_plays_each_chunk_fully():
    executed, num_chunks = play(ActionQueue(execution_horizon=4), action_horizon=4, num_steps=8)
    assert executed == [0, 1, 2, 3, 100, 101, 102, 103] and num_chunks == 2


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 40))
def test_k_of_h_actions_are_executed_per_chunk(execution_horizon, extra, num_steps):
    executed, num_chunks = play(ActionQueue(execution_horizon), execution_horizon + extra, num_steps)
    assert num_chunks == -(-num_steps // execution_horizon)
    assert executed == [float(100 * (t // execution_horizon) + t % execution_horizon) for t in range(num_steps)]


@given(st.integers(1, 8), st.integers(0, 6), st.integers(0, 6))
def test_known_tail_continues_the_running_chunk(execution_horizon, num_known, extra):
    action_horizon = execution_horizon + extra
    queue = ActionQueue(execution_horizon, num_known)
    executed, _ = play(queue, action_horizon, 2 * execution_horizon)
    continued = min(num_known, extra, execution_horizon)
    tail = executed[execution_horizon : execution_horizon + continued]
    assert tail == [float(execution_horizon + i) for i in range(continued)]


def test_nothing_is_known_by_default_at_the_start_and_after_reset():
    queue = ActionQueue(2)
    queue.push(np.zeros((4, 7)))
    assert queue.known_tail() is None
    queue = ActionQueue(2, num_known=2)
    assert queue.known_tail() is None
    queue.push(np.zeros((4, 7)))
    queue.reset()
    assert queue.needs_chunk and queue.known_tail() is None


def test_broken_chunks_are_refused():
    queue = ActionQueue(3, num_known=1)
    with pytest.raises(ValueError, match="execution_horizon 3"):
        queue.push(np.zeros((2, 7)))
    queue.push(np.zeros((4, 7)))
    with pytest.raises(ValueError, match="does not start with"):
        queue.push(np.ones((4, 7)))
    with pytest.raises(IndexError, match="push a chunk"):
        ActionQueue(1).pop()


def play_realtime(execution_horizon: int, delay: int, action_horizon: int, latency: int, num_steps: int):
    """Actions executed (None: held still), when each answer takes `latency` steps; chunk n proposes n * 100 + 0, 1, ..."""
    queue, executed, num_chunks, due = RealtimeQueue(execution_horizon, delay), [], 0, None
    for step in range(num_steps):
        if queue.should_ask:
            chunk = num_chunks * 100.0 + np.arange(action_horizon)[:, None]
            known = queue.ask()
            if known is not None:
                chunk[: len(known)] = known
            num_chunks, due = num_chunks + 1, (step + latency, chunk)
        if due is not None and step >= due[0]:
            queue.push(due[1])
            due = None
        executed.append(float(queue.pop()[0]) if queue.has_action else None)
    return executed, num_chunks, queue.num_late


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 4), st.integers(1, 60))
def test_answers_on_time_leave_no_gap_and_continue_what_was_executed(more, delay, extra, num_steps):
    execution_horizon = delay + more
    executed, _, num_late = play_realtime(execution_horizon, delay, execution_horizon + delay + extra, delay, num_steps)
    assert executed[:delay] == [None] * min(delay, num_steps), "only the first chunk is awaited"
    moves = executed[delay:]
    assert None not in moves and num_late == 0
    for before, after in zip(moves, moves[1:], strict=False):
        if before // 100 != after // 100:  # a new chunk: it was told `delay` actions and goes on behind them
            assert after % 100 == delay


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 40))
def test_without_delay_it_is_the_action_queue(execution_horizon, extra, num_steps):
    action_horizon = execution_horizon + extra
    executed, num_chunks, _ = play_realtime(execution_horizon, 0, action_horizon, 0, num_steps)
    assert (executed, num_chunks) == play(ActionQueue(execution_horizon), action_horizon, num_steps)


def test_a_late_answer_is_counted_and_a_missing_one_leaves_nothing_to_execute():
    executed, _, num_late = play_realtime(execution_horizon=2, delay=1, action_horizon=9, latency=3, num_steps=12)
    assert num_late > 0 and None not in executed[3:], "it went on with actions the answer did not know of"
    executed, _, num_late = play_realtime(execution_horizon=2, delay=1, action_horizon=3, latency=3, num_steps=12)
    assert num_late == 0 and None in executed[3:], "it had nothing to go on with"
    with pytest.raises(IndexError, match="Hold still"):
        RealtimeQueue(1, 0).pop()


def test_a_realtime_queue_refuses_broken_answers():
    with pytest.raises(ValueError, match="delay < execution_horizon"):
        RealtimeQueue(2, 2)
    queue = RealtimeQueue(2, 1)
    with pytest.raises(ValueError, match="No answer is due"):
        queue.push(np.zeros((3, 7)))
    assert queue.ask() is None
    with pytest.raises(ValueError, match="their sum"):
        queue.push(np.zeros((2, 7)))
    queue.push(np.zeros((3, 7)))
    queue.pop(), queue.pop()
    assert queue.should_ask and queue.ask().shape == (1, 7)
    with pytest.raises(ValueError, match="known actions"):
        queue.push(np.ones((3, 7)))
    queue.reset()
    assert queue.should_ask and not queue.has_action


def test_the_robot_side_imports_no_torch():
    code = "import sys, vla.interface, vla.chunking, vla.action_tokenizer, vla.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
