"""The Python part of configure_huggingface.sh: test the token that stands on stdin, store it, test models with it."""

import os
import sys
from pathlib import Path

from sft.errors import Problems, RunFailed
from sft.programs.command_line import run_program
from sft.storage.atomic import sync


def account(token: str) -> str | None:
    """The name the hub knows the token by; None where the hub can't be reached. Raises Problems for a refused token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    try:
        return HfApi().whoami(token=token)["name"]
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise Problems(["the hub refuses this token; make a new one of role read. Nothing was stored"]) from None
        return None
    except (httpx.HTTPError, OSError):
        return None


def store(token: str) -> Path:
    """Write the token with mode 600, in one step, where huggingface_hub looks for it."""
    from huggingface_hub.constants import HF_TOKEN_PATH

    path = Path(HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, token.encode())
        os.fsync(descriptor)
        aside.replace(path)
        sync(path.parent)
    finally:
        os.close(descriptor)
        aside.unlink(missing_ok=True)
    return path


def access(model: str, token: str) -> str:
    """One sentence on whether the token opens the model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import httpx

    try:
        HfApi().auth_check(model, token=token)
    except GatedRepoError:
        return f"gated: accept its licence at https://huggingface.co/{model} and wait for the mail"
    except RepositoryNotFoundError:
        return "no such model, or a private one of somebody else; check the spelling"
    except (httpx.HTTPError, OSError) as error:
        return f"could not be tested ({type(error).__name__})"
    return "can be read"


def main() -> None:
    token = sys.stdin.read().strip()
    name = account(token)
    path = store(token)
    print(
        f"stored in {path} (readable by you alone), where every Hugging Face tool finds it; there is nothing to source"
    )
    if name is None:
        raise RunFailed("the hub could not be reached, so the token is untested; run this again with a network")
    print(f"the hub knows it as {name}")
    for model in sys.argv[1:]:
        print(f"{model}: {access(model, token)}")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
