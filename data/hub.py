"""Files from the Hugging Face Hub."""

import errno
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from utils import UserError


def download(repo: str, patterns: Sequence[str], *, data_set: bool = False) -> Path:
    """A local snapshot with those files of a repository that match a pattern. What is there already is not fetched
    again, and a download that broke off goes on. Raises UserError, which says why there is none."""
    kind = "data set" if data_set else "model"
    try:
        return Path(snapshot_download(repo, repo_type="dataset" if data_set else None, allow_patterns=list(patterns)))
    except Exception as error:  # of the network too, whose classes belong to the HTTP library of the day
        raise UserError(f"{repo} cannot be fetched from the Hub: {reason(error, repo, kind)}") from error


def reason(error: Exception, repo: str, kind: str) -> str:
    """Why a download failed, and what would help."""
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'data set')}{repo}"
        return f"it is gated. Accept its terms at {page} and run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {kind} of this name, or it is private. If it is private, run `hf auth login`"
    if isinstance(error, HFValidationError):
        return f"this is no name of a {kind} there, which is ORG/NAME"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space is left for {constants.HF_HUB_CACHE} (HF_HOME= names another place)"
    if isinstance(error, LocalEntryNotFoundError):
        return f"it is not here yet, and {constants.ENDPOINT} cannot be reached"
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; the same command goes on with it"
