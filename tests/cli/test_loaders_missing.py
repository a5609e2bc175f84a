"""Data modules without the loader that a command needs are refused in one line."""

from pathlib import Path

import pytest

from lightning_koopman.cli.main import main
from lightning_koopman.cli.user_code import build_batches, fit_and_choose

USER_CODE = """
import lightning as L
import torch
from torch.utils.data import DataLoader

rows = torch.arange(8.0).view(4, 2)

class Net(L.LightningModule):
    def forward(self, x): return x

class Validating(L.LightningDataModule):
    def val_dataloader(self): return DataLoader(rows, batch_size=2)

class Training(L.LightningDataModule):
    def train_dataloader(self): return DataLoader(rows, batch_size=2)

class Both(Training, Validating):
    def setup(self, stage): self.stages = [*getattr(self, "stages", []), stage]

given = L.LightningDataModule()
given.val_dataloader = lambda: DataLoader(rows, batch_size=2)  # as from_datasets gives it
both = Both()
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loaderless.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["Net", "Training"])
def test_data_without_a_validation_loader_are_an_error_of_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["components", "--model=loaderless:Net", f"--data=loaderless:{name}"]) == 1
    assert capsys.readouterr().err == (
        f"error: loaderless:{name} has no val_dataloader; name a DataModule that has one, or a function "
        "that gives batches\n"
    )


@pytest.mark.parametrize("name", ["Validating", "given"])
def test_data_to_fit_on_need_a_training_loader(name: str) -> None:
    assert [batch.shape for batch in build_batches(f"loaderless:{name}")] == [(2, 2)] * 2
    with pytest.raises(ValueError, match=f"loaderless:{name} has no train_dataloader; name a"):
        fit_and_choose(f"loaderless:{name}", {})


def test_each_loader_is_made_after_its_own_stage() -> None:
    fitted, chosen = fit_and_choose("loaderless:both", {})
    assert [len(list(fitted)), len(list(chosen))] == [2, 2]
    import loaderless  # written by the fixture

    assert loaderless.both.stages == ["fit", "validate"]
