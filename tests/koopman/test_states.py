"""Pooling, the frozen POD basis, and the keys that choose folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.koopman.states import Basis, fit_basis, pod_basis, sample_keys
from lightning_koopman.network.axes.forms import has_channels_first, pooled_grid
from lightning_koopman.network.axes.rows import RowForm


def pool(tensor: Tensor, max_dim: int, *, channels_first: bool) -> Tensor:
    grid = pooled_grid(tuple(tensor.shape[1:]), max_dim, channels_first=channels_first)
    return RowForm(channels_first=channels_first, grid=grid).rows(tensor)


def pooled(shape: tuple[int, ...], max_dim: int, *, channels_first: bool = True) -> Tensor:
    return pool(torch.randn(shape), max_dim, channels_first=channels_first)


@pytest.mark.parametrize(
    ("shape", "max_dim", "width"),
    [
        ((5, 7), 3, 7),  # flat states are never pooled
        ((5, 2, 4, 4), 32, 32),  # narrow enough: only flattened
        ((5, 2, 16, 16), 32, 2 * 64),  # 16 cells would keep fewer than four values a direction
        ((5, 64, 28, 28), 256, 64 * 16),
        ((5, 512, 7, 7), 64, 512),  # 2 cells would do, a square grid of 1 is taken
        ((5, 3, 100), 32, 3 * 43),
        ((5, 2, 9, 9, 9), 32, 2 * 64),
        ((5, 2, 6, 6, 6, 6), 32, 2 * 64),
        ((5, 2, 3, 100), 32, 2 * 3 * 8),  # an axis shorter than the grid stays as it is
    ],
    ids=str,
)
def test_wide_grids_are_pooled_to_few_cells(shape: tuple[int, ...], max_dim: int, width: int) -> None:
    assert pooled(shape, max_dim).shape == (5, width)


def test_pooling_averages_blocks_of_pixels() -> None:
    image = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    expected = image.numpy().reshape(3, 2, 4, 2, 4, 2).mean(axis=(3, 5)).reshape(3, -1)
    assert np.allclose(pool(image, 8, channels_first=True).numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 28, 28), (2, 16, 7, 9), (2, 5, 4, 6, 6)], ids=str)
def test_cells_of_images_and_volumes_are_those_of_adaptive_pooling(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = torch.randn(shape).to(dtype)
    rows = pool(values, 32, channels_first=True)
    side = round((rows.shape[1] / shape[1]) ** (1 / (len(shape) - 2)))
    pools = {4: nn.functional.adaptive_avg_pool2d, 5: nn.functional.adaptive_avg_pool3d}
    expected = pools[len(shape)](values.double(), [side] * (len(shape) - 2)).flatten(1)
    assert rows.shape[1] < values[0].numel()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert torch.allclose(rows.double(), expected, rtol=0, atol=tolerance)
    # Also where the pass runs in autocast, whose products keep half the digits.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool(values, 32, channels_first=True), rows)


def test_sequences_with_channels_last_are_pooled_over_time() -> None:
    sequence = torch.randn(3, 32, 5, dtype=torch.float64)
    rows = pool(sequence, 8, channels_first=False)
    expected = sequence.numpy().reshape(3, 16, 2, 5).mean(axis=2).transpose(0, 2, 1).reshape(3, -1)
    assert np.allclose(rows.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_rows_are_at_least_single_precision(given: torch.dtype, kept: torch.dtype) -> None:
    for shape in ((4, 3), (4, 2, 8, 8)):
        assert pool(torch.ones(shape, dtype=given), 8, channels_first=True).dtype == kept


@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 2, 3)], ids=str)
def test_rows_are_a_copy(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, requires_grad=True)
    rows = pool(tensor, 100, channels_first=True)
    with torch.no_grad():
        tensor.add_(1)
    assert not rows.any()
    assert not rows.requires_grad
    assert rows.ndim == 2


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)], ids=str)
def test_a_state_without_samples_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a state of shape \(.*\) is no row of values per sample"):
        pool(torch.zeros(shape), 8, channels_first=True)


def test_the_layout_is_told_from_the_module() -> None:
    sequence, image = torch.ones(2, 3, 4), torch.ones(2, 3, 4, 4)
    assert not has_channels_first(sequence, nn.Linear(4, 4))
    assert not has_channels_first(sequence, nn.LayerNorm(4))
    assert has_channels_first(sequence, nn.Conv1d(3, 3, 1))
    assert has_channels_first(sequence, nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    assert has_channels_first(image, nn.ReLU())
    # As many values a patch as the image is wide, and as many channels.
    patches, last = torch.ones(2, 1, 14, 14), torch.ones(2, 7, 9, 14)
    assert has_channels_first(patches, nn.Linear(14, 24), is_input=True)
    assert not has_channels_first(last, nn.Linear(14, 24), is_input=True)


class Patches(nn.Module):
    """Patches of 2 by 7 pixels, of an image that is as wide as a patch has values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(14, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(nn.functional.unfold(x, (2, 7), stride=(2, 7)).transpose(1, 2))


def test_an_image_as_wide_as_its_patches_have_values_is_no_image_of_as_many_channels() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Patches(), nn.Tanh(), nn.Flatten(), nn.Linear(84, 3))
    images = (torch.randn(900, 110) @ torch.randn(110, 196)).view(900, 1, 14, 14)
    # All 110 directions of the images are kept, and the embedding is linear in them.
    report = credit_report(network, images.split(100), components=["0", "3"])
    assert report.r2[0] > 1 - 1e-6


ROWS = {
    "normal": lambda g: torch.randn(20000, 8, generator=g),
    "one column": lambda g: torch.linspace(0, 1, 20000)[:, None],
    "whole numbers": lambda g: torch.arange(20000.0)[:, None],
    "pixels": lambda g: torch.randint(0, 17, (20000, 64), generator=g).float(),
    "bytes over 255": lambda g: torch.randint(0, 256, (20000, 64), generator=g) / 255,
    "zero and one": lambda g: torch.randint(0, 2, (20000, 40), generator=g).float(),
    "minus one and one": lambda g: torch.randint(0, 2, (20000, 40), generator=g) * 2.0 - 1,
    "half precision": lambda g: torch.randn(20000, 8, generator=g).half(),
    "sparse": lambda g: torch.randn(20000, 50, generator=g) * (torch.rand(20000, 50, generator=g) < 0.1),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ROWS)
def test_keys_are_spread_evenly(kind: str, seed: int) -> None:
    rows = torch.unique(ROWS[kind](torch.Generator().manual_seed(seed)), dim=0)
    keys = sample_keys(rows, seed)
    assert int(keys.min()) >= 0
    assert len(torch.unique(keys)) == len(rows)
    for folds in (2, 3, 5, 7, 10, 64):
        counts = np.bincount((keys % folds).numpy(), minlength=folds)
        assert chisquare(counts).pvalue > 1e-4, folds


def test_keys_depend_on_content_and_seed_alone() -> None:
    rows = torch.randn(100, 5)
    keys = sample_keys(rows)
    order = torch.randperm(100)
    assert torch.equal(sample_keys(rows[order]), keys[order])
    assert torch.equal(torch.cat([sample_keys(part) for part in rows.split(7)]), keys)
    assert torch.equal(sample_keys(rows.double()), keys)
    assert torch.equal(
        sample_keys(torch.tensor([[0.0, -0.0]])), sample_keys(torch.tensor([[-0.0, 0.0]]))
    )
    assert not torch.equal(sample_keys(rows, 1), keys)
    assert len(torch.unique(sample_keys(torch.tensor([[1.0, 2.0], [2.0, 1.0]])))) == 2
    grid = torch.cartesian_prod(torch.arange(100.0), torch.arange(100.0))
    assert len(torch.unique(sample_keys(grid))) == len(grid)


def test_keys_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    sample_keys(torch.ones(3, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_of_the_principal_directions_those_are_kept_that_vary_beside_the_largest() -> None:
    noise = np.random.default_rng(0).standard_normal((40, 4))
    turned = np.linalg.qr(noise - noise.mean(0))[0]
    # Sums of squares 1e6, 1, 4e-6 and 2.5e-7, of which the last is below a 1e-12 of the first.
    rows = torch.from_numpy(np.hstack([turned * [1e3, 1.0, 2e-3, 5e-4], np.zeros((40, 1))]))
    basis, share = pod_basis(rows, 4)
    assert basis is not None
    assert torch.allclose(basis.abs(), torch.eye(5, 3, dtype=torch.float64), atol=1e-6)
    assert share == pytest.approx(1)
    assert pod_basis(rows, 5) == (None, 1.0)
    constant, share = pod_basis(torch.ones(10, 5), 3)
    assert constant is not None
    assert (constant.shape, share) == ((5, 1), 1.0)


@pytest.mark.parametrize("n", [300, 900])
def test_single_precision_spans_the_principal_space_up_to_its_rounding(n: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, 500)) * np.logspace(0, -1.5, 500) + 3
    rows = rows.astype(np.float32)
    expected = np.linalg.svd(rows.astype(float) - rows.astype(float).mean(0), full_matrices=False)
    basis, share = pod_basis(torch.from_numpy(rows), 200)
    assert basis is not None
    assert basis.dtype == torch.float32
    basis = basis.double()
    assert torch.allclose(basis.T @ basis, torch.eye(200).double(), rtol=0, atol=1e-5)
    # The sines of the angles to the exact space, each direction by the share of variance it carries.
    outside = expected[2][:200] - (expected[2][:200] @ basis.numpy()) @ basis.numpy().T
    weights = expected[1][:200] ** 2 / (expected[1] ** 2).sum()
    assert (weights * (outside**2).sum(1)).sum() < 1e-9
    assert share == pytest.approx(weights.sum(), abs=1e-5)


def test_directions_below_the_rounding_of_single_precision_are_found_in_double() -> None:
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.standard_normal((60, 20)))[0]
    rows = torch.from_numpy(turned * np.logspace(0, -4, 20)).float()
    basis, _ = pod_basis(rows, 15)
    assert basis is not None
    assert torch.allclose(basis, pod_basis(rows.double(), 15)[0])


@pytest.mark.parametrize("exponent", [-80, -76, -73, 56, 60, 100])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)], ids=str)
def test_directions_whose_squares_single_precision_does_not_hold_are_found_in_double(
    exponent: int, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal(shape) * np.logspace(0, -1.5, shape[1])).float()
    expected, share = pod_basis(rows.double(), 8)
    basis, kept = pod_basis(rows * 2.0**exponent, 8)
    assert basis is not None
    assert expected is not None
    angles = torch.linalg.svdvals(basis.double().T @ expected)
    assert float(angles.min()) > 1 - 1e-6
    assert kept == pytest.approx(share, abs=1e-5)


def test_where_single_precision_fails_directions_are_found_in_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    expected, _ = pod_basis(rows.double(), 5)
    solve = torch.linalg.eigh

    def fails(matrix: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solve(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    basis, _ = pod_basis(rows, 5)
    assert basis is not None
    assert torch.equal(basis, expected)


@pytest.fixture(scope="module")
def earlier() -> tuple[Basis, Tensor, Tensor]:
    """A basis, the rows that it was fitted to, and as many others of the same distribution."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 40, generator=generator) * torch.logspace(0, -2, 40)
    narrow = torch.randn(2000, 5, generator=generator)
    fitted = [narrow[:1000], rows[:1000]]
    # As a measurement leaves it behind: in the type of the rows.
    return fit_basis(fitted, 10).like(fitted), narrow[1000:], rows[1000:]


def test_a_basis_is_kept_while_it_keeps_the_variance_it_was_fitted_for(
    earlier: tuple[Basis, Tensor, Tensor],
) -> None:
    basis, narrow, rows = earlier
    for scale in (1.0, 1e-3):
        found = fit_basis([narrow, scale * rows + 2], 10, earlier=basis)
        assert found.vectors == basis.vectors
        assert found.kept_variance == basis.kept_variance
        states = found.project([narrow, scale * rows + 2])
        for center, state in zip(found.center, states, strict=True):
            assert torch.allclose(center, state.double().mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("change", ["direction", "width", "number", "max_dim", "scale", "none"])
def test_a_basis_that_does_not_fit_is_fitted_anew(
    change: str, earlier: tuple[Basis, Tensor, Tensor]
) -> None:
    basis, narrow, rows = earlier
    max_dim, given = 10, [narrow, rows]
    if change == "direction":  # one direction of those dropped grows to a fiftieth of the variance
        grown = (rows.var(dim=0).sum() / 50).sqrt() * torch.randn(1000, 1)
        given = [narrow, rows + grown * torch.eye(40)[-1]]
    elif change == "width":
        given = [narrow, torch.randn(1000, 41)]
    elif change == "number":
        given = [narrow]
    elif change == "max_dim":
        max_dim = 40
    elif change == "scale":  # the squares of which single precision does not hold
        given = [narrow, rows.flip(1) * 1e20]
    found = fit_basis(given, max_dim, earlier=basis)
    anew = fit_basis(given, max_dim)
    kept = change == "none"
    for one, other, old in zip(found.vectors[1:], anew.vectors[1:], basis.vectors[1:], strict=False):
        assert (one is old) == kept
        assert kept or one is other or torch.equal(one, other)
    assert (found.kept_variance == basis.kept_variance) == kept


def test_columns_apart_have_directions_of_their_own_however_little_they_vary() -> None:
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(200, 12, generator=generator) * torch.arange(12, 0, -1)
    last = 1e-3 * torch.randn(200, 5, generator=generator) * torch.tensor([5.0, 4, 3, 2, 1])
    rows = torch.cat([others, last], dim=1)
    vectors = fit_basis([rows], 8, apart=[5]).vectors[0]
    assert vectors.shape == (17, 8)
    # Four for each, and none that mixes them.
    for columns, block in ((slice(0, 4), vectors[:12]), (slice(4, 8), vectors[12:])):
        part = others if columns.start == 0 else last
        expected, _ = pod_basis(part, 4)
        assert torch.allclose(block[:, columns].abs(), expected.abs(), atol=1e-4)
    assert torch.equal(vectors[12:, :4], torch.zeros(5, 4))
    # All of what there is of them, where that is less than half.
    narrow = fit_basis([rows], 12, apart=[5]).vectors[0]
    assert torch.equal(narrow[12:, 7:], torch.eye(5))
    # What never varies has none.
    rows[:, 12:] = 1.0
    given = fit_basis([rows], 8, apart=[5]).vectors[0]
    assert torch.equal(given, pod_basis(rows, 8)[0])


def test_of_joined_states_those_no_wider_than_an_equal_share_are_kept_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(200, 12, generator=generator) * torch.arange(12, 0, -1)
    narrow = 1e-3 * torch.randn(200, 2, generator=generator)
    other = torch.randn(200, 9, generator=generator)
    rows = torch.cat([wide, narrow, other], dim=1)
    vectors = fit_basis([rows], 8, joined=[(12, 2, 9)]).vectors[0]
    assert vectors.shape == (23, 8)
    assert torch.equal(vectors[12:14, 6:], torch.eye(2))
    # The others share the directions that are left, as if nothing stood between them.
    expected, _ = pod_basis(torch.cat([wide, other], dim=1), 6)
    left = torch.cat([vectors[:12, :6], vectors[14:, :6]])
    assert torch.allclose(left.abs(), expected.abs(), atol=1e-4)
    assert not vectors[12:14, :6].any()
    # Of equal states none is preferred.
    given = fit_basis([rows], 8, joined=[(12, 11)]).vectors[0]
    assert torch.equal(given, pod_basis(rows, 8)[0])


class Conditioned(nn.Module):
    """Reads a few numbers beside many, as a diffusion model the time beside an image."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.time, self.hidden = nn.Linear(300, 20), nn.Linear(6, 12), nn.Linear(12, 20)
        self.out = nn.Linear(20, 3)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        return self.out(torch.tanh(self.image(image)) + torch.tanh(self.hidden(self.time(time))))


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_what_reads_a_narrow_input_beside_a_wide_one_reads_all_of_it(scale: float) -> None:
    torch.manual_seed(0)
    model, image, time = Conditioned(), torch.randn(600, 300), scale * torch.randn(600, 6)
    batches = list(zip(image.split(100), time.split(100), strict=True))
    report = credit_report(model, batches, forward_fn=lambda model, batch: model(*batch))
    # An exactly linear layer on its own input.
    assert report.r2[report.components.index("time")] == pytest.approx(1, abs=1e-6)
