from pathlib import Path

from benchmarks.loader import _PHASES, _document_lengths, _make_corpus, _make_maker, _median_phases
from pretrain.batching.packing import MicrobatchLayout
from pretrain.world import World


def test_phases_of_a_mixture(tmp_path: Path) -> None:
    """Catches a benchmark that reads and masks the first corpus only, or no longer fits the code that it measures."""
    corpora = [_make_corpus(tmp_path / name, _document_lengths(name, 20_000)) for name in ("wiki", "web")]
    maker = _make_maker(corpora, (0.5, 0.5), MicrobatchLayout(128, 1024), 64, World(0, 2))
    assert set(maker[0].origins.corpora) == {0, 1}
    assert all(milliseconds > 0 for milliseconds in _median_phases(maker, 0).values())
    assert set(_median_phases(maker, 0)) == set(_PHASES)
