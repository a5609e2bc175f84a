"""Model families as people use them, without options: all that reaches the outputs is in the report."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family, build, loader
from graphs import NAMES, graphs, networks
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_koopman import CreditReport, KoopmanCreditMonitor, Options, credit_report
from lightning_koopman.network.tensors import all_tensors

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def outputs_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """Run the model as the user does; what it returned, and the loss among it."""
    returned = model(**batch) if isinstance(batch, dict) else model(batch)
    return [tensor for tensor in all_tensors(returned) if tensor.requires_grad]


def unreported(model: nn.Module, batch: Any, report: CreditReport) -> list[str]:
    """List the parameters that move the outputs, by autograd alone, and that no state or note names."""
    # Caches and lists of hidden states lead to nothing else: the losses and last states are enough.
    given = outputs_of(model, batch)
    losses = [tensor for tensor in given if not tensor.ndim] or given[:2]
    model.zero_grad()
    sum((tensor.double().square().mean() for tensor in losses), torch.zeros(())).backward()
    states = {*report.components, *(state for read in report.reads.values() for state in read)}
    calls = {part.partition("#")[0].removesuffix(".*") for s in states for part in s.split("+")}
    said = " ".join(report.notes)
    missing = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and bool(parameter.grad.any()):
            holder = model.get_submodule(name.rpartition(".")[0])
            inside = any(name.startswith(f"{call}.") for call in calls)
            named = any(name[: i + 1].rstrip(".") in said for i, c in enumerate(name) if c == ".")
            # Norms that follow a component at once belong to it.
            if not inside and not named and name not in said and "Norm" not in type(holder).__name__:
                missing.append(name)
    model.zero_grad()
    return missing


def check(model: nn.Module, batches: Iterable[Any]) -> CreditReport:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = credit_report(model, batches, options=Options(max_dim=16))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    dead = " ".join(note for note in report.notes if "dead branch" in note)
    for quantity in ("credit", "gain", "r2", "chain_r2"):
        finite = np.isfinite(getattr(report, quantity))
        assert all(name in dead for name, ok in zip(report.components, finite, strict=True) if not ok)
    assert np.nansum(report.gain) == pytest.approx(report.total)
    assert len(report.components) >= 3
    return report


def blocks_inside(model: nn.Module, report: CreditReport) -> list[str]:
    """List components that hold a list of blocks, each of several layers, though they are no blocks."""
    modules = dict(model.named_modules())
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    blocks = {id(block) for part in lists for block in part}

    def holds_blocks(module: nn.Module) -> bool:
        return any(
            len({type(block) for block in part}) == 1 < len(part)
            and all(sum(bool(m._parameters) for m in block.modules()) > 3 for block in part)
            for part in module.modules()
            if isinstance(part, nn.ModuleList)
        )

    names = [part.partition("#")[0] for state in report.components for part in state.split("+")]
    chosen = {name: modules[name] for name in names if name in modules}
    return [name for name, part in chosen.items() if id(part) not in blocks and holds_blocks(part)]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_families_of_transformers(family: Family) -> None:
    pytest.importorskip("transformers", "5")
    model = build(family)
    batches = loader(family, model)
    report = check(model, batches)
    assert unreported(model, next(iter(batches)), report) == []
    assert blocks_inside(model, report) == []


@pytest.mark.parametrize("name", NAMES)
def test_networks_on_graphs(name: str) -> None:
    pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    model = networks()[name]().eval()
    report = check(model, graphs())
    assert unreported(model, next(iter(graphs())), report) == []
    assert (report.n_samples == 240) == ("nodes" not in name)


class Training(LightningModule):
    """Trains a model of transformers on the loss that it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


TRAINED = (
    ("albert", "SequenceClassification"),
    ("bert", "MaskedLM"),
    ("beit", "SemanticSegmentation"),
    ("detr", "ObjectDetection"),
    ("llama", "SequenceClassification"),
    ("resnet", "ImageClassification"),
    ("t5", "Seq2SeqLM"),
    ("wav2vec2", "AudioClassification"),
)


@pytest.mark.parametrize(("name", "task"), TRAINED)
def test_families_in_a_trainer_are_trained_the_same_and_reported(
    name: str, task: str, tmp_path: Any
) -> None:
    pytest.importorskip("transformers", "5")
    family = next(f for f in FAMILIES if (f.name, f.task) == (name, task))
    weights, monitor = [], KoopmanCreditMonitor(options=Options(max_dim=16))
    for callbacks in ([], [monitor]):
        module = Training(build(family))
        torch.manual_seed(2)
        trainer = Trainer(
            max_epochs=1,
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        batches = loader(family, module.model)
        trainer.fit(module, batches, batches)
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert monitor.report is not None
    assert np.isfinite(monitor.report.r2).all()
    named = {part.partition("#")[0] for state in monitor.report.components for part in state.split("+")}
    expected = credit_report(build(family), batches, options=Options(max_dim=16))
    parts = {part for state in expected.components for part in state.split("+")}
    assert {part if part == "output" else f"model.{part}" for part in parts} >= named
