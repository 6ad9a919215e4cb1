"""What can go wrong between here and the Hugging Face hub, in one line each."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


def page_of(repository: str) -> str:
    """The address of a repository, for people."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def network_errors() -> tuple[type[Exception], ...]:
    """The base classes of all that goes wrong between here and the hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError)


def status_of(error: Exception) -> int | None:
    """The hub's answer, where it gave one."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def errors_in_one_line(repository: str) -> Iterator[None]:
    """Turn what goes wrong in the block into a `ValueError` that says what to do."""
    try:
        yield
    except network_errors() as error:
        raise ValueError(_explain(error, repository)) from error


def _explain(error: Exception, repository: str) -> str:
    from huggingface_hub import errors

    page, status = page_of(repository), status_of(error)
    login = "'hf auth login' or the environment variable HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        refused = "" if status == 401 else "; the account of the token in use has not done so"
        return (
            f"{repository} is gated: accept its licence at {page} with your account, and give a "
            f"token of it by {login}{refused}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {page}, or it is private: check the name, or give a token of "
            f"an account that may read it by {login}"
        )
    if status == 401:
        return f"the hub refuses the token: give another one by {login}"
    if status:
        return f"{page}: the hub answers {status}; try again later"
    if isinstance(error, OSError) and error.errno:
        return f"{repository}: {error.strerror or error}" + (
            "; free some and run the same again" if error.errno == errno.ENOSPC else ""
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{page} is not on this machine, and HF_HUB_OFFLINE forbids fetching: unset it"
    reason = str(error.__cause__ or error).partition("\n")[0] or type(error).__name__
    return (
        f"{page} cannot be reached ({reason}): check the network and try again, or fetch the files "
        "in another way and give their path"
    )
