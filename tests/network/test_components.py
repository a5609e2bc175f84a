"""Which modules are taken for the network's components."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import Options, component_effects, credit_report
from lightning_koopman.network.components import (
    clean_name,
    has_parameters,
    is_norm,
    named_components,
    transparent_modules,
    unwrapped,
)
from lightning_koopman.network.runs.hook_points import find_module


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4)


class Net(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bn = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(4, 4, 1)
        self.layers = nn.ModuleList(Residual() for _ in range(depth))


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())


class ListBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])


class AttributeStage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"b{i}", ListBlock())


class ExpertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.mixture = Net(gate=nn.Linear(4, 2), experts=nn.ModuleList(Residual() for _ in range(2)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mlp() for _ in range(3))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2))


AUTOMATIC = {
    "chain": (mlp, ["0", "3"]),
    "wrapped": (lambda: Net(model=Net(net=mlp())), ["model.net.0", "model.net.3"]),
    "single layer": (lambda: nn.Linear(3, 2), ["Linear"]),
    "norm belongs to the layer before": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        ["0", "3"],
    ),
    "norm in front stands for itself": (
        lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)),
        ["0", "1", "2"],
    ),
    "blocks stay whole": (
        lambda: Net(
            stem=nn.Conv2d(1, 4, 3), layers=nn.Sequential(Block(), Block()), head=nn.Linear(4, 2)
        ),
        ["stem", "layers.0", "layers.1", "head"],
    ),
    "stages of blocks are opened": (
        lambda: Net(
            stem=nn.Conv2d(1, 4, 3),
            layer1=nn.Sequential(Block(), Block()),
            layer2=nn.Sequential(Block(), Block()),
            fc=nn.Linear(4, 2),
        ),
        ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc"],
    ),
    "stages are opened, if one of them has a list of blocks": (
        lambda: Net(stem=nn.Conv2d(1, 4, 3), stages=nn.ModuleList([Stage(2), Stage(1)])),
        [
            *("stem", "stages.0.downsample", "stages.0.layers.0", "stages.0.layers.1"),
            *("stages.1.downsample", "stages.1.layers.0"),
        ],
    ),
    "a list of single convolutions is no stage": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Bottleneck(), Bottleneck()),
        ["0", "1", "2"],
    ),
    "a mixture of experts is no stage": (
        lambda: Net(stem=nn.Linear(4, 4), layers=nn.ModuleList([ExpertLayer(), ExpertLayer()])),
        ["stem", "layers.0", "layers.1"],
    ),
    "branches side by side are no stage": (
        lambda: nn.Sequential(nn.Linear(4, 4), Branches(), Branches()),
        ["0", "1", "2"],
    ),
    "two towers are looked into": (
        lambda: Net(encoder=mlp(), decoder=mlp()),
        ["encoder.0", "encoder.3", "decoder.0", "decoder.3"],
    ),
    "a block that stands alone stays whole, as its like do": (
        lambda: nn.Sequential(
            nn.Sequential(ListBlock()), nn.Sequential(ListBlock(), ListBlock()), nn.Linear(4, 2)
        ),
        ["0.0", "1.0", "1.1", "2"],
    ),
    "stages of one block each": (
        lambda: nn.Sequential(nn.Sequential(ListBlock()), nn.Sequential(ListBlock()), nn.Linear(4, 2)),
        ["0.0", "1.0", "2"],
    ),
    "blocks held as attributes, in two stages": (
        lambda: Net(
            stem=nn.Linear(4, 4), s1=AttributeStage(1), s2=AttributeStage(3), head=nn.Linear(4, 2)
        ),
        ["stem", "s1.b0", "s2.b0", "s2.b1", "s2.b2", "head"],
    ),
    "blocks held as attributes, in three stages": (
        lambda: Net(
            s1=AttributeStage(1), s2=AttributeStage(2), s3=AttributeStage(2), head=nn.Linear(4, 2)
        ),
        ["s1.b0", "s2.b0", "s2.b1", "s3.b0", "s3.b1", "head"],
    ),
    "two kinds of attention are no stage": (
        lambda: Net(
            stem=nn.Linear(4, 4),
            layers=nn.ModuleList(
                Net(own=Residual(), cross=Residual(), mlp=nn.Linear(64, 64)) for _ in range(2)
            ),
        ),
        ["stem", "layers.0", "layers.1"],
    ),
    "a norm in front of one layer belongs to it": (
        lambda: Net(
            stem=nn.Conv2d(1, 4, 3),
            stage1=nn.Sequential(Block(), Block()),
            down=nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2)),
            stage2=nn.Sequential(Block(), Block()),
        ),
        ["stem", "stage1.0", "stage1.1", "down", "stage2.0", "stage2.1"],
    ),
    "a list of a norm and one layer is never called itself": (
        lambda: Net(
            stem=nn.Conv2d(1, 4, 3),
            down=nn.ModuleList([nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2)]),
            stage=nn.Sequential(Block(), Block()),
        ),
        ["stem", "down.1", "stage.0", "stage.1"],
    ),
    "module dictionaries are opened": (
        lambda: Net(
            parts=nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}), head=nn.Linear(3, 2)
        ),
        ["parts.a", "parts.b", "head"],
    ),
}


@pytest.mark.parametrize("kind", AUTOMATIC)
def test_the_automatic_choice_is_what_a_person_would_draw(kind):
    make, expected = AUTOMATIC[kind]
    model = make()
    chosen = named_components(model)
    assert list(chosen) == expected
    modules = dict(model.named_modules())
    assert all(modules.get(name, model) is module for name, module in chosen.items())


class Small(nn.Module):
    """A network of plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Training(nn.Module):
    """Holds networks as a LightningModule does."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def training_step(self, batch, index):
        return self.net(batch).square().mean()


@pytest.mark.parametrize(
    "make",
    [
        lambda net: copy.deepcopy(net).requires_grad_(False),
        lambda net: nn.Sequential(copy.deepcopy(net)).requires_grad_(False),
        torch.optim.swa_utils.AveragedModel,
    ],
)
def test_a_teacher_beside_a_network_does_not_keep_it_closed(make):
    net = Small()
    both = named_components(Training(net=net, other=make(net)))
    assert list(both) == ["net.first", "net.last", "other"]
    beside = named_components(Training(net=net, other=make(net), head=nn.Linear(2, 2)))
    assert list(beside) == ["net", "head", "other"]


def test_frozen_parts_of_a_network_are_parts_like_any():
    net = nn.Sequential(Small().requires_grad_(False), Small())
    assert list(named_components(net)) == ["0", "1"]
    # Of networks that are all trained, or not at all, none is a copy.
    for frozen in (False, True):
        both = Training(net=Small(), other=Small()).requires_grad_(not frozen)
        assert list(named_components(both)) == ["net", "other"]


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ("0", ["0"]),
        (["3", "0"], ["0", "3"]),
        (["*"], ["0", "1", "2", "3"]),
        (["[03]", "0"], ["0", "3"]),
    ],
)
def test_names_and_patterns_choose_in_order_of_registration(components, expected):
    assert list(named_components(mlp(), components)) == expected


def test_patterns_reach_into_blocks():
    model = Net(stages=nn.Sequential(Block(), Block()), head=nn.Linear(4, 2))
    assert list(named_components(model, ["stages.*.conv", "head"])) == [
        "stages.0.conv",
        "stages.1.conv",
        "head",
    ]


def test_an_unknown_name_lists_close_matches():
    model = Net(encoder=nn.Linear(3, 3), decoder=nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=r"no module is called 'encodr'\. Close matches: 'encoder', 'decoder'\."
    ):
        named_components(model, ["encodr"])
    with pytest.raises(
        ValueError, match=r"no module is called 'zzz'\. The model has 'encoder', 'decoder'\."
    ):
        named_components(model, "zzz")
    with pytest.raises(ValueError, match=r"no module is called 'zzz\.\*'"):
        named_components(model, ["encoder", "zzz.*"])


def test_nested_components_are_refused():
    model = Net(stages=nn.Sequential(Block(), Block()), head=nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match=r"components overlap: 'stages\.0\.conv' is part of 'stages\.0'"
    ):
        named_components(model, ["stages.0", "stages.0.conv"])
    with pytest.raises(ValueError, match=r"components overlap: .* is part of 'stages'"):
        named_components(model, ["stages", "stages.*.bn"])


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("blocks.*", [f"blocks.{i}" for i in range(12)]),
        ("*", ["stem", *(f"blocks.{i}" for i in range(12)), "head"]),
        ("blocks.1*", ["blocks.1", "blocks.10", "blocks.11"]),
        ("blocks.*.conv", [f"blocks.{i}.conv" for i in range(12)]),
        (nn.Sequential, ["stem", "head"]),
        (["stem.*", "head.0"], ["stem.0", "stem.1", "head.0"]),
        ("bl*s", ["blocks"]),
    ],
)
def test_of_what_a_pattern_or_a_type_matches_the_outermost_modules_count(wanted, names):
    stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3)))
    blocks = nn.ModuleList(Block() for _ in range(12))
    model = Net(stem=stem, blocks=blocks, head=nn.Sequential(nn.Sequential(nn.Linear(4, 2))))
    assert list(named_components(model, wanted)) == names


def test_nested_components_are_found_whatever_sorts_between_them():
    model = Net(**{"a": nn.Sequential(nn.Linear(2, 2)), "a-b": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"components overlap: 'a\.0' is part of 'a'"):
        named_components(model, ["a", "a-b", "a.0"])


@pytest.mark.parametrize("make", [lambda: nn.ReLU(), lambda: nn.Sequential(nn.ReLU(), nn.Flatten())])
def test_a_model_without_parameters_has_no_components(make):
    with pytest.raises(
        ValueError, match=r"found no component in .* it has no submodule with parameters"
    ):
        named_components(make())


def test_transparent_modules_are_leaves_outside_of_every_component():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ReLU()),
        Block(),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    chosen = named_components(model)
    assert transparent_modules(model, chosen) == [model[1], model[2][0], model[4]]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.LayerNorm(2), True),
        (nn.GroupNorm(1, 2), True),
        (nn.InstanceNorm2d(2), True),
        (nn.RMSNorm(2), True),
        (nn.Linear(2, 2), False),
        (nn.ReLU(), False),
    ],
)
def test_normalisation_layers_are_recognised(module, expected):
    assert is_norm(module) is expected


def test_parameters_are_found_at_any_depth():
    assert has_parameters(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))))
    assert not has_parameters(nn.Sequential(nn.Sequential(nn.ReLU())))


def test_names_are_those_the_user_wrote():
    assert clean_name("_orig_mod.layers.0._orig_mod.fc") == "layers.0.fc"
    assert clean_name("layers.0") == "layers.0"


def test_an_empty_choice_is_refused():
    with pytest.raises(ValueError, match="components names nothing; leave it out"):
        named_components(nn.Sequential(nn.Linear(2, 2)), [])


class Deep(nn.Module):
    """Blocks in a list, a leaf beside them, and parts within the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.body = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, ["stem", "blocks.0", "blocks.1", "body.a"]),  # lists are never called, so their members
        (2, ["stem", "blocks.0", "blocks.1", "body.a"]),
        (3, ["stem", "blocks.0.0", "blocks.1.0", "body.a.0", "body.a.1"]),
        (9, ["stem", "blocks.0.0", "blocks.1.0", "body.a.0", "body.a.1"]),
    ],
)
def test_a_depth_takes_what_is_called_there(depth, expected):
    assert list(named_components(Deep(), depth)) == expected


def test_a_depth_is_one_or_more():
    with pytest.raises(ValueError, match="depth is 0; the model's own children are at depth 1"):
        named_components(Deep(), 0)


@pytest.mark.parametrize("odd", [True, 1.5, None, torch.nn.functional.relu, dict])
def test_what_chooses_no_component_is_refused(odd):
    with pytest.raises(TypeError, match=r"give names, glob patterns, types of nn\.Module, or a depth"):
        named_components(Deep(), [odd])


def test_wrappers_within_wrappers_are_opened_to_their_blocks():
    def tower(*inner: nn.Module) -> nn.Module:
        return Net(only=Net(layers=nn.Sequential(*inner)))

    net = Net(left=tower(nn.Linear(3, 4), nn.Linear(4, 4)), right=tower(nn.Linear(4, 2)))
    assert list(named_components(net, None)) == [
        "left.only.layers.0",
        "left.only.layers.1",
        "right.only.layers.0",
    ]
    single = Net(left=tower(nn.Linear(3, 4), nn.Linear(4, 4)), right=Net(deep=Net(last=Block())))
    assert list(named_components(single, None))[-1] == "right.deep.last"


class Wrapper(nn.Module):
    """What FSDP and activation checkpointing put around a module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> Any:
        return next(self.children())(x)


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
def test_wrapped_modules_are_chosen_as_if_they_were_not(name):
    def net(wrap: Any) -> nn.Module:
        blocks = [nn.Sequential(wrap(nn.Linear(4, 4)), nn.ReLU()) for _ in range(2)]
        return Net(body=wrap(nn.Sequential(*map(wrap, blocks))), head=wrap(nn.Linear(4, 2)))

    plain, wrapped = net(lambda m: m), net(lambda m: Wrapper(name, Wrapper("_orig_mod", m)))
    for wanted in (None, "body.*.0", nn.Linear, 2):
        expected, given = named_components(plain, wanted), named_components(wrapped, wanted)
        assert list(given) == list(expected)
        assert [type(m) for m in given.values()] == [type(m) for m in expected.values()]
    head = wrapped.head  # type: ignore[attr-defined]
    assert unwrapped(head) is head.get_submodule(f"{name}._orig_mod")


class Shared(nn.Module):
    """One block in a list that runs three times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.body = nn.ModuleDict({"inp": nn.Linear(6, 8), "blocks": nn.ModuleList([block])})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["inp"](x)
        for _ in range(3):
            x = self.body["blocks"][0](x)
        return self.head(x.mean(1))


def test_a_list_of_one_block_is_opened():
    assert list(named_components(Shared())) == ["body.inp", "body.blocks.0", "head"]
    report = credit_report(Shared(), list(torch.randn(200, 4, 6).split(50)), options=Options(max_dim=16))
    blocks = ("body.blocks.0", "body.blocks.0#1", "body.blocks.0#2")
    assert report.components == ("body.inp", *blocks, "head")


def test_norms_in_a_list_of_their_own_belong_to_the_blocks_beside_them():
    net = nn.Module()
    net.attentions = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
    net.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
    net.head = nn.Linear(8, 3)
    assert list(named_components(net)) == ["attentions.0", "attentions.1", "head"]


class Whole(nn.Module):
    """Runs parts that are registered elsewhere, too."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x


def registered_twice(kind: str) -> nn.Module:
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
    model, head = nn.Module(), nn.Linear(6, 2)
    whole = Whole(encoder, head) if kind == "in a module" else nn.Sequential(encoder, head)
    if kind != "whole first":
        model.encoder, model.head = encoder, head
    model.whole = whole
    if kind == "whole first":
        model.encoder, model.head = encoder, head
    model.forward = whole.forward
    return model


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("in a sequence", ["encoder.0", "encoder.3", "head"]),
        ("in a module", ["encoder.0", "encoder.3", "head"]),
        ("whole first", ["whole.0.0", "whole.0.3", "whole.1"]),
    ],
)
def test_a_module_that_is_registered_twice_is_one_component(kind, expected):
    torch.manual_seed(0)
    model = registered_twice(kind).eval()
    assert list(named_components(model)) == expected
    rows = torch.randn(400, 4).split(100)
    report = credit_report(model, rows)
    assert report.components == tuple(expected)
    assert not report.notes
    # As the same network without second names.
    plain = nn.Sequential(*model.encoder, model.head).eval()
    np.testing.assert_array_equal(report.credit, credit_report(plain, rows).credit)
    effects = component_effects(model, rows, report, ["skip", "linear"])
    np.testing.assert_array_equal(
        effects.values["skip"],
        component_effects(plain, rows, credit_report(plain, rows), ["skip", "linear"]).values["skip"],
    )


def test_any_name_of_a_module_chooses_it():
    model = registered_twice("in a sequence")
    assert list(named_components(model, ["whole.0.0", "whole.1"])) == ["encoder.0", "head"]
    report = credit_report(
        model.eval(), torch.randn(400, 4).split(100), options=Options(output="whole.0.3")
    )
    assert report.components == ("encoder.0", "encoder.3")


def test_parts_registered_elsewhere_are_parts_of_the_whole():
    with pytest.raises(ValueError, match=r"'encoder.0' is part of 'whole'. Choose one of the two"):
        named_components(registered_twice("in a module"), ["encoder.0", "whole"])


def test_names_that_read_like_calls_are_refused():
    model = nn.ModuleDict({"block": nn.Linear(4, 4), "block#1": nn.Linear(4, 4)})
    with pytest.raises(
        ValueError, match="'block#1' holds a '#', which tells the calls of one module apart"
    ):
        named_components(model)
    assert list(named_components(model, "block")) == ["block"]


def test_the_time_that_modules_are_looked_up_in_grows_with_their_number_not_with_its_square(monkeypatch):
    visits = []

    def named_modules(self, *args, **kwargs):
        for found in ordinary(self, *args, **kwargs):
            visits.append(found)
            yield found

    ordinary = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", named_modules)

    def visited(depth: int) -> int:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(depth)))
        for layer in net:
            nn.init.eye_(layer[0].weight)
        visits.clear()
        report = credit_report(net, torch.randn(120, 3).split(40), options=Options(errors=False))
        assert report.parameters == (12,) * depth
        return len(visits)

    # With its square, it would be sixteen times.
    assert visited(40) < 6 * visited(10)


def test_a_call_is_found_through_wrappers_and_in_scripted_modules_or_refused_by_name():
    inner = mlp()
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3)))
    body = Wrapper("_orig_mod", Net(a=Wrapper("_fsdp_wrapped_module", inner)))
    net = Net(body=body, scripted=scripted)
    assert find_module(net, "body.a.3#2") == (inner[3], 2)
    assert find_module(Wrapper("_orig_mod", net), "body.a") == (inner, 0)
    assert find_module(net, "scripted.0")[0].weight.shape == (3, 4)
    for name in ("body.b", "scripted.1", "body.a.0.weight"):
        with pytest.raises(ValueError, match=f"Net has no module '{name}', which the report names"):
            find_module(net, name)


def test_layers_whose_weights_are_derived_have_the_norms_behind_them():
    def make():
        parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
        return nn.Sequential(*parts)

    plain, derived = make(), make()
    for layer in derived[::3]:
        torch.nn.utils.parametrizations.weight_norm(layer)
    assert list(named_components(derived)) == list(named_components(plain)) == ["0", "3"]
