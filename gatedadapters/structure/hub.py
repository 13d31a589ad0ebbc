"""Saved adapters on the Hugging Face Hub: fetched into its cache by their id, and pushed as one commit.

Who may read and write is what `huggingface_hub` knows: `hf auth login`, or the variable `HF_TOKEN`. Tokens are neither
taken as arguments nor shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gatedadapters.errors import ArtifactError, GatedAdaptersError
from gatedadapters.redaction import remember_secret
from gatedadapters.structure.card import CARD

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may"


def downloaded(
    repository: str, files: Sequence[str], *, revision: str | None = None, inside: Sequence[str] = ()
) -> Path:
    """The folder in the hub's cache that holds files of a repository, all of one commit.

    Without a network the cache answers. No other file of the repository is fetched.

    Args:
        repository: its id.
        files: their names.
        revision: branch, tag or commit; None takes the newest.
        inside: folders of the repository to look into where the first file is not at its top.

    Raises:
        ArtifactError: there is no such repository, revision or file, it may not be read, or the hub cannot be reached
            and the cache does not hold it.
    """
    with hub_errors("read", repository, revision):
        first, prefix = _first(repository, files[0], revision, inside)
        commit = first.parent.parent.name if prefix else first.parent.name
        for name in files[1:]:
            hf_hub_download(repository, prefix + name, revision=commit)
    return first.parent


def _first(repository: str, name: str, revision: str | None, inside: Sequence[str]) -> tuple[Path, str]:
    """The path of a file in the cache, and the folder of the repository that it lies in, with a slash."""
    prefixes = ["", *(f"{folder}/" for folder in inside)]
    for prefix in prefixes:
        try:
            return Path(hf_hub_download(repository, prefix + name, revision=revision)), prefix
        except EntryNotFoundError:
            if prefix == prefixes[-1]:
                raise
    raise AssertionError


def card_of(repository: str, *, revision: str | None = None, token: str | None = None) -> str | None:
    """The text of the card that a repository holds; None if there is none, or no repository yet.

    Args:
        repository: its id.
        revision: the branch.
        token: in place of the one that the client knows.

    Raises:
        ArtifactError: the hub cannot be reached or refuses.
    """
    with hub_errors("write", repository, revision, token):  # whoever asks is about to
        try:
            path = hf_hub_download(repository, CARD, revision=revision, token=token)
        except (LocalEntryNotFoundError, GatedRepoError):
            raise  # it may well be there, but cannot be read
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
    return Path(path).read_text(encoding="utf-8", errors="replace")


def pushed(
    repository: str, folder: Path, *, files: Sequence[str], private: bool | None, revision: str | None, message: str
) -> str:
    """Commit files of a folder to a repository, which is made if it does not exist; all of them or none.

    Args:
        repository: its id.
        folder: the folder.
        files: names of the files.
        private: whether a new repository is private; None leaves it to the account.
        revision: the branch, which is made if it does not exist.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: the hub cannot be reached or refuses.
    """
    hub = HfApi(library_name="gatedadapters")
    with hub_errors("write", repository, revision):
        repository = hub.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repository, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, folder / name) for name in files]
        done = hub.create_commit(repository, operations, commit_message=message, revision=revision)
    return done.commit_url


@contextmanager
def hub_errors(
    doing: Literal["read", "write"], repository: str, revision: str | None = None, token: str | None = None
) -> Iterator[None]:
    """A context in which what the hub, its client or the network raises becomes an ArtifactError.

    The client raises errors of several libraries, which differ between its releases, and some of them quote the header
    with the token. So all are caught, and none is shown as the cause.

    Args:
        doing: what is done with the repository.
        repository: its id.
        revision: the branch, tag or commit.
        token: a token that the client was given; None for the one that it has itself.
    """
    token = token or get_token()
    remember_secret(token or "")
    try:
        yield
    except GatedAdaptersError:
        raise
    except Exception as error:
        raise _told(error, doing, repository, revision, known=token is not None) from None


def _told(
    error: Exception, doing: Literal["read", "write"], repository: str, revision: str | None, *, known: bool
) -> ArtifactError:
    """What to say of an error; `known` tells whether the hub was given a token."""
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    got = " ".join(next((line for line in str(e).splitlines() if line.strip()), type(e).__name__) for e in causes)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return ArtifactError(
            "this is no id of a repository on the hub",
            expected='"user/name"',
            got=repr(repository),
            where="the Hugging Face Hub",
            fix="letters, digits, -, _ and . are allowed, 96 characters at most",
        )
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)) or (status is None and _is_network(error)):
        cached = ", and the cache does not hold it" if doing == "read" else ""
        return ArtifactError(
            f"the hub cannot be reached{cached}",
            expected="a connection, or a repository that was loaded before",
            got=got,
            where=repository,
            fix="check the network and the variables HF_ENDPOINT and HF_HUB_OFFLINE; a folder needs no network",
        )
    if isinstance(error, RevisionNotFoundError):
        return ArtifactError(
            "the repository has no such revision",
            expected="a branch, a tag or a commit",
            got=repr(revision),
            where=repository,
            fix=f"see the list of branches of {repository} on the hub",
        )
    if isinstance(error, EntryNotFoundError):
        return ArtifactError(
            "the repository holds no saved adapter",
            expected="the files that Adapters.save or push_to_hub writes",
            got=got,
            where=repository if revision is None else f"{repository}, revision {revision}",
            fix="a peft adapter is loaded with import_peft; else check the name and the revision",
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        who = "a token that may not" if known else "a request without a token"
        return ArtifactError(
            f"there is no such repository, or you may not {doing} it",
            expected=f'"user/name" of a repository that you may {doing}; there is no such folder either',
            got=f"the hub's answer {status} to {who}" if status is not None else got,
            where=repository,
            fix=f"check the name; {_LOGIN}",
        )
    return ArtifactError(
        f"the hub does not let this repository be {'read' if doing == 'read' else 'written'}",
        expected="a request that the hub accepts",
        got=got,
        where=repository,
        fix="read what the hub answered; if it is busy, try again",
    )


def _is_network(error: Exception) -> bool:
    """Whether a connection failed, by the names of the classes of httpx, which the client renamed between releases."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"})
