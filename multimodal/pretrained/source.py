"""Where a published checkpoint lies: a folder, or a repository of the Hugging Face Hub brought here."""

import re
from pathlib import Path

FILES = ["*.safetensors", "*.json", "*.yaml", "tokenizer.model", "README.md"]  # never pickles
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder `path` (whose parent exists), or the local copy of the Hub repository "owner/name".

    A repository is downloaded once, then it comes from the cache.
    Raises FileNotFoundError or OSError of one message that says what to type: for a name that is neither, a repository that
    does not exist or asks for a login, or no network.
    """
    folder = Path(path).expanduser()
    is_beside_others = folder.parent != Path() and folder.parent.is_dir()  # a mistyped or half-written folder, no repository
    if folder.exists() or is_beside_others:
        if revision is not None:
            raise ValueError(f"{path} is a folder here; a revision ({revision!r}) selects a state of a Hub repository only.")
        return folder
    if not is_repository(str(path)):
        raise FileNotFoundError(f"No folder {path}, and no Hub repository is named so (expected owner/name). Check the path.")
    return _download(str(path), revision)


def is_repository(name: str) -> bool:
    """Could `name` be a Hub repository, "owner/name"?"""
    return _REPOSITORY.fullmatch(name) is not None and not name.startswith(".")


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError

    fetch = f"hf download {repository} --local-dir FOLDER"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))
    except GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        raise OSError(
            f"{repository} asks for consent: accept its terms at {page}, then `hf auth login` and run this again."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} has no revision {revision!r}; leave the revision out for its main branch."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"No folder {repository} here and no such repository on the Hub. Check the name; a private one needs "
            "`hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise OSError(
            f"No folder {repository} here, no copy of that repository in the cache, and the Hub cannot be reached. On a "
            f"machine with a network: {fetch}; then give that FOLDER as the path here (or unset HF_HUB_OFFLINE if it is set)."
        ) from error
