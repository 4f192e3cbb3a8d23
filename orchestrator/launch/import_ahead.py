"""Import the modules of a training while Ray Train still sets up a worker. Ray imports this module first."""

import importlib
import threading

MODULES = (
    # None of Ray's own: the worker imports those at the same time, and would find them half initialized.
    "torch.nn.parallel",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "accelerate",
    "orchestrator.training.worker",
)
_THREAD = "import-ahead"


def start() -> None:
    """Start the imports in a thread; code that needs one of the modules waits for it, as for any import."""
    threading.Thread(target=_import_all, name=_THREAD, daemon=True).start()


def wait() -> None:
    """Wait until all modules are imported, if the imports were started."""
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join()


def _import_all() -> None:
    for name in MODULES:
        importlib.import_module(name)
