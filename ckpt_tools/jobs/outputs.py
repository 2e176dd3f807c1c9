"""Targets: what an output may be called, which format its name asks for, and what it may replace.

All of it is found out before any work is done; see `storage.staged` for the writing.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..errors import CkptError, ReadError, UsageError, WriteError
from ..formats import FORMATS, format_of, suffixes
from ..formats.format import Format
from ..formats.header import Header
from ..formats.json_file import read_json
from ..formats.sharded import SHARDED
from ..series.paths import as_path, is_address, shown
from ..storage.hidden import size_of_leftovers
from ..storage.source import LOCAL, store_of
from ..storage.staged import is_writable, same_file
from .options import AveragedOutput


@dataclass(frozen=True, slots=True)
class Target:
    """Where an output goes.

    Attributes:
        path: of the file or folder.
        folder: True for a folder, whatever its name.
    """

    path: Path
    folder: bool

    @classmethod
    def of(cls, out: str | Path, usual: Target | None = None) -> Target:
        """Read what the user says: a known suffix means a file; all else, and a slash at the end, a folder.

        Args:
            usual: where the output would go by itself. If that is a file, a slash at the end puts it into a folder
                under its usual name. None if the output may be a folder.

        Raises:
            UsageError: no name, or a suffix that is a slip of a known one.
        """
        text = shown(os.fspath(out))
        name, known = Path(text).name, suffixes()
        if text == "-":
            raise UsageError(
                "`out='-'`: checkpoints are not written to standard output, as their parts are written in any order. "
                "Name a file, such as `out='averaged.pth'`; a folder of this name is ./-"
            )
        if not text or name in known:
            raise UsageError(f"`out={text!r}`: there is no name in it. Is a variable of the shell unset?")
        path = as_path(out)
        slash = os.path.basename(text) != name  # noqa: PTH119 - a Path would not tell
        if not name.endswith(known):
            near = difflib.get_close_matches(path.suffix.lower(), known, n=2, cutoff=0.7)
            if near and not slash and not _is_folder(path):
                raise UsageError(
                    f"{text}: {path.suffix} is not a known suffix. Did you mean {' or '.join(near)}? "
                    f"If a folder should have this name, end it in a slash: {text}/"
                )
            if slash and not near and usual is not None and not usual.folder:
                return cls(path / usual.name, folder=False)
        return cls(path, folder=slash or not name.endswith(known))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    @property
    def format(self) -> Format:
        """The format that the name asks for; shards for a folder."""
        return SHARDED if self.folder else format_of(self.path)


def default_target(headers: list[Header]) -> Target:
    """Name the output as its inputs suggest."""
    if all(header.shards or header.ranks or header.format.keeps_folder for header in headers):
        return Target.of("averaged")
    usual = {header.file_format.usual_suffix for header in headers}
    return Target.of("averaged" + (usual.pop() if len(usual) == 1 else ".pth"))


def named_target(output: AveragedOutput, headers: Iterable[Header], usual: Target) -> Target | None:
    """Read where an average is to go; None if nothing says it.

    Args:
        headers: of its inputs.
        usual: where it would go then; if that is a file, ``DIR/`` puts it into this folder.
    """
    if output.named is None:
        return None
    one_file = output.max_shard_size is None and not any(header.in_folder for header in headers)
    return Target.of(output.named, usual if one_file else None)


def named_after(header: Header, tail: str) -> Target:
    """Name an output after its input, with something before the suffix: ``last-bn.pth``."""
    source = header.path
    suffix = next((s for s in (".pth.tar", *suffixes()) if source.name.endswith(s)), "")
    stem = source.name.removesuffix(suffix)
    written = header.format.written_as
    if not header.copied_to_folder and written is not header.format and not suffix.endswith(written.suffixes):
        suffix = header.format.usual_suffix
    name = f"{stem}{tail}{suffix}"
    # What was read from a store is written there only if that is asked for.
    place = source.with_name(name) if store_of(source) is LOCAL else Path(name)
    return Target(place, folder=header.copied_to_folder or not suffix)


def check_same_format(base: Header, target: Target, *, folder: bool) -> None:
    """Refuse a target of another format than the checkpoint has, or that is no folder where it has to be one.

    Raises:
        UsageError: it is.
    """
    if not base.format.rewritten or (folder and not base.format.writes):
        raise UsageError(
            f"{base.path}: a {base.format.name} checkpoint, which is read, not written. Make plain weights of it "
            "first: `convert(to='plain')`."
        )
    if target.folder if folder else target.format is base.format.written_as:
        return
    wanted = "a folder" if folder else f"a file named *{' or *'.join(base.format.written_as.suffixes)}"
    raise UsageError(f"{target.path}: the checkpoint is {wanted}, and stays one. Choose another name with `out`.")


def check_shard_size(target: Target, max_shard_size: int | None) -> None:
    """Refuse a size of shards where there are none.

    Raises:
        UsageError: the target is one file.
    """
    if max_shard_size is not None and not target.folder:
        raise UsageError("`max_shard_size` needs a folder: give `out` a name without suffix.")


def on_this_machine(given: str | Path, option: str) -> Path:
    """Return a path as it is, for what is written on this machine alone.

    Raises:
        UsageError: it is an address.
    """
    if is_address(given):
        raise UsageError(
            f"`{option}`: {shown(given)} is in a store, and this is written on this machine alone. Give a local path, "
            "and upload the file afterwards."
        )
    return Path(given)


def grows_at(target: Path) -> Path:
    """Return where an output grows: beside its target, or for one in a store, in the folder for temporary files."""
    if store_of(target) is LOCAL:
        return target
    import tempfile

    return Path(tempfile.gettempdir(), target.name)


def check_target(
    target: Path, inputs: Iterable[Path], *, nbytes: int, force: bool, names: Collection[str] | None
) -> None:
    """Refuse a target before any work is done.

    Args:
        inputs: files and folders that must stay as they are.
        nbytes: size of the output.
        force: replace what is there.
        names: of the files in a folder; None if the target is one file.

    Raises:
        WriteError: the target exists, is an input or inside one, cannot be written, or does not fit on the disk; or it
            is a folder with other files than these and those of an older output.
    """
    if store_of(target) is not LOCAL:
        _check_address(target, [*inputs], nbytes=nbytes, force=force, names=names)
        return
    folder = names is not None
    with _looking_at(target):
        parent = target.absolute().parent
        if parent.exists() and not parent.is_dir():
            raise WriteError(f"{target}: {parent} is a file, not a folder. Choose another place with `out`.")
        if not parent.is_dir():
            raise WriteError(f"{target}: there is no folder {parent}. Make it first: mkdir -p {parent}")
        resolved = target.resolve()
        around, there = set(resolved.parents), resolved.exists()
        for path in dict.fromkeys(inputs):
            source = path.resolve()
            if resolved == source or (there and same_file(resolved, source)):
                raise WriteError(
                    f"{target}: is one of the inputs, which are never changed. Choose another name with `out`."
                )
            if source in around and source.is_dir():
                raise WriteError(
                    f"{target}: lies inside the input {path}, which is never changed. Choose another place with `out`."
                )
            if folder and resolved in source.parents:
                raise WriteError(
                    f"{target}: holds the input {path}, which is never changed. Choose another folder with `out`."
                )
        if folder and resolved in (Path.cwd(), *Path.cwd().parents):
            raise WriteError(f"{target}: is the folder you are in, or around it. Choose another folder with `out`.")
        if target.exists() and not (target.is_dir() or target.is_file()):
            raise WriteError(f"{target}: is not a regular file. Choose another name with `out`.")
        if target.exists() and target.is_dir() != folder:
            kind = "a folder" if target.is_dir() else "a file"
            raise WriteError(f"{target}: is {kind} already. Choose another name with `out`.")
        if names is not None:
            _check_replaceable(target, names)
        # A link is replaced itself, as any file is; what it leads to stays as it was.
        if not force and os.path.lexists(target) and (not folder or target.is_symlink() or any(target.iterdir())):
            raise WriteError(
                f"{target}: exists already. Pass `force=True` to replace it, or choose another name with `out`."
            )
        if not is_writable(parent):
            raise WriteError(f"{target}: the folder {parent} is not writable for you. Choose another place with `out`.")
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            free += size_of_leftovers(target)
        if nbytes > free:
            raise WriteError(
                f"{target}: needs {nbytes:,} bytes, and {parent} has {free:,} left. "
                "Free some space or choose another place with `out`."
            )


def _check_address(
    target: Any, inputs: Sequence[Path], *, nbytes: int, force: bool, names: Collection[str] | None
) -> None:
    """Refuse a target in a store; see `check_target`."""
    from ..storage.remote.sending import CLAIM, bucket_of

    bucket_of(target).forget(target)
    folder = names is not None
    with _looking_at(target):
        for path in inputs:
            if target == path or path in target.parents or (folder and target in path.parents):
                raise WriteError(
                    f"{target}: is, holds or lies in the input {path}, which is never changed. Choose another place "
                    "with `out`."
                )
        there = [kind for kind, found in (("file", target.is_file()), ("folder", target.is_dir())) if found]
        if ("file" if folder else "folder") in there:
            raise WriteError(f"{target}: is a {there[0]} already. Choose another name with `out`.")
        if names is not None and there:
            claimed = read_json(target / CLAIM).get("names")  # what a job that was killed may have sent
            _check_replaceable(target, {*names, CLAIM, *(map(str, claimed) if isinstance(claimed, list) else ())})
        if there and not force:
            raise WriteError(
                f"{target}: exists already. Pass `force=True` to replace it, or choose another name with `out`."
            )
    here = grows_at(target)
    free = shutil.disk_usage(here.parent).free + size_of_leftovers(here)
    if nbytes > free:
        raise WriteError(
            f"{target}: needs {nbytes:,} bytes on this machine first, and {here.parent} has {free:,} left. Set TMPDIR "
            "to a folder with room for it."
        )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@contextmanager
def _looking_at(target: Path) -> Iterator[None]:
    """Refuse a target that cannot even be looked at: a name too long, a loop of links, a zero byte, no rights."""
    try:
        yield
    except (ReadError, OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WriteError(f"{target}: cannot be a target ({reason}). Choose another name with `out`.") from error


@contextmanager
def named(option: str, where: str = "out") -> Iterator[None]:
    """Let errors name this option, where they would name another: `out`, or that of `where`."""
    try:
        yield
    except CkptError as error:
        raise type(error)(re.sub(rf"`{where}(?=[`=])", f"`{option}", str(error))) from error


def _check_replaceable(folder: Path, names: Iterable[str]) -> None:
    """Refuse to replace a folder that holds anything but what takes its place, or an older output of that kind."""
    if folder.is_dir():
        new = {*names}
        known = new.union(*(each.replaced(folder, new) for each in FORMATS))
        around = {parent.as_posix() for name in known for parent in PurePath(name).parents}
        waiting = [folder]
        while waiting:
            for child in sorted(waiting.pop().iterdir()):
                name = child.relative_to(folder).as_posix()
                if name in around and child.is_dir() and not child.is_symlink():
                    waiting.append(child)
                elif name not in known or not child.is_file():
                    raise WriteError(
                        f"{folder}: is a folder that also holds {name}, and a folder of shards would replace all of "
                        "it. Choose a new folder with `out`, or the name of a file in this one."
                    )
