"""Where heavy files live: data sets, caches, run folders, LIBERO assets."""

import os
from pathlib import Path


def remask_home() -> Path:
    """The folder named by REMASK_HOME, else ~/.cache/remask. Not created here."""
    return Path(os.environ.get("REMASK_HOME") or Path.home() / ".cache" / "remask").expanduser()
