"""The commands that alter a trained network, for a while or for good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from lightning_koopman.effects import KINDS, Kind, Scale
from lightning_koopman.user_code import build_trained, fit_and_choose

if TYPE_CHECKING:
    from lightning_koopman.checkpoints import Checkpoint
    from lightning_koopman.report import CreditReport


def linearize(
    model: str,
    data: str,
    ckpt: str,
    out: str,
    max_drop: float = 0.01,
    components: str | list[str] | None = None,
    max_dim: int = 256,
    seed: int = 0,
    trust_checkpoint: bool = False,
) -> None:
    """Replace as many components as possible by linear layers, and write the new checkpoint.

    Args:
        model: Model to build, as in evaluate.
        data: Data, as pkg.mod:DataModule: linear layers are fitted on its training loader and chosen on
            its validation loader. Of the batches that a function or object gives, those at even places
            are fitted on, and the others chosen on.
        ckpt: Checkpoint of the trained network.
        out: Checkpoint to write; lightning_koopman.linear_component.load_linearized reads it.
        max_drop: Largest drop of the accuracy; without class targets, largest relative squared change
            of the outputs.
        components: Names or glob patterns of components; chosen by default.
        max_dim: Most directions of a wide input that are kept.
        seed: Chooses the folds, and the order of a loader that shuffles.
        trust_checkpoint: Unpickle whatever the checkpoint holds. It may then run any code.
    """
    from lightning_koopman.linear_component import save_linearized
    from lightning_koopman.linearization import linearize_within

    network, checkpoint = build_trained(model, ckpt, trust_checkpoint)
    fit_on, choose_on, report = _measured(network, checkpoint, data, components, max_dim, seed)
    result = linearize_within(
        network, report, fit_on, choose_on, max_drop=max_drop, max_dim=max_dim, seed=seed
    )
    Console().print(result)
    more: dict[str, Any] = {} if checkpoint.step is None else {"global_step": checkpoint.step}
    more["hyper_parameters"] = dict(checkpoint.hyper_parameters)
    more["datamodule_hyper_parameters"] = dict(checkpoint.data_hyper_parameters)
    save_linearized(result.model, out, more=more)
    Console().print(f"Written to {out}", highlight=False, soft_wrap=True)


def intervene(
    model: str,
    data: str,
    ckpt: str,
    kinds: list[Kind] | None = None,
    components: str | list[str] | None = None,
    initial_checkpoint: str | None = None,
    strength: float = 0.3,
    draws: int = 5,
    scale: Scale | None = None,
    figure: str | None = None,
    out: str | None = None,
    max_dim: int = 256,
    seed: int = 0,
    trust_checkpoint: bool = False,
) -> None:
    """Alter one component after the other: the predicted effect on the outputs beside the measured one.

    Args:
        model: Model to build, as in evaluate.
        data: Data, as pkg.mod:DataModule: effects are predicted on its training loader and measured on
            its validation loader. Of the batches that a function or object gives, those at even places
            are for the prediction, and the others for the measurement.
        ckpt: Checkpoint of the trained network.
        kinds: Alterations out of linear, reinit, weight_noise, output_noise and skip; all by default.
        components: Names or glob patterns of components; chosen by default.
        initial_checkpoint: Weights that training began with, for reinit; drawn anew by default.
        strength: Noise, as a share of the standard deviation.
        draws: Number of draws that measured effects of kinds with a random part are averaged over.
        scale: kl, or relative; by default kl where targets are class indices.
        figure: File for a figure of predicted against measured effects.
        out: JSON file for the report with its predicted effects.
        max_dim: Wider states are pooled and projected.
        seed: Seed of everything that is drawn, the order of a loader that shuffles included.
        trust_checkpoint: Unpickle whatever the checkpoints hold. They may then run any code.
    """
    from lightning_koopman.checkpoints import load_checkpoint
    from lightning_koopman.measured_effects import intervene
    from lightning_koopman.predictions import predict_effects

    network, checkpoint = build_trained(model, ckpt, trust_checkpoint)
    initial = (
        initial_checkpoint and load_checkpoint(initial_checkpoint, trust=trust_checkpoint).state_dict
    )
    fit_on, measure_on, report = _measured(network, checkpoint, data, components, max_dim, seed)
    asked: dict[str, Any] = {
        "initial": initial or None,
        "strength": strength,
        "scale": scale,
        "seed": seed,
    }
    report = predict_effects(network, fit_on, report, kinds or KINDS, **asked)
    result = intervene(
        network, measure_on, report, kinds or KINDS, fit_batches=fit_on, draws=draws, **asked
    )
    Console().print(result)
    if figure is not None:
        result.plot().savefig(figure)
    if out is not None:
        report.to_json(out)


def _measured(
    network: nn.Module,
    checkpoint: Checkpoint,
    data: str,
    components: str | list[str] | None,
    max_dim: int,
    seed: int,
) -> tuple[list[Any], list[Any], CreditReport]:
    """Give batches to fit on, others, and a trained network's report on the former."""
    from lightning_koopman.evaluate import credit_report

    torch.manual_seed(seed)  # for loaders that shuffle
    fit_on, others = fit_and_choose(data, checkpoint.data_hyper_parameters)
    report = credit_report(
        network, fit_on, components=components, max_dim=max_dim, seed=seed, step=checkpoint.step
    )
    return fit_on, others, report
