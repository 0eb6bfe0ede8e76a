"""Laws of the control loop over a slow policy."""

import threading
import time

import numpy as np
import pytest

from serve.realtime import RealtimeController
from tests.odd_policy import OddPolicy, odd_observation
from tests.point_world import SPEC
from vla.interface import ActionChunk


class SlowPolicy:
    """Answers when told to; chunk n is n * 100 + 0, 1, ... behind its known actions."""

    spec, action_horizon = SPEC, 6

    def __init__(self) -> None:
        self.release = threading.Semaphore(0)
        self.num_asked = self.num_answered = 0

    def act(self, observations, *, known=None, seeds=None):
        number, self.num_asked = self.num_asked, self.num_asked + 1
        if not self.release.acquire(timeout=20):
            raise TimeoutError("never released")
        actions = np.repeat(100.0 * number + np.arange(self.action_horizon)[:, None], 7, axis=1).astype(np.float32)
        if known[0] is not None:
            actions[: len(known[0])] = known[0]
        self.num_answered += 1
        return [ActionChunk(actions)]


def wait_until(condition) -> None:
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    assert condition()


def test_actions_go_on_while_an_answer_is_on_its_way_and_it_continues_them():
    policy, executed = SlowPolicy(), []
    with RealtimeController(policy, execution_horizon=3, delay=2) as control:

        def step() -> None:
            action = control.action(odd_observation)
            executed.append(None if action is None else float(action[0]))

        step()
        policy.release.release()
        wait_until(lambda: control._answer is not None and control._answer.done())
        for _ in range(5):  # three of its own, then two while the next answer is on its way
            step()
        policy.release.release()
        wait_until(lambda: control._answer is not None and control._answer.done())
        step()
    assert executed == [None, 0, 1, 2, 3, 4, 102] and control.num_late == 0


def test_an_error_of_the_policy_reaches_the_caller_and_the_next_call_asks_again():
    with RealtimeController(OddPolicy(), execution_horizon=2, delay=1) as control:
        instruction = "raise"
        with pytest.raises(RuntimeError):
            for _ in range(1000):
                control.action(lambda: odd_observation(instruction))
                time.sleep(0.005)
        instruction = "go"
        wait_until(lambda: control.action(lambda: odd_observation(instruction)) is not None)


def test_a_chunk_too_short_for_the_delay_is_refused():
    with pytest.raises(ValueError, match="exceed the policy's action_horizon 4"):
        RealtimeController(OddPolicy(), execution_horizon=3, delay=2)
