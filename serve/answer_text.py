"""The text of an answer while its tokens arrive: whole characters only, nothing that may yet turn out to be a stop string."""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are no character (yet)


class AnswerText:
    """Incremental detokenisation with stop strings.

    The text released so far never changes, and at the end equals decode(all ids), cut before the first stop string. A window of
    recent ids is decoded anew for each token, since what a token looks like depends on its neighbours (a space in front, half
    of a character): the window starts where the text was last complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._window: list[int] = []  # ids of the last complete piece and of those after it
        self._num_known = 0  # of the window, ids of the last complete piece
        self._consumed = 0  # characters of the window's text that are in `_held` or released
        self._held = ""  # final characters that may begin a stop string
        self._fresh = ""  # final characters not taken yet
        self.text = ""  # all final characters
        self.stop_string: str | None = None  # the one that was met

    def push(self, token: int) -> bool:
        """Add a token; True if a stop string is now complete (then nothing more may be pushed)."""
        self._window.append(token)
        text = self._decode(self._window)
        stable = text.rstrip(_INCOMPLETE)
        is_longer = len(stable) > self._consumed
        if is_longer:
            self._held += stable[self._consumed :]
            self._consumed = len(stable)
        if is_longer and stable == text:  # a special token shows nothing, so it cannot open a window
            del self._window[: self._num_known]
            self._num_known = len(self._window)
            self._consumed = len(self._decode(self._window))
        return self._release()

    def finish(self) -> None:
        """No token follows: everything held back becomes final."""
        if self.stop_string is None:
            self._held += self._decode(self._window)[self._consumed :]
            self._final(len(self._held))

    def take(self) -> str:
        """The characters that became final since the last call."""
        fresh, self._fresh = self._fresh, ""
        return fresh

    def _release(self) -> bool:
        found = [(place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.stop_string = min(found, key=lambda pair: pair[0])
            self._final(place)
            self._held = ""
            return True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        self._final(len(self._held) - keep)
        return False

    def _final(self, count: int) -> None:
        self._fresh += self._held[:count]
        self.text += self._held[:count]
        self._held = self._held[count:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, shorter than `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
