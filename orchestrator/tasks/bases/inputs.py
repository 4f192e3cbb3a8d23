"""The half of a task that reads its inputs, for bases that add targets to inputs of any kind."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import pyarrow as pa

from orchestrator.data.cache import Built
from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.tasks.base import Encoded, Task


class InputTask(Task):
    """A task that encodes its inputs apart from its targets."""

    noun: ClassVar[str]
    """A word for an example, for messages."""

    @classmethod
    @abstractmethod
    def input_columns(cls, options: Any) -> tuple[Column, ...]:
        """Return the columns of the inputs."""

    @abstractmethod
    def encode_inputs(self, examples: Examples, processor: Any) -> Built:
        """Return the inputs in numbers, as a table; a pure function, so that it can be cached by content."""

    @abstractmethod
    def input_cache_parts(self, processor: Any) -> list[Any]:
        """Return whatever `encode_inputs` depends on besides the examples, as JSON-able values."""

    @abstractmethod
    def wrap_inputs(self, table: pa.Table, processor: Any) -> Encoded:
        """Return the columns of `encode_inputs`, ready to be batched; batches have no targets."""

    @abstractmethod
    def longest_inputs(self, number: int, processor: Any) -> pa.Table:
        """Return `encode_inputs` of this number of made-up examples, as large as the options allow."""

    @abstractmethod
    def show_inputs(self, encoded: Encoded, row: int, processor: Any) -> str:
        """Return an encoded example as the model reads it, in words for people."""
