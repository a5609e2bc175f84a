"""Networks and data held against a reference, in memory and from a file."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from lightning_koopman import CreditReport, Options, credit_report, drift
from lightning_koopman.measurement.drift import drift_from, drift_since
from lightning_koopman.measurement.measurement import Measurement


def samples(n: int = 1500, seed: int = 0, width: int = 6) -> list[Tensor]:
    return list(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).split(300))


def mlp(out: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, out))


class Skips(nn.Module):
    """Two residual blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 10), nn.Linear(10, 3)
        self.first, self.second = (nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(x + self.second(x))


class Words(nn.Module):
    """Word vectors, a recurrent layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(20, 8), nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.rnn(self.words(ids))
        return self.head(states.mean(dim=1))


@torch.no_grad()
def broken(model: nn.Module, name: str) -> nn.Module:
    """A copy, all of whose weights have moved a little, and those of one part a lot."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    for parameter in model.get_submodule(name).parameters():
        parameter.mul_(-1)
    return model


@pytest.mark.parametrize("name", ["0", "2", "4", "6"])
@pytest.mark.parametrize("from_file", [False, True])
def test_the_part_that_broke_is_named_first(tmp_path: Path, name: str, from_file: bool) -> None:
    net = mlp()
    reference: Any = credit_report(net, samples())
    if from_file:
        reference.save_reference(tmp_path / "reference.safetensors")
        reference = tmp_path / "reference.safetensors"
    found = drift(reference, broken(net, name), samples(seed=1))
    assert found.components == ("0", "2", "4", "6")
    assert found.culprit == name
    assert found.changed[found.components.index(name)]
    assert np.allclose(found.drift, found.old - found.new)


@pytest.mark.parametrize("name", ["0", "2", "6"])
@pytest.mark.parametrize("seed", [0, 1], ids=["the same samples", "others"])
def test_a_part_that_gives_the_same_for_every_sample_is_named_first(name: str, seed: int) -> None:
    torch.manual_seed(0)
    net = mlp()
    report = credit_report(net, samples())
    dead = copy.deepcopy(net)
    nn.init.zeros_(dead.get_submodule(name).weight)  # type: ignore[arg-type]
    with torch.no_grad():
        assert bool((dead(samples()[0]).std(dim=0) < 1e-6).all())
    found = drift(report, dead, samples(seed=seed))
    assert found.culprit == name
    assert found.components[found.changed.argmax()] == name
    assert found.changed.sum() == 1
    assert f"Look at {name}" in found.verdict
    assert "no longer varies" in found.verdict
    assert "nan" not in str(found)
    assert ("drift: empty where" in str(found)) == (name != "6")


def test_a_report_without_errors_says_why_it_holds_no_reference(tmp_path: Path) -> None:
    net = mlp()
    report = credit_report(net, samples(), options=Options(errors=False))
    with pytest.raises(ValueError, match=r"measurements without errors have none; give one that"):
        drift(report, net, samples())
    with pytest.raises(ValueError, match=r"measurements without errors have none; save that of"):
        report.save_reference(tmp_path / "reference.safetensors")


def test_norms_folded_into_the_layers_before_them_are_no_other_components() -> None:
    torch.manual_seed(0)
    widths = ((6, 12), (12, 12), (12, 12))
    blocks = [(nn.Linear(*pair), nn.BatchNorm1d(12), nn.ReLU()) for pair in widths]
    net = nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(12, 3))
    for batch in samples(seed=2):
        net(batch)
    folded = copy.deepcopy(net.eval())
    for i in (0, 3, 6):
        folded[i] = fuse_linear_bn_eval(folded[i], folded[i + 1])  # type: ignore[type-var]
        folded[i + 1] = nn.Identity()
    torch.testing.assert_close(folded(samples()[0]), net(samples()[0]))
    for one, other in ((net, folded), (folded, net)):
        found = drift(credit_report(one, samples()), other, samples())
        assert found.components == ("0", "3", "6", "9")
        assert np.abs(found.drift).max() < 1e-6
        assert not found.changed.any()
        assert drift(credit_report(one, samples()), broken(other, "3"), samples(seed=1)).culprit == "3"


class Adapted(nn.Module):
    """A layer with an addition of low rank beside it, as adapters have."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.base_layer)
        layer.weight += self.up.weight @ self.down.weight
        return layer


def with_norms() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [(nn.Linear(n, 12), nn.BatchNorm1d(12), nn.ReLU()) for n in (6, 12)]
    net = nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(12, 3))
    for batch in samples(seed=2):
        net(batch)
    return net.eval()


def test_norms_behind_adapters_are_matched_with_those_behind_layers() -> None:
    net, layers = with_norms(), (0, 3, 6)
    adapted = copy.deepcopy(net)
    for i in layers:
        adapted[i] = Adapted(adapted[i])  # type: ignore[arg-type]
    merged = copy.deepcopy(adapted)
    for i in layers:
        merged[i] = merged[i].merged()  # type: ignore[operator]
    of_layers, of_adapted = (credit_report(one, samples()) for one in (net, adapted))
    assert (of_layers.components, of_adapted.components) == (("0", "3", "6"), ("0", "1", "3", "4", "6"))
    for report in (of_layers, of_adapted):
        found, expected = (drift(report, one, samples(seed=1)) for one in (adapted, merged))
        assert found.components == report.components
        np.testing.assert_allclose(found.drift, expected.drift, atol=1e-5)
        np.testing.assert_array_equal(found.changed, expected.changed)
    assert drift(of_layers, adapted, samples(seed=1)).changed.any()


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_norms_behind_layers_in_eight_bits_belong_to_these() -> None:
    net = with_norms()
    narrow = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear}, dtype=torch.qint8)
    report = credit_report(net, samples())
    assert credit_report(narrow, samples()).components == report.components
    found = drift(report, narrow, samples(seed=1))
    assert np.abs(found.drift).max() < 0.01


@pytest.mark.parametrize("options", [{}, {"delay": 2}], ids=str)
def test_where_data_skips_components_too(options: dict[str, Any]) -> None:
    net = Skips()
    report = credit_report(net, samples(), options=Options(**options))
    assert report.reads["head"][0] == "sum into head"
    assert set(report.reads["sum into head"]) >= {"second.0", "sum into second"}
    assert drift(report, broken(net, "second"), samples(seed=1)).culprit == "second.0"
    assert np.abs(drift(report, net, samples(seed=1)).drift).max() < 0.01


class Cut(Skips):
    """The same components, of which the last reads one block alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.second(x + self.first(x)))


@pytest.mark.parametrize("is_cut_before", [False, True])
def test_a_connection_that_was_cut_or_made_shows_in_what_reads_it(is_cut_before: bool) -> None:
    torch.manual_seed(0)
    net, cut = Skips(), Cut()
    cut.load_state_dict(net.state_dict())
    before, now = (cut, net) if is_cut_before else (net, cut)
    # Where a sum was, it is what changed.
    culprit = "head" if is_cut_before else "sum into head"
    assert drift(credit_report(before, samples()), now, samples(seed=1)).culprit == culprit


def test_wide_states_meet_in_the_basis_of_the_reference(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 3))
    report = credit_report(net, samples(), options=Options(max_dim=16))
    path = tmp_path / "reference.safetensors"
    report.save_reference(path)
    assert drift(path, broken(net, "2"), samples(seed=1)).culprit == "2"
    again = [drift(given, net, samples(seed=3)) for given in (path, report)]
    assert np.allclose(again[0].drift, again[1].drift, rtol=0, atol=1e-12)
    assert np.abs(again[0].drift).max() < 0.01


def test_the_same_samples_of_the_same_network_drift_by_rounding_alone() -> None:
    net = mlp()
    found = drift(credit_report(net, samples()), net, samples())
    assert np.abs(found.drift).max() < 1e-6
    assert found.culprit is None


@pytest.mark.filterwarnings("ignore:.*are few for states this wide")
def test_a_note_tells_where_the_reference_rests_on_too_few_samples() -> None:
    def marks(before: int, now: int, after: nn.Module) -> tuple[bool, bool]:
        report = credit_report(model, samples(before, seed=10 + seed))
        found = drift(report, after, samples(now, seed=100 + seed))
        told = f"the reference rests on {before} samples, few for states" in str(found.notes)
        return bool(found.changed.any()), told

    marked = []
    for seed in range(10):
        torch.manual_seed(seed)
        model = mlp()
        marked.append(marks(6, 300, model))
        assert marks(60, 300, broken(model, "2")) == (True, False)
        assert not marks(12, 12, model)[1]
    # No weight has moved, and yet most have marks; each time it is told why.
    assert sum(changed for changed, _ in marked) >= 4
    assert all(changed == told for changed, told in marked)


def test_notes_tell_where_drift_is_too_small_to_show_a_change() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    data = samples(600, width=64)
    report = credit_report(net, data, max_samples=None)
    few = drift(report, net, samples(60, seed=1, width=64))
    assert few.notes[0].startswith("60 samples are few for states this wide")
    assert few.notes[0].endswith("take 160 or more")
    assert (few.drift[:2] < 0).all()
    # Next to the same samples, but none has the bits that it had.
    rounded = drift(report, net, [batch * (1 + 3e-7) for batch in data])
    assert "has seen them, rounded otherwise" in rounded.notes[0]
    assert "Note: the reference explains more" in " ".join(str(rounded).split())
    assert (rounded.drift[:2] < -5 * rounded.stderr[:2]).all()
    assert drift(report, net, data).notes == ()
    for seed in range(1, 6):
        assert drift(report, net, samples(600, seed=seed, width=64)).notes == ()


@pytest.mark.parametrize(
    ("change", "is_moved", "is_widened"),
    [
        (lambda x: x, False, False),
        (lambda x: x + 1, True, False),
        (lambda x: 3 * x, False, True),  # about a mean of zero, which stays
        (lambda x: 0.7 * x, False, True),
        (lambda x: 3 * (x + 0.5), True, True),
    ],
)
def test_notes_tell_where_the_inputs_are_others(
    change: Callable[[Tensor], Tensor], is_moved: bool, is_widened: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = mlp()
    seen = torch.cat(samples(1500))
    given = change(torch.cat(samples(1000, seed=1)))
    report = credit_report(net, seen.split(300), max_samples=None)
    found = drift(report, net, given.split(300))
    spreads = [float(x.var(dim=0).sum().sqrt()) for x in (given, seen)]
    away = float((given.mean(dim=0) - seen.mean(dim=0)).norm()) / spreads[0]
    assert found.moved == pytest.approx(away if is_moved else 0, rel=0.01)
    assert found.widened == pytest.approx(spreads[0] / spreads[1] if is_widened else 1, rel=0.01)
    others = "components may be marked for what they are given; to tell, take samples like those"
    mean = f"the mean of the input is {found.moved:.2f} of its spread away from the reference's"
    spread = f"the spread of the input is {found.widened:.2g} times the reference's"
    told = {f"{mean}, and {others}": is_moved, f"{spread}, and {others}": is_widened}
    assert found.notes == tuple(note for note, is_told in told.items() if is_told)
    report.save_reference(tmp_path / "it.safetensors")
    assert drift(tmp_path / "it.safetensors", net, given.split(300)).notes == found.notes
    # Beside weights that changed there is nothing to tell where samples are alike.
    assert not drift(report, broken(net, "2"), samples(seed=1)).notes


def test_sequences_of_another_length_are_pooled_to_the_same_cells() -> None:
    net = Words()

    def ids(length: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return list(torch.randint(20, (1200, length), generator=generator).split(400))

    report = credit_report(net, ids(40, 0), options=Options(max_dim=32))
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.rnn.weight_ih_l0[::2] *= -1
    assert drift(report, broken, ids(48, 1)).culprit == "rnn"
    assert np.abs(drift(report, net, ids(40, 1)).drift).max() < 0.02


def test_positions_that_are_there_twice_are_pooled_to_those_of_the_reference() -> None:
    class Positions(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(dim=1)

    torch.manual_seed(0)
    net = Positions(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(1200, 6, 4)
    report = credit_report(net, x.split(400), options=Options(max_dim=48), max_samples=None)
    found = drift(report, net, x.repeat_interleave(2, dim=1).split(400))
    assert report.reference is not None
    assert set(report.reference.grids.values()) == {(6,)}
    assert np.abs(found.drift).max() < 1e-6


def test_lifted_states_are_lifted_as_the_reference_was(tmp_path: Path) -> None:
    net = mlp()
    for lift in ("rff", "rbf", "polynomial"):
        report = credit_report(net, samples(), options=Options(max_dim=24, observables=lift))
        path = tmp_path / f"{lift}.safetensors"
        report.save_reference(path)
        both = [drift(given, net, samples(seed=1)) for given in (report, path)]
        assert np.allclose(both[0].drift, both[1].drift, rtol=0, atol=1e-9)
        assert np.abs(both[0].drift).max() < 0.01
        found = drift(path, broken(net, "2"), samples(seed=1))
        assert found.components[found.drift.argmax()] == "2"


def test_functions_are_handed_over_again_for_a_file_holds_none(tmp_path: Path) -> None:
    net, path = mlp(), tmp_path / "reference.safetensors"

    def halves(rows: Tensor) -> Tensor:
        return rows[:, : rows.shape[1] // 2 + 1]

    def doubled(answer: Tensor) -> Tensor:
        return 2 * answer

    def squares(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows**2], dim=1)

    options = Options(reduce=halves, output=doubled, observables=squares)
    report = credit_report(net, samples(), options=options)
    report.save_reference(path)
    with pytest.raises(ValueError, match=r"yours for \['reduce', 'output', 'observables'\]"):
        drift(path, net, samples())
    found = drift(path, net, samples(seed=1), options=options)
    assert np.allclose(found.drift, drift(report, net, samples(seed=1)).drift, rtol=0, atol=1e-9)


def test_a_measurement_that_follows_a_reference_gives_drift_without_another_pass() -> None:
    net = mlp()
    report = credit_report(net, samples())
    assert report.reference is not None
    moved = broken(net, "4")
    measurement = Measurement(moved, None, Options())
    measurement.follow(report.reference)
    measurement.run(moved, samples(seed=1))
    ran = measurement.report(step=7)
    found = drift_since(report.reference, measurement, step=7)
    assert (found.culprit, found.step) == ("4", 7)
    assert np.array_equal(found.drift, drift(report, moved, samples(seed=1)).drift)
    assert np.allclose(ran.credit, credit_report(moved, samples(seed=1)).credit)


def measured(net: nn.Module, data: list[Tensor], max_dim: int = 256) -> Measurement:
    measurement = Measurement(net, None, Options(max_dim=max_dim))
    measurement.run(net, data)
    return measurement


@torch.no_grad()
def test_drift_from_an_earlier_measurement_is_that_from_its_report() -> None:
    torch.manual_seed(0)
    net, data = mlp(), [3 * (batch + 1) for batch in samples(1200, seed=1)]
    before = measured(net, samples())
    report = credit_report(net, samples())
    net[4].weight.neg_()  # type: ignore[operator]
    found = drift_from(before, measured(net, data), since=3, step=7)
    expected = dataclasses.replace(drift(report, net, data, step=7), since=3)
    assert found is not None
    assert expected.moved > 0.9
    assert expected.widened == pytest.approx(3, rel=0.05)
    for field in dataclasses.fields(expected):
        value, wanted = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(wanted, np.ndarray | float):
            np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-9)
        else:
            assert value == wanted, field.name
    assert str(found) == str(expected)


@torch.no_grad()
def test_components_that_read_and_give_known_coordinates_drift_beside_those_that_do_not() -> None:
    torch.manual_seed(0)
    net, data = mlp(), samples()
    before, report = measured(net, data, 8), credit_report(net, data, options=Options(max_dim=8))
    net[4].weight.neg_()  # type: ignore[operator]
    found = drift_from(before, measured(net, data, 8))
    expected = drift(report, net, data)
    assert found is not None
    assert list(expected.changed) == [False, False, True, True]
    for name in ("drift", "stderr", "old"):
        value, wanted = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(value[:2], wanted[:2], rtol=1e-6, atol=1e-9)
        assert np.isnan(value[2:]).all()
    assert not found.changed.any()
    # New operators are about the new coordinates, and need no old ones.
    now = credit_report(net, data, options=Options(max_dim=8))
    np.testing.assert_allclose(found.new, drift(now, net, data).new, rtol=1e-6)
    # Nothing is told of inputs in coordinates of their own.
    wide = [3 * (batch + 1) for batch in samples(seed=1)]
    other = drift_from(measured(net, data, 4), measured(net, wide, 4))
    assert other is not None
    assert (other.moved, other.widened) == (0, 1)
    assert np.isnan(other.drift).all()


def test_a_reference_stays_about_its_samples_when_more_arrive() -> None:
    net = mlp()
    measurement = Measurement(net, None, Options())
    measurement.run(net, samples())
    first, again = measurement.report(), credit_report(net, samples())
    measurement.run(net, samples(seed=1))
    last = measurement.report()
    assert (first.n_samples, last.n_samples) == (1500, 3000)
    found, expected, more = (r.reference for r in (first, again, last))
    assert found is not None
    assert expected is not None
    assert more is not None
    for i, operator in enumerate(found.operators):
        assert torch.allclose(operator, expected.operators[i], rtol=0, atol=1e-6)
        assert not torch.allclose(operator, more.operators[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", [0, -5, 2.5])
def test_numbers_of_samples_that_are_none_are_refused(number: Any) -> None:
    net = mlp()
    with pytest.raises(
        ValueError, match=f"max_samples is {number}; give a number of 1 or above, or None"
    ):
        drift(credit_report(net, samples()), net, samples(), max_samples=number)


def test_only_so_many_samples_are_taken() -> None:
    net = mlp()
    few = drift(credit_report(net, samples()), net, samples(), max_samples=np.int64(700))
    assert few.n_samples == 700


class Renamed(nn.Module):
    def __init__(self, net: nn.Sequential, second: str) -> None:
        super().__init__()
        self.first, self.names = net[0], ("first", second, "last")
        setattr(self, second, net[2])
        self.last = net[6]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x).relu()
        return x


def test_renamed_and_further_components_are_named() -> None:
    net = mlp()
    report = credit_report(Renamed(net, "second"), samples())
    other = Renamed(net, "middle")
    with pytest.raises(ValueError, match=r"missing \['second'\], not in the reference \['middle'\]"):
        drift(report, other, samples())
    more = Renamed(net, "second")
    more.names, more.more = ("first", "second", "more", "last"), nn.Linear(12, 12)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"missing \[\], not in the reference \['more'\]"):
        drift(report, more, samples())
    named = credit_report(Renamed(net, "second"), samples(), components=["second", "last"])
    assert drift(named, Renamed(net, "second"), samples(seed=1)).components == named.components
    with pytest.raises(ValueError, match=r"missing \['second'\]"):
        drift(named, other, samples())


def test_another_order_of_the_same_components_is_refused() -> None:
    net = Renamed(mlp(12), "second")
    net.last = nn.Linear(12, 12)
    report = credit_report(net, samples())
    net.names = ("first", "last", "second")
    with pytest.raises(ValueError, match=r"order \['input', 'first', 'last', 'second'\], the"):
        drift(report, net, samples())


def test_another_width_is_refused() -> None:
    report = credit_report(mlp(), samples())
    with pytest.raises(ValueError, match="component '6' gives 5 values per sample, in the reference 3"):
        drift(report, mlp(5), samples())


def test_a_report_from_json_has_no_reference(tmp_path: Path) -> None:
    report = credit_report(mlp(), samples())
    assert "reference" not in report.to_dict()
    read = CreditReport.from_dict(report.to_dict())
    with pytest.raises(ValueError, match="JSON and measurements without errors have none; give one"):
        drift(read, mlp(), samples())
    with pytest.raises(ValueError, match="without errors have none; save that of a report"):
        read.save_reference(tmp_path / "never")
    assert not list(tmp_path.iterdir())


def test_what_is_no_reference_or_no_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="reference has type Sequential; give a report"):
        drift(mlp(), mlp(), samples())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches is one tensor"):
        drift(credit_report(mlp(), samples()), mlp(), samples()[0])
    with pytest.raises(ValueError, match="no sample arrived"):
        drift(credit_report(mlp(), samples()), mlp(), [])


def test_the_network_is_left_as_it_was_found() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    report = credit_report(net, samples())
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    drift(report, net, samples(seed=1))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training and not module._forward_hooks for module in net.modules())


@torch.no_grad()
def test_small_faults_are_found_with_few_samples_and_none_where_nothing_changed() -> None:
    found, drifts = 0, []
    for seed in range(6):
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        net = nn.Sequential(*layers)
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight)
        report = credit_report(net, samples(170, 3 * seed, 64))
        same = drift(report, net, samples(170, 3 * seed + 1, 64))
        assert not same.changed.any()
        drifts.append(same.drift)
        net[2].weight += 0.3 * net[2].weight.std() * torch.randn(64, 64)
        found += drift(report, net, samples(170, 3 * seed + 2, 64)).culprit == "2"
    assert found >= 5
    assert np.abs(np.mean(drifts, axis=0)).max() < 0.01


@pytest.mark.slow
def test_false_alarms_are_few_however_many_samples() -> None:
    rows = marked = networks = 0
    for seed in range(75):
        n_old, n_new = [(400, 400), (400, 2000), (2000, 400), (60, 60), (60, 120)][seed // 15]
        torch.manual_seed(seed)
        width = 6 + seed % 3
        layers = [nn.Linear(width, 20), *(nn.Linear(20, 20) for _ in range(6)), nn.Linear(20, 4)]
        act = (nn.ReLU(), nn.Tanh(), nn.GELU())[seed % 3]
        net = nn.Sequential(*[part for layer in layers for part in (layer, act)][:-1])
        report = credit_report(net, samples(n_old, 2 * seed, width))
        found = drift(report, net, samples(n_new, 2 * seed + 1, width))
        rows, marked = rows + len(found.changed), marked + int(found.changed.sum())
        networks += bool(found.changed.any())
    assert networks <= 0.1 * 75
    assert marked <= 0.05 * rows
