"""How much to draft now: by measured costs, calibrated confidence, and a switch for when drafting does not pay.

With v(N) seconds for a target pass over N rows, c(W) for a draft level of W rows and o for everything else of a round, plain
decoding gives R / (v(R) + o) tokens a second for R requests, a drafted round (R + sum of p) / (draft + v(R M) + o), where p are
the probabilities that drafted nodes are accepted and every tree is padded to the M nodes of the largest. All decisions maximise
that quotient:

- while drafting, a level is added if the best path's p exceeds (rate now) * (c + dv/dN), a node is kept if p exceeds
  rate * dv/dN;
- before verifying, M is the maximiser over the trees at hand;
- after verifying, a request whose drafted rounds bring fewer tokens than plain ones would in that time stops drafting, and
  probes again after a pause that doubles each time. A round in which no level ran for a request says nothing about it.

The paper's cost model holds v constant, which is true of small batches on a GPU and false on a CPU.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serve.drafters import DraftLimits
from serve.generation import Generation
from serve.tree import DraftTree


@dataclass(frozen=True)
class Drafting:
    """What the drafter did in a round, before anything was trimmed."""

    levels: Mapping[int, int] = field(default_factory=dict)  # id of each request that was asked for -> levels run for it
    read_seconds: float = 0.0  # see serve.drafters.Proposal

    @property
    def num_levels(self) -> int:
        """Requests share their levels."""
        return max(self.levels.values(), default=0)

    @property
    def num_requests(self) -> int:
        """Requests for which a level ran."""
        return sum(count > 0 for count in self.levels.values())


@dataclass(frozen=True)
class Round:
    """What a round verified and what came of it, request by request. Seconds leave out what the drafter read."""

    ids: tuple[int, ...]
    trees: tuple[DraftTree, ...]
    paths: tuple[tuple[int, ...], ...]  # nodes that the target agrees with, root first
    accepted: tuple[int, ...]  # drafted tokens that became part of the answer, which may end inside a path
    drafting: Drafting
    draft_seconds: float
    verify_seconds: float
    seconds: float  # of the whole round

    @property
    def num_rows(self) -> int:
        """Rows of the target's pass, padding included."""
        return len(self.trees) * max(len(tree.tokens) for tree in self.trees)


class Controller(Protocol):
    """`plan` before drafting, `trim` before verifying, `observe` afterwards."""

    def plan(self, generations: Sequence[Generation]) -> list[DraftLimits]: ...

    def trim(self, trees: Sequence[DraftTree], drafting: Drafting) -> list[DraftTree]: ...

    def observe(self, outcome: Round) -> None: ...

    def release(self, request_id: int) -> None: ...


class FixedController:
    """The same limits for every request and round: for tests, and for tables that compare trees."""

    def __init__(self, limits: DraftLimits) -> None:
        self.limits = limits

    def plan(self, generations: Sequence[Generation]) -> list[DraftLimits]:
        return [self.limits] * len(generations)

    def trim(self, trees: Sequence[DraftTree], drafting: Drafting) -> list[DraftTree]:
        return list(trees)

    def observe(self, outcome: Round) -> None:
        pass

    def release(self, request_id: int) -> None:
        pass


@dataclass(frozen=True)
class CostTable:
    """Seconds by number of rows, measured at some row counts and linear between and beyond them."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.seconds) or list(self.rows) != sorted(set(self.rows)):
            raise ValueError(f"A cost table needs rising row counts with their seconds; got {self.rows} and {self.seconds}.")

    @classmethod
    def measure(cls, run: Callable[[int], float], rows: Sequence[int], repetitions: int = 5) -> "CostTable":
        """run(n) does the work of n rows and returns its seconds; the least of some interleaved repetitions counts.

        Then made non-decreasing: a pass over more rows can be quicker than one over fewer (a bfloat16 product of one row often
        is), but then the engine could have padded, and a falling table would make it draft just to fill rows.
        """
        for count in rows:
            run(count)
        best = np.full(len(rows), np.inf)
        for _ in range(repetitions):
            best = np.minimum(best, [run(count) for count in rows])
        return cls(tuple(rows), tuple(np.maximum.accumulate(best).tolist()))

    def __call__(self, rows: float) -> float:
        last = len(self.rows) - 1
        if rows > self.rows[last] and last > 0:
            slope = (self.seconds[last] - self.seconds[last - 1]) / (self.rows[last] - self.rows[last - 1])
            return self.seconds[last] + slope * (rows - self.rows[last])
        return float(np.interp(rows, self.rows, self.seconds))

    def slope(self, rows: float, reach: float = 4.0) -> float:
        """Seconds per further row, over the next `reach` rows."""
        return max(0.0, self(rows + reach) - self(rows)) / reach


@dataclass(frozen=True)
class AdaptiveConfig:
    """Limits and inertia of the adaptive controller."""

    max_nodes: int = 16
    max_depth: int = 8
    width: int = 3
    warmup: int = 4  # drafted rounds of a request before it can be switched off
    memory: float = 0.2  # weight of the newest round in averages
    first_pause: int = 8  # rounds without drafting after the first switch-off; doubles up to
    longest_pause: int = 128
    probes: int = 2  # drafted rounds of a probe


class Calibration:
    """From a drafter's path probability to the share of such nodes that were accepted, both in bins; old evidence fades."""

    EDGES = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0 + 1e-6])

    def __init__(self, prior: float = 8.0, fading: float = 0.998) -> None:
        self._prior, self._fading = prior, fading
        self._centres = (self.EDGES[1:] + self.EDGES[:-1]) / 2
        self._seen = np.zeros(len(self._centres))
        self._right = np.zeros(len(self._centres))

    def probability(self, scores: Sequence[float]) -> np.ndarray:
        """Path log-probabilities of the drafter -> estimated probabilities of acceptance, rising with the score."""
        share = (self._right + self._prior * self._centres) / (self._seen + self._prior)
        return np.maximum.accumulate(share)[self._bin(scores)]

    def score_for(self, probability: float) -> float:
        """The least path log-probability whose estimated probability reaches `probability`; inf if none does."""
        share = np.maximum.accumulate((self._right + self._prior * self._centres) / (self._seen + self._prior))
        enough = np.flatnonzero(share >= probability)
        return math.log(max(self.EDGES[enough[0]], 1e-9)) if len(enough) else math.inf

    def learn(self, scores: Sequence[float], accepted: Sequence[bool]) -> None:
        bins = self._bin(scores)
        self._seen *= self._fading
        self._right *= self._fading
        np.add.at(self._seen, bins, 1)
        np.add.at(self._right, bins, np.asarray(accepted, dtype=np.float64))

    def _bin(self, scores: Sequence[float]) -> np.ndarray:
        return np.searchsorted(self.EDGES, np.exp(np.minimum(scores, 0.0)), side="right") - 1


@dataclass
class _Standing:
    """Of one request: does drafting pay?"""

    rounds: int = 0  # drafted ones since it was last switched on
    gain: float = 1.0  # average of tokens in a drafted round / tokens of plain rounds in the same time
    pause: int = 0  # rounds left without drafting
    next_pause: int = 0
    probing: bool = False


@dataclass
class AdaptiveController:
    """See the module. `target` and `draft` are measured at the start; running averages of real rounds correct their scale."""

    target: CostTable
    draft: CostTable  # of one level
    overhead: float  # seconds of a plain round beside the target's pass
    config: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    calibration: Calibration = field(default_factory=Calibration)
    target_scale: float = 1.0
    draft_scale: float = 1.0
    _standing: dict[int, _Standing] = field(default_factory=dict)
    _rate: float = 0.0  # tokens a second of recent rounds

    def plan(self, generations: Sequence[Generation]) -> list[DraftLimits]:
        count = len(generations)
        limits = []
        rate = max(self._rate, count / self.plain_seconds(count))
        row = self.target_scale * self.target.slope(count)
        level = self.draft_scale * self.draft(count * self.config.width)
        for generation in generations:
            standing = self._standing.setdefault(generation.id, _Standing(next_pause=self.config.first_pause))
            if standing.pause > 0:
                standing.pause -= 1
                limits.append(DraftLimits(0, 0, 0))
                continue
            keep = self.calibration.score_for(min(1.0, rate * row))
            expand = self.calibration.score_for(min(1.0, rate * (row + level / count)))
            if standing.probing or standing.rounds < self.config.warmup:  # evidence first
                keep, expand = min(keep, math.log(0.3)), min(expand, math.log(0.3))
            limits.append(DraftLimits(self.config.max_nodes, self.config.max_depth, self.config.width, keep, expand))
        return limits

    def trim(self, trees: Sequence[DraftTree], drafting: Drafting) -> list[DraftTree]:
        best = self.best_size(trees, drafting)
        return [tree.best(best) for tree in trees]

    def best_size(self, trees: Sequence[DraftTree], drafting: Drafting) -> int:
        """Drafted nodes per tree that maximise expected tokens per second, what the drafting cost being spent."""
        count, largest = len(trees), max(tree.num_drafted for tree in trees)
        gains = np.zeros(largest + 1)
        for tree in trees:
            if tree.num_drafted:
                probabilities = np.sort(self.calibration.probability(tree.scores[1:]))[::-1]
                gains[1 : len(probabilities) + 1] += probabilities
        tokens = count + np.cumsum(gains)
        spent = self.draft_scale * self.draft_seconds(drafting) + self.overhead
        seconds = [spent + self.target_scale * self.target(count * (size + 1)) for size in range(largest + 1)]
        return int(np.argmax(tokens / seconds))

    def plain_seconds(self, count: int) -> float:
        """Predicted seconds of a round without drafts."""
        return self.target_scale * self.target(count) + self.overhead

    def draft_seconds(self, drafting: Drafting) -> float:
        """Of the draft's levels, by the table; `draft_scale` corrects it."""
        return drafting.num_levels * self.draft(drafting.num_requests * self.config.width)

    def observe(self, outcome: Round) -> None:
        memory, count = self.config.memory, len(outcome.ids)
        tokens = count + sum(outcome.accepted)
        self.target_scale += 0.05 * (_bounded(outcome.verify_seconds / self.target(outcome.num_rows)) - self.target_scale)
        self._rate += memory * (tokens / outcome.seconds - self._rate)
        drafting = outcome.drafting
        if drafting.num_levels == 0:
            return
        self.draft_scale += 0.05 * (_bounded(outcome.draft_seconds / self.draft_seconds(drafting)) - self.draft_scale)
        slower = outcome.seconds / self.plain_seconds(count)
        for request_id, tree, accepted, path in zip(outcome.ids, outcome.trees, outcome.accepted, outcome.paths, strict=True):
            if drafting.levels.get(request_id, 0):
                nodes = set(path)
                self.calibration.learn(tree.scores[1:], [node in nodes for node in range(1, len(tree.tokens))])
                if request_id in self._standing:  # not ended by this round
                    self._judge(self._standing[request_id], (1 + accepted) / slower)

    def release(self, request_id: int) -> None:
        self._standing.pop(request_id, None)

    def _judge(self, standing: _Standing, gain: float) -> None:
        """One more drafted round of a request, worth `gain` plain rounds."""
        config = self.config
        standing.rounds += 1
        standing.gain += max(config.memory, 1 / standing.rounds) * (gain - standing.gain)
        enough = config.probes if standing.probing else config.warmup
        if standing.rounds < enough:
            return
        if standing.gain < 1.0:
            standing.pause = standing.next_pause
            standing.next_pause = min(2 * standing.next_pause, config.longest_pause)
            standing.rounds, standing.gain, standing.probing = 0, 1.0, True
        elif standing.probing:
            standing.probing, standing.next_pause = False, config.first_pause


def _bounded(ratio: float) -> float:
    """A machine that stalls for a moment must not turn the tables over."""
    return min(3.0, max(0.3, ratio))


def describe(table: CostTable, unit: float | None = None) -> Mapping[int, float]:
    """Rows -> cost in units of `unit` seconds, default that of one row: the v(M) of the literature."""
    unit = table.seconds[0] if unit is None else unit
    return {rows: seconds / unit for rows, seconds in zip(table.rows, table.seconds, strict=True)}
