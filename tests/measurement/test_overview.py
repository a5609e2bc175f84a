"""What would be measured: components, shapes, widths, and the command that lists them."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.cli.main import main
from lightning_koopman.measurement.overview import describe_components
from lightning_koopman.network.flow.dataflow import DataFlow

USER_CODE = """
def images():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

def pictures():
    return [torch.randn(5, 1, 8, 8)] * 3

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
"""


@pytest.fixture
def listed(user_module, monkeypatch, capsys):
    """What the command prints, word by word in each line."""
    user_module("listed", USER_CODE)
    monkeypatch.setenv("COLUMNS", "120")

    def words(command: str, code: int = 0) -> list[list[str]]:
        assert main(["components", *command.split()]) == code
        told = capsys.readouterr()
        return [line.split() for line in (told.err if code else told.out).splitlines()]

    return words


def test_the_command_lists_names_types_and_parameters_of_a_choice(listed):
    lines = listed("--model listed:images")
    assert ["0", "Conv2d", "40"] in lines
    assert ["3", "Linear", "435"] in lines
    assert ["2", "components", "with", "475", "of", "475"] in lines
    for more, shown in (("--components 3", ["3"]), ("--depth 1", ["0", "3"])):
        lines = listed(f"--model listed:images {more}")
        assert [line[0] for line in lines if line[1:2] in (["Conv2d"], ["Linear"])] == shown


def test_with_data_it_lists_shapes_and_state_widths(listed):
    lines = listed("--model listed:images --data listed:pictures --max-dim 100")
    # The flattened state belongs to the convolution, and is wider than a state vector may be.
    assert ["0", "Conv2d", "40", "5x1x8x8", "5x144", "144", "→", "100"] in lines
    assert ["3", "Linear", "435", "5x144", "5x3", "3"] in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model listed:images --components x", "no module is called 'x'"),
        ("--model listed:images --components 0 --depth 1", "components is '0' and depth is 1; give one"),
        ("--model listed:images --max-dim 0", "max_dim is 0; a state vector needs at least one"),
        ("--model listed:Wide", "listed:Wide cannot be built without arguments"),
    ],
)
def test_wrong_arguments_are_explained(listed, arguments, message):
    assert message in " ".join(word for line in listed(arguments, code=1) for word in line)


def branches() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(torch.cat([m.a(x), m.b(x)], 1))

    parts = {"stem": nn.Linear(4, 6), "a": nn.Linear(6, 3), "b": nn.Linear(6, 2)}
    return wired(run, **parts, spare=nn.Linear(4, 4), head=nn.Linear(5, 2))


def printed(found: RenderableType) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


def test_joined_and_silent_components_are_named():
    net = branches()
    found = describe_components(net, [torch.randn(8, 4)])
    assert [row.state for row in found.rows] == ["stem", "a+b", "a+b", "head"]
    assert [row.width for row in found.rows] == [6, 3, 2, 2]
    assert any("'spare'" in note for note in found.notes)
    assert "3 in a+b" in printed(found)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_every_call_of_a_shared_module_is_a_row(shared_net):
    found = describe_components(shared_net, [torch.randn(8, 5, dtype=torch.float64)])
    assert [row.name for row in found.rows] == ["shared", "shared#1", "head"]
    assert found.rows[1].shape_in == (8, 5)
    title = found.__rich__().title
    assert isinstance(title, str)
    assert title.startswith("3 components with 48 of 78 parameters")


def test_parameters_are_those_of_all_that_a_component_holds_each_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(60, 4)
    assert credit_report(net, [x]).parameters == (30 + 12, 14)
    assert [row.parameters for row in describe_components(net, [x]).rows] == [30 + 12, 14]
    both = {"both": nn.Linear(2, 3), "head": nn.Linear(6, 2)}
    twice = wired(lambda m, x: m.head(torch.cat([m.both(x[:, :2]), m.both(x[:, 2:])], 1)), **both)
    report = credit_report(twice, [x])
    assert (report.components, report.parameters) == (("both+both#1", "head"), (9, 14))


def test_a_batch_and_a_component_that_runs_are_needed():
    net = branches()
    with pytest.raises(ValueError, match="batches is empty; the shapes need one batch"):
        describe_components(net, [])
    with pytest.raises(ValueError, match=r"no component ran in the forward pass; chosen were \['spare'"):
        describe_components(net, [torch.randn(8, 4)], components="spare")


def with_constant() -> nn.Module:
    """A layer that gives the same for every sample, beside those that the data run through."""
    parts = {"stem": nn.Linear(4, 3), "constant": nn.Linear(2, 3), "head": nn.Linear(3, 2)}
    return wired(lambda m, x: m.head(m.stem(x) + m.constant(torch.ones(len(x), 2))), **parts)


def test_what_is_the_same_for_every_sample_is_shown_as_left_out():
    found = describe_components(with_constant(), [torch.randn(8, 4)])
    (line,) = [text for text in printed(found).splitlines() if text.strip().startswith("constant")]
    assert line.rstrip().endswith("left out")


def test_where_data_cannot_be_followed_components_stand_in_a_row(monkeypatch):
    def broken(self: DataFlow, *args: object, **kwargs: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(DataFlow, "_known", broken)
    found = describe_components(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), [torch.randn(8, 4)])
    assert [row.state for row in found.rows] == ["0", "1"]
