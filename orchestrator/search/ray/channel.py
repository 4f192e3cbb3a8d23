"""The channel between a trial's process and its worker group: a small Ray actor that holds the newest messages.

Both sides wait in the actor (an asyncio condition), so a message arrives within a millisecond or two and nobody polls.
The trial's process creates the actor and kills it when the workers have exited; should that process die, Ray ends the
actor with its owner. The actor reserves no resources and runs on the node of its owner, where it dies with it and with
no other node.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.search.workers.messages import ChannelClosed, Command, Status

ANSWER_TIMEOUT_S = 60.0
"""Longest time for the actor to answer, in addition to the time that it is asked to wait for a message."""
T = TypeVar("T")


class Latest(Generic[T]):
    """The newest message of one kind."""

    def __init__(self, value: T) -> None:
        self.value = value
        self.version = 0
        self._changed = asyncio.Condition()

    async def set(self, value: T) -> None:
        async with self._changed:
            self.value = value
            self.version += 1
            self._changed.notify_all()

    async def next(self, version: int, timeout: float) -> tuple[int, T]:
        """Return the version and the value, once the version is above `version` or after `timeout` seconds."""
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self.version > version), timeout)
            return self.version, self.value


class ChannelActor:
    """Holds the newest command and status, and the failures that workers have recorded."""

    def __init__(self) -> None:
        self.command = Latest(Command())
        self.status = Latest(Status())
        self.failures: dict[int, str] = {}

    async def send_command(self, command: Command) -> None:
        await self.command.set(command)

    async def send_status(self, status: Status) -> None:
        await self.status.set(status)

    async def next_command(self, version: int, timeout: float) -> tuple[int, Command]:
        return await self.command.next(version, timeout)

    async def next_status(self, version: int, timeout: float) -> tuple[int, Status]:
        return await self.status.next(version, timeout)

    async def record_failure(self, number: int, reason: str) -> None:
        self.failures.setdefault(number, reason)

    async def failure_of(self, number: int) -> str | None:
        return self.failures.get(number)


class RayChannel:
    """A handle of the actor with the interface of `messages.Channel`; it can be pickled."""

    def __init__(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        # Not in the placement group of the trial's actor, which Ray would use otherwise.
        strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        self._actor = ray.remote(num_cpus=0)(ChannelActor).options(scheduling_strategy=strategy).remote()

    def send_command(self, command: Command) -> None:
        self._call("send_command", command)

    def send_status(self, status: Status) -> None:
        self._call("send_status", status)

    def next_command(self, version: int, timeout: float) -> tuple[int, Command]:
        found: tuple[int, Command] = self._call("next_command", version, timeout, wait=timeout)
        return found

    def next_status(self, version: int, timeout: float) -> tuple[int, Status]:
        found: tuple[int, Status] = self._call("next_status", version, timeout, wait=timeout)
        return found

    def record_failure(self, number: int, reason: str) -> None:
        self._call("record_failure", number, reason)

    def failure_of(self, number: int) -> str | None:
        found: str | None = self._call("failure_of", number)
        return found

    def close(self) -> None:
        ray.kill(self._actor)

    def _call(self, method: str, *arguments: Any, wait: float = 0.0) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=wait + ANSWER_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            raise ChannelClosed(f"the process died that a trial and its workers talk through ({error})") from error
