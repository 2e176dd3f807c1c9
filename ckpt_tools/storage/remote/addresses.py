"""Addresses: ``s3://bucket/run/step_10.pth`` as a path."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import PosixPath
from typing import Any
from urllib.parse import urlsplit

from ...errors import UsageError
from ..source import STORES, Store

_ADDRESS = re.compile(r"(s3|gs|az|https?|hf)://(.*)", re.DOTALL)


class Address(PosixPath):
    """The address of an object or folder in a store: a path whose text keeps its ``//``.

    What a path asks of the local file system is asked of the store instead. There are no links in a store.
    """

    __slots__ = ()

    @property
    def _store(self) -> Store | None:
        return STORES.get(self.parts[0][:-1]) if self.parts else None

    def __str__(self) -> str:
        text = super().__str__()
        scheme, colon, rest = text.partition(":/")
        return f"{scheme}://{rest}" if colon and scheme in STORES else text

    def __fspath__(self) -> str:
        return str(self)

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        return self._store is not None and self._store.is_file(self)

    def is_dir(self, **_: Any) -> bool:
        return self._store is not None and self._store.is_folder(self)

    def is_symlink(self) -> bool:
        return False

    def absolute(self) -> Address:
        return self

    def resolve(self, strict: bool = False) -> Address:
        return self

    def expanduser(self) -> Address:
        return self

    def iterdir(self) -> Generator[Address, None, None]:
        yield from ([] if self._store is None else [self / name for name in self._store.names(self)])


def as_address(given: str | os.PathLike[str]) -> Address | None:
    """Return what a user gives as the address of an object; None if it is a path of the local file system.

    The query of a URL, which may be a signature, stays in the store, and the address has none.

    Raises:
        UsageError: a library that the store needs is not installed; or there is a password in it.
    """
    if isinstance(given, Address):
        return given
    found = _ADDRESS.fullmatch(os.fspath(given)) if isinstance(given, str) else None
    if found is None:
        return None
    scheme, rest = found.groups()
    if scheme not in STORES:
        STORES[scheme] = _made(scheme)
    text = f"{scheme}://{rest}"
    if scheme.startswith("http"):
        parts = urlsplit(text)
        if parts.username or parts.password:
            raise UsageError(
                f"{scheme}://...@{parts.hostname}{parts.path}: an address with a password in it is not taken. Use a "
                "signed address, or download the file first."
            )
        text = f"{scheme}://{parts.netloc}{parts.path}"
        if parts.query:
            from .objects import QUERIES

            QUERIES[text] = parts.query
    return Address(text)


def _made(scheme: str) -> Store:
    needed = ["obstore", *(["huggingface_hub"] if scheme == "hf" else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{scheme}:// needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed: "
            "pip install 'ckpt-tools[remote]'"
        )
    if scheme == "hf":
        from .hub import Hub

        return Hub()
    from .objects import BUCKETS, Buckets, WebServers

    return Buckets(BUCKETS[scheme]) if scheme in BUCKETS else WebServers()
