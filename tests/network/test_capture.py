"""What hooks record, and that they leave nothing behind."""

import copy
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.access import hooks
from lightning_koopman.network.access.isolation import is_compiled, undisturbed
from lightning_koopman.network.capture.capture import Capture
from lightning_koopman.network.flow.dataflow import DataFlow
from lightning_koopman.network.names import INPUT
from lightning_koopman.network.tensors import first_tensor


def hooks_on(model: nn.Module) -> int:
    """Count what is registered in all dictionaries of hooks."""
    held = [(name, held) for module in model.modules() for name, held in vars(module).items()]
    return sum(len(hooks) for name, hooks in held if "_hooks" in name)


def recorded(model: nn.Module, *args: Any, components: Any = None, passes: int = 1) -> dict[str, Tensor]:
    """States of the last of some equal passes."""
    with undisturbed(model), Capture(model, components) as capture:
        for _ in range(passes):
            capture.start_pass()
            model(*args)
            states = capture.end_pass()
    return states


def assert_states(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        assert torch.allclose(given[name], tensor, rtol=0, atol=1e-12), name


# What is recorded.


@pytest.mark.parametrize("passes", [1, 3])
def test_in_place_activations_are_recorded_as_by_hand(mlp, passes):
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        first = torch.relu(mlp.first(x))
        second = mlp.second(first)  # its activation is a function, which no hook sees
        head = mlp.head(torch.relu(second))
    states = recorded(mlp, x, passes=passes)
    assert_states(states, {INPUT: x, "first": first, "second": second, "head": head})
    assert float(states["second"].min()) < 0 <= float(states["first"].min())


@pytest.mark.parametrize("passes", [1, 2])
def test_named_components_are_taken_before_an_in_place_activation(mlp, passes):
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        first = mlp.first(x)
        act = torch.relu(first)
    states = recorded(mlp, x, components=["first", "act"], passes=passes)
    assert_states(states, {INPUT: x, "first": first, "act": act})
    assert float(states["first"].min()) < 0


@pytest.mark.parametrize("passes", [1, 2])
def test_norms_dropout_and_pooling_belong_to_the_layer_before(conv_net, passes):
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    conv_net.eval()
    with torch.no_grad():
        first = torch.relu(conv_net.bn1(conv_net.conv1(x)))
        second = torch.relu(conv_net.bn2(conv_net.conv2(first))).mean(dim=(2, 3), keepdim=True)
        fc = conv_net.fc(second.flatten(1))
    conv_net.train()
    assert_states(
        recorded(conv_net, x, passes=passes), {INPUT: x, "conv1": first, "conv2": second, "fc": fc}
    )


def test_a_shared_module_gives_one_state_a_call(shared_net):
    x = torch.randn(5, 5, dtype=torch.float64)
    with torch.no_grad():
        first = shared_net.shared(x)
        second = shared_net.shared(torch.tanh(first))
        head = shared_net.head(torch.tanh(second))
    assert_states(recorded(shared_net, x), {INPUT: x, "shared": first, "shared#1": second, "head": head})


def test_a_shared_activation_speaks_for_the_layer_before_each_call():
    parts = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "act": nn.ReLU(inplace=True)}
    net, x = wired(lambda m, x: m.act(m.b(m.act(m.a(x)))), **parts), torch.randn(4, 3)
    with torch.no_grad():
        a = torch.relu(net.a(x))
        b = torch.relu(net.b(a))
    assert_states(recorded(net, x, passes=2), {INPUT: x, "a": a, "b": b})


def test_tuples_give_their_first_tensor(tuple_net):
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    with torch.no_grad():
        sequence, _ = tuple_net.gru(tuple_net.embed(x))
    states = recorded(tuple_net, x)
    assert list(states) == [INPUT, "embed", "gru", "gru#0:1", "head"]
    assert torch.equal(states["gru"], sequence)


def test_components_come_in_order_of_execution():
    net = wired(lambda m, x: m.last(m.first(x)), last=nn.Linear(3, 2), first=nn.Linear(3, 3))
    assert list(recorded(net, torch.ones(2, 3))) == [INPUT, "first", "last"]


def test_keyword_inputs_are_recorded():
    def run(m: Any, left: Tensor, right: Tensor) -> Tensor:
        return m.b(m.a(input1=left, input2=right))

    net, left = wired(run, a=nn.Bilinear(2, 3, 4), b=nn.Linear(4, 2)), torch.randn(5, 2)
    with undisturbed(net), Capture(net) as capture:
        net(left=left, right=torch.randn(5, 3))
        assert torch.equal(capture.end_pass()[INPUT], left)


def test_a_single_layer_is_a_network_of_one_component():
    net = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert_states(recorded(net, x), {INPUT: x, "Linear": net(x).detach()})


def test_recorded_states_are_copies():
    def overwriting(m: Any, x: Tensor) -> Tensor:
        hidden = m.a(x)
        out = m.b(hidden)
        hidden.zero_(), x.zero_()
        return out

    net, x = wired(overwriting, a=nn.Linear(3, 3), b=nn.Linear(3, 2)), torch.randn(4, 3)
    expected = x.clone()
    states = recorded(net, x)
    assert torch.equal(states[INPUT], expected)
    assert bool(states["a"].all())


def test_a_second_call_within_one_step_is_ignored(linear_chain):
    net = linear_chain(3, 4, 2)
    first, second = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    with undisturbed(net), Capture(net) as capture:
        net(first)
        net(second)
        states = capture.end_pass()
        assert list(states) == [INPUT, "0", "1"]
        assert torch.equal(states[INPUT], first)
        assert torch.equal(states["1"], net(first))
        capture.start_pass()
        net(second)
        assert torch.equal(capture.end_pass()[INPUT], second)


def test_components_that_did_not_run_are_silent(shared_net):
    with undisturbed(shared_net), Capture(shared_net) as capture:
        assert set(capture.silent) == {"shared", "unused", "head"}
        shared_net(torch.randn(2, 5, dtype=torch.float64))
        assert capture.silent == ["unused"]


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_recorded_under_the_names_of_the_user(linear_chain, whole):
    net = linear_chain(3, 4, 4, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    plain = recorded(net, x)
    if whole:
        compiled: Any = torch.compile(net, backend="eager")
    else:
        compiled = nn.Sequential(*net)
        compiled[1] = torch.compile(compiled[1], backend="eager")
    with torch.no_grad():
        compiled(x)  # compiled before the hooks are set
        assert is_compiled(compiled)
        assert_states(recorded(compiled, x), plain)
        assert torch.equal(compiled(x), net(x))
    assert not is_compiled(net)


def test_a_module_compiled_in_place_is_recorded(linear_chain):
    net = linear_chain(3, 4, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    plain = recorded(net, x)
    net.compile(backend="eager")
    with torch.no_grad():
        net(x)
    assert is_compiled(net)
    assert_states(recorded(net, x), plain)


# What is left behind: nothing.


def test_no_hook_is_left_after_success(conv_net):
    with Capture(conv_net) as capture:
        assert hooks_on(conv_net) > 0
        conv_net(torch.randn(2, 1, 8, 8, dtype=torch.float64))
        capture.end_pass()
    assert hooks_on(conv_net) == 0
    capture.remove()


def test_no_hook_is_left_after_the_model_raised(raising_net):
    with pytest.raises(RuntimeError, match="the model itself failed"), Capture(raising_net):
        raising_net(torch.randn(2, 4, dtype=torch.float64))
    assert hooks_on(raising_net) == 0


def test_no_hook_is_left_when_registering_fails(conv_net, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(conv_net.fc, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no more hooks"), Capture(conv_net):
        pass
    assert hooks_on(conv_net) == 0


def test_nothing_is_left_whichever_hook_cannot_be_made(conv_net, monkeypatch):
    made, most, kept = itertools.count(), 0, hooks._Hook.__init__

    def refuse(hook: Any) -> None:
        if next(made) == most:
            raise MemoryError("no more hooks")
        kept(hook)

    monkeypatch.setattr(hooks._Hook, "__init__", refuse)
    for most in range(99):  # ruff: ignore[unused-loop-control-variable]
        # Hooks that were made once are used again, so each time it is a new network.
        net, made = copy.deepcopy(conv_net), itertools.count()
        try:
            with Capture(net):
                break
        except MemoryError:
            assert hooks_on(net) == 0
            assert not any("forward" in vars(module) for module in net.modules())
    assert 10 < most < 99


@pytest.mark.parametrize("place", [(DataFlow, "__exit__"), (Capture, "_leave")])
def test_nothing_follows_the_data_where_ctrl_c_met_the_end(place, mlp, monkeypatch):
    kept, errors = getattr(*place), [KeyboardInterrupt()]

    def interrupted(*args: Any) -> None:
        if errors:
            raise errors.pop()
        kept(*args)

    monkeypatch.setattr(*place, interrupted)
    capture = Capture(mlp)
    capture.start_pass(torch.ones(2, 6, dtype=torch.float64))
    capture.__enter__()
    mlp(torch.ones(2, 6, dtype=torch.float64))
    assert torch._C._len_torch_dispatch_stack() == 1
    with pytest.raises(KeyboardInterrupt):
        capture.remove()
    capture.remove()
    assert torch._C._len_torch_dispatch_stack() == 0


def in_another_thread(act: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def test_what_another_thread_runs_meanwhile_is_neither_seen_nor_ended(mlp):
    x, other = torch.randn(2, 2, 6, dtype=torch.float64)
    expected, alone = recorded(mlp, x), mlp(other)
    given: list[Tensor] = []

    def meanwhile(*_: Any) -> None:
        if not given:
            given.append(other)
            given.append(in_another_thread(lambda: mlp(other)))

    mlp.first.register_forward_hook(meanwhile)
    found = recorded(mlp, x)
    assert torch.equal(given[1], alone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_thread_may_be_about_to_call_what_is_just_taken_off(mlp):
    x = torch.randn(2, 6, dtype=torch.float64)
    with Capture(mlp):
        hooks = [h for m in mlp.modules() for h in m._forward_pre_hooks.values()]
        forward = vars(mlp.first)["forward"]
        # As torch calls hooks that it no longer knows to take keywords.
        assert in_another_thread(lambda: [hook(mlp, (x,)) for hook in hooks]) == [None] * len(hooks)
    assert hooks
    assert torch.equal(in_another_thread(lambda: forward(x)), mlp.first(x))


def test_hooks_of_others_still_fire_and_stay(mlp):
    seen: list[str] = []
    for name in ("first", "act", "head"):
        mlp.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    before = hooks_on(mlp)
    recorded(mlp, torch.randn(2, 6, dtype=torch.float64))
    assert seen == ["first", "act", "head"]
    assert hooks_on(mlp) == before


def test_inside_inference_mode_states_can_still_be_differentiated():
    net = nn.Linear(3, 2)
    with torch.inference_mode(), undisturbed(net):
        assert not torch.is_inference_mode_enabled()
        assert not torch.ones(2).is_inference()


# What goes wrong, and how it is told.


def test_a_failing_hook_ends_only_the_capture_never_the_forward_pass():
    def keep(tensor: Tensor, module: nn.Module) -> Tensor:
        raise ValueError("cannot keep this")

    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with Capture(net, keep=keep) as capture:
        assert net(torch.ones(2, 3)).shape == (2, 2)
        with pytest.raises(ValueError, match="cannot keep this"):
            capture.end_pass()
        assert capture.end_pass() == {}


def test_an_output_without_a_floating_point_tensor_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), wired(lambda m, x: x.argmax(dim=1), part=nn.Linear(1, 1)))
    with Capture(net) as capture:
        net(torch.ones(2, 3))
        with pytest.raises(ValueError, match="'1' returned Tensor with no floating-point tensor"):
            capture.end_pass()


def test_torchscript_modules_are_refused():
    net = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.ones(2, 3))
    with pytest.raises(ValueError, match="is a TorchScript module, whose parts take no forward hooks"):
        Capture(net)


class Pair(NamedTuple):
    index: Tensor
    value: Tensor


@dataclass
class Output:
    loss: None
    logits: Tensor


VALUE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (VALUE, VALUE),
        ((None, [3, {"a": VALUE}]), VALUE),
        (Pair(torch.ones(2).long(), VALUE), VALUE),
        (Output(None, VALUE), VALUE),
        (torch.ones(2).long(), None),
        (("text", 1.0, {}), None),
        (Output, None),
    ],
    ids=["tensor", "nested", "named tuple", "dataclass", "whole numbers", "no tensor", "a class"],
)
def test_the_first_floating_point_tensor_is_found(given, expected):
    assert first_tensor(given) is expected


def test_complex_components_are_left_out_by_name():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        z = m.spectrum(torch.fft.rfft(m.low(x)))
        return m.high(torch.fft.irfft(z, n=6))

    spectrum = nn.Linear(4, 4, dtype=torch.complex64)
    model = wired(run, low=nn.Linear(5, 6), spectrum=spectrum, high=nn.Linear(6, 3))
    x = list(torch.randn(200, 5).split(50))
    report = credit_report(model, x)
    assert report.components == ("low", "high")
    assert report.r2[1] > 0.999
    assert "gave no floating-point tensor, so left out: spectrum" in report.notes
    with pytest.raises(ValueError, match="component 'spectrum' returned Tensor with no floating-point"):
        credit_report(model, x, components=["low", "spectrum", "high"])


def test_complex_states_are_refused():
    with pytest.raises(ValueError, match=r"dtype torch\.complex64 arrived; complex states are not"):
        first_tensor([torch.ones(2, dtype=torch.complex64)])


def bodied(gives: Callable[[Tensor], Any] = torch.tanh) -> Any:
    """A body of two layers, after which the body itself still does something."""

    def run(m: Any, x: Tensor) -> Tensor:
        given = m.body(x)
        return m.head(given if isinstance(given, Tensor) else x[:, :3])

    layers = {"first": nn.Linear(4, 5), "second": nn.Linear(5, 3)}
    body = wired(lambda m, x: gives(m.second(m.first(x))), **layers)
    return wired(run, body=body, head=nn.Linear(3, 2))


def test_the_output_of_interest_may_be_what_holds_the_components():
    model, x = bodied(), torch.randn(6, 4)
    with Capture(model, ["body.first", "body.second"], output="body") as capture:
        model(x)
        capture.record_end(torch.zeros(6, 1))  # too late: the body gave it
        states = capture.end_pass()
    assert list(states) == [INPUT, "body.first", "body.second", "body"]
    assert torch.equal(states["body"], model.body(x))


def test_the_output_of_interest_may_lie_beside_the_components():
    model, x = bodied(), torch.randn(6, 4)
    with Capture(model, ["body.first"], output="head") as capture:
        model(x)
        assert list(capture.end_pass()) == [INPUT, "body.first", "head"]
    with pytest.raises(ValueError, match=r"'body.second' is part of component 'body'. Name finer"):
        Capture(model, ["body"], output="body.second")


def test_an_output_without_numbers_is_told_behind_the_pass_and_not_in_it():
    model, x = bodied(gives=lambda given: "words"), torch.randn(6, 4)
    with Capture(model, ["body.first", "body.second"], output="body") as capture:
        assert model(x).shape == (6, 2), "the user's own pass ends as it does without us"
        with pytest.raises(
            ValueError, match="the output of interest has type str, without a floating-point"
        ):
            capture.end_pass()
    assert hooks_on(model) == 0


def test_a_named_component_that_gives_no_numbers_is_refused_behind_the_pass():
    model, x = bodied(gives=lambda given: given.argmax(1)), torch.randn(6, 4)
    with Capture(model, ["body", "head"]) as capture:
        model.body(x)
        with pytest.raises(ValueError, match=r"'body' returned Tensor with no floating-point.*\. Leave"):
            capture.end_pass()


def test_units_of_which_other_processes_hold_the_rest_are_refused():
    class Spread(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, : self.kept]

    net = nn.Sequential(Spread(4, 6), nn.Tanh(), nn.Linear(3, 2)).double()
    net[0].kept = 3
    x = torch.randn(5, 4, dtype=torch.float64)

    def run() -> list[str]:
        with Capture(net) as capture:
            net(x)
        return list(capture.end_pass())

    assert run() == ["input", "0", "2"]  # a layer may well give fewer, if its weight is whole
    net[0].weight.full_tensor = lambda: None
    with pytest.raises(ValueError, match=r"'0' gave 3 of its 6 units.*output_layouts=Replicate\(\)"):
        run()
    net[0].kept, net[2] = 6, nn.Linear(6, 2).double()
    assert run() == ["input", "0", "2"]


def test_units_of_a_module_of_unknown_width_are_refused_if_its_weights_lie_in_parts():
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.scale = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.kernel[:3].T) * self.scale

    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Up(), nn.Tanh()), nn.Linear(3, 2))

    def run() -> list[str]:
        with Capture(net, ["0", "1", "2"]) as capture:
            net(torch.randn(5, 4))
        return list(capture.end_pass())

    assert run() == ["input", "0", "1", "2"]
    kernel = net[1][0].kernel
    kernel.full_tensor = kernel.to_local = lambda: kernel[:3]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'1' gave 3 of its 6 units.*output_layouts=Replicate\(\)"):
        run()
    # A width that some whole weight has is not that of a part.
    net[1][0].scale = nn.Parameter(torch.ones(3))
    assert run() == ["input", "0", "1", "2"]


@pytest.mark.parametrize("end", [None, "1"])
def test_a_state_that_lies_in_parts_in_several_processes_is_refused(end):
    class Spread(nn.Module):
        """Gives a tensor that passes for one over four processes."""

        def forward(self, x: Tensor) -> Tensor:
            given = x.clone()
            given.full_tensor = given.to_local = lambda: x  # type: ignore[attr-defined]
            given.device_mesh = SimpleNamespace(size=self.sizes.__getitem__)  # type: ignore[attr-defined]
            given.placements = [  # type: ignore[attr-defined]
                SimpleNamespace(is_replicate=lambda held=held: held) for held in self.replicated
            ]
            return given

    net = nn.Sequential(nn.Linear(4, 3), Spread())
    net[1].sizes, net[1].replicated = (2, 1), (True, False)
    x = torch.randn(5, 4)

    def run() -> dict[str, Tensor]:
        with Capture(net, ["0"] if end else ["0", "1"], output=end) as capture:
            net(x)
        return capture.end_pass()

    assert torch.equal(run()["1"], net[0](x))  # every process holds the whole
    net[1].sizes = (2, 2)
    with pytest.raises(ValueError, match=r"the state of '1' is a DTensor.*output_layouts=Replicate\(\)"):
        run()


class Direct(nn.Module):
    """Calls ``forward`` of its layers, which fires no hook; all but the last, if ``mixed``."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b.forward(torch.tanh(self.a.forward(x))))
        return self.c(x) if self.mixed else self.c.forward(x)


@pytest.mark.parametrize("mixed", [True, False])
def test_layers_called_by_their_forward_are_seen_like_others(mixed):
    torch.manual_seed(0)
    net = Direct(mixed)
    batches = list(torch.randn(300, 4).split(100))
    plain = nn.Sequential(net.a, nn.Tanh(), net.b, nn.Tanh(), net.c)
    report = credit_report(net, batches)
    expected = credit_report(plain, batches, components=["0", "2", "4"])
    assert report.components == ("a", "b", "c")
    assert report.total == pytest.approx(expected.total)
    assert not any("forward" in vars(module) for module in net.modules())
    # Altered outputs arrive too.
    altered = component_effects(net, batches, report, kinds=["output_noise"])
    assert altered.values["output_noise"].min() > 0
