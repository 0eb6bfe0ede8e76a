"""The table of readable layouts, and which one a model folder has."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.config import VLMConfig
from multimodal.pretrained.decoders import DECODERS
from multimodal.pretrained.family import Family
from multimodal.pretrained.idefics3 import IDEFICS3
from multimodal.pretrained.llava import LLAVA, LLAVA_NEXT
from multimodal.pretrained.paligemma import PALIGEMMA
from multimodal.pretrained.prismatic import PRISMATIC
from multimodal.pretrained.qwen_vl import QWEN_VL

FAMILIES = (DECODERS, LLAVA, LLAVA_NEXT, IDEFICS3, QWEN_VL, PALIGEMMA, PRISMATIC)


@dataclass(frozen=True)
class Description:
    """What a folder says about itself, before any weight is read."""

    folder: Path
    family: Family
    vlm: VLMConfig
    raw: Mapping[str, Any]  # config.json


def describe(folder: Path) -> Description:
    """Family and settings of a model folder.

    Raises FileNotFoundError without config.json; ValueError for a layout that no family reads, settings that ours has no
    counterpart for, or a config that the installed transformers does not understand.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}. Check the path; a Hub repository is written owner/name.")
    if not path.is_file():
        is_ours = (folder / "config.yaml").is_file()
        hint = " It is a policy of ours: give it as --policy.path or --start_from." if is_ours else ""
        raise FileNotFoundError(f"{folder} holds no config.json, so it is no published model.{hint}")
    raw = json.loads(path.read_text())
    kind = raw.get("model_type")
    family = next((each for each in FAMILIES if kind in each.model_types), None)
    if family is None:
        readable = ", ".join(f"{each.name} ({', '.join(each.model_types)})" for each in FAMILIES)
        raise ValueError(
            f"{folder} is a {kind!r} model (config.json); readable are {readable}. Start from one of those, or add a family's "
            "table to multimodal/pretrained."
        )
    config = _transformers_config(folder, raw) if family.knows_transformers else raw
    try:
        return Description(folder, family, family.build(config), raw)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read as {family.name}: {error}") from error
    except (AttributeError, KeyError) as error:
        raise ValueError(
            f"{folder}/config.json lacks {error} of a {family.name} model. Take the file of the published model."
        ) from error


def _transformers_config(folder: Path, raw: Mapping[str, Any]) -> Any:
    """transformers fills in what the file leaves out, and gives old and new files one form."""
    from transformers import AutoConfig, __version__  # seconds to import

    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        written = raw.get("transformers_version", "an unnamed version")
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"transformers {__version__} does not understand {folder}/config.json, written by {written}: {reason}. Install one "
            f"that does: pip install 'transformers>={written}'"
        ) from error
