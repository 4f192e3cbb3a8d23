"""What the machine has, and what is missing with the command that installs it."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from orchestrator.cli import doctor
from orchestrator.cli.doctor import Finding, examine


def by_name() -> dict[str, Finding]:
    found = examine()
    names = [finding.name for finding in found]
    assert len(names) == len(set(names))
    return dict(zip(names, found, strict=True))


def test_versions_cores_and_memory_are_those_of_this_machine() -> None:
    found = by_name()
    for package in doctor.PACKAGES:
        assert found[package] == Finding(package, version(package))
    assert int(found["cores"].value) >= 1
    assert float(found["memory"].value.split()[0]) == pytest.approx(psutil.virtual_memory().total / 1e9, abs=0.1)


def test_a_missing_package_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(package: str) -> str:
        if package in ("peft", "sacrebleu"):
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(doctor, "version", lacks)
    found = by_name()
    assert found["peft"] == Finding("peft", "missing", "pip install peft")
    assert found["extra scores"].remedy == 'pip install "transfer-orchestrator[scores]"'
    assert found["torch"].remedy is None


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    compiler = by_name()["DeepSpeed's compiler"]
    assert compiler.value.startswith("none")
    assert "g++" in str(compiler.remedy)


def test_gpus_are_listed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Card", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = by_name()
    assert found["GPU 0"].value == found["GPU 1"].value == "Card, 85.9 GB"
    assert "GPU" not in found


def test_a_gpu_that_pytorch_cannot_use_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old. Please update it.")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    found = by_name()["GPU"]
    assert found.value == "2, which PyTorch cannot use: The NVIDIA driver on your system is too old"
    assert "install a driver for that" in str(found.remedy)


def test_a_gpu_that_this_build_of_pytorch_knows_nothing_of_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "NVIDIA_DEVICE", tmp_path)
    assert by_name()["GPU"].value == "one, but this PyTorch is built without CUDA; trains on the CPU"
    monkeypatch.setattr(doctor, "NVIDIA_DEVICE", tmp_path / "none")
    assert by_name()["GPU"] == Finding("GPU", "none; trains on the CPU")


def test_the_cluster_named_by_the_environment_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert by_name()["Ray cluster"].value == "10.0.0.1:6379"
    monkeypatch.delenv("RAY_ADDRESS")
    assert "RAY_ADDRESS is not set" in by_name()["Ray cluster"].value


def test_a_disk_that_is_nearly_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    disk = by_name()["disk here"]
    assert disk.value == "1.07 GB free"
    assert disk.remedy is not None


def test_every_extra_is_one_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys()
