"""Ctrl-C, SIGTERM and pauses, turned into flags that a training loop reads between steps."""

import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType


class Interruption:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; the second one raises KeyboardInterrupt.

    `at_once` makes the first one raise too (while nothing needs to be finished, as during validation). `take_pause`
    tells whether the process was stopped and continued (SIGSTOP, SIGCONT; Ctrl-Z) since it was last asked. Outside the
    main thread Python delivers no signals, so nothing is installed there.
    """

    def __init__(self) -> None:
        self.requested, self.at_once = False, False
        self._paused = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGINT, self._stop), (signal.SIGTERM, self._stop), (signal.SIGCONT, self._resumed)):
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take_pause(self) -> bool:
        paused, self._paused = self._paused, False
        return paused

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self.at_once:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing this step, then writing a checkpoint (again to stop at once)", file=sys.stderr)

    def _resumed(self, number: int, frame: FrameType | None) -> None:
        self._paused = True


def resume_command() -> str:
    """This process's command line with --resume=true."""
    program, *arguments = sys.argv
    kept = [argument for argument in arguments if argument != "--resume" and not argument.startswith("--resume=")]
    name = Path(program).name
    words = ["python", program] if name.endswith(".py") else [name]
    return shlex.join([*words, *kept, "--resume=true"])
