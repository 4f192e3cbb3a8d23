"""The image for clusters: what can be checked of it where no image can be built."""

from __future__ import annotations

import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from orchestrator import load_recipe

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = ("cluster", "quant", "scores")
LOCKS = sorted(CLUSTER.glob("*.lock"))
PINNED = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.]*) \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def locked(name: str) -> dict[str, str]:
    """Version by package; raises AssertionError for a line that is neither a package nor a hash of the one above."""
    versions: dict[str, str] = {}
    hashes: dict[str, int] = {}
    package = ""
    for line in (CLUSTER / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if found := PINNED.fullmatch(line):
            package = found[1]
            assert package not in versions, f"{package} is there twice"
            versions[package], hashes[package] = found[2], 0
        else:
            assert HASH.fullmatch(line), f"{line!r} is neither a package of the index nor a hash"
            hashes[package] += 1
    assert all(hashes.values()), [package for package, count in hashes.items() if not count]
    return versions


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, each with its continued lines."""
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if line and not line.startswith("#")).replace("\\\n", " ")
    pairs = (line.split(maxsplit=1) for line in text.splitlines())
    return [(instruction, " ".join(rest.split())) for instruction, rest in pairs]


def said(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def assert_holds(versions: dict[str, str], requirements: list[str]) -> None:
    for requirement in map(Requirement, requirements):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not locked"
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


def test_what_the_project_needs_on_a_cluster_is_locked_within_its_bounds() -> None:
    project = PROJECT["project"]
    extras = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    assert_holds(locked("requirements.lock"), [*project["dependencies"], *extras])


def test_what_the_image_is_built_with_is_locked() -> None:
    assert_holds(locked("build.lock"), [*PROJECT["build-system"]["requires"], "setuptools"])


def test_pytorch_is_locked_with_cuda() -> None:
    """Its build for CPUs has `+cpu` behind its version, and nothing of NVIDIA's beside it."""
    versions = locked("requirements.lock")
    assert {"triton", "nvidia-cublas", "nvidia-nccl-cu13"} <= set(versions)


def made_by(path: Path) -> str:
    """The command that a lock says it was made with."""
    return path.read_text(encoding="utf-8").splitlines()[1].removeprefix("#").strip()


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_was_made_as_the_readme_says_for_the_python_of_the_image(path: Path) -> None:
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    assert made_by(path) in re.sub(r"\\\n *", "", readme)
    words = shlex.split(made_by(path))
    assert words[words.index("-o") + 1] == f"cluster/{path.name}"
    (base,) = (rest.split()[0] for rest in said("FROM") if rest.endswith(" AS base"))
    version = words[words.index("--python-version") + 1]
    assert base.startswith(f"python:{version}.")
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version)


def test_the_extras_of_the_lock_are_those_of_its_command() -> None:
    words = shlex.split(made_by(CLUSTER / "requirements.lock"))
    assert tuple(after for word, after in pairwise(words) if word == "--extra") == EXTRAS


def test_every_image_that_is_built_upon_has_a_whole_version() -> None:
    stages: set[str] = set()
    for image, *name in (rest.split() for rest in said("FROM")):
        assert image in stages or re.search(r":\d+\.\d+\.\d+", image), f"{image} may change from day to day"
        stages.update(name[1:])


def test_only_what_is_locked_is_installed() -> None:
    installs = [
        shlex.split(command)
        for rest in said("RUN")
        for command in rest.split("&&")
        if "install" in command and "apt-get" not in command
    ]
    assert installs
    for words in installs:
        assert "--no-deps" in words
        # What is built may not fetch what it is built with.
        assert "--no-build-isolation" in words or words[words.index("--only-binary") + 1] == ":all:"
        if "." in words:
            assert "--no-index" in words
        else:
            assert "--require-hashes" in words
            assert (CLUSTER / words[words.index("--requirement") + 1]) in LOCKS
    named = {words[words.index("--requirement") + 1] for words in installs if "--requirement" in words}
    assert named == {path.name for path in LOCKS}


def test_it_runs_as_nobody_in_particular() -> None:
    last = max(index for index, (name, _) in enumerate(instructions()) if name == "FROM")
    users = [rest for name, rest in instructions()[last:] if name == "USER"]
    # By number, which Kubernetes needs to see that it is not root.
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])


def test_nothing_of_a_checkout_comes_near_it_but_the_package() -> None:
    """Neither runs, nor data, nor a file with a token that somebody left there."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    rules = [rule for rule in ignored if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    let_in = {path for rule in rules if rule.startswith("!") for path in ROOT.glob(rule[1:])}
    copied = {ROOT / source for rest in said("COPY") if not rest.startswith("--from=") for source in rest.split()[:-1]}
    assert copied == let_in
    assert not said("ADD")
    assert not re.search(r"(?i)token|secret|password", "\n".join(" ".join(pair) for pair in instructions()))


def test_a_job_of_kubernetes_has_the_cluster_that_is_described_and_fits_on_it() -> None:
    job = yaml.safe_load((CLUSTER / "kuberay" / "job.yaml").read_text(encoding="utf-8"))
    cluster = yaml.safe_load((CLUSTER / "kuberay" / "cluster.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    assert spec == cluster["spec"]
    words = shlex.split(job["spec"]["entrypoint"])
    assert shlex.join(words) == job["spec"]["entrypoint"], "KubeRay hands it to a shell as it is"
    program, verb, name, *overrides = words
    assert (program, verb) == ("orchestrator", "train")
    assert program in PROJECT["project"]["scripts"]
    recipe = load_recipe(name, overrides)
    (group,) = spec["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    # From the start: a run is refused that the nodes which are there cannot hold.
    assert recipe.scale.workers == group["minReplicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    shared = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared")
    assert Path(recipe.scale.storage).is_relative_to(shared)


@pytest.mark.parametrize("name", ["cluster.yaml", "job.yaml"])
def test_kubernetes_runs_the_image_that_is_described(name: str) -> None:
    spec = yaml.safe_load((CLUSTER / "kuberay" / name).read_text(encoding="utf-8"))["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert spec["rayVersion"] == locked("requirements.lock")["ray"]
    user, group = map(int, said("USER")[-1].split(":"))
    wanted = {"runAsNonRoot": True, "runAsUser": user, "runAsGroup": group, "fsGroup": group}
    pods = [each["template"]["spec"] for each in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert [pod["securityContext"] for pod in pods] == [wanted] * 2
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert images == {"IMAGE"}, "what the README has replaced"
