"""Files from and to the Hugging Face hub: asked for once, and each way in which that fails told apart."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nh2st_pipe.core.errors import HubError

__all__ = ["Pushed", "cached", "describe", "fetch", "fetch_folder", "has_file", "opens", "push_files", "reachable"]

_SECONDS = 10.0  # to reach the hub, before it counts as out of reach


def fetch(repo: str, file: str, revision: str | None = None) -> Path:
    """Return the path of `file` of the repository `repo` in the local cache, fetched where it is not there.

    Raises HubError with the actual cause.
    """
    from huggingface_hub import hf_hub_download

    with _causes(repo, revision, file):
        if not reachable():
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
        return Path(hf_hub_download(repo, file, revision=revision))


def cached(repo: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a file in the local cache, None where it is not there; nothing is asked for."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def describe(repo: str, file: str, revision: str | None = None) -> int:
    """Return the size in bytes of a file on the hub, without fetching it. Raises HubError with the actual cause."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _causes(repo, revision, file):
        if not reachable():
            raise HubError(f"{file} of {repo} is not in the local cache, and the hub cannot be reached")
        return get_hf_file_metadata(hf_hub_url(repo, file, revision=revision)).size or 0


def fetch_folder(repo: str, patterns: list[str], revision: str | None = None) -> Path:
    """Return the folder of a repository's files that match `patterns`; as `fetch`."""
    from huggingface_hub import snapshot_download

    with _causes(repo, revision, "the repository"):
        offline = not reachable()
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))


@dataclass(frozen=True)
class Pushed:
    """A commit that was made, or proposed."""

    url: str
    revision: str


def has_file(repo: str, file: str) -> bool:
    """Whether a repository has a file; False where there is no repository. Raises HubError with the actual cause."""
    from huggingface_hub import HfApi, constants

    with _causes(repo, None, file, "could not be asked for"):
        return bool(HfApi(endpoint=constants.ENDPOINT).file_exists(repo, file))


def opens(repo: str) -> bool:
    """Whether files of a repository may be fetched, with the token that is here or without."""
    from huggingface_hub import HfApi, constants

    try:
        HfApi(endpoint=constants.ENDPOINT).auth_check(repo)
    except Exception:  # gated, private, not there, no answer
        return False
    return True


def push_files(
    repo: str, files: Mapping[str, bytes | Path], message: str, private: bool = False, create_pr: bool = False
) -> Pushed:
    """Put files into a repository in one commit, or propose that with `create_pr`. Without, one that is not there is
    made, `private` if asked for.

    Raises HubError with the actual cause; then nothing of it is there but an empty repository.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    with _causes(repo, None, "the head", "could not be pushed"):
        if not create_pr:
            api.create_repo(repo, private=private, exist_ok=True)
        made = api.create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
            create_pr=create_pr,
        )
    return Pushed(str(made.pr_url or made.commit_url), str(made.pr_revision or made.oid))


def reachable() -> bool:
    """Whether the hub answers at all, in whatever way: one request, where the library would try six times in 30 s."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # each version of the library has other errors; what matters is that there was no answer
        return False
    return True


@contextmanager
def _causes(repo: str, revision: str | None, file: str, failed: str = "could not be downloaded") -> Iterator[None]:
    """Turn what the library raises into a HubError that says what to do, its retries and warnings unsaid."""
    from huggingface_hub import errors, get_token

    at = f"{repo}@{revision}" if revision else repo
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        terms = f"agree to its terms at huggingface.co/{repo}"
        if get_token() is None:
            raise HubError(
                f"{repo} is gated, and no token was given: {terms}, then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        raise HubError(f"{repo} is gated, and your token has no access: {terms} with its account") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision '{revision}'; check where it is asked for") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the hub knows no {repo}, or it is private and no token was given (`hf auth login`, HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{file} of {at} is not in the local cache, and the hub cannot be reached (or HF_HUB_OFFLINE is "
            "set); connect"
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{at} holds no file {file}; check its name") from error
    except errors.HFValidationError as error:
        raise HubError(f"{at} is no name of a repository: {str(error).splitlines()[0]}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise HubError(f"{file} of {at} {failed}: {str(error).splitlines()[0]}") from error
    finally:
        log.setLevel(level)
