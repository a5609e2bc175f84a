"""The commands that decide: effects of altering, what to drop or to make linear, how many bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from torch import nn

from lightning_koopman.cli.commands import check_table, check_writable, say_written
from lightning_koopman.cli.user_code import build_batches, build_trained, fit_and_choose
from lightning_koopman.koopman.options import DEFAULTS, Options
from lightning_koopman.report.effects import Kind, Scale

if TYPE_CHECKING:
    from lightning_koopman.decisions.bits import BitWidths
    from lightning_koopman.decisions.drop import DropOrder
    from lightning_koopman.decisions.linear import Linearized


@dataclass
class Task:
    """What all of these commands take.

    Args:
        model: Model to build, as in evaluate.
        data: Data to measure on, as in evaluate. linearize fits its layers on the training loader of a
            DataModule and chooses on its validation loader; of batches that a function or object gives,
            it fits on those at even places, and chooses on the others.
        ckpt: Checkpoint of the trained network.
        components: Names or glob patterns of components; all by default.
        samples: Most samples to measure on.
        figure: File for a figure.
        out: File for the result: of effects the report, by its name csv, html or else JSON; of others
            the table where it ends in .json or .csv, else a checkpoint of the new network.
        seed: Seed of all that is drawn, the order of a loader that shuffles included.
        trust_checkpoint: Unpickle whatever the checkpoint holds. It may then run any code.
    """

    model: str
    data: str
    ckpt: str
    components: str | list[str] | None = None
    samples: int = 512
    figure: str | None = None
    out: str | None = None
    seed: int = 0
    trust_checkpoint: bool = False

    def __post_init__(self) -> None:
        check_writable(self.out, figure=self.figure)
        found = build_trained(self.model, self.ckpt, self.trust_checkpoint)
        self.network, self.checkpoint = found
        torch.manual_seed(self.seed)  # for loaders that shuffle

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that every decision takes."""
        return {"components": self.components, "samples": self.samples}

    def batches(self) -> Iterable[Any]:
        """Build the data to measure on."""
        return build_batches(self.data, self.checkpoint.data_hyper_parameters)

    def finish(
        self, found: DropOrder | Linearized | BitWidths, network: nn.Module | None, otherwise: str = ""
    ) -> None:
        """Write what was asked for, and print what was decided and what to do next."""
        from lightning_koopman.decisions.swaps import save_shrunk
        from lightning_koopman.report.files import write_table

        console = Console()
        table = self.out is not None and self.out.lower().endswith((".json", ".csv"))
        if self.figure is not None:
            found.plot()[0].savefig(self.figure)
        if self.out is not None and table:
            write_table(found.to_frame(), self.out)
        elif self.out is not None and network is not None:
            save_shrunk(network, self.out, more=self._facts())
        if network is None:
            said = f"Next: {otherwise}. Nothing changed, so no checkpoint is written."
        elif self.out is None or table:
            said = "Next: --out shrunk.ckpt writes the new network."
        else:
            said = (
                "Next: load it by lightning_koopman.decisions.swaps.load_shrunk(model, "
                f"{self.out!r}), and test it on other data."
            )
        shown = found.__rich__()
        console.print(dataclasses.replace(shown, lines=shown.lines[:-1]))
        say_written(self.figure, self.out if table or network is not None else None)
        console.print(said, highlight=False, soft_wrap=True, markup=False)

    def _facts(self) -> dict[str, Any]:
        """Return what the checkpoint holds beside the weights."""
        checkpoint = self.checkpoint
        step: dict[str, Any] = {} if checkpoint.step is None else {"global_step": checkpoint.step}
        return step | {
            "hyper_parameters": dict(checkpoint.hyper_parameters),
            "datamodule_hyper_parameters": dict(checkpoint.data_hyper_parameters),
        }


def effects(
    kinds: list[Kind] | None = None,
    how: Literal["auto", "measured", "predicted", "both"] = "auto",
    replacements: dict[str, str] | None = None,
    bits: list[int] | None = None,
    initial_checkpoint: str | None = None,
    strength: float = 0.3,
    draws: int | None = None,
    scale: Scale | None = None,
    max_dim: int = DEFAULTS.max_dim,
    **task: Any,
) -> None:
    """Show what altering each component does to the outputs, beside its credit.

    Args:
        kinds: Alterations out of skip, linear, reinit, weight_noise and output_noise; by default skip
            and linear.
        how: Measured by running the altered network, predicted by backward passes, or both side by side;
            auto measures where that costs less.
        replacements: Checkpoints of other weights for the network, by names of your own.
        bits: Numbers of bits that the weights are rounded to, such as [4,3]; needs the extra quantize.
        initial_checkpoint: Weights that training began with, for reinit; drawn anew by default.
        strength: Noise, as a share of the standard deviation.
        draws: Number of draws that effects of kinds with a random part are averaged over.
        scale: kl, or relative; by default kl where targets are class indices.
        max_dim: Wider states are pooled and projected.
        **task: What all of these commands take; out is a file of the report with its effects, by its
            name csv, html or else JSON.
    """
    from lightning_koopman.effects.component_effects import component_effects
    from lightning_koopman.effects.replacements import quantized_weights
    from lightning_koopman.measurement.evaluate import credit_report
    from lightning_koopman.network.weights import load_checkpoint
    from lightning_koopman.report.files import kind_of, write_reports

    given = Task(**task)

    def weights(path: str) -> Mapping[str, Any]:
        return load_checkpoint(path, trust=given.trust_checkpoint).state_dict

    batches = given.batches()
    if isinstance(batches, Iterator):
        batches = list(batches)
    report = credit_report(
        given.network,
        batches,
        components=given.components,
        step=given.checkpoint.step,
        options=Options(max_dim=max_dim, seed=given.seed),
    )
    found = component_effects(
        given.network,
        batches,
        report,
        kinds or ["skip", "linear"],
        how=how,
        samples=given.samples,
        replacements={name: weights(path) for name, path in (replacements or {}).items()}
        | {f"int{number}": quantized_weights(given.network, number) for number in bits or ()},
        initial=weights(initial_checkpoint) if initial_checkpoint else None,
        strength=strength,
        draws=draws,
        scale=scale,
        seed=given.seed,
    )
    report = dataclasses.replace(report, effects=found)
    if given.figure is not None:
        found.plot()[0].savefig(given.figure)
    if given.out is not None:
        if kind_of(given.out) == "json":
            report.to_json(given.out)
        else:
            write_reports([report], given.out)
    say_written(given.figure, given.out)
    # The last line says what to do next.
    Console().print(report)


def drop(max_drop: float = 0.01, steps: int | None = None, **task: Any) -> None:
    """Drop blocks one after the other, the one that matters least first, within a loss.

    Args:
        max_drop: Largest drop of the accuracy; without class targets, largest change of the outputs.
        steps: Number of blocks to drop, whatever the loss is.
        **task: What all of these commands take.
    """
    from lightning_koopman.decisions.drop import drop_order

    check_table(task.get("out"))
    given = Task(**task)
    found = drop_order(given.network, given.batches(), max_drop=max_drop, steps=steps, **given.common)
    count = found.within if steps is None else len(found.components)
    otherwise = "lightning-koopman linearize" + (", or a larger --max-drop" if found.components else "")
    given.finish(found, found.apply(given.network, count) if count else None, otherwise)


def linearize(
    max_drop: float = 0.01,
    cost: Literal["flops", "parameters", "seconds"] = "flops",
    budget: float = 0.0,
    allow_larger: bool = False,
    max_dim: int = 256,
    **task: Any,
) -> None:
    """Replace components by linear layers within a loss, as long as the network gets smaller.

    Args:
        max_drop: Largest drop of the accuracy; without class targets, largest change of the outputs.
        cost: What is to be saved.
        budget: Share of the original cost that is enough.
        allow_larger: Admit a network that needs more parameters, operations or time than before, and
            make components linear also where that saves nothing.
        max_dim: Most directions of a wide input that are kept.
        **task: What all of these commands take.
    """
    from lightning_koopman.decisions.linear import linearize

    check_table(task.get("out"))
    given = Task(**task)
    fit_on, choose_on = fit_and_choose(given.data, given.checkpoint.data_hyper_parameters)
    found = linearize(
        given.network, choose_on, fit_batches=fit_on, max_drop=max_drop, cost=cost, budget=budget,
        allow_larger=allow_larger, max_dim=max_dim, **given.common,
    )  # fmt: skip
    otherwise = "lightning-koopman drop" + (", or a larger --max-drop" if found.candidates else "")
    given.finish(found, found.model if found.components else None, otherwise)


def bits(
    average: float = 3.0,
    widths: list[int] | None = None,
    group_size: int | None = None,
    **task: Any,
) -> None:
    """Choose how many bits the weights of each component keep, so many per weight on average.

    Args:
        average: Bits per weight.
        widths: Numbers of bits to choose from; 8, 4, 3 and 2 by default.
        group_size: Inputs that share a scale; all of an output channel by default.
        **task: What all of these commands take; the checkpoint holds what the integers stand for.
    """
    from lightning_koopman.decisions.bits import bit_widths

    check_table(task.get("out"))
    given = Task(**task)
    found = bit_widths(
        given.network, given.batches(), bits=widths or (8, 4, 3, 2), average=average,
        group_size=group_size, **given.common,
    )  # fmt: skip
    given.finish(found, found.apply(given.network))
