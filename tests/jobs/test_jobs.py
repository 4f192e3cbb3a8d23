"""A recipe goes to a cluster, is followed, stopped and fetched; what cannot go is refused in a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ask import TOKEN, Ask
from transformers import AutoModelForSequenceClassification

import orchestrator
from orchestrator.errors import ClusterError, InputError
from orchestrator.jobs import Cluster, connect
from orchestrator.jobs.client import check_address
from orchestrator.jobs.fetch import BEGIN, receive, send
from orchestrator.jobs.on_cluster import refuse_differences
from orchestrator.jobs.submit import run_directory
from orchestrator.jobs.upload import ENVIRONMENT_FILE, pack

pytestmark = pytest.mark.xdist_group("ray")
WriteRecipe = Callable[..., Path]
CANARY = "hush-this-is-a-canary"
FAR = "from orchestrator.jobs import Cluster; Cluster.is_here = False"
MODEL_FILES = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture
def recipe(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    return write_recipe(train={"epochs": 1}, scale={"storage": str(tmp_path / "shared")})


def listed(ask: Ask) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(ask("jobs", "--json").stdout)["jobs"]
    return found


def test_a_job_is_followed_and_its_model_fetched(recipe: Path, address: str, ask: Ask, tmp_path: Path) -> None:
    told = ask("submit", str(recipe), "--env", "SOME_SECRET", "--follow", SOME_SECRET=CANARY)
    assert told.returncode == 0, told.stderr
    assert "accuracy" in told.stdout
    job = listed(ask)[0]
    assert (job["status"], job["verb"], job["exit_code"]) == ("succeeded", "train", 0)
    assert f"orchestrator fetch {job['id']}" in told.stderr
    # The secret is nowhere that others could look.
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request) as answer:
        details = answer.read().decode()
    assert job["id"] in details
    assert CANARY not in told.stdout + told.stderr + details + ask("logs", job["id"]).stdout
    here, received = tmp_path / "here", tmp_path / "received"
    assert ask("fetch", job["id"], "--output", str(here)).returncode == 0
    assert {path.name for path in (here / "model").iterdir()} >= MODEL_FILES
    AutoModelForSequenceClassification.from_pretrained(here / "model")
    assert not (here / "checkpoints").exists()
    # To another machine the same comes through the log of a job.
    assert ask("fetch", job["id"], "--output", str(received), before=FAR).returncode == 0
    assert {path.name for path in received.iterdir()} == {path.name for path in here.iterdir()}
    weights = "model/model.safetensors"
    assert (received / weights).read_bytes() == (here / weights).read_bytes()


def test_a_job_is_stopped_and_its_next_attempt_has_the_same_directory(
    write_recipe: WriteRecipe, ask: Ask, tmp_path: Path
) -> None:
    long = str(write_recipe(train={"epochs": 100_000}, scale={"storage": str(tmp_path / "shared")}))

    def send() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(ask("submit", long, "--json").stdout)
        return found

    first = send()
    assert send()["id"] == first["id"]
    assert first["id"] in ask("status", first["id"]).stdout
    until = time.monotonic() + 120
    while not (Path(first["directory"]) / "run.json").exists():
        assert time.monotonic() < until, ask("logs", first["id"]).stdout
        time.sleep(0.2)
    assert ask("stop", first["id"]).returncode == 0
    assert next(job["status"] for job in listed(ask) if job["id"] == first["id"]) == "stopped"
    assert json.loads((Path(first["directory"]) / "run.json").read_text())["status"] == "interrupted"
    # What is sent for a fetch is no attempt, and nobody needs to see it.
    assert ask("fetch", first["id"], "--output", str(tmp_path / "far"), before=FAR).returncode == 0
    assert [job["id"] for job in listed(ask) if job["id"].startswith(first["id"])] == [first["id"]]
    second = send()
    assert second["id"] == f"{first['id']}-2"
    assert second["directory"] == first["directory"]
    assert json.loads(ask("stop", second["id"], "--json").stdout)["status"] == "stopped"


def test_a_failed_job_gives_its_exit_code(write_recipe: WriteRecipe, ask: Ask, tmp_path: Path) -> None:
    wrong = write_recipe(transfer={"freeze": 7}, scale={"storage": str(tmp_path / "shared")})
    told = ask("submit", str(wrong), "--follow")
    assert told.returncode == 2
    assert "freeze" in told.stdout


def test_a_cluster_that_cannot_be_used_is_told_in_a_sentence(recipe: Path, ask: Ask) -> None:
    wrong = ask("submit", str(recipe), RAY_AUTH_TOKEN="another-token-that-is-long-enough-for-ray")
    assert wrong.returncode == 3
    assert "refuses the token\n    -> set RAY_AUTH_MODE=token" in wrong.stderr
    without = ask("submit", str(recipe), RAY_AUTH_MODE="disabled")
    assert without.returncode == 3
    assert "needs a token" in without.stderr
    with pytest.raises(ClusterError, match=r"nothing answers at http://127\.0\.0\.1:1"):
        connect("http://127.0.0.1:1")


def test_a_cluster_that_is_too_small_is_told_with_what_it_has(write_recipe: WriteRecipe, ask: Ask) -> None:
    large = write_recipe(train={"global_batch_size": 8}, scale={"workers": 4, "gpus_per_worker": 1})
    told = ask("submit", str(large))
    assert told.returncode == 3
    what = "4 workers with 1 CPU and 1 GPU each do not fit: the cluster has room for 0 (1 node: 2 CPU, 0 GPU)"
    assert what in told.stderr


FOLLOWING = """
import asyncio, sys
from orchestrator.cli.jobs import follow
from orchestrator.jobs import Cluster

class Client:
    async def tail_job_logs(self, job_id):
        yield "first words\\n"
        await asyncio.sleep(600)

follow(Cluster("http://127.0.0.1:8265", Client()), type("Job", (), {"id": "some-job"}), sys.stdout)
"""


def test_whoever_stops_following_leaves_the_job_running_and_is_told_so() -> None:
    command = [sys.executable, "-c", FOLLOWING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "first words\n"
        follower.send_signal(signal.SIGINT)
        _, told = follower.communicate(timeout=30)
    assert "the job goes on; see: orchestrator logs some-job --follow" in told
    assert follower.returncode != 0


def test_a_plan_asks_the_cluster_what_it_has(recipe: Path, ask: Ask) -> None:
    told = ask("plan", str(recipe))
    assert told.returncode == 0, told.stderr
    assert "1 machine with 2 places each (the cluster's CPUs)" in told.stdout


def test_an_unknown_job_is_told_with_those_there_are(ask: Ask) -> None:
    told = ask("logs", "none-such")
    assert told.returncode == 2
    assert "there is no job 'none-such'" in told.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("http://10.0.0.1:8265", "unencrypted"),
        ("10.0.0.1:8265", "unencrypted"),
        ("ray://10.0.0.1:10001", "is not the address of a Ray dashboard"),
        ("http://", "is not the address of a Ray dashboard"),
    ],
)
def test_an_address_that_is_not_safe_is_refused(given: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        connect(given)


@pytest.mark.parametrize(
    "given", ["http://localhost:8265", "http://127.0.0.1:8265", "https://ray.example.org", "http://[::1]:8265"]
)
def test_addresses_of_this_machine_and_encrypted_ones_are_taken(given: str) -> None:
    assert check_address(given, insecure=False) == given


def test_another_machine_is_taken_unencrypted_where_the_user_says_so() -> None:
    assert check_address("10.0.0.1:8265", insecure=True) == "http://10.0.0.1:8265"


@pytest.fixture
def dashboard() -> Iterator[Callable[[], SimpleNamespace]]:
    """Starts stand-ins for a cluster's dashboard, which keep the paths that they are asked for."""
    servers = []

    def start() -> SimpleNamespace:
        asked: list[str] = []

        class Dashboard(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path.partition("?")[0])
                listed = {"total": 0, "num_after_truncation": 0, "num_filtered": 0, "result": []}
                answers: dict[str, Any] = {
                    "version": {"ray_version": "2.60.0"},
                    "jobs/": [],
                    "nodes": {"result": True, "msg": "", "data": {"result": listed}},
                    "logs": {"logs": ""},
                    "stop": {"stopped": True},
                }
                body = next(json.dumps(value) for end, value in answers.items() if asked[-1].endswith(end)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return SimpleNamespace(address=f"http://127.0.0.1:{server.server_port}", asked=asked)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_cluster_that_is_named_is_asked_whatever_the_environment_says(
    variable: str, dashboard: Callable[[], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    named, other = dashboard(), dashboard()
    monkeypatch.setenv(variable, other.address)
    cluster = connect(named.address)
    assert cluster.jobs() == []
    assert not cluster.is_here
    cluster.stop("some-job")
    assert cluster.logs("some-job") == ""
    assert other.asked == []
    expected = {"/api/version", "/api/jobs/", "/api/v0/nodes", "/api/jobs/some-job/stop", "/api/jobs/some-job/logs"}
    assert set(named.asked) == expected
    assert os.environ[variable] == other.address


def test_without_an_address_the_one_of_the_environment_is_asked_and_told(
    dashboard: Callable[[], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dashboard()
    monkeypatch.setenv("RAY_ADDRESS", named.address)
    cluster = connect(None)
    assert cluster.address == named.address
    assert cluster.jobs() == []
    assert named.asked


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_an_address_of_the_environment_is_held_to_the_same(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://10.0.0.1:8265")
    with pytest.raises(InputError, match=f"{variable}.*unencrypted"):
        connect(None)


def test_local_files_travel_and_the_recipe_finds_them(
    write_recipe: WriteRecipe, small_data: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", CANARY)
    files = {split: str(small_data / f"{split}.jsonl") for split in ("train", "select", "test")}
    path = write_recipe(target={"task": "text-classification", "data": {**files, "train": f"{files['train']}#20"}})
    folder = tmp_path / "upload"
    folder.mkdir()
    upload = pack(orchestrator.load_recipe(path), folder, [], ["SOME_SECRET"])
    assert json.loads((folder / ENVIRONMENT_FILE).read_text()) == {"SOME_SECRET": CANARY}
    assert (folder / ENVIRONMENT_FILE).stat().st_mode & 0o077 == 0
    assert (folder / "orchestrator" / "cli" / "main.py").exists()
    sent = orchestrator.load_recipe(folder / "recipe.yaml")
    assert sent.target.data.train.startswith("./files/")  # type: ignore[union-attr]
    from orchestrator.training.prepare import prepare

    before, after = prepare(orchestrator.load_recipe(path)), prepare(sent)
    assert len(after.tables["train"]) == 20
    assert before.identity == after.identity
    again = tmp_path / "again"
    again.mkdir()
    assert pack(orchestrator.load_recipe(path), again, [], ["SOME_SECRET"]).digest == upload.digest
    shared = tmp_path / "only-model"
    shared.mkdir()
    pack(orchestrator.load_recipe(path), shared, [tiny_bert.parent], [])
    assert orchestrator.load_recipe(shared / "recipe.yaml").source.model == str(tiny_bert)


def test_pictures_that_a_data_file_names_travel_with_it(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    from PIL import Image

    from orchestrator.tasks import read_options
    from orchestrator.training.pictures import find_named_pictures
    from orchestrator.training.prepare import read_examples

    home = tmp_path / "data"
    (home / "pictures" / "deep").mkdir(parents=True)
    rows = []
    for number in range(12):
        path = home / "pictures" / "deep" / f"{number}.png"
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(path)
        rows.append({"image": f"pictures/deep/{number}.png", "label": "ab"[number % 2]})
    (home / "unnamed.png").write_bytes(path.read_bytes())
    for split, some in {"train": rows[:8], "test": rows[8:]}.items():
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    files = {split: str(home / f"{split}.jsonl") for split in ("train", "test")}
    recipe = orchestrator.load_recipe(
        write_recipe(target={"task": "image-classification", "data": files, "options": {}, "columns": {}})
    )
    folder = tmp_path / "upload"
    folder.mkdir()
    pack(recipe, folder, [], [], find_named_pictures(recipe))
    assert not list(folder.rglob("unnamed.png"))
    home.rename(tmp_path / "elsewhere")
    sent = orchestrator.load_recipe(folder / "recipe.yaml")
    found = read_examples(sent, *read_options(sent))
    assert [len(examples) for examples in found.values()] == [7, 1, 4]
    assert all(Path(each["path"]).exists() for each in found["train"].table["image"].to_pylist())


def test_what_cannot_travel_is_told_all_at_once(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.jobs.upload.LARGEST", 1000)
    path = write_recipe(target={"task": "text-classification", "data": "./nowhere.jsonl"})
    with pytest.raises(InputError) as caught:
        pack(orchestrator.load_recipe(path), tmp_path, [], ["NO_SUCH_VARIABLE"])
    told = str(caught.value)
    for words in (
        "nowhere.jsonl does not exist",
        "NO_SUCH_VARIABLE is not set",
        "and a job may have 1.00 kB",
        "--shared",
    ):
        assert words in told
    assert not (tmp_path / "recipe.yaml.partial").exists()


def test_storage_of_one_node_alone_is_refused(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "is_here", False)
    far = Cluster("https://ray.example.org", None)
    with pytest.raises(InputError, match=r"scale\.storage is 'runs', a folder that only one node"):
        run_directory(orchestrator.load_recipe(write_recipe(scale={"storage": "runs"})), far, "train")
    shared = orchestrator.load_recipe(write_recipe(name="mine", scale={"storage": "/shared/runs"}))
    assert run_directory(shared, far, "search") == "/shared/runs/mine-search"


@pytest.mark.parametrize(("addresses", "is_here"), [(["192.0.2.7"], False), ([], False), (["127.0.0.1"], True)])
def test_a_cluster_is_here_where_its_nodes_are_this_machine(
    addresses: list[str], is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where a tunnel to it begins."""
    monkeypatch.setattr(Cluster, "_nodes", lambda _: [SimpleNamespace(node_ip=address) for address in addresses])
    assert Cluster("http://localhost:8265", None).is_here == is_here


def test_nodes_that_differ_are_named() -> None:
    def node(sees: bool = True, **versions: str) -> dict[str, Any]:
        return {"versions": {"torch": "2.10", "ray": "2.60", **versions}, "sees": sees}

    refuse_differences(["a", "b"], [node(), node()], Path("/shared"))
    with pytest.raises(ClusterError) as caught:
        refuse_differences(["a", "b", "c"], [node(), node(sees=False), node(torch="2.11")], Path("/shared"))
    told = str(caught.value)
    assert "the node b does not see /shared" in told
    assert "torch is not the same on all nodes: a has 2.10, b has 2.10, c has 2.11" in told
    with pytest.raises(ClusterError, match="peft is not the same on all nodes: a has missing"):
        refuse_differences(["a"], [node(peft="missing")], Path("/shared"))


def test_what_is_sent_is_what_is_there_without_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "checkpoints").mkdir()
    text = f"noise\n{send(str(tmp_path), ('checkpoints',))}\n"

    class Sender:
        def submit(self, *_: Any, **__: Any) -> None: ...

        def wait(self, *_: Any) -> Any:
            return type("Job", (), {"status": "succeeded"})

        def logs(self, _: str) -> str:
            return text

    import io
    import tarfile

    job = type("Job", (), {"id": "a", "name": "a", "directory": "b"})
    data = receive(Sender(), job, everything=False)  # type: ignore[arg-type]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert sorted(archive.getnames()) == ["model", "model/weights"]
    assert BEGIN in text
