"""A policy folder goes to the Hugging Face Hub with its model card (`vla push`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from multimodal.checkpoint import CARD, checkpoint_hash, load_checkpoint
from multimodal.pretrained.source import is_repository
from vla.cli import parse_config
from vla.merge import PolicyPath
from vla.model_card import model_card, read_results
from vla.policy import PolicyAssets


@dataclass(frozen=True)
class PushConfig:
    """Settings of `vla push`."""

    policy: PolicyPath = field(default_factory=PolicyPath)
    repo_id: str | None = None  # owner/name on the Hub; made if there is none
    results: list[Path] = field(default_factory=list)  # eval_info.json files of `vla eval`, for the card
    license: str | None = None  # of the weights, e.g. apache-2.0; a backbone's own licence binds it
    private: bool = False
    dry_run: bool = False  # write the card into the policy folder and list what would be sent


def write_card(folder: Path, repo_id: str, results: Sequence[Path], license: str | None) -> Path:
    """Write folder/README.md; it changes neither what is loaded nor the content hash.

    Raises ValueError if results are another policy's, or if the policy lies over a base that only this machine has.
    """
    assets, _ = PolicyAssets.load(folder)
    if assets.base is not None and not is_repository(assets.base.path):
        raise ValueError(
            f"{folder} holds adapters for {assets.base.path}, a folder that others do not have. Push the whole: vla merge "
            f"--policy.path={folder} --output_dir=MERGED, then push that."
        )
    versions = json.loads(load_checkpoint(folder).text("versions.json"))
    checkpoint = checkpoint_hash(folder)
    rows = [row for path in results for row in read_results(path, checkpoint)]
    card = folder / CARD
    card.write_text(model_card(assets, versions, checkpoint, repo_id, rows, license))
    return card


def push_to_hub(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Send every file of the folder; the commit's address. Raises OSError saying what to type without a login or network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[".*"], commit_message="vla push"))
    except LocalTokenNotFoundError as error:
        raise OSError("The Hub wants to know who pushes: `hf auth login`, then run this again.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = "`hf auth login` with a token that may write there" if status in (401, 403) else "try again later"
        raise OSError(f"The Hub refused {repo_id} ({status}): {error}. {hint[0].upper() + hint[1:]}.") from error
    except (OfflineModeIsEnabled, ConnectionError) as error:
        raise OSError(f"The Hub cannot be reached to push {repo_id}: {error}. Unset HF_HUB_OFFLINE, or push from a machine with a network.") from error


def main(argv: Sequence[str]) -> int:
    """`vla push`."""
    config = parse_config(PushConfig, argv, verb="push")
    if config.policy.path is None or config.repo_id is None or not is_repository(config.repo_id):
        raise ValueError("vla push needs --policy.path=FOLDER and --repo_id=owner/name.")
    folder = Path(config.policy.path).expanduser()
    card = write_card(folder, config.repo_id, config.results, config.license)
    if config.dry_run:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        print(card.read_text())
        print(f"would push to {config.repo_id}: " + ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.2f} MB)" for path in files))
        return 0
    print(push_to_hub(folder, config.repo_id, private=config.private))
    return 0
