"""A robot's control loop over a policy that takes time: RealtimeController asks in the background. No torch.

    with RemotePolicy("grpc://gpu-box:8001") as policy, RealtimeController(policy, execution_horizon=4, delay=2) as control:
        while not done:                       # once per control period
            action = control.action(observe)  # None: nothing to execute yet, hold still
            if action is not None:
                robot.step(action)
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vla.chunking import RealtimeQueue
from vla.interface import Observation, Policy


class RealtimeController:
    """One robot's vla.chunking.RealtimeQueue and the thread that waits for its answers."""

    def __init__(self, policy: Policy, *, execution_horizon: int, delay: int) -> None:
        """delay: control periods an answer takes, rounded up.

        Raises ValueError unless delay < execution_horizon and execution_horizon + delay fit a chunk.
        """
        if execution_horizon + delay > policy.action_horizon:
            raise ValueError(
                f"execution_horizon {execution_horizon} + delay {delay} exceed the policy's action_horizon "
                f"{policy.action_horizon}; lower execution_horizon."
            )
        self._policy = policy
        self._queue = RealtimeQueue(execution_horizon, delay)
        self._thread = ThreadPoolExecutor(1)
        self._answer: Future[np.ndarray] | None = None
        self._seed = 0

    def __enter__(self) -> "RealtimeController":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    @property
    def num_late(self) -> int:
        """Answers that came later than `delay` promised; the motion may have jumped there."""
        return self._queue.num_late

    def reset(self, seed: int = 0) -> None:
        """A new episode; an answer still on its way is forgotten."""
        if self._answer is not None:
            self._answer.cancel()
        self._answer, self._seed = None, seed
        self._queue.reset()

    def action(self, observe: Callable[[], Observation]) -> np.ndarray | None:
        """The action [D] of this control period; None while there is none. `observe` is called when a chunk is due.

        Raises what the policy raises; the next call asks again.
        """
        if self._queue.should_ask:
            self._answer = self._thread.submit(self._ask, observe(), self._queue.ask(), self._seed)
            self._seed += 1
        if self._answer is not None and self._answer.done():
            answer, self._answer = self._answer, None
            try:
                self._queue.push(answer.result())
            except Exception:
                self._queue.reset()  # whatever it was is the caller's to handle; nothing of it is executed
                raise
        return self._queue.pop() if self._queue.has_action else None

    def _ask(self, observation: Observation, known: np.ndarray | None, seed: int) -> np.ndarray:
        (chunk,) = self._policy.act([observation], known=[known], seeds=[seed])
        return chunk.actions
