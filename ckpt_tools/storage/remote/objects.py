"""Objects: files in the buckets of S3, Google and Azure, and on web servers, read by ranges through obstore.

A file is pinned when it is first seen, by its entity tag (else by the time of its last change) and its size. Every
later request asks for that content alone, so what a job reads is of one state, or the job is refused.

Texts of obstore are not shown: they have whole URLs, and with them signatures. So nothing of them is chained to our
errors either.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import obstore
from obstore import exceptions

from ...errors import CorruptError, SeriesError
from .addresses import Address

R = TypeVar("R")
QUERIES: dict[str, str] = {}
"""Queries of URLs, by the URL without it: a signature is no part of an address, which is shown and recorded."""
CONNECTIONS = 16
"""Requests at the same time."""
MOST_MATCHES = 10_000
"""Objects that a glob may match; more is a slip."""
MAGIC = re.compile("[*?[]")
TRIES = 4
"""Times that a range is asked for, each with the retries of obstore."""
PAUSE = 0.5
"""Seconds before the second try; twice as long before each further one."""
_RETRIES: Any = {
    "max_retries": 5,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=8), "base": 2},
    "retry_timeout": timedelta(seconds=60),
}
_CLIENT: Any = {"timeout": "120s", "connect_timeout": "10s"}
_START = 512  # bytes of a file that tell its format, and are kept
_LARGE = 256 << 10  # bytes of a read from which on it is one of many in sequence
_BLOCK = 8 << 20
_BLOCKS = 32  # kept at once, of all files


class Pinned(NamedTuple):
    """A state of an object.

    Attributes:
        nbytes: its size.
        tag: entity tag; empty if the server has none.
        modified: time of the last change, in seconds.
    """

    nbytes: int
    tag: str
    modified: int

    @classmethod
    def of(cls, meta: Any) -> Pinned:
        return cls(meta["size"], meta.get("e_tag") or "", int(meta["last_modified"].timestamp()))

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.tag or self.modified,)

    def same(self, other: Pinned) -> bool:
        return self.nbytes == other.nbytes and self.identity == other.identity


class Place(NamedTuple):
    """Where an object is.

    Attributes:
        client: a store of obstore.
        key: of the object in it.
        fixed: its content never changes; tags of the server are of no interest then.
    """

    client: Any
    key: str
    fixed: bool = False


Places = Callable[[Place | None], Place]
"""Returns the place of an object; given one that failed, another one if there is any."""


class ObjectFile:
    """An object, open for reading; see `Source`.

    Args:
        path: for messages.
        places: see `Places`.
        pinned: the state to read.
        starts: first bytes of files, by path and state; filled here.
    """

    def __init__(self, path: Path, places: Places, pinned: Pinned, starts: dict[object, bytes]) -> None:
        self._path, self._places, self._pinned, self._starts = path, places, pinned, starts

    def stat(self) -> tuple[int, tuple[object, ...]]:
        """Return the pinned (size, identity): every request is refused if they are not those of the object any more."""
        return self._pinned.nbytes, (str(self._path), *self._pinned.identity)

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        pass

    def read_into(self, offset: int, view: memoryview) -> int:
        count = max(min(len(view), self._pinned.nbytes - offset), 0)
        if count < _LARGE:
            view[:count] = self._small(offset, offset + count)
            return count
        done = 0
        while done < count:
            number, within = divmod(offset + done, _BLOCK)
            block = self._block(number)[within : within + count - done]
            view[done : done + len(block)] = block
            done += len(block)
        return done

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of many small ranges, (offset, nbytes), several at a time."""

        def read(each: tuple[int, int]) -> bytes:
            offset, nbytes = each
            return self._small(offset, min(offset + nbytes, self._pinned.nbytes))

        return in_parallel(read, ranges)

    def fetch(self, begin: int, end: int) -> memoryview:
        """Return the bytes of a range within the file by one request, which is made again if it fails."""
        place = None
        for attempt in range(TRIES):
            place = self._places(place)
            try:
                return self._ask(place, begin, end, first=not attempt)
            except _Again as again:
                if attempt == TRIES - 1:
                    raise OSError(errno.EIO, f"{again}; {TRIES} tries", str(self._path)) from None
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError  # pragma: no cover

    def _ask(self, place: Place, begin: int, end: int, *, first: bool) -> memoryview:
        pinned = self._pinned
        client, key, fixed = place
        options: Any = {"range": (begin, end)}
        if pinned.tag and not fixed and not pinned.tag.startswith("W/"):  # weak tags match nothing
            options["if_match"] = pinned.tag
        try:
            found, data = asked(_got, client, key, options)
        except _ERRORS as error:
            told = refused(error, self._path, again=True)
            if fixed and first and isinstance(told, PermissionError):
                raise _Again("access denied") from None  # to a place that was signed some time ago
            raise told from None
        if found.nbytes != pinned.nbytes or not (fixed or found.same(pinned)):
            raise _changed(self._path)
        if len(data) != end - begin:
            raise _Again("the server sent fewer bytes than were asked for")
        return data

    def _small(self, begin: int, end: int) -> bytes:
        if end <= begin:
            return b""
        key = self._path, self._pinned
        if begin < _START and key not in self._starts:
            data = bytes(self.fetch(0, min(max(end, _START), self._pinned.nbytes)))
            self._starts[key] = data[:_START]
            return data[begin:end]
        start = self._starts.get(key, b"")
        return start[begin:end] if end <= len(start) else bytes(self.fetch(begin, end))

    def _block(self, number: int) -> memoryview:
        """Return a block, kept for a while: large reads mostly come one behind another."""
        key = self._path, self._pinned, number
        with _KEPT_LOCK:
            lock = _KEPT.setdefault(key, _Kept())
            _KEPT.move_to_end(key)
            while len(_KEPT) > _BLOCKS:
                _KEPT.popitem(last=False)
        with lock.lock:
            if lock.data is None:
                lock.data = self.fetch(number * _BLOCK, min((number + 1) * _BLOCK, self._pinned.nbytes))
            return lock.data


class _Kept:
    """A block, or the wait for it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.data: memoryview | None = None


_KEPT: OrderedDict[object, _Kept] = OrderedDict()
_KEPT_LOCK = Lock()


class _Again(Exception):
    """A request failed in a way that may pass."""


_ERRORS = (exceptions.BaseError, OSError, ValueError)
_NO_RANGE = re.compile(r"\b416 [A-Z]")
_PASSING = re.compile(r"status code: (5\d\d|429|408)")
_STATUS = re.compile(r"status code: (\d{3} [A-Za-z ]*[A-Za-z])")
_CODE = re.compile(r"<Code>(\w{1,40})</Code>")
_NO_CREDENTIALS = re.compile(
    r"169\.254\.169\.254|metadata\.google\.internal|169\.254\.170\.2|credential", re.IGNORECASE
)


def refused(error: BaseException, path: Path, *, again: bool = False) -> Exception:
    """Return the error of a request in our words.

    Args:
        again: return `_Again` if it may pass.
    """
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such object", str(path))
    if isinstance(error, exceptions.PreconditionError):
        return _changed(path)
    code = _CODE.search(text)
    status = _STATUS.search(text)
    answer = " ".join(each[1] for each in (status, code) if each)
    if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)) or (
        code and re.search("Token|AccessKey|Signature|AccessDenied", code[1])
    ):
        reason = f"access denied: {answer or 'no reason given'}; the credentials may be wrong, or have expired"
        return PermissionError(errno.EACCES, reason, str(path))
    if isinstance(error, exceptions.NotSupportedError):
        return OSError(errno.EOPNOTSUPP, "the server sends whole files only. Download it first", str(path))
    if status is not None:
        reason = f"the server answered {answer}"
        if code and code[1] in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            reason += ". The bucket is in another region: set AWS_REGION"
    elif _NO_CREDENTIALS.search(text):
        reason = "no credentials were found. Set those of the store in the environment"
        return PermissionError(errno.EACCES, reason, str(path))
    elif re.search("timed ?out", text, re.IGNORECASE):
        reason = "no answer in time"
    elif re.search("dns error|failed to lookup", text):
        reason = "the server's name is not known"
    elif re.search("Connect", text):
        reason = "no connection to the server"
    elif "got" in text and "Requested" in text:
        reason = "the server sent fewer bytes than were asked for"
    else:
        reason = "the transfer broke off"
    passing = status is None or _PASSING.search(text)
    return _Again(reason) if again and passing else OSError(errno.EIO, reason, str(path))


def _changed(path: Path) -> CorruptError:
    return CorruptError(f"{path}: changed while it was read. Wait until training has finished writing, then try again.")


def asked(call: Callable[..., R], *arguments: Any, **options: Any) -> R:
    """Return what a request gives; a signal ends the wait for it, as it would not end the library's own wait."""
    if threading.current_thread() is not threading.main_thread():
        return call(*arguments, **options)
    given: list[R] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            given.append(call(*arguments, **options))
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            failed.append(error)

    thread = threading.Thread(target=work, name="ckpt-request", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]
    return given[0]


def _got(client: Any, key: str, options: Any) -> tuple[Pinned, memoryview]:
    result = obstore.get(client, key, options=options)
    return Pinned.of(result.meta), memoryview(result.bytes())


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return the results for all items, several of which are worked on at a time."""
    if len(items) < 2:
        return [function(each) for each in items]
    with ThreadPoolExecutor(min(CONNECTIONS, len(items))) as pool:
        return [*pool.map(function, items)]


class Objects:
    """What stores of objects have in common; see `Store`. A subclass says where objects are, and lists folders.

    Listings and states are kept until `refresh`, so that a job sees one state of the store.

    Attributes:
        root: parts of a path before the first that a glob may be in.
    """

    root = 2

    def __init__(self) -> None:
        self._listed: dict[Path, Mapping[str, Pinned | None]] = {}
        self._pinned: dict[Path, Pinned | None] = {}
        self._starts: dict[object, bytes] = {}

    def place(self, path: Path, refused: Place | None = None) -> Place:
        """Return where an object is; see `Places`."""
        raise NotImplementedError

    def listing(self, folder: Path) -> Mapping[str, Pinned | None]:
        """Return the files in a folder with their states, and the folders in it with None."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Forget what was seen so far."""
        for each in (self._listed, self._pinned, self._starts):
            each.clear()
        with _KEPT_LOCK:
            _KEPT.clear()

    def forget(self, path: Path) -> None:
        """Forget what was seen of a file or folder, and of the folder that it is in."""
        for each in (self._listed, self._pinned):
            for known in [key for key in each if path in (key, *key.parents) or key == path.parent]:
                each.pop(known, None)

    def open(self, path: Path) -> ObjectFile:
        pinned = self._state(path)
        if pinned is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(path))
        return ObjectFile(path, lambda refused: self.place(path, refused), pinned, self._starts)

    def is_file(self, path: Path) -> bool:
        return self._state(path) is not None

    def is_folder(self, path: Path) -> bool:
        try:
            return bool(self._children(path))
        except PermissionError:
            if self._state(path) is not None:  # it may be read, and nothing be listed
                return False
            raise

    def names(self, folder: Path) -> list[str]:
        return sorted(self._children(folder))

    def real_path(self, path: Path) -> Path:
        return path

    def identity(self, path: Path) -> object:
        return path

    def find(self, pattern: Path) -> list[Path]:
        found: list[Path] = [Address(*pattern.parts[: self.root])]
        for part in pattern.parts[self.root :]:
            if not MAGIC.search(part):
                found = [folder / part for folder in found]
                continue
            in_parallel(self._children, found)
            if part == "**":
                found = self._below(found, pattern)
                continue
            found = [
                folder / name
                for folder in found
                for name in self._children(folder)
                if fnmatchcase(name, part) and not name.startswith(".")
            ]
            check_few(found, pattern)
        in_parallel(self._children, [*dict.fromkeys(path.parent for path in found)])
        return sorted(path for path in found if path.name in self._children(path.parent))

    def _below(self, folders: list[Path], pattern: Path) -> list[Path]:
        """Return folders and all folders below them."""
        found, new = [*folders], folders
        while new:
            in_parallel(self._children, new)
            new = [
                folder / name
                for folder in new
                for name, state in self._children(folder).items()
                if state is None and not name.startswith(".")
            ]
            found += new
            check_few(found, pattern)
        return found

    def _children(self, folder: Path) -> Mapping[str, Pinned | None]:
        if not isinstance(folder, Address):  # a name in some file, and not what the user has given
            return {}
        if folder not in self._listed:
            self._listed[folder] = self.listing(folder)
        return self._listed[folder]

    def _state(self, path: Path) -> Pinned | None:
        if not isinstance(path, Address):
            return None
        if path.parent in self._listed:
            found = self._listed[path.parent].get(path.name)
            if found is not None or self._listed[path.parent]:
                return found
        if path not in self._pinned:
            self._pinned[path] = self._look(path)
        return self._pinned[path]

    def _look(self, path: Path) -> Pinned | None:
        """Ask for the state of an object, and for its first bytes, since these are read next."""
        if len(path.parts) <= self.root:
            return None
        if MAGIC.search(path.name):  # a glob, which asks for this list next
            return self._children(path.parent).get(path.name)
        place = self.place(path)
        try:
            pinned, data = asked(_got, place.client, place.key, {"range": (0, _START)})
            start = bytes(data)
        except _ERRORS as error:
            told: BaseException = refused(error, path)
            if isinstance(told, FileNotFoundError):
                return None
            if not _NO_RANGE.search(str(error)):
                raise told from None
            try:
                pinned, start = Pinned.of(asked(obstore.head, place.client, place.key)), b""  # an empty file
            except _ERRORS as again:
                raise refused(again, path) from None
        self._starts[path, pinned] = start
        return pinned


def check_few(found: Sequence[Path], pattern: Path) -> None:
    """Refuse a glob that matches too many objects.

    Raises:
        SeriesError: it does.
    """
    if len(found) > MOST_MATCHES:
        raise SeriesError(
            f"'{pattern}' matches more than {MOST_MATCHES:,} objects. Write a narrower one, such as "
            f"'{pattern.parent / 'step*000'}'."
        )


class Buckets(Objects):
    """The buckets of a provider as folders.

    Args:
        made: from the name of a bucket to a store of obstore.
    """

    def __init__(self, made: Callable[[str], Any]) -> None:
        super().__init__()
        self._made = made
        self._clients: dict[str, Any] = {}

    def place(self, path: Path, refused: Place | None = None) -> Place:
        return Place(self._client(path), "/".join(path.parts[2:]))

    def listing(self, folder: Path) -> Mapping[str, Pinned | None]:
        if len(folder.parts) < 2:
            return {}
        prefix = "/".join(folder.parts[2:])
        try:
            found = asked(obstore.list_with_delimiter, self._client(folder), prefix or None)
        except _ERRORS as error:
            told = refused(error, folder)
            if isinstance(told, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such bucket", str(folder)) from None
            raise told from None
        skip = len(prefix) + 1 if prefix else 0
        # An object of the name of the folder marks it, as consoles do: it is no file in it.
        files: dict[str, Pinned | None] = {
            meta["path"][skip:]: Pinned.of(meta) for meta in found["objects"] if meta["path"][skip:]
        }
        return {prefix[skip:]: None for prefix in found["common_prefixes"]} | files

    def _client(self, path: Path) -> Any:
        bucket = path.parts[1]
        if bucket not in self._clients:
            try:
                self._clients[bucket] = self._made(bucket)
            except (exceptions.BaseError, ValueError) as error:
                raise refused(error, path) from None
        return self._clients[bucket]


def _s3(bucket: str) -> Any:
    from obstore.store import S3Store

    options: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint:
        options["endpoint"] = endpoint
    client = _CLIENT | ({"allow_http": True} if endpoint.startswith("http:") else {})
    if "AWS_ACCESS_KEY_ID" not in os.environ and "AWS_SKIP_SIGNATURE" not in os.environ:
        # obstore reads no ~/.aws: where boto3 is installed, it is asked.
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider

            options["credential_provider"] = Boto3CredentialProvider()
        except (ImportError, ValueError):
            pass
    return S3Store(bucket, client_options=client, retry_config=_RETRIES, **options)


def _gcs(bucket: str) -> Any:
    from obstore.store import GCSStore

    return GCSStore(bucket, client_options=_CLIENT, retry_config=_RETRIES)


def _azure(container: str) -> Any:
    from obstore.store import AzureStore

    return AzureStore(container, client_options=_CLIENT, retry_config=_RETRIES)


BUCKETS: dict[str, Callable[[str], Any]] = {"s3": _s3, "gs": _gcs, "az": _azure}


def at_url(url: str, query: str = "", headers: Mapping[str, str] | None = None) -> Place:
    """Return the place of the file at a URL without query.

    Args:
        headers: to send along.
    """
    from obstore.store import HTTPStore

    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    client = _CLIENT | {"allow_http": scheme == "http"} | ({"default_headers": dict(headers)} if headers else {})
    base = f"{scheme}://{host}/" + (f"?{query}" if query else "")
    return Place(HTTPStore(base, client_options=client, retry_config=_RETRIES), unquote(key))


class WebServers(Objects):
    """Files on web servers, which list nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple[str, str | None], Place] = {}

    def place(self, path: Path, refused: Place | None = None) -> Place:
        url = str(path)
        key = url, QUERIES.get(url)
        if key not in self._places:
            self._places[key] = at_url(url, key[1] or "")
        return self._places[key]

    def listing(self, folder: Path) -> Mapping[str, Pinned | None]:
        return {}
