"""Linear components: exact on linear networks, saved and loaded as usual, refused where impossible."""

import dataclasses
import io

import pytest
import torch
from effect_nets import Branches
from torch import nn

from lightning_koopman import CheckpointError, Options, credit_report, linearize
from lightning_koopman.cli import main as cli
from lightning_koopman.effects.linear_map import LinearFit
from lightning_koopman.effects.linearization import (
    LinearComponent,
    linear_components,
    linearize_within,
    load_linearized,
    save_linearized,
)


def mlp(act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 3)
    ).eval()


def inputs(n: int = 500, seed: int = 5) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def toy_model() -> nn.Module:
    return mlp()


def toy_batches() -> list[list[torch.Tensor]]:
    x = inputs(800)
    return [[part, mlp()(part).argmax(1)] for part in x.split(100)]


def test_identity_activations_make_linearising_exact_and_merged():
    net, x = mlp(nn.Identity), inputs()
    report = credit_report(net, [x])
    new = linearize(net, report, ["2", "4"], [x])
    assert [type(child).__name__ for child in new] == [
        "Linear", "Identity", "LinearComponent", "Identity", "Identity", "Identity", "Linear",
    ]  # fmt: skip
    torch.testing.assert_close(new(inputs(seed=8)), net(inputs(seed=8)), rtol=1e-4, atol=1e-5)
    assert new[2].rank is not None  # 16 -> 16 through the 6 directions that the input fills
    assert sum(p.numel() for p in new.parameters()) < sum(p.numel() for p in net.parameters())


def test_the_original_is_left_alone_and_neighbours_stay_apart_on_demand():
    net, x = mlp(), inputs()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    new = linearize(net, credit_report(net, [x]), ["2", "4"], [x], merge=False)
    assert len(linear_components(new)) == 2
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_bare_linear_layer_stays_as_it_is():
    net, x = mlp(), inputs()
    new = linearize(net, credit_report(net, [x]), ["6"], [x])
    assert not linear_components(new)
    torch.testing.assert_close(new(x), net(x))


def test_state_dicts_go_round(tmp_path):
    net, x = mlp(), inputs()
    report = credit_report(net, [x])
    new = linearize(net, report, ["2", "4"], [x])
    torch.save(new.state_dict(), tmp_path / "weights.pt")
    other = linearize(net, report, ["2", "4"], [x + 0.1])
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    torch.testing.assert_close(other(x), new(x), rtol=0, atol=0)
    save_linearized(new, tmp_path / "new.ckpt", more={"global_step": 7})
    loaded = load_linearized(net, tmp_path / "new.ckpt")
    torch.testing.assert_close(loaded(x), new(x), rtol=0, atol=0)
    whole = io.BytesIO()
    torch.save(new, whole)
    whole.seek(0)
    torch.testing.assert_close(torch.load(whole, weights_only=False)(x), new(x), rtol=0, atol=0)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    net, x = mlp(), inputs()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="holds no linear components; load it as usual"):
        load_linearized(net, tmp_path / "plain.ckpt")
    save_linearized(linearize(net, credit_report(net, [x]), ["4"], [x]), tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match=r"does not fit Sequential: .* \(KeyError: '4'\)"):
        load_linearized(net[:2], tmp_path / "new.ckpt")


def test_wide_images_become_thin_layers_that_give_whole_images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)).eval()
    x = torch.randn(900, 1, 8, 8)
    new = linearize(
        net, credit_report(net, [x], options=Options(max_dim=64)), ["1"], x.split(300), variance=1.0
    )
    assert new[1].shape == (4, 8, 8)
    assert new[1].rank == 64  # the 512 values in between depend on 64 pixels
    torch.testing.assert_close(new(x), net(x), rtol=1e-3, atol=1e-4)


def test_greedy_choice_keeps_the_drop_and_reports_costs():
    net, x = mlp(), inputs(800)
    y = net(x).argmax(1)
    batches = [[a, b] for a, b in zip(x.split(100), y.split(100), strict=True)]
    report = credit_report(net, batches)
    result = linearize_within(net, report, batches[::2], batches[1::2], max_drop=0.1)
    assert result.metric[0] == pytest.approx(1.0)
    assert result.metric[1] >= 0.9
    assert result.components
    assert result.after.parameters <= result.before.parameters
    assert result.before.flops == 2 * 100 * (6 * 16 + 16 * 16 * 2 + 16 * 3)
    nothing = linearize_within(mlp(nn.Tanh), report, [x], [x], max_drop=0.0)
    assert nothing.model is not None
    with pytest.raises(ValueError, match="max_drop is -1"):
        linearize_within(net, report, batches, batches, max_drop=-1)


def test_states_that_no_single_module_gives_are_named():
    torch.manual_seed(0)
    net, x = Branches(), torch.randn(200, 3)
    with pytest.raises(
        ValueError, match=r"the states \['left\+right'\] were joined from what runs side"
    ):
        linearize(net, credit_report(net, [x]), ["head"], [x])
    named = credit_report(net, [x], components=["left", "head"])
    assert named.components[-1] == "output"
    with pytest.raises(ValueError, match=r"ends with what the network returns.*by output="):
        linearize(net, named, ["head"], [x])


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.act(self.act(self.first(x)) + x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x, other):
        return torch.relu(self.inner(x) + other)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.last = Pair(), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.pair(x, x))


def test_errors_say_what_arrived_and_what_to_do():
    net, x = mlp(), inputs()
    report = credit_report(net, [x])
    with pytest.raises(ValueError, match=r"has no components \['x'\]"):
        linearize(net, report, ["x"], [x])
    with pytest.raises(ValueError, match="variance is 0"):
        linearize(net, report, ["2"], [x], variance=0)
    with pytest.raises(ValueError, match="the batches were empty"):
        linearize(net, report, ["2"], [])
    with pytest.raises(ValueError, match="does not say which modules"):
        linearize(net, dataclasses.replace(report, parts={}), ["2"], [x])
    with pytest.raises(ValueError, match=r"went through torch.compile"):
        linearize(torch.compile(net, backend="eager"), report, ["2"], [x])
    shared = Shared().eval()
    with pytest.raises(ValueError, match=r"\['act'\] run \[2\] times in one pass"):
        linearize(shared, credit_report(shared, [x]), ["first"], [x])
    pairs = Pairs().eval()
    with pytest.raises(ValueError, match="'pair' takes 2 tensors and gives Tensor"):
        linearize(pairs, credit_report(pairs, [x], components=["pair", "last"]), ["pair"], [x])
    with pytest.raises(ValueError, match="0 sample arrived; a linear map needs at least 2"):
        LinearFit().solve()
    assert "shape=(2,)" in repr(LinearComponent(3, (2,), replaces=["a"]))


def test_command_writes_a_checkpoint_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": mlp().state_dict(), "global_step": 3}, "net.ckpt")
    here = __name__
    arguments = [
        "linearize", "--model", f"{here}:toy_model", "--data", f"{here}:toy_batches",
        "--ckpt", "net.ckpt", "--max-drop", "0.2", "--out", "new.ckpt",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert "parameters" in capsys.readouterr().out
    loaded = load_linearized(mlp(), "new.ckpt")
    assert linear_components(loaded)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.inner(self.inner(x)))


def test_a_second_call_cannot_become_linear_and_places_apart_are_no_neighbours():
    net, x = Repeated().eval(), inputs()
    with pytest.raises(
        ValueError, match="'inner#1' is a module's second call; only modules that run once"
    ):
        linearize(net, credit_report(net, [x], components=["inner", "last"]), ["inner#1"], [x])
    apart = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6), nn.Tanh()), "b": nn.Linear(6, 2)})
    apart.forward = lambda given: apart["b"](apart["a"](given))
    new = linearize(apart, credit_report(apart, [x], components=["a", "b"]), ["a", "b"], [x])
    assert [component.replaces for component in linear_components(new)] == [("a",)]


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new.ckpt"
    path.write_bytes(b"of another day")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_linearized(mlp(), path)
    assert path.read_bytes() == b"of another day"
    assert list(tmp_path.iterdir()) == [path]
