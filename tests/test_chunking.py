"""Laws of the action queue: k of H in order, and a continuous motion when the tail is known."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.chunking import ActionQueue


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


def test_the_robot_side_imports_no_torch():
    code = "import sys, vla.interface, vla.chunking, vla.action_tokenizer, vla.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
