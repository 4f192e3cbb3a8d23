"""Stored features in the object store of the runs: other machines download what one has computed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable

from orchestrator.data.feature_store import LAYOUT, VALUES, FeatureStore
from orchestrator.storage import RemoteFolder

WHOLE = "WHOLE"
"""The file that is written last; it holds the size of each other file."""
FILES = (VALUES, LAYOUT)


class SharedFeatures:
    """The features that all machines share.

    Args:
        store: the store of this machine.
        remote: the folder for all machines.
        downloads: whether this worker downloads for its node.
        uploads: whether this worker uploads for all workers.
        agree: waits for all workers.
    """

    def __init__(
        self,
        store: FeatureStore,
        remote: RemoteFolder,
        downloads: bool,
        uploads: bool,
        agree: Callable[[str | None], str | None],
    ) -> None:
        self.store = store
        self.remote = remote
        self.downloads = downloads
        self.uploads = uploads
        self.agree = agree

    def download(self, keys: Iterable[str]) -> None:
        """Download entries that are complete in the object store. All workers call this. Failed ones are computed."""
        for key in keys:
            if self.downloads and self.store.open(key) is None:
                with contextlib.suppress(OSError):
                    self._download(key)
        self.agree(None)

    def upload(self, keys: Iterable[str]) -> None:
        """Upload entries that are complete here. If that fails, other machines compute them too."""
        for key in keys:
            if self.uploads and self.store.open(key) is not None:
                with contextlib.suppress(OSError):
                    self._upload(key)

    def _download(self, key: str) -> None:
        mark = self.remote.read(f"{key}/{WHOLE}")
        if mark is None:
            return
        sizes: dict[str, int] = json.loads(mark)
        if self.store.make_room(sum(sizes.values())) is not None:
            return
        partial = self.store.folder / f".{key}.{os.getpid()}.download"
        try:
            partial.mkdir(mode=0o700)
            for name in FILES:
                self.remote.download(f"{key}/{name}", partial / name)
            if sizes == {name: (partial / name).stat().st_size for name in FILES}:
                self.store.adopt(key, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _upload(self, key: str) -> None:
        if self.remote.read(f"{key}/{WHOLE}") is not None:
            return
        folder = self.store.folder / key
        for name in FILES:
            self.remote.upload(folder / name, f"{key}/{name}")
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        self.remote.write(f"{key}/{WHOLE}", json.dumps(sizes).encode())
