"""Execute k of a chunk's H actions, then ask again, optionally handing over part of the rest as known. numpy only."""

import numpy as np


class ActionQueue:
    """The actions one robot still has to execute.

        queue = ActionQueue(execution_horizon=8)
        while not done:
            if queue.needs_chunk:
                chunk, = policy.act([observe()], known=[queue.known_tail()])
                queue.push(chunk.actions)
            step(queue.pop())

    execution_horizon: actions executed of every chunk (k). k = H is open loop over each chunk.
    num_known: how many of the H - k actions not executed the next chunk must start with, which makes the motion
        continuous across chunks. 0 (default): every chunk is decided afresh.
    """

    def __init__(self, execution_horizon: int, num_known: int = 0) -> None:
        if execution_horizon < 1 or num_known < 0:
            raise ValueError(
                f"execution_horizon must be >= 1 and num_known >= 0; got {execution_horizon} and {num_known}."
            )
        self.execution_horizon = execution_horizon
        self.num_known = num_known
        self.reset()

    def reset(self) -> None:
        """Forget the running chunk; call it when an episode starts."""
        self._chunk: np.ndarray | None = None  # [H, D]
        self._num_executed = 0

    @property
    def needs_chunk(self) -> bool:
        return self._chunk is None or self._num_executed >= self.execution_horizon

    def known_tail(self) -> np.ndarray | None:
        """Actions [n, D], n <= num_known, that follow the last executed one; None if the next chunk is free."""
        if self._chunk is None or self.num_known == 0:
            return None
        tail = self._chunk[self._num_executed : self._num_executed + self.num_known]
        return tail.copy() if len(tail) else None

    def push(self, actions: np.ndarray) -> None:
        """Replace what is left by a new chunk [H, D], which starts at the present instant.

        Raises ValueError if H < execution_horizon or if the chunk does not start with `known_tail()`.
        """
        actions = np.asarray(actions)
        if actions.ndim != 2 or len(actions) < self.execution_horizon:
            raise ValueError(
                f"Chunk has shape {actions.shape}; expected [H, D] with H >= execution_horizon "
                f"{self.execution_horizon}. Lower execution_horizon to the policy's action_horizon."
            )
        known = self.known_tail()
        if known is not None and not np.array_equal(actions[: len(known)], known):
            raise ValueError(
                f"The chunk does not start with the {len(known)} known actions; the policy must honour `known` "
                "(vla/interface.py), or set num_known=0."
            )
        self._chunk, self._num_executed = actions.copy(), 0

    def pop(self) -> np.ndarray:
        """The next action [D]. Raises IndexError when a chunk is due."""
        if self.needs_chunk:
            raise IndexError("No action left: push a chunk when `needs_chunk` is true.")
        self._num_executed += 1
        return self._chunk[self._num_executed - 1].copy()
