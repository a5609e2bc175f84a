"""Arguments of another type are refused by name, wherever the package is entered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_koopman import (
    KoopmanCredit,
    KoopmanCreditMonitor,
    Options,
    component_effects,
    credit_report,
    drift,
    evaluate_checkpoints,
    fit_operator,
    linearize,
)

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def report(**given: Any) -> Any:
    return credit_report(network(), [X], **given)


def held_against(**given: Any) -> Any:
    return drift(report(), network(), [X], **given)


def fit(**given: Any) -> Any:
    return fit_operator(**{"x": X, "y": X, **given})


def predict(**given: Any) -> Any:
    return fit().predict(**given)


def evaluate(**given: Any) -> Any:
    return evaluate_checkpoints(network(), **{"checkpoints": "none.ckpt", "batches": [X], **given})


def update(**given: Any) -> None:
    KoopmanCredit().update(**{"states": [X, X], **given})


@pytest.mark.parametrize(
    ("ask", "given", "message"),
    [
        (Options, {"tikhonov": "a"}, "tikhonov is 'a'; it must be a number"),
        (Options, {"rank": True}, "rank is True; it must be an integer"),
        (Options, {"folds": 2.5}, r"folds is 2\.5; it must be an integer"),
        (Options, {"seed": None}, "seed is None; it must be an integer"),
        (Options, {"targets": 1}, "targets is 1; it must be a list, of which each entry is an integer"),
        (Options, {"targets": [0.5]}, r"targets\[0\] is 0\.5; it must be an integer"),
        (Options, {"output": ["2"]}, "output is of type list; it must be the name of a module, or a fu"),
        (fit, {"x": X.numpy()}, r"x is of type ndarray; it must be a torch\.Tensor"),
        (fit, {"y": None}, r"y is None; it must be a torch\.Tensor"),
        (fit, {"folds": 2.5}, r"folds is 2\.5; it must be an integer"),
        (fit, {"rank": 2.5}, r"rank is 2\.5; it must be an integer"),
        (fit, {"seed": "a"}, "seed is 'a'; it must be an integer"),
        (predict, {"x": [[1.0]]}, r"x is of type list; it must be a torch\.Tensor"),
        (report, {"forward_fn": "f"}, "forward_fn is 'f'; it must be a function, called as forward_fn"),
        (report, {"step": "last"}, "step is 'last'; it must be an integer"),
        (held_against, {"forward_fn": 1}, "forward_fn is 1; it must be a function, called as"),
        (held_against, {"step": 0.5}, r"step is 0\.5; it must be an integer"),
        (held_against, {"options": {}}, r"options is of type dict; it must be Options, such as Options"),
        (evaluate, {"checkpoints": 1}, "checkpoints is 1; it must be a path, or a list of paths"),
        (evaluate, {"checkpoints": [None]}, r"checkpoints\[0\] is None; it must be a path"),
        (evaluate, {"shard": "1/2"}, "shard is '1/2'; it must be a list, of which each entry is an int"),
        (evaluate, {"shard": [1]}, "shard is 1; write i/n with i from 1 to n"),
        (evaluate, {"on_report": "print"}, "on_report is 'print'; it must be a function"),
        (evaluate, {"known": ["a.json"]}, r"known\[0\] is 'a.json'; it must be what credit_report"),
        (evaluate, {"about": "me"}, "about is 'me'; it must be names of model and data"),
        (evaluate, {"effects": 2}, r"effects is 2; it must be a list of some of \('linear'"),
        (evaluate, {"effects": "skip"}, r"effects is 'skip'; give a list of some of \('linear'"),
        (KoopmanCreditMonitor, {"effects": None}, "effects is None; it must be a list of some of"),
        (KoopmanCreditMonitor, {"effects": False}, r"effects is False; .* or \(\) for none"),
        (KoopmanCreditMonitor, {"max_overhead": "5%"}, "max_overhead is '5%'; it must be a number"),
        (KoopmanCreditMonitor, {"every_n_epochs": 1.5}, r"every_n_epochs is 1\.5; it must be an"),
        (KoopmanCreditMonitor, {"max_samples": "9"}, "max_samples is '9'; it must be an integer"),
        (KoopmanCredit, {"quantities": None}, "quantities is None; give a list, with names out of"),
        (KoopmanCredit, {"components": "ab"}, "components is 'ab'; it must be a list, of which each"),
        (KoopmanCredit, {"components": [0]}, r"components\[0\] is 0; it must be a name"),
        (KoopmanCredit, {"dims": [4, "4"]}, r"dims\[1\] is '4'; it must be an integer"),
        (KoopmanCredit, {"center": [0.0]}, r"center\[0\] is 0\.0; it must be a torch\.Tensor"),
        (KoopmanCredit, {"links": [0]}, r"links\[0\] is 0; it must be a list of integers"),
        (KoopmanCredit, {"links": [[0], ["a"]]}, r"links\[1\]\[0\] is 'a'; it must be an integer"),
        (update, {"states": 1}, "states is 1; it must be a list of tensors, or a mapping to them"),
        (update, {"states": [X.numpy()]}, r"states\[0\] is of type ndarray; it must be a torch\.Tensor"),
        (update, {"keys": [0, 1]}, r"keys is of type list; it must be a torch\.Tensor"),
    ],
)  # fmt: skip
def test_another_type_is_refused_before_any_work_is_done(ask: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(**given)


@pytest.mark.parametrize("keys", [torch.zeros(2, dtype=torch.int64), torch.zeros(60)])
def test_keys_are_one_integer_per_sample(keys: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"keys has shape .* expected one integer per sample, \(60,\)"):
        update(keys=keys)
    update(keys=torch.arange(60))


@pytest.mark.parametrize(
    "ask", [lambda z: fit(x=z), lambda z: predict(x=z), lambda z: update(states=[X, z])]
)
def test_complex_states_are_refused(ask: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.complex64 arrived; complex states are not"):
        ask(torch.complex(X, X))


def test_a_number_is_a_state_of_one_sample() -> None:
    metric = KoopmanCredit()
    metric.update([torch.tensor(1.0), torch.tensor(2.0)])
    assert metric.layout is not None
    assert metric.layout.dims == (1, 1)


def test_components_are_no_number_with_a_fraction() -> None:
    with pytest.raises(TypeError, match=r"components holds 2\.5; give names, glob patterns, types"):
        report(components=2.5)


def test_a_class_is_no_network() -> None:
    with pytest.raises(ValueError, match=r"model is the class Linear; pass an instance, Linear\("):
        linearize(nn.Linear, [X])  # type: ignore[arg-type]


def test_numbers_of_numpy_are_taken_by_options_and_written_to_files(tmp_path: Any) -> None:
    given: Any = {
        "folds": np.int64(3),
        "max_dim": np.int32(2),
        "seed": np.int64(1),
        "targets": [np.int64(0)],
    }
    found = credit_report(network(), [X], options=Options(**given, tikhonov=np.float32(0.01)))
    found.save_reference(tmp_path / "reference")
    assert held_against().components == found.components
    assert KoopmanCredit(folds=np.int64(3), dims=[4, 2]).layout.folds == 3  # type: ignore[call-arg, union-attr]


def test_any_integer_is_a_seed() -> None:
    found = component_effects(network(), [X], kinds=["output_noise"], seed=-1)
    assert found.values["output_noise"].shape == (2,)
