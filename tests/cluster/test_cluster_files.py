"""The files for clusters: what can be checked of them without the clouds that they are for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

CLUSTER = Path(__file__).parent.parent.parent / "cluster"
SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
LAUNCHED = sorted(path for path in CLUSTER.glob("*.yaml"))
WriteRecipe = Callable[..., Path]


def test_every_file_is_told_of_with_how_it_was_checked() -> None:
    text = (CLUSTER / "README.md").read_text(encoding="utf-8")
    for path in CLUSTER.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in text, path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_read_and_tell_how_they_are_used(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    told = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert path.name in told.stderr
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_files_for_the_launcher_fit_its_schema(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(config, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert config["head_node_type"] in config["available_node_types"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    # Reached through a tunnel alone.
    assert "--dashboard-host=127.0.0.1" in "".join(starts)


OLDEST_DRIVER = {"12": 525, "13": 580}
"""Of NVIDIA for Linux, by the CUDA that PyTorch was built for (CUDA's release notes, "minor version compatibility")."""


def test_images_of_machines_have_a_driver_that_suits_the_locked_torch() -> None:
    lock = (CLUSTER / "requirements.lock").read_text(encoding="utf-8")
    cuda = re.search(r"^nvidia-cuda-runtime(?:-cu\d+)?==(\d+)\.", lock, re.MULTILINE)
    assert cuda is not None
    oldest = OLDEST_DRIVER[cuda[1]]
    gcp, aws = (
        [node["node_config"] for node in yaml.safe_load((CLUSTER / name).read_text())["available_node_types"].values()]
        for name in ("gcp.yaml", "aws.yaml")
    )
    images = [node["disks"][0]["initializeParams"]["sourceImage"] for node in gcp]
    assert all(int(image.rpartition("-nvidia-")[2]) >= oldest for image in images)
    # Amazon numbers its images, so the user looks up the latest one. What Ray takes by itself is years old.
    assert {node["ImageId"] for node in aws} == {"IMAGE"}
    for name in ("aws.yaml", "Dockerfile", "kuberay/cluster.yaml"):
        assert f"{oldest} or newer" in (CLUSTER / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("name", ["cluster.yaml", "job.yaml"])
def test_what_kubernetes_is_given_holds_together(name: str) -> None:
    claim, described, given = (
        yaml.safe_load((CLUSTER / "kuberay" / each).read_text(encoding="utf-8"))
        for each in ("volume.yaml", "cluster.yaml", name)
    )
    assert (described["apiVersion"], described["kind"]) == ("ray.io/v1", "RayCluster")
    spec = given["spec"].get("rayClusterSpec", given["spec"])
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        # KubeRay leaves alone what a container says of it: then its autoscaler would have another token, or none.
        assert not [each for each in container.get("env", []) if each["name"].startswith("RAY_AUTH")]


def test_kubernetes_clusters_want_the_token_of_a_secret_that_the_user_is_told_to_make() -> None:
    text = (CLUSTER / "kuberay" / "cluster.yaml").read_text(encoding="utf-8")
    options = yaml.safe_load(text)["spec"]["authOptions"]
    assert options["mode"] == "token"
    # The key is KubeRay's to name.
    assert f"create secret generic {options['secretName']} --from-literal=auth_token=" in text
    assert f"get secret {options['secretName']} -o jsonpath='{{.data.auth_token}}'" in text


SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do
  if [[ "$1" == --nodelist=* ]]; then echo "${1#--nodelist=}" >> "$SRUN_LOG"; fi
  shift
done
exec "$@"
"""
SCONTROL = "#!/usr/bin/env bash\nprintf 'node-a\\nnode-b\\n'\n"
HOSTNAME = "#!/usr/bin/env bash\necho 127.0.0.1\n"


@pytest.mark.slow
def test_a_job_of_slurm_trains_on_all_its_nodes(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands, which start both nodes on this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME}.items():
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    own = Path(sys.executable).parent
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{commands}{os.pathsep}{own}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "4711",
        "SLURM_CPUS_ON_NODE": "1",
        "SRUN_LOG": str(tmp_path / "log"),
    }
    recipe = write_recipe(train={"epochs": 1}, scale={"workers": 2, "cpus_per_worker": 1})
    output = tmp_path / "run"
    command = ["bash", str(CLUSTER / "slurm.sh"), "train", str(recipe), "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "run.json").read_text())["world_size"] == 2
    # The first node is asked for its address, then each runs a part of the cluster.
    assert sorted((tmp_path / "log").read_text().split()) == ["node-a", "node-a", "node-b"]


def test_scripts_pass_shellcheck() -> None:
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", *SCRIPTS], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()
