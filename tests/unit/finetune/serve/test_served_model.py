import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from experiment.errors import UserError
from finetune.device import Device
from finetune.serve import served_model
from finetune.serve.served_model import load_served_model, pack_linear_layers, padded_rows

CPU = torch.device("cpu")
NEEDS_BF16 = pytest.mark.skipif(torch.bfloat16 not in served_model.ONEDNN_DTYPES, reason="oneDNN lacks bf16 here")


class Layers(nn.Module):
    """One layer without autocast, as some models have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(24, 40), nn.Linear(40, 8, bias=False), nn.Linear(8, 3)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(values)))
        with torch.autocast("cpu", enabled=False):
            return self.third(hidden.float())


def test_a_checkpoint_that_its_run_deletes_meanwhile(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a message about weights that cannot be loaded."""
    folder = Path(shutil.copytree(folders["masked"], tmp_path / "hf"))
    monkeypatch.setattr(served_model, "is_masked_lm", lambda path: shutil.rmtree(path) or True)
    with pytest.raises(UserError, match=rf"^{folder} was deleted while it was read: .*; run the command again$"):
        load_served_model(folder, "fp32")


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.bfloat16, marks=NEEDS_BF16)])
def test_packed_layers_give_the_same_results(dtype: torch.dtype | None) -> None:
    """Catches another precision than that of autocast, a bias that is lost, and numbers of tokens that do not work."""
    torch.manual_seed(0)
    model, device = Layers().eval(), Device(CPU, dtype)
    inputs = [torch.randn(*shape, 24) for shape in ((1, 1), (3, 7), (2, 600), (0, 4))]
    with torch.inference_mode(), device.autocast():
        expected = [model(values) for values in inputs]
        names = list(model.state_dict())
        pack_linear_layers(model, device)
        found = [model(values) for values in inputs]
    assert list(model.state_dict()) == names
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-6 if dtype is None else 2e-2, rtol=0.0)


def test_a_precision_without_onednn_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server in bf16 that does not start on a CPU without AVX-512."""
    monkeypatch.setattr(served_model, "ONEDNN_DTYPES", (torch.float32,))
    model = Layers()
    pack_linear_layers(model, Device(CPU, torch.bfloat16))
    assert {type(layer) for layer in model.children()} == {nn.Linear}


def test_a_layer_outside_of_autocast_stays_fp32() -> None:
    """Catches a layer that a model computes in fp32 on purpose, and that packing takes to bf16."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 8))
    values = torch.randn(5, 24)
    with torch.inference_mode():
        expected = layer(values)
        pack_linear_layers(layer, Device(CPU, torch.bfloat16))
        torch.testing.assert_close(layer(values), expected, atol=0.0, rtol=0.0)


def test_there_are_few_numbers_of_rows() -> None:
    """Catches memory that grows with each new number of tokens, and one mask that costs as much as 32."""
    numbers = {count: padded_rows(count) for count in range(1, 1025)}
    assert len(set(numbers.values())) <= 40
    assert all(count <= number < max(2 * count, count + 32) for count, number in numbers.items())
