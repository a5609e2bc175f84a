"""Properties that hold for any chain, split into any batches, at any scale."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_koopman import CreditReport, Options, credit_report

SLOWLY = settings(max_examples=25, deadline=None, derandomize=True)
WIDTHS = st.lists(st.integers(2, 9), min_size=3, max_size=5)


def chain(widths: list[int], seed: int, kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), kind()]
    return nn.Sequential(*layers[:-1]).double()


def same(left: CreditReport, right: CreditReport, rtol: float = 1e-8) -> None:
    assert left.directions == right.directions
    for name in ("credit", "gain", "r2", "chain_r2", "sensitivity", "rank"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=rtol, atol=rtol)


@SLOWLY
@given(widths=WIDTHS, seed=st.integers(0, 99), size=st.integers(1, 120), shuffle=st.booleans())
def test_batches_and_their_order_do_not_matter(
    widths: list[int], seed: int, size: int, shuffle: bool
) -> None:
    model = chain(widths, seed, nn.Tanh)
    rows = torch.randn(120, widths[0], dtype=torch.float64)
    order = torch.randperm(120) if shuffle else torch.arange(120)
    same(credit_report(model, [rows]), credit_report(model, rows[order].split(size)))


@SLOWLY
@given(
    widths=WIDTHS,
    seed=st.integers(0, 99),
    power=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    size=st.integers(1, 150),
)
def test_a_network_of_any_type_and_scale_gives_finite_numbers_and_is_left_as_it_was(
    widths: list[int], seed: int, power: int, dtype: torch.dtype, size: int
) -> None:
    model = chain(widths, seed, nn.LeakyReLU)
    # The largest and smallest scales that the type itself holds, with room for the layers.
    limits = torch.finfo(dtype)
    scale = min(max(10.0**power, limits.tiny * 1e4), limits.max * 1e-4)
    with torch.no_grad():
        for layer in model[::2]:
            layer.bias.mul_(scale)
    model = model.to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = (scale * torch.randn(150, widths[0], dtype=torch.float64)).to(dtype)
    report = credit_report(model, rows.split(size))
    if report.directions:
        for name in ("credit", "gain", "r2", "chain_r2", "sensitivity", "rank"):
            assert np.isfinite(getattr(report, name)).all(), name
        assert report.gain.sum() == pytest.approx(report.total, abs=1e-9)
    assert (report.r2 <= 1).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@SLOWLY
@given(
    spatial=st.lists(st.integers(1, 6), max_size=3),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    size=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_images_and_sequences_of_any_shape_in_any_batches(
    spatial: list[int], channels: int, dtype: torch.dtype, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    mixing = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(spatial)]
    one = (1,) if spatial else ()
    model = nn.Sequential(
        mixing(channels, 3, *one), nn.Tanh(), nn.Flatten(), nn.Linear(3 * math.prod(spatial), 2)
    ).to(dtype)
    rows = torch.randn(90, channels, *spatial, dtype=dtype)
    whole = credit_report(model, [rows], options=Options(max_dim=32))
    assert (whole.r2 <= 1).all()
    if whole.directions:
        assert np.isfinite(whole.credit).all()
    # Wide states are projected on the directions of the first 64 samples, whatever the batches.
    if dtype == torch.float64:
        same(whole, credit_report(model, rows.split(size), options=Options(max_dim=32)))
