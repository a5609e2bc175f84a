"""What a network returns first, made of a state that a further component reads, is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import Options, credit_report

NOTE = (
    "this report is about decoder; the first tensor that the network returns is made of {}, and counts "
    "only as far as that leads there; choose another output with output="
)


def lengths(v: Tensor) -> Tensor:
    return v.view(-1, 3, 4).norm(dim=2)


def report_of(run: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = wired(run, encoder=nn.Linear(6, 12), capsules=nn.Linear(12, 12), decoder=nn.Linear(12, 6))
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    return credit_report(model, x.split(100), options=Options(**options))


def capsules(m: nn.Module, x: Tensor) -> Tensor:
    capsules: Tensor = m.capsules(torch.tanh(m.encoder(x)))
    return capsules


def test_scores_of_a_state_that_a_decoder_reads_are_told() -> None:
    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return lengths(v := capsules(m, x)), m.decoder(v)

    told = report_of(run)
    assert told.components == ("encoder", "capsules", "decoder")
    assert NOTE.format("capsules") in told.notes
    chosen = report_of(run, output=lambda returned: returned[0])
    assert (chosen.components[-1], chosen.widths[-1]) == ("output", 3)
    assert not [note for note in chosen.notes if "the first tensor" in note]


def test_scores_of_several_states_that_a_decoder_reads_are_told() -> None:
    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(m.encoder(x))
        return lengths(z := h + m.capsules(h)), m.decoder(z)

    assert NOTE.format("encoder, capsules") in report_of(run).notes


def behind(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.decoder(v := capsules(m, x)), lengths(v)


def alone(m: nn.Module, x: Tensor) -> Tensor:
    return m.decoder(capsules(m, x)).square()


def beside_the_input(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.square(), m.decoder(capsules(m, x))


def of_the_end_too(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.decoder(v := capsules(m, x))
    return y + v[:, :6], y


@pytest.mark.parametrize("run", [behind, alone, beside_the_input, of_the_end_too])
def test_other_outputs_need_no_note(run: Any) -> None:
    report = report_of(run)
    assert "decoder" in report.components[-1] or "output" in report.components[-1]
    assert not [note for note in report.notes if "the first tensor" in note]
