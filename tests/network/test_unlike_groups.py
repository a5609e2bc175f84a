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
