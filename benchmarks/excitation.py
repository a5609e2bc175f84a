"""What excitation does to the credits of the demo's networks. Writes docs/excitation.md.

Run from the repository: `python benchmarks/excitation.py` (a few minutes on one core).
"""

import logging
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_koopman import CreditReport, credit_report
from lightning_koopman.demo import DigitClassifier, Digits

SEEDS = (0, 1, 2, 3, 4)
SHARES = (0.0, 0.1, 0.5)
DRAWS = 20
PAGE = Path(__file__).parent.parent / "docs" / "excitation.md"


def trained(seed: int) -> tuple[nn.Module, list[Tensor]]:
    """Train the demo's MLP; give it with its validation images."""
    L.seed_everything(seed, verbose=False)
    model, data = DigitClassifier(), Digits()
    trainer = L.Trainer(
        max_epochs=30,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model.eval(), [batch[0] for batch in data.val_dataloader()]


@torch.no_grad()
def moved(model: nn.Module, report: CreditReport, images: list[Tensor], share: float) -> list[float]:
    """Log of how far noise on each component's output moves the logits, over the noise's share."""
    modules = dict(model.named_modules())
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(images)
    before = model(x)
    found = []
    for calls in report.parts.values():

        def disturb(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output + share * output.std(dim=0) * torch.randn(output.shape, generator=generator)

        handle = modules[calls[-1]].register_forward_hook(disturb)
        squares = [(model(x) - before).square().sum(dim=1).mean() for _ in range(DRAWS)]
        handle.remove()
        found.append(float((torch.stack(squares).mean().sqrt() / share).log()))
    return found


def cell(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def table(reports: dict[tuple[int, float], CreditReport], name: str, components: tuple[str, ...]) -> str:
    lines = [
        f"| component | {' | '.join(f'{name}, excitation {share:g}' for share in SHARES)} |",
        "|---|" + "---:|" * len(SHARES),
    ]
    for i, component in enumerate(components):
        cells = [cell(np.array([getattr(reports[s, e], name)[i] for s in SEEDS])) for e in SHARES]
        lines.append(f"| `{component}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the page."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    reports: dict[tuple[int, float], CreditReport] = {}
    measured: dict[float, list[list[float]]] = {share: [] for share in SHARES[1:]}
    seconds: dict[float, list[float]] = {share: [] for share in SHARES}
    for seed in SEEDS:
        model, images = trained(seed)
        for share in SHARES:
            start = time.perf_counter()
            reports[seed, share] = credit_report(model, images, excitation=share)
            seconds[share].append(time.perf_counter() - start)
        for share, found in measured.items():
            found.append(moved(model, reports[seed, 0.0], images, share))
    components = reports[0, 0.0].components

    lines = [
        "| component | noise on its output | moves the logits by (log) | "
        + " | ".join(f"sensitivity, excitation {share:g}" for share in SHARES)
        + " |",
        "|---|---:|---:|" + "---:|" * len(SHARES),
    ]
    # The last component's output is the logits: its sensitivity is their spread, whatever the operators.
    for i, component in enumerate(components[:-1]):
        for share, found in measured.items():
            truth = np.array([row[i] for row in found])
            gaps = [
                np.array([reports[seed, e].sensitivity[i] for seed in SEEDS]) - truth for e in SHARES
            ]
            cells = [f"{gap.mean():+.3f} ± {gap.std(ddof=1):.3f}" for gap in gaps]
            lines.append(f"| `{component}` | {share:g} | {cell(truth)} | {' | '.join(cells)} |")
    times = ", ".join(f"{np.median(seconds[share]):.2f} s with {share:g}" for share in SHARES)
    shown = (np.mean([reports[seed, share].total for seed in SEEDS]) for share in SHARES)
    totals = ", ".join(f"{total:.3f} with {share:g}" for total, share in zip(shown, SHARES, strict=True))
    PAGE.write_text(
        f"""# What excitation does

Made by `benchmarks/excitation.py`. The demo's MLP (64-128-128-64-10) on handwritten digits,
{len(SEEDS)} trainings from different seeds, reports on the 539 validation images; mean ± standard
deviation over the trainings. `excitation=σ` calls every component a second time, on its input with
normal noise of σ times each unit's standard deviation, and fits its operator to both sets of answers
([how](method.md#1-snapshots)).

{table(reports, "credit", components)}

{table(reports, "sensitivity", components)}

{table(reports, "r2", components)}

Totals: {totals}. R² is about the data alone, with and without excitation.

## Against noise itself

`sensitivity` says how far independent noise on a component's output moves the logits. That can be
measured: noise of a share of each unit's standard deviation on the component's output, {DRAWS} draws,
the root mean square change of the logits divided by the share. The last columns are the report's
`sensitivity` less that, in nats; 0 would be exact.

{chr(10).join(lines)}

One measurement (median): {times}.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
