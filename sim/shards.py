"""One evaluation on many machines: which episodes are whose (`vla eval --shard=i/n`)."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n". Raises ValueError unless 0 <= i < n."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"shard is {text!r}; allowed: i/n with 0 <= i < n, e.g. 0/4 to 3/4.")
    return int(index), int(count)


def episode_list(tasks: Sequence[int], episodes: int) -> list[tuple[int, int]]:
    """(task, episode) of an evaluation, all shards together."""
    return [(task, episode) for task in tasks for episode in range(episodes)]


def shard_of(items: Sequence[T], shard: str | None) -> list[T]:
    """Every n-th item from the i-th on; all without a shard. Raises ValueError if nothing is left to do."""
    if shard is None:
        return list(items)
    index, count = parse_shard(shard)
    if index >= len(items):
        raise ValueError(f"shard {shard} of {len(items)} episodes is empty; use at most {len(items)} shards.")
    return list(items[index::count])
