"""The commands that decide: what to drop, what to make linear, how many bits to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from torch import nn

from lightning_koopman.cli.user_code import build_batches, build_trained, fit_and_choose

if TYPE_CHECKING:
    from lightning_koopman.decisions.bits import BitWidths
    from lightning_koopman.decisions.steps import Steps
    from lightning_koopman.network.weights import Checkpoint


def drop(
    model: str,
    data: str,
    ckpt: str,
    out: str | None = None,
    figure: str | None = None,
    max_drop: float = 0.01,
    steps: int | None = None,
    components: list[str] | None = None,
    samples: int = 512,
    seed: int = 0,
    trust_checkpoint: bool = False,
) -> None:
    """Drop blocks one after the other, the one that matters least first, within a loss.

    Args:
        model: Model to build, as in evaluate.
        data: Data to measure on, as in evaluate.
        ckpt: Checkpoint of the trained network.
        out: File to write: a checkpoint of the network without the blocks, which
            lightning_koopman.decisions.swaps.load_shrunk reads; or .json, a table of the steps.
        figure: File for a figure of the loss after each step.
        max_drop: Largest drop of the accuracy; without class targets, largest change of the outputs.
        steps: Number of blocks to drop, whatever the loss is.
        components: Names or glob patterns of blocks that may go; all by default.
        samples: Number of samples to measure on.
        seed: Fixes the order of a loader that shuffles.
        trust_checkpoint: Unpickle whatever the checkpoint holds. It may then run any code.
    """
    from lightning_koopman.decisions.drop import drop_order

    network, checkpoint = build_trained(model, ckpt, trust_checkpoint)
    torch.manual_seed(seed)  # for loaders that shuffle
    batches = build_batches(data, checkpoint.data_hyper_parameters)
    found = drop_order(
        network, batches, components=components, max_drop=max_drop, steps=steps, samples=samples
    )
    count = found.within if steps is None else len(found.components)
    _finish(found, found.apply(network, count) if count else None, checkpoint, figure, out)


def linearize(
    model: str,
    data: str,
    ckpt: str,
    out: str | None = None,
    figure: str | None = None,
    max_drop: float = 0.01,
    cost: Literal["flops", "parameters", "seconds"] = "flops",
    budget: float = 0.0,
    allow_larger: bool = False,
    components: list[str] | None = None,
    samples: int = 512,
    max_dim: int = 256,
    seed: int = 0,
    trust_checkpoint: bool = False,
) -> None:
    """Replace components by linear layers within a loss, as long as the network gets smaller.

    Args:
        model: Model to build, as in evaluate.
        data: Data, as pkg.mod:DataModule: linear layers are fitted on its training loader and chosen on
            its validation loader. Of the batches that a function or object gives, those at even places
            are fitted on, and the others chosen on.
        ckpt: Checkpoint of the trained network.
        out: File to write: a checkpoint of the new network, which
            lightning_koopman.decisions.swaps.load_shrunk reads; or .json, a table of the steps.
        figure: File for a figure of the loss after each step.
        max_drop: Largest drop of the accuracy; without class targets, largest change of the outputs.
        cost: What is to be saved.
        budget: Share of the original cost that is enough.
        allow_larger: Admit a network that needs more parameters, operations or time than before.
        components: Names or glob patterns of components that may become linear; all by default.
        samples: Number of samples to choose on.
        max_dim: Most directions of a wide input that are kept.
        seed: Chooses the folds, and the order of a loader that shuffles.
        trust_checkpoint: Unpickle whatever the checkpoint holds. It may then run any code.
    """
    from lightning_koopman.decisions.linear import linearize

    network, checkpoint = build_trained(model, ckpt, trust_checkpoint)
    torch.manual_seed(seed)  # for loaders that shuffle
    fit_on, choose_on = fit_and_choose(data, checkpoint.data_hyper_parameters)
    found = linearize(
        network, choose_on, fit_batches=fit_on, components=components, max_drop=max_drop, cost=cost,
        budget=budget, allow_larger=allow_larger, samples=samples, max_dim=max_dim, seed=seed,
    )  # fmt: skip
    _finish(found, found.model if found.components else None, checkpoint, figure, out)


def bits(
    model: str,
    data: str,
    ckpt: str,
    out: str | None = None,
    figure: str | None = None,
    average: float = 3.0,
    widths: list[int] | None = None,
    group_size: int | None = None,
    components: list[str] | None = None,
    samples: int = 512,
    seed: int = 0,
    trust_checkpoint: bool = False,
) -> None:
    """Choose how many bits the weights of each component keep, so many per weight on average.

    Args:
        model: Model to build, as in evaluate.
        data: Data to measure on, as in evaluate.
        ckpt: Checkpoint of the trained network.
        out: File to write: a checkpoint with the weights that the integers stand for; or .json, a table
            of the choice.
        figure: File for a figure of the effect of each number of bits.
        average: Bits per weight.
        widths: Numbers of bits to choose from; 8, 4, 3 and 2 by default.
        group_size: Inputs that share a scale; all of an output channel by default.
        components: Names or glob patterns of components to round; all by default.
        samples: Number of samples to measure on.
        seed: Fixes the order of a loader that shuffles.
        trust_checkpoint: Unpickle whatever the checkpoint holds. It may then run any code.
    """
    from lightning_koopman.decisions.bits import bit_widths

    network, checkpoint = build_trained(model, ckpt, trust_checkpoint)
    torch.manual_seed(seed)  # for loaders that shuffle
    batches = build_batches(data, checkpoint.data_hyper_parameters)
    found = bit_widths(
        network, batches, bits=widths or (8, 4, 3, 2), average=average, components=components,
        group_size=group_size, samples=samples,
    )  # fmt: skip
    _finish(found, found.apply(network), checkpoint, figure, out)


def _finish(
    found: Steps | BitWidths,
    network: nn.Module | None,
    checkpoint: Checkpoint,
    figure: str | None,
    out: str | None,
) -> None:
    """Print what was decided, write what was asked for, and say what to do next."""
    from lightning_koopman.decisions.swaps import save_shrunk
    from lightning_koopman.report.saved import write_atomically

    console = Console()
    console.print(found)
    if figure is not None:
        found.plot()[0].savefig(figure)
    if out is not None and out.endswith(".json"):
        with write_atomically(out) as temporary:
            found.to_frame().to_json(temporary, orient="records", indent=1)
    elif out is not None and network is not None:
        save_shrunk(network, out, more=_facts(checkpoint))
    if network is None:
        said = "Next: a larger --max-drop; nothing changed, so no checkpoint was written."
    elif out is None or out.endswith(".json"):
        said = "Next: --out shrunk.ckpt writes the new network."
    else:
        said = f"Written to {out}. Next: load_shrunk(model, {out!r}), and a test on other data."
    console.print(said, highlight=False, soft_wrap=True, markup=False)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint holds beside the weights."""
    step: dict[str, Any] = {} if checkpoint.step is None else {"global_step": checkpoint.step}
    return step | {
        "hyper_parameters": dict(checkpoint.hyper_parameters),
        "datamodule_hyper_parameters": dict(checkpoint.data_hyper_parameters),
    }
