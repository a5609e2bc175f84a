"""Means and spreads of what streams by are those of all of it at once."""

import numpy as np
import pytest
import torch

from lightning_koopman.effects.means import MeanAndSpread


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [(60,), (1, 17, 42), (0, 30, 0, 30)])
def test_streamed_mean_and_spread_are_numpys(sizes, offset):
    rows = offset + torch.randn(60, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    streamed = MeanAndSpread(rows.split(sizes))
    assert streamed.count == 60
    np.testing.assert_allclose(streamed.mean, rows.numpy().mean(axis=0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(streamed.std, rows.numpy().std(axis=0), rtol=1e-12)


@pytest.mark.parametrize("at_once", [1, 5, 2**18])
def test_streamed_means_are_over_axes_that_vary_too(at_once, monkeypatch):
    """Whatever is taken at once, and in whatever part an axis first varies."""
    monkeypatch.setattr("lightning_koopman.effects.means._VALUES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    for shapes, axes in (
        ([(9, 2, 3), (4, 2, 3), (7, 5, 3)], (0, 1)),
        ([(9, 3, 4, 5), (4, 3, 4, 6), (7, 3, 2, 5)], (0, 2, 3)),
        ([(9, 3, 4, 5), (4, 3, 2, 5), (7, 3, 4, 6)], (0, 2, 3)),
        ([(9, 3), (4, 2)], (0, 1)),
        ([(9,), (4,)], (0,)),
    ):
        parts = [3 + torch.randn(shape, generator=generator) for shape in shapes]
        streamed = MeanAndSpread(parts)
        kept = [k for k in range(parts[0].ndim) if k not in axes]
        flat = [part.double().permute(*axes, *kept).flatten(0, len(axes) - 1) for part in parts]
        rows = torch.cat(flat).numpy()
        assert streamed.count == len(rows)
        np.testing.assert_allclose(streamed.mean.flatten(), rows.mean(axis=0).flatten(), rtol=1e-13)
        np.testing.assert_allclose(streamed.std.flatten(), rows.std(axis=0).flatten(), rtol=1e-12)
        assert streamed.mean.expand_as(parts[-1]).shape == parts[-1].shape
    with pytest.raises(ValueError, match=r"shape \(2,\) and of shape \(3, 4\) per sample arrived"):
        MeanAndSpread([torch.zeros(5, 3, 4), torch.zeros(5, 2)])
