import pickle
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from lit import LitNet
from torch import nn
from torch.distributed import checkpoint as distributed

from lightning_koopman.network.weights import (
    CheckpointError,
    apply_checkpoint,
    find_checkpoints,
    load_checkpoint,
    run_names,
)


def save(path: Path, model: nn.Module, step: int = 4, **more: Any) -> Path:
    torch.save({"state_dict": model.state_dict(), "global_step": step, **more}, path)
    return path


def test_reads_weights_step_and_hyperparameters(tmp_path):
    model = LitNet()
    path = save(tmp_path / "a.ckpt", model, 12, hyper_parameters={"width": 16})
    checkpoint = load_checkpoint(path)
    assert (checkpoint.step, dict(checkpoint.hyper_parameters)) == (12, {"width": 16})
    assert checkpoint.state_dict.keys() == model.state_dict().keys()


def test_reads_a_bare_state_dict_whose_step_is_unknown(tmp_path):
    torch.save(LitNet().state_dict(), tmp_path / "bare.pt")
    assert load_checkpoint(tmp_path / "bare.pt").step is None


def test_strips_what_compile_adds_to_names(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    torch.save({f"_orig_mod.{k}": v for k, v in model.state_dict().items()}, tmp_path / "c.pt")
    other = nn.Sequential(nn.Linear(2, 2))
    apply_checkpoint(other, load_checkpoint(tmp_path / "c.pt"))
    assert torch.equal(other[0].weight, model[0].weight)


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("owned"),))


def test_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "evil.ckpt", LitNet(), extra=Payload())
    with pytest.raises(CheckpointError, match=r"evil.ckpt holds more than weights.*--trust-checkpoint"):
        load_checkpoint("evil.ckpt")
    assert not Path("owned").exists()
    load_checkpoint("evil.ckpt", trust=True)
    assert Path("owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no checkpoint, or a damaged one"),
        (b"not a checkpoint at all", "is no checkpoint, or a damaged one"),
        (pickle.dumps([1, 2]), "is no checkpoint, or a damaged one"),
        (pickle.dumps({"a": 174812789}, protocol=2), "is no checkpoint, or a damaged one"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    (tmp_path / "bad.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad\.ckpt.*({message})"):
        load_checkpoint(tmp_path / "bad.ckpt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_is_named(tmp_path, share):
    content = save(tmp_path / "cut.ckpt", LitNet()).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
        load_checkpoint(tmp_path / "cut.ckpt")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.ckpt does not exist"):
        load_checkpoint(tmp_path / "none.ckpt")


def test_folder_of_shards_is_named(tmp_path):
    (tmp_path / "shards.ckpt").mkdir()
    (tmp_path / "shards.ckpt" / ".metadata").touch()
    (tmp_path / "shards.ckpt" / "meta.pt").touch()
    with pytest.raises(CheckpointError, match=r"sharded checkpoint; merge it .*consolidate_checkpoint"):
        load_checkpoint(tmp_path / "shards.ckpt")


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavail)", "ignore:TypedStorage")
def test_shards_of_torch_are_merged_by_the_command_that_is_named(tmp_path):
    model = LitNet()
    folder, merged = tmp_path / "shards", tmp_path / "merged.pt"
    # Older ones find by themselves that there is one process.
    alone = {"no_dist": True} if "no_dist" in signature(distributed.save).parameters else {}
    distributed.save({"state_dict": model.state_dict()}, checkpoint_id=folder, **alone)
    with pytest.raises(CheckpointError, match="format_utils dcp_to_torch FOLDER FILE") as told:
        load_checkpoint(folder)
    command = str(told.value).rpartition("python -m ")[2].split()
    given = {"FOLDER": str(folder), "FILE": str(merged)}
    subprocess.run([sys.executable, "-m", *(given.get(word, word) for word in command)], check=True)
    saved = load_checkpoint(merged).state_dict
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("content", [torch.ones(2), {"state_dict": {"a": 1}}, {"a": "b"}])
def test_files_without_weights_are_named(tmp_path, content):
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt holds (a Tensor|no state_dict)"):
        load_checkpoint(tmp_path / "odd.ckpt")


def test_first_mismatching_key_is_named_and_the_model_left_alone(tmp_path):
    model, more = LitNet(), LitNet()
    more.extra = nn.Linear(1, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name, other, message in (
        ("wide", LitNet(width=20), "wide.ckpt does not fit LitNet: 'net.0.weight' has shape"),
        ("short", nn.Linear(1, 1), "short.ckpt does not fit LitNet: it lacks 'net.0.weight'"),
        ("more", more, "the model has no 'extra.weight'"),
    ):
        checkpoint = load_checkpoint(save(tmp_path / f"{name}.ckpt", other))
        with pytest.raises(CheckpointError, match=message):
            apply_checkpoint(model, checkpoint)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_patterns_folders_and_plain_names_are_found_once(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.ckpt", "deep/b.ckpt", "c.txt"):
        (tmp_path / name).touch()
    expected = [tmp_path / "a.ckpt", tmp_path / "deep" / "b.ckpt"]
    assert find_checkpoints(str(tmp_path / "**" / "*.ckpt")) == expected
    assert find_checkpoints(tmp_path) == expected
    assert find_checkpoints([tmp_path, tmp_path / "a.ckpt"]) == expected
    assert find_checkpoints(tmp_path / "missing.ckpt") == [tmp_path / "missing.ckpt"]
    with pytest.raises(CheckpointError, match=r"no checkpoint matches .*\*\.pt"):
        find_checkpoints(str(tmp_path / "*.pt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint matches .*empty/\*\*/\*\.ckpt"):
        find_checkpoints(tmp_path / "empty")


def test_brackets_in_the_name_of_a_file_or_folder_that_is_there_are_no_pattern(tmp_path):
    folder = tmp_path / "run [a]"
    folder.mkdir()
    for name in ("x [1].ckpt", "y.ckpt"):
        (folder / name).touch()
    assert find_checkpoints(folder) == [folder / "x [1].ckpt", folder / "y.ckpt"]
    assert find_checkpoints(folder / "x [1].ckpt") == [folder / "x [1].ckpt"]
    assert find_checkpoints(str(tmp_path / "*" / "[xy]*.ckpt")) == find_checkpoints(folder)
    (folder / "sub").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint matches .*run \[a\]/sub/\*\*/\*\.ckpt"):
        find_checkpoints(folder / "sub")


@pytest.mark.parametrize("wrapper", ["module", "model"])
def test_what_a_wrapper_puts_before_all_names_is_told(wrapper, tmp_path):
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    outer = nn.ModuleDict({wrapper: inner})
    torch.save(outer.state_dict(), tmp_path / "outer.pt")
    with pytest.raises(CheckpointError, match=rf"'0\.weight'; its names have '{wrapper}\.' in front"):
        apply_checkpoint(inner, load_checkpoint(tmp_path / "outer.pt"))
    torch.save(inner.state_dict(), tmp_path / "inner.pt")
    with pytest.raises(CheckpointError, match=rf"0\.weight'; its names lack '{wrapper}\.' in front"):
        apply_checkpoint(outer, load_checkpoint(tmp_path / "inner.pt"))
    lacking = {name: value for name, value in outer.state_dict().items() if "1.bias" not in name}
    torch.save(lacking, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"it lacks '0\.weight'$"):
        apply_checkpoint(inner, load_checkpoint(tmp_path / "other.pt"))


def test_numbers_in_names_are_sorted_as_numbers(tmp_path):
    for folder in (1, 2, 10):
        (tmp_path / f"run{folder}").mkdir()
        for epoch in (*range(1, 13), 100):
            (tmp_path / f"run{folder}" / f"epoch_{epoch}.pt").touch()
    found = find_checkpoints(str(tmp_path / "*" / "*.pt"))
    places = [(int(path.parent.name[3:]), int(path.stem[6:])) for path in found]
    assert places == [(folder, e) for folder in (1, 2, 10) for e in (*range(1, 13), 100)]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/1.ckpt", "a/2.ckpt"], ["", ""]),
        (["r/a/1.ckpt", "r/b/1.ckpt"], ["a", "b"]),
        (["r/1.ckpt", "r/b/1.ckpt"], [".", "b"]),
        (["v0/checkpoints/1.ckpt", "v1/checkpoints/1.ckpt"], ["v0", "v1"]),
        (["v0/checkpoints/1.ckpt", "v0/1.ckpt"], ["checkpoints", "."]),
        (["x/v0/seed1/1.ckpt", "x/v1/seed1/1.ckpt"], ["v0/seed1", "v1/seed1"]),
        # Folders of a sweep, whose files are named by what Lightning counts or by one metric.
        (["lr=0.1/epoch=1.ckpt", "lr=0.2/epoch=1.ckpt"], ["lr=0.1", "lr=0.2"]),
        (["a/loss=0.1.ckpt", "b/loss=0.2.ckpt", "last.ckpt"], ["a", "b", "."]),
        (["step=20/loss=0.1.ckpt", "step=30/loss=0.2.ckpt"], ["step=20", "step=30"]),
    ],
)
def test_runs_are_named_by_folder(paths, names):
    assert run_names([Path(path) for path in paths]) == names
