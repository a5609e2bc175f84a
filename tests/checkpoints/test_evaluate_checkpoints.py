from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, dataset, events
from small import save
from torch import nn
from torch.utils.data import DataLoader

from lightning_koopman import CheckpointError, EvaluationError, credit_report, evaluate_checkpoints

BATCHES = list(dataset().tensors[0].split(60))


def checkpoints(folder: Path, steps: tuple[int, ...] = (30, 10, 20)) -> dict[int, LitNet]:
    models = {}
    for step in steps:
        torch.manual_seed(step)
        models[step] = LitNet()
        save(folder / f"{step}.ckpt", step, state_dict=models[step].state_dict())
    return models


@pytest.mark.usefixtures("no_pixels")
def test_each_checkpoint_is_measured_at_its_own_step_in_order(tmp_path):
    models = checkpoints(tmp_path)
    host = LitNet()
    before = {k: v.clone() for k, v in host.state_dict().items()}
    reports = evaluate_checkpoints(host, tmp_path, BATCHES, logdir=tmp_path / "tb")
    assert [report.step for report in reports] == [10, 20, 30]
    for report in reports:
        assert report.step is not None
        np.testing.assert_array_equal(report.credit, credit_report(models[report.step], BATCHES).credit)
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())

    assert reports[0].credit[-1] == 0, "by definition, and so not drawn"
    for i, component in enumerate(reports[0].components[:-1]):
        run = events(tmp_path / "tb" / "koopman" / f"{i + 1}-{component}")
        logged = run.Scalars("koopman/credit")
        assert [event.step for event in logged] == [10, 20, 30]
        values = [event.value for event in logged]
        np.testing.assert_allclose(values, [report.credit[i] for report in reports], rtol=1e-6)


def test_a_generator_of_batches_serves_every_checkpoint_and_progress_is_told(tmp_path):
    checkpoints(tmp_path)
    seen: list[tuple[int, int]] = []
    count = {"on_progress": lambda *counts: seen.append(counts)}
    reports = evaluate_checkpoints(LitNet(), tmp_path, iter(BATCHES), **count)
    assert [report.n_samples for report in reports] == [160, 160, 160]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_random_states_stay_whatever_loader_gives_the_batches(tmp_path):
    checkpoints(tmp_path)
    host, state = LitNet(), torch.get_rng_state()
    reports = evaluate_checkpoints(host, tmp_path, DataLoader(dataset(), 40, shuffle=True))
    assert [report.n_samples for report in reports] == [160, 160, 160]
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_checkpoints_are_named_after_the_good_ones_were_measured(tmp_path):
    checkpoints(tmp_path, (10, 20))
    save(tmp_path / "narrow.ckpt", 15, state_dict=LitNet(width=5).state_dict())
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    with pytest.raises(EvaluationError) as caught:
        evaluate_checkpoints(LitNet(), [tmp_path, tmp_path / "gone.ckpt"], BATCHES)
    assert [report.step for report in caught.value.reports] == [10, 20]
    assert len(caught.value.failures) == 3
    for part in ("gone.ckpt does not exist", "broken.ckpt", "narrow.ckpt does not fit LitNet: 'net.0."):
        assert part in str(caught.value)


def test_weights_that_give_no_credits_are_told_and_the_other_checkpoints_measured(tmp_path):
    models = checkpoints(tmp_path)
    state = models[10].state_dict()
    first, last = next(iter(state)), list(state)[-2:]
    save(tmp_path / "nan.ckpt", 15, state_dict={**state, first: state[first] / 0})
    large = {name: value * 1e30 for name, value in state.items()}
    save(tmp_path / "large.ckpt", 16, state_dict=large)
    dead = {**state, **{name: torch.zeros_like(state[name]) for name in last}}
    save(tmp_path / "dead.ckpt", 1, state_dict=dead)
    with pytest.raises(EvaluationError) as caught:
        evaluate_checkpoints(LitNet(), tmp_path, BATCHES)
    assert [report.step for report in caught.value.reports] == [10, 20, 30]
    for report in caught.value.reports:
        np.testing.assert_array_equal(report.credit, credit_report(models[report.step], BATCHES).credit)
    assert [Path(told.split()[0]).name for told in caught.value.failures] == [
        "dead.ckpt",
        "nan.ckpt",
        "large.ckpt",
    ]
    for part in (
        "dead.ckpt cannot be measured: the output of the last component is constant",
        f"nan.ckpt cannot be measured, for its {first!r} holds NaN or infinity; its training",
        "large.ckpt cannot be measured: component",
    ):
        assert part in str(caught.value)
    # What is wrong with the data is wrong with all checkpoints, and told once.
    with pytest.raises(ValueError, match=r"^the network's input holds NaN in batch 0"):
        evaluate_checkpoints(LitNet(), tmp_path, [BATCHES[0] * torch.nan])


def test_the_model_gets_its_weights_back_when_measuring_fails(tmp_path):
    checkpoints(tmp_path, (10,))
    host = LitNet()
    before = {k: v.clone() for k, v in host.state_dict().items()}

    def broken(model: Any, batch: Any) -> None:
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        evaluate_checkpoints(host, tmp_path, BATCHES, forward_fn=broken)
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())


class Distilled(LitNet):
    """Leaves a frozen part out of its checkpoints, as Lightning allows."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.strict_loading = nn.Linear(8, 3), False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("teacher.")}


def test_what_a_module_leaves_out_of_its_checkpoints_stays_as_it_was_built(tmp_path):
    models = checkpoints(tmp_path)
    host = Distilled()
    kept = host.teacher.weight.detach().clone()
    for report in evaluate_checkpoints(host, tmp_path, BATCHES):
        expected = credit_report(models[report.step], BATCHES)
        np.testing.assert_array_equal(report.credit, expected.credit)
    assert torch.equal(host.teacher.weight, kept)
    save(tmp_path / "lacks.ckpt", 15, state_dict={"net.0.weight": torch.zeros(16, 8)})
    with pytest.raises(CheckpointError, match="does not fit Distilled: it lacks 'net"):
        evaluate_checkpoints(host, tmp_path / "lacks.ckpt", BATCHES)


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint matches"):
        evaluate_checkpoints(LitNet(), str(tmp_path / "*.ckpt"), BATCHES)
