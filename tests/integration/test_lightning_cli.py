"""The callback in a YAML file of LightningCLI, in both namespaces."""

import csv
import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lit import small_module

from lightning_koopman import KoopmanCreditMonitor, Options

CLASS_PATH = "lightning_koopman.KoopmanCreditMonitor"

CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 4
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger:
    class_path: {namespace}.loggers.CSVLogger
    init_args:
      save_dir: {folder}
  callbacks:
    - class_path: lightning_koopman.KoopmanCreditMonitor
      init_args:
        components: [net.0, net.2]
        every_n_epochs: 2
        options:
          normalize: rms
          tikhonov: 1e-3
          targets: [0, 2]
        prefix: {prefix}
        max_overhead: 1000000.0
        on_error: raise
model:
  width: 9
"""


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def namespace(request, monkeypatch, tmp_path):
    pytest.importorskip(request.param)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # LightningCLI warns of arguments beside args=
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)
    return str(request.param)


def run(namespace: str, *args: str) -> Any:
    cli = importlib.import_module(f"{namespace}.cli").LightningCLI
    return cli(small_module(namespace), args=list(args))


def monitor_of(cli: Any) -> KoopmanCreditMonitor:
    (monitor,) = (c for c in cli.trainer.callbacks if isinstance(c, KoopmanCreditMonitor))
    return monitor


def write_config(folder: Path, namespace: str, **changes: str) -> str:
    values = {"namespace": namespace, "folder": folder / "logs", "prefix": "own"} | changes
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(**values))
    return str(path)


def test_help_describes_every_argument(namespace, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(namespace, "fit", f"--trainer.callbacks.help={CLASS_PATH}")
    printed = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "Watch the Koopman credit of every component while a network trains" in printed
    described = inspect.getdoc(KoopmanCreditMonitor)
    assert described is not None
    described = described.split("Args:")[1].split("Raises:")[0]
    for name in {*inspect.signature(KoopmanCreditMonitor).parameters} - {"options"}:
        assert f"--trainer.callbacks.{name} " in printed
        assert sentence(described, name) in printed
    options = inspect.getdoc(Options)
    assert options is not None
    for field in dataclasses.fields(Options):
        assert f"--trainer.callbacks.options.{field.name} " in printed
        assert sentence(options.split("Args:")[1].split("Raises:")[0], field.name) in printed


def sentence(described: str, name: str) -> str:
    """Find what a docstring says of an argument."""
    return " ".join(described.split(f"\n    {name}: ")[1].split("\n    ")[0].split())


def test_print_config_holds_every_argument(namespace, capsys):
    given = ["--trainer.callbacks.components=[net.*]", "--trainer.callbacks.options.rank=3"]
    with pytest.raises(SystemExit) as stopped:
        run(namespace, "fit", f"--trainer.callbacks={CLASS_PATH}", *given, "--print_config")
    assert stopped.value.code == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["class_path"] == CLASS_PATH
    arguments = callback["init_args"]
    assert list(arguments) == list(inspect.signature(KoopmanCreditMonitor).parameters)
    assert arguments["components"] == ["net.*"]
    assert list(arguments["options"]) == [field.name for field in dataclasses.fields(Options)]
    assert arguments["options"]["rank"] == 3
    assert arguments["options"]["max_dim"] == 128


def test_fit_from_yaml_and_again_from_what_it_saved(namespace, tmp_path):
    cli = run(namespace, "fit", f"--config={write_config(tmp_path, namespace)}")
    monitor = monitor_of(cli)
    assert isinstance(monitor, importlib.import_module(namespace).Callback)
    assert [report.step for report in monitor.history] == [4, 8, 16]
    assert monitor.report.components == ("net.0", "net.2")
    assert monitor.report.widths == (9, 3)
    assert monitor.report.directions == 2
    assert set(monitor.report.tikhonov) == {1e-3}
    log = Path(cli.trainer.log_dir)
    with (log / "metrics.csv").open() as file:
        logged = set(next(csv.reader(file)))
    assert {"own/credit/net.0", "own/credit/net.2", "own/total"} <= logged

    again = monitor_of(run(namespace, "fit", f"--config={log / 'config.yaml'}"))
    assert again.report.to_dict() == monitor.report.to_dict()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("every_n_epoch=2", "every_n_epoch"),
        ("options.normalize=zca", "normalize"),
        ("max_samples=many", "max_samples"),
    ],
)
def test_mistakes_are_named(namespace, argument, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(namespace, "fit", f"--trainer.callbacks={CLASS_PATH}", f"--trainer.callbacks.{argument}")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_values_out_of_range_are_named(namespace, tmp_path):
    config = write_config(tmp_path, namespace)
    with pytest.raises(ValueError, match="every_n_epochs is 0; it must be 1 or above"):
        run(namespace, "fit", f"--config={config}", "--trainer.callbacks.every_n_epochs=0")


def test_the_snippet_of_the_recipes(namespace, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```yaml title=.*?\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "config.yaml").write_text(snippet)
    cli = run(
        namespace,
        "fit",
        f"--config={tmp_path / 'config.yaml'}",
        "--seed_everything=0",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.log_every_n_steps=1",
    )
    assert len(monitor_of(cli).history) == 2
