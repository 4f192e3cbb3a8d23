"""How tests speak with the cluster of their fixture."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

TOKEN = "a-token-that-is-long-enough-for-ray-to-take"
Ask = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs a command: the verb, its arguments, code to run `before`, environment variables."""
