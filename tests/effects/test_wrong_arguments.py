"""Arguments of another type than the one that is meant are refused by name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import bit_widths, component_effects, credit_report, drop_order, linearize

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
DATA = [(X[:30], Y[:30]), (X[30:], Y[30:])]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).eval()


@pytest.mark.parametrize("to_batches", [tuple, list])
@pytest.mark.parametrize("ask", [credit_report, component_effects, drop_order, linearize, bit_widths])
def test_an_input_and_its_target_are_no_batches(ask, to_batches):
    with pytest.raises(ValueError, match=r"shapes \(60, 6\), \(60,\), …, .* pass \[\(x, y\)\] for a"):
        ask(network(), to_batches((X, Y)))


def test_batches_of_inputs_alone_are_taken_as_before():
    assert drop_order(network(), X.split(20)).n_samples == 60
    assert drop_order(network(), [X[:20], X[20:]]).n_samples == 60


@pytest.mark.parametrize(
    ("ask", "given", "message"),
    [
        (drop_order, {"samples": 1.5}, "samples is 1.5; it must be an integer"),
        (drop_order, {"samples": True}, "samples is True; it must be an integer"),
        (drop_order, {"steps": 1.5}, "steps is 1.5; it must be an integer"),
        (drop_order, {"max_drop": "1%"}, "max_drop is '1%'; it must be a number"),
        (
            drop_order,
            {"metric": "accuracy"},
            r"metric is 'accuracy'; it must be a function, called as m",
        ),
        (drop_order, {"forward_fn": "f"}, "forward_fn is 'f'; it must be a function, called as forward"),
        (
            drop_order,
            {"report": "report.json"},
            "report is 'report.json'; it must be what credit_report",
        ),
        (component_effects, {"report": "report.json"}, "report is 'report.json'; it must be what"),
        (
            component_effects,
            {"kinds": ["output_noise"], "draws": 2.5},
            "draws is 2.5; it must be an int",
        ),
        (component_effects, {"probes": 1.5}, "probes is 1.5; it must be an integer"),
        (component_effects, {"seed": "a"}, "seed is 'a'; it must be an integer"),
        (component_effects, {"strength": "0.3"}, "strength is '0.3'; it must be a number"),
        (
            component_effects,
            {"initial": nn.Linear(1, 1)},
            "initial is of type Linear; it must be a state",
        ),
        (linearize, {"variance": "all"}, "variance is 'all'; it must be a number"),
        (linearize, {"max_dim": 2.5}, "max_dim is 2.5; it must be an integer"),
        (linearize, {"fit_batches": []}, "fit_batches holds no batch; give some to fit maps on"),
        (bit_widths, {"bits": 4}, "bits is 4; it must be a list, of which each entry is an integer"),
        (bit_widths, {"bits": (8, 4.5)}, r"bits\[1\] is 4.5; it must be an integer"),
        (bit_widths, {"average": "3"}, "average is '3'; it must be a number"),
        (bit_widths, {"group_size": 1.5}, "group_size is 1.5; it must be an integer"),
    ],
)
def test_another_type_is_refused_by_name(ask, given, message):
    with pytest.raises(ValueError, match=message):
        ask(network(), DATA, **given)


def test_numbers_of_numpy_are_numbers():
    found = drop_order(network(), DATA, max_drop=np.float32(1), steps=np.int64(1), samples=np.int32(40))
    assert (found.n_samples, len(found.components)) == (40, 1)


def test_replacements_come_by_name():
    net = network()
    weights = copy.deepcopy(net.state_dict())
    with pytest.raises(
        ValueError, match=r"replacements\['0.weight'\] is of type Tensor; it must be a s"
    ):
        component_effects(net, DATA, replacements=weights)
    with pytest.raises(
        ValueError, match="replacements is of type Sequential; it must be state_dicts by"
    ):
        component_effects(net, DATA, replacements=net)
    assert (
        component_effects(net, DATA, kinds=[], replacements={"same": weights}).values["same"].max()
        < 1e-9
    )


@pytest.mark.parametrize("ask", [component_effects, drop_order])
def test_a_metric_gives_one_number(ask):
    def by_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).float()

    with pytest.raises(ValueError, match=r"metric returned Tensor of shape \(60,\); let it return one"):
        ask(network(), DATA, metric=by_sample)
    with pytest.raises(ValueError, match="metric returned NoneType; let it return one number"):
        ask(network(), DATA, metric=lambda outputs, targets: None)
    found = ask(network(), DATA, metric=lambda outputs, targets: by_sample(outputs, targets).mean())
    assert found.metric_before == pytest.approx(ask(network(), DATA).metric_before)


def test_another_network_than_the_one_that_was_decided_on_is_refused():
    found = drop_order(network(), DATA, components=["2"], steps=1)
    with pytest.raises(ValueError, match="Sequential has no module '2', in whose place another goes"):
        found.apply(nn.Sequential(nn.Linear(6, 6)), 1)
    with pytest.raises(ValueError, match=r"model has type NoneType; it must be a torch\.nn\.Module"):
        found.apply(None, 1)
    with pytest.raises(ValueError, match=r"steps is 0\.5; it must be an integer"):
        found.apply(network(), 0.5)


def test_a_file_is_not_written_into_a_folder_that_is_not_there(tmp_path):
    report = credit_report(network(), DATA)
    path = tmp_path / "nowhere" / "report.json"
    for write in (report.to_json, report.save_reference):
        with pytest.raises(
            FileNotFoundError, match=r"report\.json cannot be written, for there is no folder"
        ):
            write(path)
    assert not path.parent.exists()
