"""How tensors become rows, against what NumPy gives by hand."""

from collections import namedtuple
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import Options, credit_report
from lightning_koopman.network.axes.forms import has_channels_first, pooled_grid
from lightning_koopman.network.axes.padding import valid_positions
from lightning_koopman.network.axes.rows import RowForm, by_sample


def test_samples_come_to_the_front():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(by_sample(x, RowForm(batch_axis=1)), x.transpose(0, 1))
    assert torch.equal(by_sample(x[0], RowForm()), x[0])
    assert torch.equal(by_sample(x[0, 0], RowForm()), x[0, 0][:, None])


@pytest.mark.parametrize("group", [2, 3])
def test_neighbouring_entries_of_one_sample_get_an_axis(group):
    x = torch.arange(6.0 * 5).reshape(6, 5)
    form = RowForm(group=group)
    rows = by_sample(x, form)
    assert rows.shape == (6 // group, group, 5)
    for sample, parts in enumerate(rows):
        assert torch.equal(parts, x[sample * group : (sample + 1) * group])
    # Entries that cannot be dealt out evenly are samples themselves.
    assert torch.equal(by_sample(x[:5], form), x[:5])
    assert by_sample(torch.arange(6.0), form).shape == (6 // group, group)


def test_entries_of_one_sample_may_lie_apart():
    # Two views of three samples of two positions: view, sample, position.
    x = torch.arange(12.0).reshape(2, 3, 2)
    form = RowForm(group=4, run=2)
    assert torch.equal(by_sample(x.flatten(), form), x.transpose(0, 1).reshape(3, 4))
    assert form.samples(12, 3).tolist() == [0, 0, 1, 1, 2, 2] * 2


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 3, 8, 8)])
def test_rows_are_copies_of_at_least_single_precision(shape, dtype, kept):
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    rows = RowForm(reduce="flatten").rows(x)
    assert rows.dtype == kept
    assert torch.equal(rows, x.flatten(1).to(kept))
    rows.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("reduce", ["pool", "mean", "cls", "last", lambda x: x[:, :1]])
def test_every_reduction_gives_copies_of_at_least_single_precision(reduce, dtype):
    x = torch.randn(4, 5, 6).to(dtype)
    before = x.clone()
    rows = RowForm(reduce=reduce, grid=(5,)).rows(x)
    assert rows.dtype == torch.promote_types(dtype, torch.float32)
    rows.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("reduce", ["pool", "mean"])
def test_flat_states_have_their_samples_brought_to_the_front_too(reduce):
    x = torch.randn(6, 4)
    assert torch.equal(RowForm(batch_axis=1, reduce=reduce).rows(x), x.T)
    grouped = RowForm(group=2, channels_first=True, grid=(4,)).rows(x)
    assert torch.equal(grouped, x.reshape(3, 8))


def test_a_reduction_may_give_one_value_a_sample():
    x = torch.randn(4, 5, 6)
    assert torch.equal(RowForm(reduce=lambda t: t.sum((1, 2))).rows(x), x.sum((1, 2))[:, None])


def test_a_mask_of_another_length_than_the_state_is_not_its_own():
    x, valid = torch.randn(4, 5, 6), torch.ones(4, 7, dtype=torch.bool)
    valid[:, 2:] = False
    form = RowForm(reduce="mean")
    assert torch.equal(form.rows(x, valid), form.rows(x))


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_sequences_are_averaged_over_equal_cells_of_their_valid_positions(length):
    cells, channels = 3, 2
    x = torch.randn(3, channels, 7, dtype=torch.float64)
    valid = torch.zeros(3, 7, dtype=torch.bool)
    # The first is padded behind, the second before, the last one holds everything.
    valid[0, :length], valid[1, 7 - length :], valid[2] = True, True, True
    form = RowForm(channels_first=True, grid=(cells,))
    rows = form.rows(x, valid).view(3, channels, cells)
    for sample in range(3):
        places = np.flatnonzero(valid[sample].numpy())
        n = len(places)
        for cell in range(cells):
            first, last = cell * n // cells, -(-(cell + 1) * n // cells)
            expected = x[sample].numpy()[:, places[first:last]].mean(axis=1)
            assert np.allclose(rows[sample, :, cell].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_input", [False, True])
@pytest.mark.parametrize(
    ("sizes", "grid"),
    [
        ((28, 28), (4, 4)),  # four strips, of one row of cells each
        ((14, 20), (4, 5)),  # two strips, of two rows of cells that overlap
        ((15, 20), (4, 4)),  # no two strips are alike
        ((8, 8), (4, 4)),  # strips too short to be faster
        ((12, 10, 9), (3, 2, 4)),
    ],
)
@pytest.mark.parametrize("layout", ["as made", "channels last"])
def test_cells_of_images_are_those_of_adaptive_pooling(sizes, grid, is_input, layout):
    x = torch.randn(3, 2, *sizes, generator=torch.Generator().manual_seed(0))
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels last" else x
    pool = nn.functional.adaptive_avg_pool2d if len(sizes) == 2 else nn.functional.adaptive_avg_pool3d
    rows = RowForm(channels_first=True, grid=grid, is_input=is_input).rows(x)
    assert torch.allclose(rows, pool(x, grid).flatten(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("channels", "side", "cells"), [(1, 28, 14), (3, 32, 14), (1, 32, 4), (3, 64, 4)]
)
def test_inputs_are_pooled_to_the_same_bits_in_batches_of_any_size(channels, side, cells, dtype):
    # They tell the fold of a sample; by products, these would differ in thousands of values.
    x = torch.randn(60, channels, side, side, dtype=dtype)
    form = RowForm(channels_first=True, grid=(cells, cells), is_input=True)
    for size in (1, 2, 7, 50):
        assert torch.equal(torch.cat([form.rows(part) for part in x.split(size)]), form.rows(x))


@pytest.mark.parametrize(
    ("shape", "max_dim", "grid"),
    [
        ((300,), 256, ()),
        ((4, 8, 8), 256, (8, 8)),  # 256 values: as they are
        ((4, 8, 9), 256, (8, 9)),  # 288 values, but fewer than 4 * 256: no coarser than they are
        ((64, 28, 28), 256, (4, 4)),
        ((512, 28, 28), 256, (2, 2)),
        ((5000, 7, 7), 256, (1, 1)),
        ((5000, 7), 256, (1,)),
        ((1024, 7, 7), 256, (2, 2)),
        ((1025, 7, 7), 256, (1, 1)),  # 2 × 2 would be more than 16 * 256 values
        ((3, 2, 2, 2, 2), 256, (2, 2, 4)),
        ((64, 12, 10, 4, 3, 2), 256, (3, 3, 3)),  # 2 × 2 × 2 would be fewer than 4 * 256 values
    ],
)
def test_grids_hold_about_sixteen_times_max_dim(shape, max_dim, grid):
    assert pooled_grid(shape, max_dim, channels_first=True) == grid
    channels_last = (*shape[1:], shape[0])
    assert pooled_grid(channels_last, max_dim, channels_first=False) == grid


def test_a_layer_norm_tells_that_channels_are_last():
    assert has_channels_first(torch.zeros(2, 5, 6, 7), nn.LayerNorm(7)) is False
    assert has_channels_first(torch.zeros(2, 5, 6, 7), nn.LayerNorm(5)) is True


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("batch", "held"),
    [
        ({"attention_mask": MASK}, True),
        ({"Padding_Mask": MASK == 0}, True),
        ({"key_padding_mask": (MASK == 0).float()}, True),
        ({"src_pad_mask": MASK == 0}, True),
        ({"a": 1, 3: MASK, "mask": MASK}, True),
        ([torch.ones(2, 3), {"mask": MASK}], True),
        ({"mask": MASK + 1}, False),  # no mask: other numbers than 0 and 1
        ({"mask": MASK[:, :, None]}, False),
        ({"marks": MASK}, False),
        (MASK, False),
        ({"lengths": MASK}, False),
        # Of other things than padding.
        ({"bool_masked_pos": MASK}, False),
        ({"loss_mask": MASK, "ids": torch.ones(2, 3)}, False),
        ({"head_mask": MASK}, False),
        # As many rows as there are samples, wherever these are.
        ({"x": torch.ones(2, 3, 4), "src_mask": MASK}, True),
        ({"x": torch.ones(3, 2, 4), "src_mask": MASK}, True),
        ({"x": torch.ones(4, 3, 4), "src_mask": MASK}, False),
        ({"places": torch.arange(3)[None], "x": torch.ones(2, 3, 4), "mask": MASK}, True),
        ({"scale": torch.tensor(2.0), "mask": MASK}, True),
    ],
)
def test_what_holds_data_is_read_off_masks(batch, held):
    found = list(valid_positions(batch).values())
    assert len(found) == held
    assert all(torch.equal(mask, MASK.bool()) for mask in found)


FULL = torch.tensor([[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"mask": FULL}, FULL),
        ({"mask": 1 - FULL}, FULL),
        ({"pad_mask": FULL}, FULL),
        ({"pad_mask": 1 - FULL}, FULL),
        # Nothing tells the other way round.
        ({"mask": 1 - MASK}, 1 - MASK),
        ({"mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, torch.tensor([[1, 1, 1], [0, 0, 0]])),
    ],
)
def test_a_mask_by_which_a_sample_would_hold_no_data_is_of_padding(batch, expected):
    (found,) = valid_positions(batch).values()
    assert torch.equal(found, expected.bool())


Padded = namedtuple("Padded", "x mask")


@dataclass
class Sequences:
    x: Tensor
    lengths: Tensor


def test_what_holds_data_is_read_wherever_it_has_a_name():
    x, lengths = torch.zeros(2, 3, 4), FULL.sum(1)
    for batch in ({"inputs": {"x": x, "mask": FULL}, "y": lengths}, (Padded(x, FULL), lengths)):
        assert torch.equal(valid_positions(batch)["mask"], FULL.bool())
    assert torch.equal(valid_positions(Sequences(x, lengths))["lengths"], lengths)


@pytest.mark.parametrize("turned", [False, True])
def test_masks_of_what_positions_see_are_not_of_padding(turned):
    """In a batch of as many samples as positions, too."""
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    x = torch.randn(5, 5, 4, generator=torch.Generator().manual_seed(0))
    assert not valid_positions({"x": x, "mask": ~mask if turned else mask})
    assert valid_positions({"mask": torch.ones(1, 1)})


@pytest.mark.parametrize("n_samples", [6, 8])
def test_a_causal_mask_that_a_network_is_given_leaves_nothing_out(n_samples):
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
            return self.last((attn_mask.to(x) @ self.first(x)).mean(1))

    torch.manual_seed(0)
    x = torch.randn(240, 6, 4)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    batches = [{"x": part, "attn_mask": mask} for part in x.split(n_samples)]
    report = credit_report(Causal(), batches)
    assert report.n_samples == 240
    assert report.r2 == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "name",
    ["lengths", "Length", "lens", "seq_lengths", "input_lengths", "x_len", "src_lens", "seq_len"],
)
def test_what_holds_data_is_read_off_lengths(name):
    (lengths,) = valid_positions({"other": "text", name: torch.tensor([2, 1, 3])}).values()
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    x = torch.randn(3, 3, 4)
    for form in (RowForm(reduce="mean"), RowForm(reduce="last"), RowForm(grid=(2,))):
        assert torch.equal(form.rows(x, lengths), form.rows(x, mask))
        # As with a mask, a state of another length is used as a whole.
        assert torch.equal(form.rows(x[:, :2], lengths), form.rows(x[:, :2]))


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((2, 7, 7, 3), False),
        ((2, 3, 7, 7), True),
        ((2, 7, 7, 7), True),
        ((2, 5, 6, 7), True),
        ((2, 5, 6), False),
        ((2, 5, 5, 4, 4), True),
    ],
)
def test_two_equal_axes_tell_where_the_channels_are(shape, first):
    assert has_channels_first(torch.zeros(shape), nn.Identity()) is first


@pytest.mark.parametrize("masked", [True, False])
def test_means_over_positions_keep_their_digits_under_autocast(masked):
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(7) < torch.tensor([[7], [3], [1], [5], [2]]) if masked else None
    form = RowForm(reduce="mean")
    with torch.autocast("cpu", torch.bfloat16):
        rows = form.rows(x, valid)
    assert torch.equal(rows, form.rows(x, valid))
    assert torch.allclose(rows.double(), form.rows(x.double(), valid), rtol=0, atol=1e-6)


def test_an_input_has_its_channels_where_the_first_layer_takes_them():
    x = torch.zeros(2, 3, 60)
    assert has_channels_first(x, nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(60, 5)), is_input=True)
    assert not has_channels_first(x, nn.Sequential(nn.Linear(60, 3), nn.Conv1d(3, 4, 1)), is_input=True)
    # Tokens may be mixed before channels are.
    assert not has_channels_first(x, nn.Sequential(nn.Linear(3, 7), nn.Linear(60, 5)), is_input=True)
    assert not has_channels_first(x, nn.Conv1d(60, 4, 1), is_input=True)


@pytest.mark.parametrize("n_steps", [60, 600])
def test_a_convolution_of_series_is_linear_in_the_means_of_its_channels(n_steps):
    torch.manual_seed(0)
    layers = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 2, 3, padding=1)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 2))
    x = torch.randn(300, 3, 1) + 0.1 * torch.randn(300, 3, n_steps)
    report = credit_report(net, x.split(60), options=Options(reduce="mean"))
    by_hand = Options(reduce=lambda t: t.mean(2) if t.ndim == 3 else t)
    expected = credit_report(net, x.split(60), options=by_hand)
    assert report.r2 == pytest.approx(1, abs=1e-4)
    assert report.credit == pytest.approx(expected.credit, abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 4), (8, 6, 7), (8, 3, 9, 9), (4, 8, 6)])
@pytest.mark.parametrize("reduce", ["pool", "mean", "flatten"])
def test_the_width_of_rows_is_known_before_they_are_made(shape: tuple[int, ...], reduce: str) -> None:
    x, first = torch.randn(shape), len(shape) == 4
    for form in (RowForm(batch_axis=int(shape[0] == 4)), RowForm(group=2)):
        values = by_sample(x, form)
        grid = pooled_grid(tuple(values.shape[1:]), 20, channels_first=first)
        form = replace(form, reduce=reduce, grid=grid, channels_first=first)
        assert form.width(x) == form.rows(x).shape[1]
        if values.ndim == 3 and reduce == "pool":
            for picked in (replace(form, picked=0), replace(form, picked=-1, is_alone=True)):
                assert picked.width(x) == picked.rows(x).shape[1]
