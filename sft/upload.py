"""An exported model to a hub repository."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from sft.errors import Problems, RunFailed

# merge.json names folders of this machine, and the mark of completeness lists it.
KEPT_HERE = ["merge.json", "COMPLETE.json"]


def check_repository(name: str, *, offline: bool) -> None:
    """Problems that are better said before a long merge: a name that is none, no token, no network."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise Problems([f"--push {name}: is no repository name such as me/my-model ({error})"]) from error
    if offline:
        raise Problems([f"--push {name}: the hub can't be reached from here; leave --push away and upload later"])
    if get_token() is None:
        raise Problems([f"--push {name}: there is no hub token; run official_content/configure_huggingface.sh first"])


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Creates the repository if needed, uploads the folder, returns its address."""
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository.repo_id, ignore_patterns=KEPT_HERE)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunFailed(
            f"The upload to {name} failed: {reason}. The model is complete in {folder}; try again."
        ) from error
    return str(repository)
