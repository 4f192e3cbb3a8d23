"""Shapes of clusters are read, and refused with what would be right."""

from __future__ import annotations

import pytest

from orchestrator.errors import InputError
from orchestrator.planning import machine_of, read_shape
from orchestrator.planning.machines import ACCELERATORS, GIB


@pytest.mark.parametrize(
    ("text", "nodes", "devices", "name"),
    [
        ("H100-80GB", 1, 1, "H100-80GB"),
        ("h100", 1, 1, "H100-80GB"),
        ("8xA100-40GB", 1, 8, "A100-40GB"),
        ("4x8xH100-80GB", 4, 8, "H100-80GB"),
        ("2x1xRTX4090-24GB", 2, 1, "RTX4090-24GB"),
    ],
)
def test_shapes_name_nodes_devices_and_what_they_are(text: str, nodes: int, devices: int, name: str) -> None:
    found = read_shape(text)
    assert (found.nodes, found.devices, found.name, found.places) == (nodes, devices, name, nodes * devices)
    assert found.memory == int(name.rpartition("-")[2].removesuffix("GB")) * GIB
    assert found.is_gpu


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4x8xH10-80GB", "did you mean H100"),
        ("A100-60GB", "an A100 has 80GB or 40GB, not 60GB"),
        ("0x8xH100", "has no devices"),
        ("many", "known are T4"),
        ("", "is no shape such as 4x8xH100-80GB"),
    ],
)
def test_shapes_that_are_none_are_refused_with_what_would_be_right(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_shape(text)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_accelerator_can_be_named_as_it_is_shown(name: str) -> None:
    for size in ACCELERATORS[name].gigabytes:
        assert read_shape(f"{name}-{size}GB").name == f"{name}-{size}GB"


def test_a_cluster_is_what_its_nodes_have() -> None:
    gpus = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100-80G": 1.0}
    found = machine_of([gpus, gpus, {"CPU": 8.0}])
    assert (found.name, found.nodes, found.devices) == ("A100-80GB", 2, 8)
    found = machine_of([{"CPU": 4.0, "memory": 8e9}, {"CPU": 2.0, "memory": 6e9}])
    assert (found.nodes, found.devices, found.memory, found.is_gpu) == (2, 2, 6_000_000_000, False)


def test_a_cluster_of_several_kinds_is_refused() -> None:
    nodes = [{"GPU": 1.0, "accelerator_type:T4": 1.0}, {"GPU": 1.0, "accelerator_type:L4": 1.0}]
    with pytest.raises(InputError, match=r"are of 2 kinds \(L4, T4\)[\s\S]*--on"):
        machine_of(nodes)
