"""Import what training needs while a Ray Train worker is still being set up. Itself light: Ray calls it first."""

import importlib
import threading

MODULES = (
    # Nothing of Ray's own: the worker is importing that at the same time, and looks at it half done.
    "torch.nn.parallel",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "accelerate",
    "orchestrator.training.worker",
)
_THREAD = "import-ahead"


def start() -> None:
    """Begin the imports in the background; whoever needs one of the modules waits for it as for any import."""
    threading.Thread(target=_import_all, name=_THREAD, daemon=True).start()


def wait() -> None:
    """Wait until all are imported, where they are being imported."""
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join()


def _import_all() -> None:
    for name in MODULES:
        importlib.import_module(name)
