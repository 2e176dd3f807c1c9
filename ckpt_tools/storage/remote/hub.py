"""The Hub: files of model repositories, ``hf://org/name@revision/path``, as Hugging Face serves them.

A revision is looked up once and then stands for its commit, whose files never change. Names come from the Hub's own
library, and payload by ranges from the place that it gives for a file, which is signed for some time.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from ...errors import SeriesError
from .addresses import Address
from .objects import MAGIC, Objects, Pinned, Place, at_url, check_few

_BASE: Any = HfHubHTTPError.__bases__[0]  # of all errors of its HTTP library
_FAILURES = (_BASE, OSError, ValueError)


class Hub(Objects):
    """Revisions of repositories as folders."""

    root = 3

    def __init__(self) -> None:
        super().__init__()
        self._api = HfApi(endpoint=constants.ENDPOINT)
        self._commits: dict[Path, str] = {}
        self._places: dict[Path, Place] = {}
        self._lock = Lock()

    def refresh(self) -> None:
        super().refresh()
        self._commits.clear()
        self._places.clear()

    def place(self, path: Path, refused: Place | None = None) -> Place:
        with self._lock:  # all requests under way find out at once that a signature has expired
            if self._places.get(path) is refused:
                self._places[path] = self._signed(path)
            return self._places[path]

    def _signed(self, path: Path) -> Place:
        """Ask for a place of a file, which is mostly on another host, and signed for some time."""
        repository, _ = _repository(path)
        name, endpoint = "/".join(path.parts[3:]), self._api.endpoint
        url = hf_hub_url(repository, name, revision=self._commit(path), endpoint=endpoint)
        with _in_words(path):
            parts = urlsplit(get_hf_file_metadata(url, token=get_token()).location)
        token = get_token() if parts.netloc == urlsplit(endpoint).netloc else None
        headers = {"Authorization": f"Bearer {token}"} if token else None
        found = at_url(f"{parts.scheme}://{parts.netloc}{parts.path}", parts.query, headers)
        return found._replace(fixed=True)

    def listing(self, folder: Path) -> Mapping[str, Pinned | None]:
        """List the whole revision, since that is one request too, and return one folder."""
        if len(folder.parts) < 3 or MAGIC.search(folder.parts[2]):
            return {}
        top = Address(*folder.parts[:3])
        if top in self._listed:
            return {}
        repository, _ = _repository(top)
        found: dict[Path, dict[str, Pinned | None]] = {top: {}}
        commit = self._commit(top)
        with _in_words(top):
            for each in self._api.list_repo_tree(repository, revision=commit, recursive=True):
                path = top / each.path
                state = None
                if isinstance(each, RepoFile):
                    state = Pinned(each.size, each.lfs["sha256"] if each.lfs else each.blob_id, 0)
                else:
                    found.setdefault(path, {})
                found.setdefault(path.parent, {})[path.name] = state
        self._listed |= found
        return found.get(folder, {})

    def _look(self, path: Path) -> Pinned | None:
        return self._children(path.parent).get(path.name) if len(path.parts) > 3 else None

    def find(self, pattern: Path) -> list[Path]:
        name, _, revisions = pattern.parts[2].partition("@") if len(pattern.parts) > 2 else ("", "", "")
        if not MAGIC.search(revisions):
            return super().find(pattern)
        if MAGIC.search(name):
            raise SeriesError(f"'{pattern}': write out the name of the repository. A glob may be of its revisions.")
        folder = Address(*pattern.parts[:2])
        known = self._revisions(folder / name)
        tops = [folder / f"{name}@{each}" for each in known if fnmatchcase(each, revisions)]
        check_few(tops, pattern)
        rest = pattern.parts[3:]
        return sorted(path for top in tops for path in (super(Hub, self).find(top.joinpath(*rest)) if rest else [top]))

    def _revisions(self, path: Path) -> list[str]:
        """Return the names of branches and tags, as they are in an address."""
        repository, _ = _repository(path)
        with _in_words(path):
            refs = self._api.list_repo_refs(repository)
        return [quote(each.name, safe="") for each in (*refs.branches, *refs.tags)]

    def _commit(self, path: Path) -> str:
        top = Address(*path.parts[:3])
        if top not in self._commits:
            repository, revision = _repository(top)
            try:
                with _in_words(top):
                    sha = self._api.repo_info(repository, revision=revision).sha
            except _NoRevision:
                near = difflib.get_close_matches(quote(revision or "", safe=""), self._revisions(top), n=1)
                hint = f" Did you mean {str(top).partition('@')[0]}@{near[0]}?" if near else ""
                raise SeriesError(f"{top}: the repository has no revision {revision}.{hint}") from None
            self._commits[top] = sha or revision or "main"
        return self._commits[top]


def _repository(path: Path) -> tuple[str, str | None]:
    """Return the repository of an address, and the revision.

    Raises:
        SeriesError: there is none in it.
    """
    if len(path.parts) < 3:
        raise SeriesError(f"{path}: no address of a model. Write hf://org/name, or hf://org/name@revision.")
    name, _, revision = path.parts[2].partition("@")
    return f"{path.parts[1]}/{name}", unquote(revision) or None


class _NoRevision(Exception):
    """The repository is there, and the revision is not."""


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Raise failures of the Hub in our words: its own have URLs, and with them signatures."""
    try:
        yield
    except RevisionNotFoundError:
        raise _NoRevision from None
    except GatedRepoError:
        reason = "the model is gated. Ask for access on its page, and set HF_TOKEN"
        raise PermissionError(errno.EACCES, reason, str(path)) from None
    except RepositoryNotFoundError:
        reason = "no such model, or it is private. Set HF_TOKEN if it is"
        raise FileNotFoundError(errno.ENOENT, reason, str(path)) from None
    except HFValidationError:
        raise SeriesError(f"{path}: no address of a model. Write hf://org/name, or hf://org/name@revision.") from None
    except _FAILURES as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            reason = f"access denied: {status}; HF_TOKEN may be wrong, or have expired"
            raise PermissionError(errno.EACCES, reason, str(path)) from None
        reason = "the Hub did not answer" if status is None else f"the Hub answered {status}"
        raise OSError(errno.EIO, reason, str(path)) from None
