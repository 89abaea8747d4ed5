"""The recipe that `benchmarks.throughput` compares with."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

MODEL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def peer_settings(folder: Path) -> Any:
    from benchmarks.run_mlm_peer import PeerSettings

    return PeerSettings(
        source=str(folder / "text.txt"),
        tokenizer=str(folder),
        model=MODEL,
        lines=False,
        precision="fp32",
        length=8,
        threads=1,
        accumulated=2,
        updates=3,
        warmup_updates=1,
    )


def test_tokens_of_timed_updates(tmp_path: Path) -> None:
    """Catches a rate that counts untimed updates, or the microbatch that accelerate collates ahead."""
    from benchmarks.run_mlm_peer import timed_tokens

    assert timed_tokens([3, 3, 5, 5, 5, 5, 9], peer_settings(tmp_path)) == 20


@pytest.mark.soak
def test_tokens_count_only_if_they_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the same where accelerate collates otherwise."""
    from benchmarks import run_mlm_peer

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text("a b a b a b\n" * 400, encoding="utf-8")
    monkeypatch.setattr(run_mlm_peer, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    settings = peer_settings(tmp_path)
    tokens_of_an_update = settings.accumulated * run_mlm_peer.BATCH * settings.length
    assert run_mlm_peer.run(settings) == tokens_of_an_update  # one update takes a "second"


@pytest.mark.parametrize("warm", [10, 0])
def test_a_run_without_timed_steps_is_rejected(warm: int) -> None:
    """Catches a rate of no tokens, and the time of steps that were never made."""
    from benchmarks.throughput import throughput

    with pytest.raises(SystemExit, match=f"--warm from 1 to less than --steps, 10, found {warm}"):
        throughput("text.txt", "tokenizer", steps=10, warm=warm)
