"""Folders in object stores, by URL: `s3://`, `gs://`, `abfs://`, through Arrow's file systems.

Credentials are found as the tools of each provider find them (environment, files, the machine's role).
AWS_ENDPOINT_URL sets the address of another S3 server.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, Problem

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
SECONDS_OF_PATIENCE = 30
CREDENTIALS = ("AWS_", "GOOGLE_", "AZURE_")
"""Prefixes of the environment variables that the providers' libraries read."""


def is_url(text: str) -> bool:
    """Whether a text is the URL of a folder in an object store."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def holds_secrets(url: str) -> bool:
    """Whether a URL contains a key, which would be stored and shown wherever the URL is."""
    user, found, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    return bool(found) and user != "anonymous" and (":" in user or not url.startswith("abfs"))


def join(place: str, name: str) -> str:
    """Return the path or URL of a name in a folder; what follows a `?` in a URL stays at its end."""
    base, mark, query = place.partition("?") if is_url(place) else (place, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def split(place: str) -> tuple[str, str]:
    """Return the folder of a path or URL, and the name in it."""
    base, mark, query = place.partition("?") if is_url(place) else (place, "", "")
    folder, _, name = base.rstrip("/").rpartition("/")
    return f"{folder}{mark}{query}", name


def _with_patience(url: str) -> str:
    """Limit how long Google's library tries to reach a store, by default a quarter of an hour."""
    if not url.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}retry_limit_seconds={SECONDS_OF_PATIENCE}"


def credentials(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables that give access to an object store; secrets, never to be shown."""
    return {name: value for name, value in environment.items() if name.startswith(CREDENTIALS)}


class RemoteFolder:
    """A folder of an object store. Objects are written and replaced atomically.

    Every method raises OSError if the store cannot be reached, or refuses.
    """

    def __init__(self, url: str) -> None:
        """
        Raises:
            InputError: the URL is not valid.
        """
        from pyarrow import ArrowInvalid, fs

        self.url = url
        try:
            self._files, path = fs.FileSystem.from_uri(_with_patience(url))
        except (ArrowInvalid, ValueError, NotImplementedError) as error:
            remedy = (
                "write s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER"
            )
            raise InputError(Problem(f"{url!r} is not the URL of a folder: {error}", remedy=remedy)) from error
        self._path = str(path).rstrip("/")

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(join(self.url, name))

    def names(self, folder: str = "") -> dict[str, int]:
        """Return the files in a folder and below by their path in it, with sizes in bytes; {} if it is missing."""
        from pyarrow import fs

        base = self._at(folder)
        found = self._files.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        return {info.path[len(base) + 1 :]: info.size for info in found if info.type == fs.FileType.File}

    def folders(self, folder: str = "") -> list[str]:
        """Return the names of the folders in a folder."""
        return sorted({name.partition("/")[0] for name in self.names(folder) if "/" in name})

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None if it does not exist."""
        try:
            with self._files.open_input_stream(self._at(name)) as file:
                data: bytes = file.read()
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, data: bytes) -> None:
        with self._files.open_output_stream(self._at(name)) as file:
            file.write(data)

    def upload(self, source: Path, name: str = "") -> None:
        """Upload a file, or all files of a folder, several at a time; nothing if the source does not exist."""
        if source.exists():
            self._copy(str(source), self._at(name), up=True)

    def download(self, name: str, target: Path) -> bool:
        """Download a file or a folder; return False if it does not exist."""
        from pyarrow import fs

        kind = self._files.get_file_info(self._at(name)).type
        if kind == fs.FileType.NotFound:
            return False
        if kind == fs.FileType.Directory:
            target.mkdir(parents=True, exist_ok=True)
            self._copy(self._at(name), str(target), up=False)
            return True
        partial = target.with_name(f".{target.name}.{os.getpid()}.download")
        try:
            self._copy(self._at(name), str(partial), up=False)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def delete(self, name: str, first: Sequence[str] = ()) -> None:
        """Delete a file, or a folder with its content, if it exists.

        Args:
            first: files of the folder to delete before all others.
        """
        from pyarrow import fs

        for each in first:
            self._delete_file(f"{self._at(name)}/{each}")
        if self._files.get_file_info(self._at(name)).type == fs.FileType.Directory:
            with contextlib.suppress(FileNotFoundError):  # Not every store has objects for folders.
                self._files.delete_dir(self._at(name))
        self._delete_file(self._at(name))

    def move(self, target: RemoteFolder) -> None:
        """Move all files to another folder of the same store."""
        for name in self.names():
            self._files.copy_file(self._at(name), target._at(name))
        self.delete("")

    def _delete_file(self, path: str) -> None:
        from pyarrow import fs

        if self._files.get_file_info(path).type == fs.FileType.File:
            self._files.delete_file(path)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _copy(self, source: str, target: str, up: bool) -> None:
        from pyarrow import fs

        here: Any = fs.LocalFileSystem()
        files = (here, self._files) if up else (self._files, here)
        fs.copy_files(source, target, source_filesystem=files[0], destination_filesystem=files[1])
