"""What loggers receive: tags, runs, figures, tables, and where the limits lie."""

import dataclasses
import io
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lit import events, quiet_trainer, small_module
from matplotlib.figure import Figure
from small import batches, network, save

from lightning_koopman import (
    CreditReport,
    KoopmanCreditMonitor,
    Options,
    component_effects,
    credit_report,
    evaluate_checkpoints,
)
from lightning_koopman.callback.loggers import CreditWriter, EventFile, free_bytes
from lightning_koopman.report.pages import to_markdown
from lightning_koopman.report.plots import plot_course


class Net(small_module()):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.save_hyperparameters()


def fit(logger, epochs=3, monitors=None, **options):
    torch.manual_seed(0)
    if monitors is None:
        monitors = [KoopmanCreditMonitor(on_error="raise", **options)]
    trainer = quiet_trainer(None, monitors, max_epochs=epochs, logger=logger, num_sanity_val_steps=None)
    trainer.fit(Net())
    return trainer, next(iter(monitors), None)


def many(size: int, **changes) -> CreditReport:
    """A report over ``size`` components, credits rising with depth."""
    options = Options(tikhonov=1e-6)
    base = credit_report(network(), batches(), options=options)
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    arrays = {
        name: np.resize(value, (size, *value.shape[1:]))
        for name, value in values.items()
        if isinstance(value, np.ndarray)
    }
    arrays |= {"credit": np.arange(size, dtype=float)} | changes
    stderr = {name: np.full(size, 0.5) for name in base.stderr}
    names = tuple(f"block.{i}" for i in range(size))
    plain = {"components": names, "stderr": stderr, "widths": (3,) * size, "operators": {}}
    plain |= {"types": (), "parameters": ()}
    return dataclasses.replace(base, **arrays, **plain)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tb")
    # Each epoch is measured, whatever it costs, and the budget is no bound for figures.
    logger = TensorBoardLogger(folder, name="", version="")
    trainer, monitor = fit(logger, epochs=5, every_n_epochs=1, max_overhead=1e6)
    return folder, trainer, monitor


def told(folder, tag) -> str:
    """Return the newest text under a tag."""
    return events(folder).Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_each_component_is_a_run_in_order_of_execution_with_three_tags_at_most(run):
    folder, _, monitor = run
    runs = {path.name: events(path) for path in (folder / "koopman").iterdir()}
    assert set(runs) == {"1-net.0", "2-net.2"}
    tags = [set(runs[name].Tags()["scalars"]) for name in sorted(runs)]
    # The credit of the last component is 0 by definition, which is no curve.
    assert tags == [
        {"koopman/credit", "koopman/skip", "koopman/drift"},
        {"koopman/skip", "koopman/drift"},
    ]
    written = [s.value for s in runs["1-net.0"].Scalars("koopman/credit")]
    assert written == pytest.approx([report.credit[0] for report in monitor.history], rel=1e-5)
    worth = [s.value for s in runs["2-net.2"].Scalars("koopman/skip")]
    assert worth == pytest.approx([r.effects.values["skip"][1] for r in monitor.history], rel=1e-5)
    drifts = [s.value for s in runs["2-net.2"].Scalars("koopman/drift")]
    assert drifts == pytest.approx([drift.drift[1] for drift in monitor.drifts], rel=1e-5)


def test_the_run_of_the_training_holds_what_is_about_the_whole(run):
    folder, _, monitor = run
    assert all(report.trusted.all() for report in monitor.history), "no doubt, and so no chart of zeros"
    ours = {t for t in events(folder).Tags()["scalars"] if t.startswith("koopman/")}
    assert ours == {"koopman/total", "koopman/overhead"}


def test_every_quantity_can_be_monitored(run):
    _, trainer, _ = run
    keys = {"chain_r2/net.0", "rank/net.2", "credit/net.2", "skip/net.0", "total", "doubts"}
    assert {f"koopman/{key}" for key in keys} <= set(trainer.callback_metrics)


def test_figures_come_at_powers_of_two_and_at_the_end(run):
    accumulator = events(run[0])
    steps = [s.step for s in accumulator.Scalars("koopman/total")]
    assert len(steps) == 5
    drawn = [image.step for image in accumulator.Images("koopman/importance")]
    assert drawn == [steps[0], steps[1], steps[3], steps[4]]
    # Its own charts show the credits of all components.
    assert "koopman/evolution" not in accumulator.Tags()["images"]


def test_bands_in_the_file_are_values_with_two_standard_errors(run):
    folder, _, monitor = run
    accumulator, reports = events(folder), monitor.history
    steps = [s.step for s in accumulator.Scalars("koopman/total")]
    images = {name: accumulator.Images(f"koopman/{name}_bands") for name in ("skip", "drift")}
    # One measurement alone makes no band; drift is held against the one before.
    assert [i.step for i in images["skip"]] == [steps[1], steps[3], steps[4]]
    assert [i.step for i in images["drift"]] == [steps[3], steps[4]]
    assert "koopman/credit_bands" not in accumulator.Tags()["images"], "errors at the end alone"
    written = plt.imread(io.BytesIO(images["skip"][-1].encoded_image_string))
    figure, (axis,) = plot_course("skip", reports)
    figure.draw_without_rendering()
    # Where the band is coloured above the last step, up to the width of its edge.
    column, _ = axis.transData.transform((reports[-1].step, 0))
    colors = written[::-1, int(column), :3]
    (rows,) = np.nonzero(np.ptp(colors, axis=1) > 0.1)
    pixel = np.diff(axis.transData.inverted().transform([(0, 0), (0, 1)])[:, 1])[0]
    ends = axis.transData.inverted().transform([(column, rows.min()), (column, rows.max() + 1)])[:, 1]
    values, error = (found["skip"] for found in (reports[-1].effects.values, reports[-1].effects.stderr))
    assert error.min() > 3 * pixel
    assert ends == pytest.approx([min(values - 2 * error), max(values + 2 * error)], abs=3 * pixel)


def test_a_text_says_what_each_chart_shows(run):
    lines = told(run[0], "koopman/charts").splitlines()
    explained = [line.split("**")[1] for line in lines if line.startswith("- ")]
    charts = {f"koopman/{name}" for name in ("credit", "skip", "drift", "total", "doubts", "overhead")}
    assert set(explained) == charts
    assert len(explained) == len(charts)
    assert "koopman/…_bands** show the same numbers in bands of two standard errors" in lines[-1]


def test_closing_table(run):
    assert told(run[0], "koopman/report") == to_markdown(run[2].report)


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_users_hyperparameters_are_as_without_the_callback(kind, tmp_path):
    fit(kind(tmp_path, name="", version="with"), epochs=1)
    fit(kind(tmp_path, name="", version="without"), epochs=1, monitors=[])
    files = [tmp_path / version / "hparams.yaml" for version in ("with", "without")]
    assert files[0].read_text() == files[1].read_text() == "width: 8\n"


def test_without_figures_tensorboard_gets_what_every_logger_gets(tmp_path):
    fit(TensorBoardLogger(tmp_path, name="", version=""), epochs=1, figures=False)
    tags = events(tmp_path).Tags()
    assert not tags["images"]
    assert not [tag for tag in tags["tensors"] if "koopman" in tag]
    assert {"koopman/credit/net.0", "koopman/skip/net.2", "koopman/doubts"} <= set(tags["scalars"])
    assert not (tmp_path / "koopman").exists()


@pytest.mark.usefixtures("no_pixels")
def test_monitors_and_prefixes_stay_apart(tmp_path):
    monitors = [KoopmanCreditMonitor(prefix=p, on_error="raise") for p in ("a", "b")]
    fit(TensorBoardLogger(tmp_path, name="", version="", prefix="try"), epochs=1, monitors=monitors)
    for prefix in ("a", "b"):
        tags = events(tmp_path / prefix / "1-net.0").Tags()["scalars"]
        assert tags == [f"try-{prefix}/credit", f"try-{prefix}/skip"]
    assert {"try-a/total", "try-b/total"} <= set(events(tmp_path).Tags()["scalars"])


def test_a_run_is_named_by_what_any_folder_may_be_called(tmp_path):
    writer, file = CreditWriter(), EventFile(str(tmp_path))
    odd = ("a/b", "module.*", "x" * 300)
    report = dataclasses.replace(many(3, credit=np.ones(3)), components=odd)
    writer.write(file, writer.scalars(report), 1)
    writer.close([file])
    file.experiment.close()
    names = sorted(path.name for path in (tmp_path / "koopman").iterdir())
    assert names == ["1-a_b", "2-module._", f"3-{'x' * 80}"]


def test_doubts_are_a_chart_from_the_first_one_on(tmp_path):
    writer, file = CreditWriter(), EventFile(str(tmp_path))
    sure = {"r2": np.ones(3), "chain_r2": np.ones(3), "stable": np.ones(3, dtype=bool)}
    for step, stable in enumerate([True, False, True]):
        report = many(3, **(sure | {"stable": np.array([stable, True, True])}))
        writer.write(file, writer.scalars(report), step)
    writer.close([file])
    file.experiment.close()
    assert [(s.step, s.value) for s in events(tmp_path).Scalars("koopman/doubts")] == [(1, 1), (2, 0)]


def test_too_many_components_are_cut_and_said_once():
    writer, report = CreditWriter(), many(250)
    with pytest.warns(
        UserWarning, match=r"250 components .* 250 tags, more than 200; .* Name components to choose"
    ):
        scalars = writer.scalars(report, overhead=0.1)
    assert len(scalars) <= 200
    assert "koopman/credit/block.249" in scalars
    assert "koopman/credit/block.0" not in scalars
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.scalars(many(250, credit=-np.arange(250.0)))
    assert "block.249" in writer.shown


def test_no_logger_keeps_the_history(tmp_path):
    with pytest.warns(UserWarning, match="no logger; Koopman credits are kept in monitor.history only"):
        _, monitor = fit(False, epochs=2)
    assert len(monitor.history) == 2


@pytest.mark.slow
def test_wandb_offline_gets_scalars_figures_and_table(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="koopman")
    fit(logger, epochs=2, every_n_epochs=1, max_overhead=1e6)
    keys = set(logger.experiment.summary.keys())
    wandb.finish()
    assert {"koopman/credit/net.0", "koopman/total", "koopman/evolution", "koopman/report"} <= keys
    assert len(list(Path(tmp_path).rglob("koopman/evolution*.png"))) >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_file_store_gets_scalars_figures_and_table(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(save_dir=str(tmp_path / "mlruns"))
    fit(logger, epochs=2)
    run = logger.experiment.get_run(logger.run_id)
    assert "koopman/credit/net.0" in run.data.metrics
    stored = [f.path for f in logger.experiment.list_artifacts(logger.run_id, "koopman")]
    assert "koopman/report.md" in stored
    assert [path for path in stored if path.startswith("koopman/evolution")]


def test_checkpoints_are_written_like_a_training(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / f"{step}.ckpt", step)
    evaluate_checkpoints(network(), tmp_path, batches(), logdir=tmp_path / "tb")
    credits = events(tmp_path / "tb" / "koopman" / "1-0").Scalars("koopman/credit")
    assert [s.step for s in credits] == [1, 2, 3]
    images = events(tmp_path / "tb").Images("koopman/importance")
    assert [i.step for i in images] == [1, 2, 3]


def test_markdown_marks_doubted_numbers():
    report = many(2, r2=np.array([0.1, 0.9]), chain_r2=np.ones(2), stable=np.ones(2, dtype=bool))
    lines = to_markdown(report).splitlines()
    assert lines[4].startswith("| block.0 |")
    assert lines[4].count("⚠") == 1, "a low R² of its own is about the gain"
    assert lines[4].endswith("| r2 |")
    assert lines[5].startswith("| block.1 |")


def test_effects_are_scalars_where_there_are_any(report):
    writer = CreditWriter()
    assert not [key for key in writer.scalars(report) if "skip" in key]
    found = component_effects(network(), batches(), report, ["skip"])
    scalars = writer.scalars(dataclasses.replace(report, effects=found))
    assert [scalars[f"koopman/skip/{i}"] for i in "02"] == pytest.approx(found.values["skip"])


class Taking:
    """What Weights & Biases and MLflow are known by: a few methods."""

    def __init__(self, **attributes):
        self.taken = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def noted(self, name):
        return lambda *given, **more: self.taken.append((name, given, more))


def test_figures_and_tables_go_where_a_logger_takes_them():
    writer, report = CreditWriter(), many(3)
    wandb, mlflow, plain = Taking(), Taking(run_id="7"), Taking(experiment=None)
    wandb.log_image, wandb.log_table = wandb.noted("image"), wandb.noted("table")
    mlflow.experiment = Taking()
    mlflow.experiment.log_figure = mlflow.noted("figure")
    mlflow.experiment.log_text = mlflow.noted("text")
    loggers = [wandb, mlflow, plain]
    writer.draw(loggers, [report], 4)
    writer.finish(loggers, [report], 4)
    figures = ["koopman/importance", "koopman/evolution"]
    images = [given for name, given, _ in wandb.taken if name == "image"]
    assert [tag for tag, _ in images] == figures
    assert all(isinstance(shown, Figure) for _, (shown,) in images)
    (table,) = [(given, more) for name, given, more in wandb.taken if name == "table"]
    assert table[0] == ("koopman/report",)
    assert [row[2] for row in table[1]["data"]] == list(report.components)
    drawn = [given for name, given, _ in mlflow.taken if name == "figure"]
    assert [(run, file) for run, _, file in drawn] == [("7", f"{tag}_00000004.png") for tag in figures]
    assert mlflow.taken[-1] == ("text", ("7", to_markdown(report), "koopman/report.md"), {})
    assert plain.taken == []


def test_room_is_told_of_folders_that_are_not_there_yet(tmp_path):
    assert free_bytes(Taking(log_dir=str(tmp_path / "not" / "yet"))) > 0
    assert free_bytes(Taking(log_dir=None, save_dir=tmp_path)) > 0
    assert free_bytes(object()) == float("inf")
