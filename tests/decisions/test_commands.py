"""The commands that decide: table, figure, file, and a last line that says what to do next."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import CheckpointError, drop_order, linearize
from lightning_koopman.cli.main import main
from lightning_koopman.decisions.swaps import load_shrunk, swaps_in

HERE = __name__


LOAD = (
    "Next: load it by lightning_koopman.decisions.swaps.load_shrunk(model, '{}'), and test it on other "
    "data."
)


def last_line(printed: str) -> str:
    """The last line, which alone says what to do next."""
    assert printed.count("Next: ") == 1
    return printed.rstrip().splitlines()[-1]


class Residual(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.inner.weight.data *= size

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def toy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(size) for size in (0.05, 1.0, 0.3)), nn.Linear(6, 3)).eval()


def toy_batches() -> list[list[Tensor]]:
    x = torch.randn(800, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return [[part, toy_model()(part).argmax(1)] for part in x.split(100)]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": toy_model().state_dict(), "global_step": 3}, "net.ckpt")
    return [f"--model={HERE}:toy_model", f"--data={HERE}:toy_batches", "--ckpt=net.ckpt"]


def test_drop_writes_a_checkpoint_a_figure_and_a_table(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drop", *given, "--max-drop=0.1", "--out=small.ckpt", "--figure=small.png"]) == 0
    printed = capsys.readouterr().out
    assert "Dropped one after the other, 512 samples" in printed
    assert last_line(printed) == LOAD.format("small.ckpt")
    assert swaps_in(load_shrunk(toy_model(), "small.ckpt"))
    assert torch.load("small.ckpt", weights_only=True)["global_step"] == 3
    assert Path("small.png").stat().st_size
    assert main(["drop", *given, "--steps=2", "--out=small.json", "--samples=100"]) == 0
    assert last_line(capsys.readouterr().out) == "Next: --out shrunk.ckpt writes the new network."
    rows = json.loads(Path("small.json").read_text())
    assert [row["step"] for row in rows] == [1, 2]
    assert {row["component"] for row in rows} < {"0", "1", "2"}


def test_nothing_is_written_where_nothing_can_go(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drop", *given, "--max-drop=0", "--components=['1']", "--out=small.ckpt"]) == 0
    printed = capsys.readouterr().out
    assert last_line(printed).startswith("Next: lightning-koopman linearize, or a larger --max-drop.")
    assert "Written" not in printed
    assert not Path("small.ckpt").exists()


def narrowing_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)).eval()


def test_no_larger_loss_is_advised_where_shapes_alone_forbid_it(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(narrowing_model().state_dict(), "narrow.ckpt")
    asked = [f"--model={HERE}:narrowing_model", "--ckpt=narrow.ckpt", given[1]]
    assert main(["drop", *asked]) == 0
    told = "Next: lightning-koopman linearize. Nothing changed, so no checkpoint is written."
    assert last_line(capsys.readouterr().out) == told
    found = drop_order(narrowing_model(), toy_batches())
    assert found.next_step == "Next: linearize, which puts linear maps in place of components."


@pytest.mark.parametrize(
    ("candidates", "told"),
    [((), "lightning-koopman drop."), (("0",), "lightning-koopman drop, or a larger --max-drop.")],
)
def test_a_larger_loss_is_advised_where_something_could_become_linear(
    given: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    candidates: tuple[str, ...],
    told: str,
) -> None:
    nothing = linearize(toy_model(), toy_batches(), max_drop=0)
    found = dataclasses.replace(nothing, components=(), candidates=candidates)
    monkeypatch.setattr("lightning_koopman.decisions.linear.linearize", lambda *_, **__: found)
    assert main(["linearize", *given]) == 0
    assert last_line(capsys.readouterr().out).startswith(f"Next: {told}")
    assert ("larger max_drop" in found.next_step) == bool(candidates)


@pytest.mark.parametrize("command", ["drop", "linearize"])
def test_a_shrunk_network_is_told_from_another_one(
    given: list[str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    admitted = ["--max-drop=0.2"] + ["--allow-larger"] * (command == "linearize")
    assert main([command, *given, *admitted, "--out=small.ckpt"]) == 0
    capsys.readouterr()
    told = (
        "error: small.ckpt holds a network with dropped or linear components, which does not fit "
        "Sequential as it is; give the one that lightning_koopman.decisions.swaps.load_shrunk(model, "
        "'small.ckpt') returns, to a command as a function that --model names\n"
    )
    for ask in ("evaluate", "effects"):
        assert main([ask, *given[:2], "--ckpt=small.ckpt"]) == 1
        assert capsys.readouterr().err.endswith(told)
    assert main(["evaluate", f"--model={HERE}:shrunk_model", given[1], "--ckpt=small.ckpt"]) == 0
    with pytest.raises(CheckpointError, match=r"does not fit Sequential: it lacks '4\.weight'"):
        load_shrunk(nn.Sequential(*toy_model(), nn.Linear(3, 3)), "small.ckpt")


def shrunk_model() -> nn.Module:
    return load_shrunk(toy_model(), "small.ckpt")


def test_linearize_writes_a_checkpoint_that_loads(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--max-drop=0.2", "--allow-larger=true", "--out=new.ckpt", "--figure=new.png"]
    assert main(["linearize", *given, *asked]) == 0
    printed = capsys.readouterr().out
    assert "of the parameters" in printed.split("\n")[0]
    assert last_line(printed) == LOAD.format("new.ckpt")
    assert swaps_in(load_shrunk(toy_model(), "new.ckpt"))
    assert Path("new.png").stat().st_size


def test_bits_writes_a_checkpoint_and_a_table(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    assert main(["bits", *given, "--average=4", "--out=small.ckpt", "--figure=small.png"]) == 0
    printed = capsys.readouterr().out
    assert "Bits per component, 512 samples" in printed
    assert last_line(printed) == LOAD.format("small.ckpt")
    weight = load_shrunk(toy_model(), "small.ckpt").get_submodule("3").weight
    assert not torch.equal(weight, toy_model()[3].weight)
    assert Path("small.png").stat().st_size
    assert main(["bits", *given, "--widths=[4, 2]", "--out=small.json"]) == 0
    assert {row["bits"] for row in json.loads(Path("small.json").read_text())} <= {2, 4}
