"""Windows of a frame cache, and batches of them that are a pure function of (seed, step). numpy only.

Nothing here has a position to save: `WindowMixture.batch(step, ...)` answers for any step, so a resumed run sees the
batches of the uninterrupted one, bit for bit, and the training loop may compute them ahead in a thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla.frame_cache import FrameCache
from vla.normalization import Statistics

_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Batch:
    """B windows: what was seen at one instant and the H actions from then on."""

    images: np.ndarray  # uint8 [B, C, H, W, 3], cameras in the order asked for
    state: np.ndarray  # float32 [B, S]
    instructions: tuple[str, ...]  # B
    actions: np.ndarray  # float32 [B, H, D]
    is_pad: np.ndarray  # bool [B, H], true past the episode's end or a frame not followed: the action before is repeated


def is_held_out(episode: np.ndarray, fraction: float) -> np.ndarray:
    """Which episode indices are kept from training: bool, same shape.

    A golden-ratio sequence: depends on the index alone, so a growing data set never moves an episode from one side to
    the other, and any run of consecutive episodes holds out its fair share.
    """
    return (0.5 + (np.asarray(episode) + 1) * _GOLDEN_RATIO) % 1.0 < fraction


def chosen_episodes(
    cache: FrameCache, tasks: Sequence[int] | None, held_out_fraction: float, held_out: bool, most: int | None = None
) -> np.ndarray:
    """Which episodes of a cache belong to these tasks and to this side of the split: bool [num_episodes].

    most: the first so many of each task, of those that are not held out; what is held out stays the same.
    """
    chosen = is_held_out(np.arange(cache.num_episodes), held_out_fraction) == held_out
    if tasks is not None:
        chosen &= np.isin(cache.episode_tasks, tasks)
    if most is not None and not held_out:
        for task in np.unique(cache.episode_tasks):
            chosen[np.flatnonzero(chosen & (cache.episode_tasks == task))[most:]] = False
    return chosen


class ActionWindows:
    """Every frame of a cache with the `action_horizon` actions from it on; a window never leaves its episode.

    Nor does it go on where another action was executed than the one that stands there (a policy's, which an expert only
    labelled): the next label answers a state that the window's own actions do not lead to.

    cameras: order of the image axis, default the cache's; tasks: only episodes of these suite tasks; held_out_fraction
    and held_out: leave that share of whole episodes out, or take only those; episodes_per_task: train on so many at most.
    """

    def __init__(
        self,
        cache: FrameCache,
        action_horizon: int,
        *,
        cameras: Sequence[str] | None = None,
        tasks: Sequence[int] | None = None,
        held_out_fraction: float = 0.0,
        held_out: bool = False,
        episodes_per_task: int | None = None,
    ) -> None:
        if episodes_per_task is not None and episodes_per_task < 1:
            raise ValueError(f"episodes_per_task is {episodes_per_task}; at least 1, or null for all.")
        self.cache, self.action_horizon = cache, action_horizon
        self.cameras = tuple(cameras or cache.spec.cameras)
        missing = [camera for camera in self.cameras if camera not in cache.images]
        if missing:
            raise ValueError(f"No camera {missing[0]!r} in {cache.root}; it holds {sorted(cache.images)}.")
        available = sorted(set(cache.episode_tasks.tolist()))
        if tasks is not None and not set(tasks) <= set(available):
            unknown = sorted(set(tasks) - set(available))
            raise ValueError(f"No episodes of tasks {unknown} in {cache.root}; it holds tasks {available}.")
        chosen = chosen_episodes(cache, tasks, held_out_fraction, held_out, episodes_per_task)
        if not chosen.any():
            raise ValueError(
                f"No episode left in {cache.root}: {cache.num_episodes} episodes, held_out_fraction "
                f"{held_out_fraction}, held_out {held_out}. Collect more episodes or change the fraction."
            )
        self.num_episodes = int(chosen.sum())
        self.instructions = tuple(cache.instructions[i] for i in np.unique(cache.episode_instructions[chosen]))
        self._starts = np.flatnonzero(chosen[cache.episode])

    def __len__(self) -> int:
        return len(self._starts)

    def gather(self, indices: np.ndarray) -> Batch:
        """The windows `indices` [B], each in 0 .. len(self) - 1."""
        cache, frames = self.cache, self._starts[indices]
        episodes = cache.episode[frames]
        wanted = frames[:, None] + np.arange(self.action_horizon)  # [B, H]
        last = cache.episode_starts[episodes + 1][:, None] - 1
        run = np.logical_and.accumulate(cache.followed[np.minimum(wanted, last)], axis=1).sum(axis=1, keepdims=True)
        last = np.minimum(last, frames[:, None] + run)
        size = cache.spec.image_size
        images = np.empty((len(frames), len(self.cameras), size, size, 3), dtype=np.uint8)
        for row, frame in enumerate(frames):  # one memcpy each; a fancy index would copy twice
            for column, camera in enumerate(self.cameras):
                images[row, column] = cache.images[camera][frame]
        return Batch(
            images=images,
            state=cache.state[frames],
            instructions=tuple(cache.instructions[i] for i in cache.episode_instructions[episodes]),
            actions=cache.action[np.minimum(wanted, last)],
            is_pad=wanted > last,
        )

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """(state [N, S], action [N, D]) of all frames of these episodes."""
        return self.cache.state[self._starts], self.cache.action[self._starts]


class WindowMixture:
    """Windows of several caches in fixed shares, shuffled in epochs without replacement.

    An epoch is as long as all windows together. Source k fills its share of it from its own endless stream of shuffled
    passes, so with one source, or with shares proportional to the sizes (the default), an epoch is every window once.
    """

    def __init__(self, sources: Sequence[ActionWindows], weights: Sequence[float] | None = None) -> None:
        if not sources:
            raise ValueError("A mixture needs at least one data set.")
        specs = [source.cache.spec for source in sources]
        shapes = {
            (s.action_horizon, s.cameras, spec.image_size, spec.action_names, spec.state_names, spec.binary_actions, spec.control_hz)
            for s, spec in zip(sources, specs, strict=True)
        }
        if len(shapes) > 1:
            raise ValueError(
                f"Data sets of a mixture differ in horizon, cameras, size, actions, state or rate: {sorted(shapes)}. Bring one into "
                "the other's form with `vla import --like=OTHER`."
            )
        sizes = np.array([len(source) for source in sources])
        weights = sizes if weights is None else np.asarray(weights, dtype=np.float64)
        if weights.shape != sizes.shape or not (weights > 0).all():
            raise ValueError(f"Give one weight > 0 per data set; got {np.asarray(weights).tolist()} for {len(sizes)}.")
        self.sources = tuple(sources)
        borders = np.rint(np.cumsum(weights) / np.sum(weights) * sizes.sum()).astype(np.int64)
        self._quota = np.diff(borders, prepend=0)  # windows of each source in one epoch
        self._offsets = np.cumsum(sizes) - sizes  # first global index of each source
        self._decks: dict[tuple[int, int], np.ndarray] = {}  # the two epochs last used

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def indices(self, step: int, *, batch_size: int, seed: int) -> np.ndarray:
        """Global window indices int64 [batch_size] of one step: rows step * batch_size on, of the endless epochs."""
        position = step * batch_size + np.arange(batch_size)
        epochs = position // len(self)
        decks = {epoch: self._deck(int(epoch), seed) for epoch in np.unique(epochs)}
        return np.array([decks[epoch][row] for epoch, row in zip(epochs, position % len(self), strict=True)])

    def batch(self, step: int, *, batch_size: int, seed: int) -> Batch:
        """The batch of one step."""
        return self.gather(self.indices(step, batch_size=batch_size, seed=seed))

    def gather(self, indices: np.ndarray) -> Batch:
        """The windows with global indices [B]: source 0's first, then source 1's, and so on."""
        owner = np.searchsorted(self._offsets, indices, side="right") - 1
        order = np.argsort(owner, kind="stable")
        pieces = [self.sources[k].gather(indices[owner == k] - self._offsets[k]) for k in np.unique(owner)]
        if len(pieces) == 1:
            return pieces[0]
        back = np.argsort(order)
        names = ("images", "state", "actions", "is_pad")
        arrays = {name: np.concatenate([getattr(piece, name) for piece in pieces])[back] for name in names}
        instructions = [text for piece in pieces for text in piece.instructions]
        return Batch(instructions=tuple(instructions[i] for i in back), **arrays)

    def statistics(self) -> tuple[Statistics, Statistics]:
        """(state, action) statistics over all frames of all sources, each frame once whatever the weights."""
        states, actions = zip(*(source.frames() for source in self.sources), strict=True)
        return Statistics.of(np.concatenate(states)), Statistics.of(np.concatenate(actions))

    def _deck(self, epoch: int, seed: int) -> np.ndarray:
        """Global indices of one epoch in order, int64 [len(self)]."""
        if (epoch, seed) not in self._decks:
            cards = [
                self._offsets[k] + self._stream(k, epoch * int(quota), int(quota), seed)
                for k, quota in enumerate(self._quota)
            ]
            deck = np.random.default_rng([seed, epoch]).permutation(np.concatenate(cards))
            self._decks = dict([*self._decks.items()][-1:]) | {(epoch, seed): deck}
        return self._decks[epoch, seed]

    def _stream(self, k: int, start: int, count: int, seed: int) -> np.ndarray:
        """Rows start .. start + count - 1 of source k's endless stream of shuffled passes."""
        size = len(self.sources[k])
        passes = range(start // size, -(-(start + count) // size))
        stream = [np.random.default_rng([seed, k, number]).permutation(size) for number in passes]
        first = start - passes.start * size
        return np.concatenate(stream)[first : first + count] if stream else np.empty(0, dtype=np.int64)
