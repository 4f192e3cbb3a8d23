"""Shapes of clusters are read, and refused with what would be right."""

from __future__ import annotations

import pytest

from orchestrator.errors import InputError
from orchestrator.planning import machine_from_nodes, parse_machine
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
    found = parse_machine(text)
    assert (found.nodes, found.devices, found.name, found.places) == (nodes, devices, name, nodes * devices)
    assert found.is_gpu


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("T4", 14.5, 15.0),
        ("V100-16GB", 15.7, 16.0),
        ("A10G", 21.9, 22.5),
        ("L4", 21.9, 22.5),
        ("L40S", 44.3, 45.0),
        ("A100-40GB", 39.3, 40.0),
        ("H100", 79.0, 79.65),
        ("H200", 139.7, 140.4),
        ("B200", 178.0, 179.1),
    ],
)
def test_devices_have_the_memory_that_pytorch_finds(name: str, least: float, most: float) -> None:
    """`most` is what `nvidia-smi` tells."""
    assert least <= parse_machine(name).memory / GIB <= most


@pytest.mark.parametrize("name", ACCELERATORS)
def test_no_device_has_all_the_memory_that_it_is_sold_with(name: str) -> None:
    assert all(0.9 * size < found < size for size, found in ACCELERATORS[name].memory.items())


def test_products_in_fp32_have_a_rate_of_their_own() -> None:
    found = parse_machine("A100")
    assert (found.rate_in("bf16"), found.rate_in("fp32")) == (312e12, 19.5e12)
    assert all(each.teraflops_fp32 < each.teraflops for each in ACCELERATORS.values())


@pytest.mark.parametrize(("kind", "name"), [("A100", "A100-40GB"), ("V100", "V100-16GB"), ("A100-80G", "A100-80GB")])
def test_of_a_size_that_the_cluster_does_not_tell_the_smallest_is_planned_with(kind: str, name: str) -> None:
    assert machine_from_nodes([{"CPU": 8.0, "GPU": 1.0, f"accelerator_type:{kind}": 1.0}]).name == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4x8xH10-80GB", "did you mean H100"),
        ("A100-60GB", "an A100 has 80GB or 40GB, not 60GB"),
        ("0x8xH100", "has no devices"),
        ("many", "use one of: T4"),
        ("", "is not a shape such as 4x8xH100-80GB"),
    ],
)
def test_shapes_that_are_none_are_refused_with_what_would_be_right(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_machine(text)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_accelerator_can_be_named_as_it_is_shown(name: str) -> None:
    for size in ACCELERATORS[name].memory:
        assert parse_machine(f"{name}-{size}GB").name == f"{name}-{size}GB"


def test_a_cluster_is_what_its_nodes_have() -> None:
    gpus = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100-80G": 1.0}
    found = machine_from_nodes([gpus, gpus, {"CPU": 8.0}])
    assert (found.name, found.nodes, found.devices) == ("A100-80GB", 2, 8)
    found = machine_from_nodes([{"CPU": 4.0, "memory": 8e9}, {"CPU": 2.0, "memory": 6e9}])
    assert (found.nodes, found.devices, found.memory, found.is_gpu) == (2, 2, 6_000_000_000, False)


def test_a_cluster_of_several_kinds_is_refused() -> None:
    nodes = [{"GPU": 1.0, "accelerator_type:T4": 1.0}, {"GPU": 1.0, "accelerator_type:L4": 1.0}]
    with pytest.raises(InputError, match=r"are of 2 kinds \(L4, T4\)[\s\S]*--on"):
        machine_from_nodes(nodes)
