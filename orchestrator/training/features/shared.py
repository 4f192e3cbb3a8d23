"""Stored features beside the runs of an object store: what one machine has computed, others bring."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable

from orchestrator.data.feature_store import LAYOUT, VALUES, FeatureStore
from orchestrator.storage import RemoteFolder

WHOLE = "WHOLE"
"""Written last; the size of each file."""
FILES = (VALUES, LAYOUT)


class SharedFeatures:
    """
    Args:
        store: this machine's.
        remote: where all machines find them.
        brings: whether this worker does so for its node.
        sends: whether this worker does so for all.
        agree: waits for all workers.
    """

    def __init__(
        self,
        store: FeatureStore,
        remote: RemoteFolder,
        brings: bool,
        sends: bool,
        agree: Callable[[str | None], str | None],
    ) -> None:
        self.store = store
        self.remote = remote
        self.brings = brings
        self.sends = sends
        self.agree = agree

    def download(self, keys: Iterable[str]) -> None:
        """Download entries that are complete in the object store. All workers call this. Failed ones are computed."""
        for key in keys:
            if self.brings and self.store.open(key) is None:
                with contextlib.suppress(OSError):
                    self._bring(key)
        self.agree(None)

    def upload(self, keys: Iterable[str]) -> None:
        """Upload entries that are complete here. If that fails, other machines compute them too."""
        for key in keys:
            if self.sends and self.store.open(key) is not None:
                with contextlib.suppress(OSError):
                    self._send(key)

    def _bring(self, key: str) -> None:
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

    def _send(self, key: str) -> None:
        if self.remote.read(f"{key}/{WHOLE}") is not None:
            return
        folder = self.store.folder / key
        for name in FILES:
            self.remote.upload(folder / name, f"{key}/{name}")
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        self.remote.write(f"{key}/{WHOLE}", json.dumps(sizes).encode())
