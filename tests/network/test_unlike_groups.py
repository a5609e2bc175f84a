"""Samples that have more points in some batches than in others, merged into the first axis."""

from __future__ import annotations

import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 5, 6), (5, 4, 3)])
@pytest.mark.parametrize("behind", [False, True])
def test_sets_of_unlike_size_give_the_report_of_sets_that_nobody_merged(counts, behind):
    reports = []
    for flat in (False, True):

        def run(m: nn.Module, x: Tensor, flat: bool = flat) -> Tensor:
            n, points, _ = x.shape
            x = m.e(x) if behind else x
            h = torch.tanh(m.a(x.flatten(0, 1) if flat else x)).view(n, points, -1)
            h = h + h.mean(1, keepdim=True)
            return m.c(m.b(h.flatten(0, 1) if flat else h)).view(n, points, -1).mean(1)

        torch.manual_seed(0)
        model = wired(run, e=nn.Linear(3, 3), a=nn.Linear(3, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2))
        draw = torch.Generator().manual_seed(0)
        sets = [torch.randn(60, points, 3, generator=draw) for points in counts]
        reports.append(credit_report(model, sets))
    assert reports[0].n_samples == reports[1].n_samples == 180
    assert reports[1].r2 == pytest.approx(reports[0].r2, abs=1e-4)
    assert reports[1].credit == pytest.approx(reports[0].credit, abs=1e-3)


@pytest.mark.parametrize("added", [0, 60, 64])
def test_rows_that_a_network_adds_to_every_batch_are_told(added: int) -> None:
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    bank, layers = 3 * torch.randn(added, 6, generator=draw), {"a": (6, 8), "b": (8, 8), "c": (8, 3)}
    modules = {name: nn.Linear(*sizes) for name, sizes in layers.items()}

    def parts(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(torch.relu(m.b(torch.tanh(m.a(x)))))

    model = wired(lambda m, x: parts(m, torch.cat([bank, x]))[added:], **modules)
    batches = list(torch.randn(288, 6, generator=draw).split(32))
    report = credit_report(model, batches)
    told = [note for note in report.notes if note.startswith("the network runs on")]
    # Rows that are a multiple of the batch's are taken for parts of its samples, such as views.
    assert len(told) == (added == 60)
    if told:
        assert told[0].startswith("the network runs on 92 rows for the 32 samples of the first batch")
        assert report.n_samples == 288 + 9 * added
    # What the note advises gives the numbers of a network without these rows.
    alone = credit_report(model, batches, forward_fn=parts)
    plain = credit_report(wired(parts, **modules), batches)
    assert alone.n_samples == plain.n_samples == 288
    assert alone.credit.tolist() == plain.credit.tolist()
    assert alone.notes == plain.notes == ()


def test_tokens_that_a_batch_holds_itself_are_no_rows_that_a_network_adds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    batches = [(torch.randn(32, 5, 4), torch.arange(32)) for _ in range(4)]
    report = credit_report(model, batches, forward_fn=lambda m, batch: m(batch[0].flatten(0, 1)))
    assert not [note for note in report.notes if note.startswith("the network runs on")]
