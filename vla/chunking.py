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


class RealtimeQueue:
    """Executes a chunk while the next one is being computed; the next one continues what was executed meanwhile.

        queue = RealtimeQueue(execution_horizon=4, delay=2)
        while not done:                      # once per control period
            if queue.should_ask:
                send(observe(), known=queue.ask())
            if answer_arrived:
                queue.push(chunk.actions)
            step(queue.pop())

    execution_horizon: actions of a chunk executed before the next one is asked for (k). delay: control periods that an
    answer takes (d); the next chunk is told the d actions that will be executed before it arrives, so an answer that is on
    time continues the motion exactly. d < k (a chunk arrives with its first d actions already executed) and k + d <= H (else
    the robot runs out of actions). With d = 0 this is `ActionQueue`.
    Real-time chunking: arXiv 2506.07339; with known actions in training, as here: arXiv 2512.05964.
    """

    def __init__(self, execution_horizon: int, delay: int) -> None:
        if not 0 <= delay < execution_horizon:
            raise ValueError(
                f"delay is {delay}, execution_horizon {execution_horizon}; needed is 0 <= delay < execution_horizon, since the "
                "first `delay` actions of a chunk are executed before it arrives."
            )
        self.execution_horizon, self.delay = execution_horizon, delay
        self.reset()

    def reset(self) -> None:
        """Forget everything; call it when an episode starts. An answer still on its way must not be pushed."""
        self._chunk: np.ndarray | None = None  # [H, D]
        self._position = 0  # of the next action
        self._since_ask: int | None = None  # actions executed while an answer is on its way
        self._known: np.ndarray | None = None
        self.num_late = 0  # answers that came after their known actions were used up: the motion may jump there

    @property
    def should_ask(self) -> bool:
        """A chunk is due and none is on its way."""
        return self._since_ask is None and (self._chunk is None or self._position >= self.execution_horizon)

    @property
    def has_action(self) -> bool:
        return self._chunk is not None and self._position < len(self._chunk)

    def ask(self) -> np.ndarray | None:
        """The actions [n, D], n <= delay, that the answer must start with; from now on one is on its way."""
        self._since_ask = 0
        tail = None if self._chunk is None else self._chunk[self._position : self._position + self.delay]
        self._known = None if tail is None or len(tail) == 0 else tail.copy()
        return None if self._known is None else self._known.copy()

    def push(self, actions: np.ndarray) -> None:
        """The answer to `ask`, a chunk [H, D] from the instant of asking on.

        Raises ValueError if H < execution_horizon + delay or if it does not start with the known actions.
        """
        actions = np.asarray(actions)
        if actions.ndim != 2 or len(actions) < self.execution_horizon + self.delay:
            raise ValueError(
                f"Chunk has shape {actions.shape}; with execution_horizon {self.execution_horizon} and delay {self.delay} it "
                "must be [H, D] with H >= their sum. Lower execution_horizon."
            )
        if self._since_ask is None:
            raise ValueError("No answer is due: call ask() first, and push once for each.")
        if self._known is not None and not np.array_equal(actions[: len(self._known)], self._known):
            raise ValueError(
                f"The chunk does not start with the {len(self._known)} known actions; the policy must honour `known`."
            )
        self.num_late += self._since_ask > (0 if self._known is None else len(self._known))
        self._chunk, self._position = actions.copy(), self._since_ask
        self._since_ask = self._known = None

    def pop(self) -> np.ndarray:
        """The next action [D]. Raises IndexError when there is none: the robot has to hold still."""
        if not self.has_action:
            raise IndexError("No action left: the answer is late. Hold still, or lower execution_horizon.")
        action = self._chunk[self._position].copy()
        self._position += 1
        if self._since_ask is not None:
            self._since_ask += 1
        return action
