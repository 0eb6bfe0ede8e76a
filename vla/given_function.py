"""A function of the user's own, by name: `--task` of `vla calibrate`, `--encoder.factory` of `vla export`."""

import importlib
import sys
from pathlib import Path
from typing import Any


def given_function(option: str, target: str) -> Any:
    """The function of "module:function"; the working directory is looked in as well. Raises ValueError if there is none."""
    module_name, colon, function = target.partition(":")
    if not module_name or not colon or not function:
        raise ValueError(f"{option} is {target!r}; write module:function.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module_name), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"{option}={target} names nothing: {error}. Modules are looked for in {here} and among the installed ones."
        ) from error
