"""Reports as plain rows, Markdown, CSV and Parquet."""

from __future__ import annotations

from typing import Any

from lightning_koopman.credit import QUANTITIES
from lightning_koopman.report import CreditReport


def to_rows(report: CreditReport) -> list[dict[str, Any]]:
    """Give one flat row a component.

    Args:
        report: The report.

    Returns:
        Rows with the step, the component, every quantity and its standard error, and the doubts.
    """
    rows = []
    for i, component in enumerate(report.components):
        row: dict[str, Any] = {"step": report.step, "component": component}
        for name in QUANTITIES:
            row[name] = float(getattr(report, name)[i])
            row[f"{name}_stderr"] = float(report.stderr[name][i])
        row["width"] = report.widths[i]
        row["doubt"] = ", ".join(report.doubts[i])
        rows.append(row)
    return rows


def to_markdown(report: CreditReport) -> str:
    """Give the report as a Markdown table whose doubted rows are marked.

    Args:
        report: The report.

    Returns:
        A title, the table and the notes. Rows that carry a doubt begin with a warning sign.
    """
    at_step = "" if report.step is None else f" at step {report.step}"
    lines = [
        f"**Koopman credit{at_step}**, {report.n_samples} samples, {report.directions} output "
        f"directions, total {report.total:.3f} ± {report.total_stderr:.3f} nats a direction",
        "",
        "| component | credit | gain | nonlinearity | R² | chain R² | rank | doubt |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for i, component in enumerate(report.components):
        name = component.replace("|", "\\|")
        doubt = ", ".join(report.doubts[i])
        cells = [
            f"⚠ {name}" if doubt else name,
            f"{report.credit[i]:.3f} ± {report.stderr['credit'][i]:.3f}",
            f"{report.gain[i]:.3f} ± {report.stderr['gain'][i]:.3f}",
            f"{report.nonlinearity[i]:.3f}",
            f"{report.r2[i]:.3f}",
            f"{report.chain_r2[i]:.3f}",
            f"{report.rank[i]:.0f}/{report.widths[i]}",
            doubt,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines).rstrip()
