"""Runs that are kept in an object store: a real S3 server on this machine's loopback."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from orchestrator import load_recipe, search, train
from orchestrator.cli.main import main
from orchestrator.distributed import Exchange
from orchestrator.errors import InputError, RunFailed
from orchestrator.jobs.fetch import download, send
from orchestrator.launch import trainer
from orchestrator.launch.dead_workers import failure_callback
from orchestrator.runs.remote import RemoteRunDirectory, open_run
from orchestrator.runs.remote_checkpoints import RemoteCheckpointStore
from orchestrator.storage import RemoteFolder, credentials, is_url, join, split
from orchestrator.training.worker import resume

STEPS = [
    "train.steps=30",
    "train.log_every=1",
    "train.save_every=5",
    "train.evaluate_every=10",
    "train.early_stopping=null",
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    started = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    started.start()
    _, port = started.get_host_and_port()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    yield f"http://127.0.0.1:{port}"
    started.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A bucket of the test's own, reached through the environment as S3's tools have it."""
    import pyarrow.fs

    values = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_ENDPOINT_URL": server}
    for name, value in {**values, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    use_machine(tmp_path / "machine-1", monkeypatch)
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    pyarrow.fs.FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")[0].create_dir(name)
    return f"s3://{name}"


def use_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as another machine would: with nothing of the copies that were made before."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder))


def rows(url: str) -> list[dict[str, Any]]:
    data = RemoteFolder(url).read("metrics.jsonl")
    assert data is not None
    return [json.loads(line) for line in data.decode().splitlines()]


def losses(url: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(url) if row["split"] == "train"}


@pytest.fixture(scope="module")
def expected(
    write_toy: Callable[..., Path], tiny_bert: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, float]]:
    """A recipe, and the losses of its run in a folder."""
    folder = tmp_path_factory.mktemp("here")
    recipe = write_toy(folder / "recipe.yaml", tiny_bert, small_data)
    run = train(load_recipe(recipe, STEPS), folder / "run")
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    found = {row["step"]: row["loss"] for row in map(json.loads, lines) if row["split"] == "train"}
    return recipe, found


def test_a_run_there_is_as_one_in_a_folder(
    bucket: str, expected: tuple[Path, dict[int, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, known = expected
    assert main(["train", str(recipe), *STEPS, f"scale.storage={bucket}/runs"]) == 0
    url = f"{bucket}/runs/toy"
    assert url in capsys.readouterr().out
    assert losses(url) == known
    files = RemoteFolder(url).names()
    assert {"recipe.yaml", "run.json", "result.json", "report.html", "predictions.parquet"} <= files.keys()
    assert {"model/model.safetensors", "model/config.json", "checkpoints/step-00000030/COMMITTED"} <= files.keys()
    assert not [name for name in files if ".partial" in name or "parts/" in name or ".probe" in name]
    again = train(load_recipe(recipe, [*STEPS, f"scale.storage={bucket}/runs"]))
    assert again.resumed
    assert again.place == url
    assert "accuracy" in again.result["metrics"]["test"]
    assert download(url, tmp_path / "fetched", ("checkpoints", "logs"))
    from transformers import AutoModelForSequenceClassification

    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "fetched" / "model").config.num_labels == 3
    assert "model.safetensors" not in send(url, ("model",))


def test_a_killed_run_goes_on_from_another_machine_with_the_same_losses(
    bucket: str, expected: tuple[Path, dict[int, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, known = expected
    url = f"{bucket}/killed"
    command = [sys.executable, "-m", "orchestrator.cli", "train", str(recipe), "--output", url, *STEPS]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while RemoteFolder(url).read("checkpoints/step-00000010/COMMITTED") is None:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until
    process.kill()
    process.wait()
    assert RemoteFolder(url).read("result.json") is None
    use_machine(tmp_path / "machine-2", monkeypatch)
    run = train(load_recipe(recipe, STEPS), url)
    assert run.resumed
    assert list(losses(url)) == list(range(1, 31))
    assert losses(url) == pytest.approx(known, rel=1e-6)
    record = json.loads(RemoteFolder(url).read("run.json") or b"")
    assert (record["attempt"], record["status"]) == (2, "finished")


def test_a_damaged_checkpoint_is_passed_over(
    bucket: str, expected: tuple[Path, dict[int, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, known = expected
    url = f"{bucket}/damaged"
    train(load_recipe(recipe, [*STEPS, "train.keep=5"]), url)
    there = RemoteFolder(url)
    weights = bytearray(there.read("checkpoints/step-00000030/weights.safetensors") or b"")
    weights[-1] ^= 1
    there.write("checkpoints/step-00000030/weights.safetensors", bytes(weights))
    there.delete("result.json")
    use_machine(tmp_path / "machine-2", monkeypatch)
    run = train(load_recipe(recipe, [*STEPS, "train.keep=5"]), url)
    assert any("step-00000030 is damaged (weights.safetensors does not match its hash)" in note for note in run.notes)
    assert losses(url) == pytest.approx(known, rel=1e-6)
    names = there.names("checkpoints")
    assert "step-00000030/COMMITTED" in names
    assert "step-00000030/DAMAGED" not in names


def test_what_is_there_is_kept_when_a_run_starts_over(bucket: str, expected: tuple[Path, dict[int, float]]) -> None:
    recipe, _ = expected
    url = f"{bucket}/again"
    short = [*STEPS, "train.steps=5"]
    train(load_recipe(recipe, short), url)
    with pytest.raises(InputError, match=r"train.learning_rate.*\n.*--fresh"):
        train(load_recipe(recipe, [*short, "train.learning_rate=0.5"]), url)
    run = train(load_recipe(recipe, short), url, fresh=True)
    assert not run.resumed
    assert any(f"{url}.old-1" in note for note in run.notes)
    assert losses(url) == losses(f"{url}.old-1")
    assert list(losses(url)) == [1, 2, 3, 4, 5]


def make_store(
    url: str, attempt: int = 1, holder: str | None = None
) -> tuple[RemoteRunDirectory, RemoteCheckpointStore]:
    directory = RemoteRunDirectory(url, holder or f"attempt-{attempt}")
    directory.create()
    directory.update_record(attempt=attempt)
    return directory, RemoteCheckpointStore(
        directory, Exchange(), lambda: directory.read_record()["attempt"] == attempt
    )


def write_files(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"weights")


def test_an_attempt_that_another_has_replaced_can_commit_nothing(bucket: str) -> None:
    _, old = make_store(f"{bucket}/run")
    old.save(1, {}, write_files)
    _, new = make_store(f"{bucket}/run", attempt=2)
    with pytest.raises(RunFailed, match="another attempt has taken over"):
        old.save(2, {}, write_files)
    assert new.committed_steps() == [1]
    new.save(2, {"step": 2}, write_files)
    found, notes = new.newest_valid()
    assert found is not None
    assert (found.step, found.state, notes) == (2, {"step": 2}, [])


def test_only_so_many_checkpoints_and_the_best_are_kept(bucket: str) -> None:
    directory, store = make_store(f"{bucket}/run")
    for step in range(1, 6):
        store.save(step, {}, write_files)
        store.prune(2, best_step=2)
    assert store.committed_steps() == [2, 4, 5]
    assert directory.remote.folders("checkpoints") == ["step-00000002", "step-00000004", "step-00000005"]
    assert sorted(path.name for path in store.folder.iterdir()) == directory.remote.folders("checkpoints")


def test_each_node_goes_on_from_its_own_copy(bucket: str) -> None:
    _, first = make_store(f"{bucket}/run")
    first.save(3, {"step": 3, "seconds": 1.5}, write_files)
    _, other = make_store(f"{bucket}/run", holder="another-node")
    found, _ = first.newest_valid()
    read: list[Path] = []
    # The first worker finds the checkpoint, and the number of rows that metrics.jsonl has; then it notes lost ones.
    told = iter([(found, 0), None])
    exchange = SimpleNamespace(rank=1, run_on_first=lambda _: next(told), agree=lambda _: None)
    session = SimpleNamespace(
        exchange=exchange, store=other, report_phase=lambda _: None, read_state=lambda folder, _: read.append(folder)
    )
    state = resume(session)  # type: ignore[arg-type]
    assert (state.step, state.seconds) == (3, 1.5)
    assert read == [other.folder / "step-00000003"] != [found.folder if found is not None else None]
    assert (read[0] / "weights.bin").read_bytes() == b"weights"


def test_a_node_that_cannot_reach_the_store_fails_the_run_on_all(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = make_store(f"{bucket}/run")
    first.save(3, {}, write_files)
    _, other = make_store(f"{bucket}/run", holder="another-node")

    def fail(*_: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(RemoteFolder, "download", fail)
    with pytest.raises(RunFailed, match=r"cannot read step 3 in s3://.*no route"):
        other.download(3)


def test_a_save_that_fails_half_way_leaves_the_checkpoint_before_it(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = make_store(f"{bucket}/run")
    store.save(1, {}, write_files)
    write = RemoteFolder.write

    def fail(folder: RemoteFolder, name: str, data: bytes) -> None:
        if name.endswith("COMMITTED"):
            raise OSError("the bucket is full")
        write(folder, name, data)

    monkeypatch.setattr(RemoteFolder, "write", fail)
    with pytest.raises(RunFailed, match=r"could not save a checkpoint to s3://.*the bucket is full"):
        store.save(2, {}, write_files)
    found, _ = store.newest_valid()
    assert found is not None
    assert found.step == 1


@pytest.mark.slow
def test_two_workers_keep_their_run_there(
    bucket: str,
    expected: tuple[Path, dict[int, float]],
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, _ = expected
    url = f"{bucket}/two"
    shown_by_ray: list[str] = []
    run_trainer = trainer.run_trainer

    def watched(loop: Any, config: dict[str, Any], settings: trainer.TrainerSettings) -> None:
        shown_by_ray.append(repr((config, vars(settings.callbacks[0]))))
        run_trainer(loop, config, settings)

    monkeypatch.setattr(trainer, "run_trainer", watched)
    overrides = [*STEPS, "scale.workers=2", "scale.zero_stage=2", "train.steps=10"]
    run = train(load_recipe(recipe, overrides), url)
    assert run.result["steps"] == 10
    assert list(losses(url)) == list(range(1, 11))
    names = RemoteFolder(url).names()
    assert "checkpoints/step-00000010/COMMITTED" in names
    assert {"logs/worker-0.log", "logs/worker-1.log"} <= names.keys()
    assert "model/model.safetensors" in names
    # The command's copy has the records, and not what the workers' has.
    assert (run.directory / "report.html").exists()
    assert not (run.directory / "model").exists()
    assert len(shown_by_ray) == 1
    assert "ObjectRef" in shown_by_ray[0]
    assert "a-secret" not in shown_by_ray[0]


def test_that_workers_died_is_told_where_the_run_is_kept(
    bucket: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    directory = open_run(f"{bucket}/run")
    directory.create()
    keys = ray.put(credentials())
    # Ray's own processes have not been told the keys.
    for name in credentials():
        monkeypatch.setenv(name, "")
    error = RuntimeError("Traceback\nValueError: no. It may be that")
    failure_callback(directory.place, keys).after_exception(None, {1: error, 0: error})
    assert directory.read_record()["notes"] == ["workers 0, 1 died (ValueError: no)"]
    assert "start again" in (directory.root / ".progress.json").read_text(encoding="utf-8")
    # Nor does a run end because nobody can be told.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    failure_callback(directory.place, None).after_exception(None, {1: error})


def test_features_that_one_machine_stored_are_brought_by_another(
    bucket: str,
    expected: tuple[Path, dict[int, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, _ = expected
    frozen = [*STEPS, "transfer.freeze=1", "train.cache_prefix=true", "train.steps=10", f"scale.storage={bucket}/runs"]
    first = train(load_recipe(recipe, [*frozen, "name=first"]))
    known = losses(first.place)
    there = RemoteFolder(f"{bucket}/runs/features")
    entries = there.folders()
    assert len(entries) == 2
    assert {f"{entries[0]}/{name}" for name in ("values.bin", "layout.json", "WHOLE")} <= there.names().keys()
    use_machine(tmp_path / "machine-2", monkeypatch)
    monkeypatch.setattr(
        "orchestrator.training.features.prefix_cache.PrefixCache._compute", lambda *_: pytest.fail("computed")
    )
    assert losses(train(load_recipe(recipe, [*frozen, "name=second"])).place) == known


def test_features_that_are_not_whole_there_are_computed(
    bucket: str, expected: tuple[Path, dict[int, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = expected
    frozen = [*STEPS, "transfer.freeze=1", "train.cache_prefix=true", "train.steps=10", f"scale.storage={bucket}/runs"]
    known = losses(train(load_recipe(recipe, [*frozen, "name=first"])).place)
    there = RemoteFolder(f"{bucket}/runs/features")
    for entry in there.folders():
        there.write(f"{entry}/values.bin", b"half of it")
    use_machine(tmp_path / "machine-2", monkeypatch)
    assert losses(train(load_recipe(recipe, [*frozen, "name=second"])).place) == known


def test_what_cannot_be_reached_is_refused_before_anything_starts(
    bucket: str, expected: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    recipe, _ = expected
    with pytest.raises(InputError, match=r"s3://no-such-bucket/toy.*bucket does not exist"):
        train(load_recipe(recipe, [*STEPS, "scale.storage=s3://no-such-bucket"]))
    with pytest.raises(InputError, match="'ftp://somewhere', which is not a known kind of address"):
        load_recipe(recipe, ["scale.storage=ftp://somewhere"])
    with pytest.raises(InputError, match=r"a search needs a folder"):
        search(load_recipe(recipe, ["scale.storage=s3://bucket/runs"]))
    assert not download("s3://no-such-bucket/x", tmp_path / "x", ())


def test_secrets_of_the_store_are_told_to_nobody(
    bucket: str, expected: tuple[Path, dict[int, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = expected
    assert credentials({"AWS_SECRET_ACCESS_KEY": "x", "HOME": "/"}) == {"AWS_SECRET_ACCESS_KEY": "x"}
    assert main(["train", str(recipe), *STEPS, "train.steps=2", f"scale.storage={bucket}"]) == 0
    shown = capsys.readouterr()
    everything = [shown.out, shown.err]
    there = RemoteFolder(f"{bucket}/toy")
    everything += [(there.read(name) or b"").decode(errors="ignore") for name in there.names()]
    assert not [text for text in everything if "a-secret" in text]


def test_a_url_keeps_its_settings_at_its_end() -> None:
    assert join("s3://b/runs/?region=eu-west-1", "toy") == "s3://b/runs/toy?region=eu-west-1"
    assert split("s3://b/runs/toy?region=eu-west-1") == ("s3://b/runs?region=eu-west-1", "toy")
    assert join("runs", "toy") == "runs/toy"
    assert split("/a/runs/toy/") == ("/a/runs", "toy")


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/runs", "s3://key@bucket/runs", "abfs://box:key@account/runs"])
def test_keys_do_not_stand_in_recipes(url: str, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"`scale.storage` has a key in it[\s\S]*in the environment"):
        load_recipe(write_recipe(), [f"scale.storage={url}"])
    assert load_recipe(write_recipe(), ["scale.storage=abfs://box@account.dfs.core.windows.net/runs"])


@pytest.mark.parametrize(
    ("text", "expected"), [("s3://a/b", True), ("runs", False), ("C://x", False), ("s3:/a", False)]
)
def test_addresses_are_told_from_folders(text: str, expected: bool) -> None:
    assert is_url(text) is expected
