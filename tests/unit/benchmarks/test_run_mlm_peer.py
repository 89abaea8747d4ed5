"""The recipe that `benchmarks.throughput` compares with."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

MODEL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_tokens_count_only_if_they_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rate that counts the microbatch that accelerate collates ahead."""
    from benchmarks import run_mlm_peer
    from benchmarks.run_mlm_peer import BATCH, PeerSettings

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text("a b a b a b\n" * 400, encoding="utf-8")
    monkeypatch.setattr(run_mlm_peer, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    settings = PeerSettings(
        source=str(tmp_path / "text.txt"),
        tokenizer=str(tmp_path),
        model=MODEL,
        lines=False,
        precision="fp32",
        length=8,
        threads=1,
        accumulated=2,
        updates=3,
        warmup_updates=1,
    )
    assert run_mlm_peer.run(settings) == settings.accumulated * BATCH * settings.length  # one update takes a "second"


@pytest.mark.parametrize("warm", [10, 0])
def test_a_run_without_timed_steps_is_rejected(warm: int) -> None:
    """Catches a rate of no tokens, and the time of steps that were never made."""
    from benchmarks.throughput import throughput

    with pytest.raises(SystemExit, match=f"--warm from 1 to less than --steps, 10, found {warm}"):
        throughput("text.txt", "tokenizer", steps=10, warm=warm)
