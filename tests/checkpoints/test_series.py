"""A second evaluation measures what is new; several runs stay apart."""

import csv
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import events
from small import batches, network, save

from lightning_koopman import CreditReport, EvaluationError, credit_report, evaluate_checkpoints
from lightning_koopman.cli.main import main
from lightning_koopman.network.weights import run_names
from lightning_koopman.report import comparison
from lightning_koopman.report.comparison import runs_table
from lightning_koopman.report.files import read_reports, write_reports
from lightning_koopman.report.pages import to_html
from lightning_koopman.report.tables import columns
from lightning_koopman.report.text import as_text

pytestmark = pytest.mark.usefixtures("no_pixels")
MORE_DATA = """
def more_batches():
    return batches()[:2]
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The report of a single checkpoint."""
    folder = tmp_path_factory.mktemp("one")
    (report,) = evaluate_checkpoints(network(), save(folder / "a.ckpt", 1), batches())
    return report


@pytest.fixture
def project(user_module):
    folder = user_module("series_code", MORE_DATA)
    for step in (1, 2, 3):
        save(folder / "ckpt" / f"{step}.ckpt", step, 1 + step / 10)
    return folder


def evaluate(*more: str, data: str = "batches") -> int:
    model = ["--model=series_code:network", f"--data=series_code:{data}"]
    return main(["evaluate", *model, "--ckpt=ckpt", *more])


def scalars(folder: Path) -> list[int]:
    return [event.step for event in events(folder).Scalars("koopman/total")]


def test_files_without_a_step_come_in_the_order_of_their_numbers(tmp_path):
    scales = {epoch: 1 + epoch / 10 for epoch in (1, 2, 9, 10, 11)}
    for epoch, scale in scales.items():
        save(tmp_path / f"epoch_{epoch}.pt", None, scale)
    found = evaluate_checkpoints(network(), str(tmp_path / "*.pt"), batches())
    alone = [
        evaluate_checkpoints(network(), tmp_path / f"epoch_{epoch}.pt", batches())[0].total
        for epoch in scales
    ]
    assert [report.step for report in found] == [0, 1, 2, 3, 4]
    assert [report.total for report in found] == alone


def test_shards_keep_all_files_of_one_step(project):
    for name, scale in (("last", 1.3), ("swapped", 2.0)):
        save(project / "ckpt" / f"{name}.ckpt", 3, scale)
    for i in (1, 2):
        assert evaluate(f"--shard={i}/2", f"--out={i}.json") == 0
    assert main(["merge", "1.json", "--out", "all.json", "2.json"]) == 0
    assert evaluate("--out=single.json") == 0
    merged, single = (
        [(report.step, report.source["path"], report.total) for report in read_reports(path)]
        for path in ("all.json", "single.json")
    )
    assert merged == single
    assert len(merged) == 5


class Leaky(L.LightningModule):
    """What the slope is, no weight shows."""

    def __init__(self, slope: float = 0.1, names: tuple[str, ...] = ("a",)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.LeakyReLU(slope), torch.nn.Linear(5, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_a_note_tells_that_a_checkpoint_is_of_a_network_built_otherwise(tmp_path):
    nets = []
    for run, slope in (("a", 0.1), ("b", 0.9)):
        torch.manual_seed(0)
        nets.append(Leaky(slope))
        content = {"state_dict": nets[-1].state_dict(), "hyper_parameters": dict(nets[-1].hparams)}
        save(tmp_path / run / "last.ckpt", 1, **content)
    found = evaluate_checkpoints(nets[0], tmp_path, batches())
    truth = [credit_report(net, batches()).total for net in nets]
    assert found[0].total == truth[0]
    assert abs(found[1].total - truth[1]) > 0.1
    told = "the checkpoint saved slope=0.9 and the network was built with 0.1; if that changes"
    assert [any(told in note for note in report.notes) for report in found] == [False, True]
    (right,) = evaluate_checkpoints(nets[1], tmp_path / "b", batches())
    assert right.total == truth[1]
    assert not any("built with" in note for note in right.notes)


@pytest.mark.slow
def test_a_second_run_measures_only_what_is_new(project, capsys, monkeypatch):
    assert evaluate("--out=r.json", "--logdir=tb") == 0
    first = (project / "r.json").read_text()
    assert "taken over" not in capsys.readouterr().err
    save(project / "ckpt" / "4.ckpt", 4)
    save(project / "ckpt" / "0.ckpt", 0)
    assert evaluate("--out=r.json", "--logdir=tb") == 0
    printed = capsys.readouterr()
    assert "2/2" in printed.err
    assert "3 of 5 reports taken over from r.json" in printed.err
    assert printed.out.index("at step 0") < printed.out.index("at step 1")
    found = read_reports("r.json")
    assert [report.step for report in found] == [0, 1, 2, 3, 4]
    assert [report.to_dict() for report in found[1:4]] == json.loads(first)
    assert sorted(scalars(project / "tb")) == [0, 1, 2, 3, 4]

    def never(*given: Any, **options: Any) -> CreditReport:
        pytest.fail("measured again")

    monkeypatch.setattr("lightning_koopman.checkpoints.series.credit_report", never)
    assert evaluate("--out=r.json", "--logdir=fresh") == 0
    told = capsys.readouterr().err
    assert "5 of 5 reports taken over" in told
    assert "checkpoints" not in told, "there is no progress to show"
    assert scalars(project / "fresh") == [0, 1, 2, 3, 4]


def test_a_changed_option_is_measured_again(project, capsys):
    evaluate("--out=r.json")
    before = (project / "r.json").read_text()
    capsys.readouterr()

    def known(*more: str, data: str = "batches") -> tuple[int | None, bool]:
        """How many of the first reports are taken over, and whether the file stays as it was."""
        (project / "r.json").write_text(before)
        assert evaluate("--out=r.json", *more, data=data) == 0
        found = re.search(r"(\d) of 3 reports taken over", capsys.readouterr().err)
        return found and int(found[1]), (project / "r.json").read_text() == before

    for option in ("--options.seed=1", "--options.tikhonov=0.01", "--components=0"):
        assert known(option) == (0, False)
    assert known(data="more_batches") == (0, False)
    assert known("--fresh=true") == (None, True)
    assert known("--trust-checkpoint=true") == (3, True)


def test_a_changed_file_is_measured_again(project, capsys):
    evaluate("--out=r.json")
    before = read_reports("r.json")
    save(project / "ckpt" / "2.ckpt", 2, 3.0)
    status = (project / "ckpt" / "3.ckpt").stat()
    os.utime(project / "ckpt" / "3.ckpt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert evaluate("--out=r.json") == 0
    assert "1 of 3 reports taken over" in capsys.readouterr().err
    after = read_reports("r.json")
    assert not np.array_equal(after[1].gain, before[1].gain)
    np.testing.assert_array_equal(after[2].credit, before[2].credit)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "html"])
def test_other_formats_resume_from_the_json_beside_them(project, capsys, kind):
    for _ in range(2):
        assert evaluate(f"--out=r.{kind}") == 0
    assert "3 of 3 reports taken over" in capsys.readouterr().err
    assert main(["report", f"r.{kind}.json"]) == 0
    assert "at step 3" in capsys.readouterr().out


def test_a_file_that_is_no_report_is_not_overwritten(project, capsys):
    (project / "notes.json").write_text('{"mine": 1}')
    assert evaluate("--out=notes.json") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "not {'mine': 1}. Name another --out, or pass --fresh" in told
    assert (project / "notes.json").read_text() == '{"mine": 1}'
    assert evaluate("--out=notes.json", "--fresh=true") == 0


def test_a_step_that_no_file_tells_moves_with_the_files(tmp_path):
    save(tmp_path / "b.ckpt", None)
    first = evaluate_checkpoints(network(), tmp_path, batches())
    save(tmp_path / "a.ckpt", None, 2.0)
    second = evaluate_checkpoints(network(), tmp_path, batches(), known=first)
    assert [report.step for report in second] == [0, 1]
    np.testing.assert_array_equal(second[1].credit, first[0].credit)


def test_an_interrupted_evaluation_keeps_known_reports_and_goes_on(tmp_path):
    paths = [save(tmp_path / f"{step}.ckpt", step) for step in range(4)]
    known = evaluate_checkpoints(network(), paths[3:], batches())

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(EvaluationError, match="interrupted after 1 of 3 checkpoints") as caught:
        evaluate_checkpoints(
            network(), paths, batches(), known=known, on_progress=stop, logdir=tmp_path / "tb"
        )
    assert caught.value.interrupted
    assert [report.step for report in caught.value.reports] == [0, 3]
    assert scalars(tmp_path / "tb") == [0, 3]
    write_reports(caught.value.reports, tmp_path / "r.json")
    counts: list[tuple[int, int]] = []
    kept = read_reports(tmp_path / "r.json")
    evaluate_checkpoints(
        network(), paths, batches(), known=kept, on_known=lambda *told: counts.append(told)
    )
    assert counts == [(2, 4)]


def test_an_evaluation_that_is_interrupted_while_it_saves_counts_and_logs_what_it_saved(tmp_path):
    paths = [save(tmp_path / f"{step}.ckpt", step, 1.0 + step) for step in range(3)]

    def stop(reports: list[CreditReport]) -> None:
        if len(reports) == 2:
            raise KeyboardInterrupt

    with pytest.raises(EvaluationError, match="interrupted after 2 of 3 checkpoints") as caught:
        evaluate_checkpoints(network(), paths, batches(), on_report=stop, logdir=tmp_path / "tb")
    assert [report.step for report in caught.value.reports] == [0, 1]
    assert scalars(tmp_path / "tb") == [0, 1]


def test_a_known_report_with_an_odd_source_is_measured_again(one):
    odd = CreditReport.from_dict(one.to_dict() | {"source": {"path": ["unhashable"]}})
    (again,) = evaluate_checkpoints(network(), one.source["path"], batches(), known=[odd])
    assert again.to_dict() == one.to_dict()


@pytest.mark.parametrize(
    "template",
    [
        "{epoch}-{val/loss:.2f}",
        "{val/loss:.2f}-{epoch}",
        "{step}_{val/acc}",
        "{epoch}-{step}-{koopman/credit/net.0:.3f}",
        "best-{epoch}-{train/loss:.2f}-{val/loss:.2f}",
    ],
)
@pytest.mark.parametrize("folder", ["checkpoints", "kept"])
@pytest.mark.parametrize("last", [True, False])
def test_slashes_in_names_of_metrics_make_no_runs(template, folder, last):
    paths, expected = [], []
    for version in ("v0", "v1"):
        names = ModelCheckpoint(dirpath=f"{version}/{folder}", filename=template)
        for epoch in range(3):
            metrics = {"val/loss": epoch / 10, "train/loss": -epoch / 7, "val/acc": float("nan")}
            counted = {"epoch": epoch, "step": 9 * epoch, "koopman/credit/net.0": -1.5 * epoch}
            given = {name: torch.tensor(value) for name, value in (metrics | counted).items()}
            paths.append(Path(names.format_checkpoint_name(given)))
            expected.append(version)
        if last:
            paths.append(Path(f"{version}/{folder}/last.ckpt"))
            expected.append(version)
    found = run_names(paths)
    assert len(set(found)) == 2
    assert [name.split("/")[0] for name in found] == expected
    assert run_names(paths[: 3 + last]) == [""] * (3 + last)


@pytest.mark.slow
def test_runs_stay_apart_everywhere(project, capsys):
    (project / "ckpt").rename(project / "old")
    for run, scale in (("b", 2.0), ("a", 1.0)):
        for step in (1, 2):
            save(project / "ckpt" / run / "checkpoints" / f"{step}.ckpt", step, scale * step)
    assert evaluate("--out=r.csv", "--logdir=tb") == 0
    printed = capsys.readouterr().out
    assert printed.index("of run a at step 2") < printed.index("of run b at step 1")
    rows = list(csv.DictReader((project / "r.csv").read_text().splitlines()))
    assert [row["run"] + row["step"] for row in rows[::2]] == ["a1", "a2", "b1", "b2"]
    assert scalars(project / "tb" / "a") == scalars(project / "tb" / "b") == [1, 2]
    assert "Newest of every run" in printed
    assert main(["report", "r.csv.json", "--out=r.html"]) == 0
    page = (project / "r.html").read_text()
    assert "<th>run</th>" in page
    for run in ("a", "b"):
        assert f"<td>{run}</td>" in page
        assert f"Credit over training, run {run}" in page


def test_runs_with_other_components_stand_side_by_side(one, monkeypatch):
    laid_out = []
    monkeypatch.setattr(comparison, "columns", lambda each: laid_out.append(each) or columns(each))
    doubted = {"r2": np.ones(2), "chain_r2": np.array([0.0, 1.0]), "stable": np.ones(2, dtype=bool)}
    other = dataclasses.replace(one, run="[b]", components=("0", "x"), credit=2 * one.credit, **doubted)
    sure = dataclasses.replace(one, run="a", **(doubted | {"chain_r2": np.ones(2)}))
    table = runs_table([sure, other])
    assert [*table.columns["component"]] == ["0", "0", "2", "x"]
    assert [*table.columns["run"]] == ["a", "[b]", "a", "[b]"]
    pairs = zip(columns(sure)["credit"], columns(other)["credit"], strict=True)
    (own, twice), last = pairs
    assert [*table.columns["credit"]] == [own, twice, *last]
    assert table.grey == {name: [False, True, False, False] for name in ("credit", "gain")}
    assert [*table.columns["doubt"]] == ["", "chain_r2", "", ""]
    assert "[b]" in as_text(table)
    assert laid_out == [sure, other], "once each, not once per component"
    assert "<th>run</th>" not in to_html([one])
