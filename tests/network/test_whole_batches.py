"""Components that are given all of a batch, and read a part of it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import credit_report


class Encoder(nn.Module):
    def __init__(self, reads: tuple[str, ...]) -> None:
        super().__init__()
        self.table, self.linear, self.reads = nn.Embedding(10, 8), nn.Linear(3, 8), reads

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        h = self.table(batch["id"]) if "id" in self.reads else torch.zeros(())
        return h + self.linear(batch["numbers"]) if "numbers" in self.reads else h


class Network(nn.Module):
    def __init__(self, reads: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.body, self.out = Encoder(reads), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.out(torch.relu(self.body(self.encoder(batch))))


def report_of(reads: tuple[str, ...], *entries: str):
    torch.manual_seed(0)
    net = Network(reads).eval()
    data = {
        "id": torch.randint(0, 10, (512,)),
        "numbers": torch.randn(512, 3),
        "label": torch.randn(512),
    }
    batches = [{name: data[name][i : i + 128] for name in entries} for i in range(0, 512, 128)]
    return credit_report(net, batches, forward_fn=lambda model, batch: model(batch))


def about_integers(report) -> bool:
    return any("integers of the batch that go into" in note for note in report.notes)


@pytest.mark.parametrize("beside", [("numbers",), ("label",), ("numbers", "label")])
def test_one_that_reads_the_integers_alone_has_no_numbers_for_its_input(beside: tuple[str, ...]):
    expected, found = report_of(("id",), "id"), report_of(("id",), "id", *beside)
    assert found.components == expected.components == ("body", "out")
    assert found.reads["body"] == ("encoder",)
    np.testing.assert_array_equal(found.r2, expected.r2)
    assert not about_integers(found)


def test_integers_are_told_where_they_are_read_alone():
    numbers = report_of(("numbers",), "id", "numbers", "label")
    assert numbers.r2[numbers.components.index("encoder")] == pytest.approx(1, abs=1e-6)
    assert not about_integers(numbers)
    assert about_integers(report_of(("id", "numbers"), "id", "numbers", "label"))
