"""The command that holds a checkpoint against a reference."""

from __future__ import annotations

from rich.console import Console

from lightning_koopman.cli.commands import check_table, check_writable, say_written
from lightning_koopman.cli.user_code import build_batches, build_trained
from lightning_koopman.network.weights import Weights


def drift(
    reference: str,
    model: str,
    data: str,
    ckpt: str,
    figure: str | None = None,
    out: str | None = None,
    max_samples: int | None = None,
    trust_checkpoint: bool = False,
    weights: Weights = "saved",
) -> None:
    """Show which components do something else than when a reference was measured.

    Args:
        reference: File that evaluate --reference or save_reference wrote.
        model: Model to build, as in evaluate.
        data: Data to measure on, as in evaluate; the same as the reference's or others.
        ckpt: Checkpoint of the network as it is now.
        figure: File for a figure.
        out: File for the numbers: JSON if its name ends in .json, else CSV; no page.
        max_samples: Most samples to take; all by default.
        trust_checkpoint: Unpickle whatever the checkpoint holds. It may then run any code.
        weights: Which weights of a training with weight averaging: as saved, averaged or current.
    """
    from lightning_koopman.measurement import drift as measurement
    from lightning_koopman.report.files import write_table
    from lightning_koopman.report.reference_file import read_reference

    # Whatever is wrong should be known before a model is built.
    check_writable(out, figure=figure)
    check_table(out)
    read_reference(reference)
    network, checkpoint = build_trained(model, ckpt, trust_checkpoint, weights)
    batches = build_batches(data, checkpoint.data_hyper_parameters)
    found = measurement.drift(reference, network, batches, max_samples=max_samples, step=checkpoint.step)
    if figure is not None:
        found.plot()[0].savefig(figure)
    if out is not None:
        write_table(found.to_frame(), out)
    say_written(figure, out)
    # The last line says what to do next.
    Console().print(found)
