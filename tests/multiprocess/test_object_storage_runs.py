"""Runs that read corpora from object storage and copy checkpoints to it."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from experiment.run_files.checkpoints import checkpoint_path, complete_checkpoints
from experiment.run_files.goodput import reached_checkpoints, read_attempt_times
from experiment.run_files.mirror import Mirror
from experiment.run_files.provenance import read_provenance
from experiment.run_files.run_folder import RunFolder
from experiment.storage import delete, list_files, upload
from launcher.cli import main
from launches import Start
from pretrain.world import World
from radosgw import missing, radosgw_server
from rank_pool import RankError, RankPool
from runs import assert_same_tensors, logged, pretrain_case, run_config, saved_tensors
from s3_server import Fault, environment, moto_server, new_bucket, proxy, response


def put_corpus(corpus: Path, url: str) -> str:
    for path in corpus.rglob("*"):
        if path.is_file():
            upload(path, f"{url}/{path.relative_to(corpus)}")
    return url


def storage_case(
    world: World, tree: Mapping[str, Any], variables: Mapping[str, str], stop_after: int | None = None
) -> str:
    """`pretrain_case` with environment variables. Only rank 0 uploads."""
    import s3fs

    from pretrain.training import checkpointer

    with pytest.MonkeyPatch.context() as patch:
        if world.rank != 0:
            patch.delattr(checkpointer, "MirrorUploads")
        for name, value in variables.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        return pretrain_case(world, tree, stop_after)


def test_a_run_from_object_storage_resumes_on_another_host(
    pools: dict[int, RankPool],
    bucket: str,
    s3_port: int,
    wordpiece_corpus: Path,
    heldout_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches results that depend on where a corpus is read, two copies on a host, and a run that starts over, or
    continues with other losses, when its folder and its cache are lost, or trains again what another host has trained
    when they return. Also commands that take URLs."""
    plain = run_config(
        tmp_path / "plain", wordpiece_corpus, corpus__eval={"held": str(heldout_corpus)}, evaluation__every_steps=3
    )
    assert pools[2].run(pretrain_case, plain) == ["done", "done"]

    train, held = (
        put_corpus(corpus, f"{bucket}/{name}")
        for corpus, name in ((wordpiece_corpus, "text"), (heldout_corpus, "text-heldout"))
    )

    def tree(name: str) -> dict[str, Any]:
        return plain | {
            "run": plain["run"] | {"dir": str(tmp_path / name)},
            "corpus": {
                "train": train,
                "eval": {"held": held},
                "cache": str(tmp_path / f"cache-{name}"),
            },
            "checkpoint": plain["checkpoint"] | {"every_steps": 2, "mirror": f"{bucket}/run"},
        }

    variables = environment(s3_port)
    assert pools[2].run(storage_case, tree("first"), variables, 4) == ["stopped", "stopped"]
    assert list(Mirror(f"{bucket}/run").complete()) == ["step-00000002", "step-00000004"]
    copies = list((tmp_path / "cache-first").glob("*/*/manifest.json"))
    assert len(copies) == 2
    (tmp_path / "first").rename(tmp_path / "lost")
    shutil.rmtree(tmp_path / "cache-first")

    assert pools[2].run(storage_case, tree("second"), variables) == ["done", "done"]
    assert logged(tmp_path / "second") == logged(tmp_path / "plain")
    last = [saved_tensors(checkpoint_path(tmp_path / name / "checkpoints", 6)) for name in ("plain", "second")]
    assert_same_tensors(*last)
    assert [path.name for path in complete_checkpoints(tmp_path / "second" / "checkpoints")] == [
        "step-00000004",
        "step-00000006",
    ]
    log = RunFolder(tmp_path / "second").rank_log(0).read_text(encoding="utf-8")
    assert f"copying {bucket}/run/step-00000004" in log

    (tmp_path / "lost").rename(tmp_path / "first")
    assert pools[2].run(storage_case, tree("first"), variables) == ["done", "done"]
    first, second = (RunFolder(tmp_path / name) for name in ("first", "second"))
    assert read_provenance(first) == read_provenance(second) == Mirror(f"{bucket}/run").provenance()
    assert "was continued in another folder" in first.rank_log(0).read_text(encoding="utf-8")
    assert reached_checkpoints(first, read_attempt_times(first))[-1].name == "step-00000006"

    with pytest.raises(RankError, match=r"checkpoint.mirror: s3://.*/run belongs to another run .*choose another"):
        pools[2].run(storage_case, tree("plain"), variables)

    def evaluate(*arguments: str) -> dict[str, Any]:
        assert main(["evaluate", "--json", *arguments]) == 0
        scores: dict[str, Any] = json.loads(capsys.readouterr().out)
        return scores

    local = evaluate("--checkpoint", str(tmp_path / "plain"), "--corpus", str(heldout_corpus))
    assert evaluate("--checkpoint", f"{bucket}/run", "--corpus", held) == local
    assert main(["export", "--checkpoint", f"{bucket}/run/step-00000006", "--output", str(tmp_path / "exported")]) == 0
    weights = tmp_path / "second" / "checkpoints" / "step-00000006" / "hf" / "model.safetensors"
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == weights.read_bytes()


BUSY = response("503 Slow Down", "SlowDown", "Please reduce your request rate.")


@pytest.fixture(params=["moto", "radosgw"])
def server_port(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of an S3 server, which this process and those that it starts find."""
    import s3fs

    if request.param == "radosgw" and (reason := missing()):
        pytest.skip(reason)
    (tmp_path / "server").mkdir()
    with moto_server() if request.param == "moto" else radosgw_server(tmp_path / "server") as port:
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield port
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.soak
@pytest.mark.real_start
def test_a_launch_with_a_faulty_server(start: Start, server_port: int, wordpiece_corpus: Path, tmp_path: Path) -> None:
    """Catches a launch that a busy server, cut or slow connections or expired credentials break for good, and code that
    only moto's server understands."""
    bucket = new_bucket()
    source = put_corpus(wordpiece_corpus, f"{bucket}/text")
    config = run_config(tmp_path / "run", Path("unused"), checkpoint__every_steps=1)
    config["corpus"] = {"train": source, "cache": str(tmp_path / "cache")}
    config["checkpoint"] |= {"mirror": f"{bucket}/run", "keep_last": 2}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "launcher", "pretrain", "--config", "config.yaml", "--num_gpus", "2"]
    with proxy(server_port) as between:
        variables = environment(between.port)

        between.lasting = Fault(answer=response("403 Forbidden", "ExpiredToken", "The provided token has expired."))
        code, output = _launch(start, command, variables)
        assert (code, output.count("access denied")) == (2, 1), output
        between.lasting = None
        between.faults = [
            *(Fault(answer=BUSY) for _ in range(3)),
            Fault(cut_after=1000),
            *(Fault(cut_after=20_000) for _ in range(3)),
            *(Fault(bytes_per_second=100_000) for _ in range(4)),
            *(Fault(answer=BUSY), Fault(cut_after=10)) * 5,
        ]
        code, output = _launch(start, command, variables)
        assert code == 0, output
        assert between.met > 5
    assert list(Mirror(f"{bucket}/run").complete()) == ["step-00000005", "step-00000006"]

    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    damaged = next(name for name in list_files(source) if name.endswith(".arrow"))
    delete(damaged)
    code, output = _launch(start, command, environment(server_port))
    assert (code, f"{damaged} does not exist" in output) == (2, True), output


def _launch(start: Start, command: list[str], variables: Mapping[str, str]) -> tuple[int, str]:
    process = start(*command, **variables)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output
