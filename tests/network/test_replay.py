"""The outermost calls of a step are recorded as they are, and run again as they were."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lit import hooks_on
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_koopman.network.access.hooks import attach
from lightning_koopman.network.access.isolation import undisturbed
from lightning_koopman.network.runs.recording import Recording, wrap


class Parts(nn.Module):
    """An encoder and a decoder, which a step may call in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.between, self.decoder = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        h = self.encoder(x * scale)
        return self.decoder(h if shift is None else h + shift)


def parts() -> Parts:
    generator = torch.Generator().manual_seed(0)
    model = Parts()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model.eval()


def parts_of(model: Any) -> dict[str, nn.Module]:
    return {"encoder": model.encoder, "decoder": model.decoder}


class Packs(nn.Module):
    """Takes a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.other = nn.GRU(4, 3), nn.Linear(2, 2)

    def forward(self, x: PackedSequence) -> Tensor:
        return self.rnn(x)[1][-1]


def recorded(model: Any, step: Callable[[Any, Tensor], Any], n_steps: int = 2, **how: Any) -> Recording:
    recording, hooks = Recording(model, parts_of(model), **how), hooks_on(model)
    for seed in range(n_steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), recording:
            step(model, x)
        recording.end_step()
    assert hooks_on(model) == hooks
    assert "forward" not in vars(model)
    return recording


WAYS: dict[str, Callable[[Parts, Tensor], Any]] = {
    "a call": lambda m, x: m(x, 0.5, shift=torch.ones(3)),
    "forward itself": lambda m, x: m.forward(x, scale=0.5, shift=torch.ones(3)),
    "two calls": lambda m, x: m.decoder(m.encoder(x)),
    "a module of torch's between them": lambda m, x: m.decoder(m.between(m.encoder(x))),
    "a view between them": lambda m, x: m.decoder(m.encoder(x)[1:4]),
    "an argument changed in place": lambda m, x: (m(x), x.zero_()),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_ran_runs_again(way):
    model, given = parts(), []
    handle = model.decoder.register_forward_hook(lambda m, a, output: given.append(output.clone()))
    recording = recorded(model, WAYS[way])
    assert recording.reason is None
    assert recording.differs() is None
    first, given[:] = given[:2], []
    with torch.no_grad():
        for step in recording.steps:
            step.run()
            step.run()
    handle.remove()
    # Each step twice, since a call may change its arguments in place.
    for found, expected in zip(given, [first[0], first[0], first[1], first[1]], strict=True):
        assert torch.equal(found, expected)


def test_later_calls_are_fed_with_what_earlier_ones_give_now():
    model = parts()
    recording = recorded(model, WAYS["two calls"], n_steps=1)
    with torch.no_grad():
        model.encoder.weight.mul_(2)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(recording.steps[0].run()[-1], model.decoder(model.encoder(x)))


def test_a_call_that_changes_what_an_earlier_one_gave_is_no_difference():
    model = parts()
    model.between = nn.ReLU(inplace=True)
    recording = recorded(model, WAYS["a module of torch's between them"])
    assert recording.differs() is None


@pytest.mark.parametrize("called", [lambda m: m.encoder, lambda m: m, lambda m: m.forward])
def test_a_step_that_goes_on_behind_a_failed_call_is_not_run_again(called: Callable[[Any], Any]):
    model = parts()
    too_large = model.encoder.register_forward_pre_hook(_refuse_many)

    def in_halves(m: Any, x: Tensor) -> Tensor:
        with contextlib.suppress(MemoryError):
            return called(m)(x)
        return torch.cat([called(m)(half) for half in x.split(2)])

    recording = recorded(model, in_halves)
    too_large.remove()
    assert recording.differs() == "a call failed, and the step went on without it"


def _refuse_many(module: nn.Module, args: Any) -> None:
    if len(args[0]) > 2:
        raise MemoryError


@pytest.mark.parametrize(
    "step",
    [
        lambda m, x: m.decoder(torch.tanh(m.encoder(x))),
        lambda m, x: m.decoder(m.encoder(x) + 1),
    ],
)
def test_code_of_the_users_between_two_calls_is_not_left_out(step):
    recording = recorded(parts(), step)
    assert recording.reason == "the step runs code of its own before 'decoder'"
    assert recording.differs() == recording.reason


def test_what_prepares_the_data_is_no_part_of_the_network():
    model = parts_with_pad()

    def step(m, x):
        return m.decoder(m.encoder(m.pad(x[:, :2]) - x.mean(dim=1, keepdim=True)))

    recording = recorded(model, step)
    assert recording.reason is None
    assert recording.differs() is None
    # What it makes of a state is the network's all the same.
    between = recorded(parts_with_pad(), lambda m, x: m.decoder(2 * m.pad(m.encoder(x))[:, :-2]))
    assert between.reason == "the step runs code of its own before 'decoder'"


def parts_with_pad() -> nn.Module:
    model = parts()
    model.pad = nn.ConstantPad1d((0, 2), 0.0)
    return model


@pytest.mark.parametrize(
    ("follow_from", "n_steps", "followed"), [(1, 2, True), (1, 1, False), (None, 3, False)]
)
def test_calls_that_nobody_followed_are_not_run_again(follow_from, n_steps, followed):
    recording = recorded(parts(), WAYS["two calls"], n_steps, follow_from=follow_from)
    said = "nobody could follow whether the step runs code of its own between its calls"
    assert recording.reason == (None if followed else said)
    between = recorded(
        parts(), lambda m, x: m.decoder(m.encoder(x) + 1), n_steps, follow_from=follow_from
    )
    assert between.reason == ("the step runs code of its own before 'decoder'" if followed else said)
    single = recorded(parts(), WAYS["a call"], n_steps, follow_from=follow_from)
    assert single.reason is None


def test_packed_sequences_are_run_again_with_and_without_calls_beside_them():
    model = Packs()
    packed = pack_sequence([torch.randn(n, 4) for n in (3, 2, 2)])
    recording = Recording(model, {"rnn": model.rnn, "other": model.other})
    with torch.no_grad(), recording:
        model.other(torch.randn(3, 2))
        expected = model(packed)
    step = recording.end_step()
    parts = {model.rnn}
    for again in (step, step.without_strangers(parts)):
        with torch.no_grad():
            assert torch.equal(again.run()[-1], expected)
    assert len(step.without_strangers(parts).calls) == 1
    # Sequences are samples, not their steps.
    assert step.without_strangers(parts).n_samples == 3


def test_calls_on_one_sample_beside_others_on_more_are_left_out_where_asked():
    """As a step that acts in an environment before it learns."""
    one, many = torch.randn(1, 4), torch.randn(5, 4)
    ways: dict[str, tuple[Callable[[Parts], Any], int]] = {
        "the same part": (lambda m: (m.encoder(one), m.decoder(m.encoder(many))), 2),
        "the whole beside its parts": (lambda m: (m(one), m.decoder(m.encoder(many))), 2),
        "parts beside the whole": (lambda m: (m.encoder(one), m(many)), 1),
        "what no other call runs": (lambda m: (m.decoder(one[:, :3]), m.encoder(many)), 2),
        "calls that feed one another": (lambda m: (m.decoder(m.encoder(one)), m(many)), 3),
        "single ones alone": (lambda m: (m.encoder(one), m.encoder(2 * one)), 2),
    }
    for way, (step, n_calls) in ways.items():
        model = parts()
        found = {}
        for lone in (True, False):
            recording = Recording(model, parts_of(model))
            with torch.no_grad(), recording:
                step(model)
            found[lone] = recording.end_step(lone=lone)
            assert recording.n_lone == len(found[True].calls) - len(found[lone].calls), way
            assert recording.differs() is None, way
        assert len(found[False].calls) == n_calls, way
        with torch.no_grad():
            assert torch.equal(found[False].run()[-1], found[True].run()[-1]), way


def test_a_pass_that_samples_is_found_out():
    class Samples(Parts):
        def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
            return self.decoder(self.encoder(x) + torch.randn(3))

    recording = recorded(Samples().eval(), lambda m, x: m(x))
    assert recording.reason is None
    differs = recording.differs()
    assert differs is not None
    assert differs.startswith(
        "'Samples' does not give again what it gave (it samples, keeps state, or its"
    )


@dataclass
class Graph:
    x: Tensor
    name: str = "graph"


class Locked:
    """An argument that refuses to be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("locked")


def test_objects_are_copied_and_what_cannot_be_copied_is_named():
    class OfObject(Parts):
        def forward(self, graph: Any, *_: Any, **__: Any) -> Tensor:
            return self.decoder(self.encoder(graph.x))

    recording = recorded(OfObject().eval(), lambda m, x: (m(g := Graph(x)), g.x.zero_()))
    assert recording.differs() is None
    assert [(step.n_samples, step.n_bytes) for step in recording.steps] == [(5, 5 * 4 * 4)] * 2
    lock = Locked()
    lock.x = torch.ones(5, 4)  # type: ignore[attr-defined]
    locked = recorded(OfObject().eval(), lambda m, x: m(lock))
    assert locked.reason == "a call could not be copied (TypeError: locked)"


def test_the_budget_of_bytes_ends_the_recording():
    recording = recorded(parts(), lambda m, x: m(x), n_steps=5, budget=2 * 5 * 4 * 4)
    assert len(recording.steps) == 2
    assert recording.full
    assert recording.n_bytes == 2 * 5 * 4 * 4
    assert [step.n_samples for step in recording.steps] == [5, 5]


@pytest.mark.parametrize(
    ("n_steps", "kept"), [(3, [0, 1, 2]), (4, [0, 2]), (5, [0, 2, 4]), (7, [0, 4]), (9, [0, 4, 8])]
)
def test_what_fits_into_the_budget_is_from_everywhere(n_steps: int, kept: list[int]) -> None:
    recording = recorded(parts(), lambda m, x: m(x), n_steps=n_steps, budget=3 * 5 * 4 * 4)
    assert recording.full == (n_steps > 3)
    for step, seed in zip(recording.steps, kept, strict=True):
        expected = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        (given,), _ = step.revive()[0]
        assert torch.equal(given, expected)


def test_of_steps_in_random_order_the_first_are_kept() -> None:
    recording = recorded(parts(), lambda m, x: m(x), n_steps=9, budget=3 * 5 * 4 * 4, ordered=False)
    assert recording.full
    assert len(recording.steps) == 3
    expected = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    (given,), _ = recording.steps[-1].revive()[0]
    assert torch.equal(given, expected)


def test_a_step_beyond_the_budget_is_not_kept() -> None:
    recording = recorded(parts(), lambda m, x: m(x), n_steps=3, budget=5 * 4 * 4 - 1)
    assert recording.steps == []
    assert recording.full


def test_copies_made_while_recording_are_the_model_alone():
    model = parts()
    recording = Recording(model, parts_of(model))
    x = torch.ones(2, 4)
    with recording:
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            for p in twin.parameters():
                p.data.zero_()
            assert not twin(x).any()
            assert not twin.forward(x).any()
        assert model(x).any()
    assert len(recording.end_step().calls) == 1


def test_two_listeners_leave_in_any_order():
    model, heard = parts(), []

    def listener(name: str) -> Callable[..., Any]:
        def listen(forward: Any, args: Any, kwargs: Any) -> Any:
            heard.append(name)
            return forward(*args, **kwargs)

        return listen

    first, second = wrap(model, "forward", listener("a")), wrap(model, "forward", listener("b"))
    first.close()
    model(torch.ones(1, 4))
    second.close()
    model(torch.ones(1, 4))
    assert heard == ["b"]
    assert "forward" not in vars(model)
    own = vars(model)["forward"] = model.forward
    wrap(model, "forward", listener("c")).close()
    assert vars(model)["forward"] is own


def test_a_replay_leaves_no_trace():
    class Counts(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
            self.passes += 1
            return super().forward(x)

    model = Counts()
    recording = recorded(model, lambda m, x: m(x), n_steps=1)
    with undisturbed(model):
        recording.steps[0].run()
    assert int(model.passes) == 1
    assert model.training


def test_what_is_put_in_place_of_an_output_may_be_laid_out_otherwise():
    model = parts()
    step = recorded(model, lambda m, x: m.decoder(m.encoder(x)[1:4])).steps[0]
    plain = step.run()[-1]
    with attach(model.encoder, after=lambda m, args, kwargs, output: output.T.contiguous().T):
        assert torch.equal(step.run()[-1], plain)
    with attach(model.encoder, after=lambda m, args, kwargs, output: output[:1].expand(5, 3)):
        assert torch.equal(step.run()[-1], model.decoder(step.run()[0][1:4]))


class Mapped(dict):
    __getattr__ = dict.__getitem__


class Encodes(nn.Module):
    """Gives an object, and beside it what it was given."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 3), kind

    def forward(self, graph: Graph) -> tuple[Any, Tensor]:
        return self.kind(x=self.layer(graph.x)), graph.x


class Decodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, given: Any, graph: Graph) -> Tensor:
        return self.layer(given.x) + graph.x[:, :2]


@pytest.mark.parametrize("kind", [Graph, Mapped])
def test_objects_that_earlier_calls_gave_are_fed_again(kind):
    model = parts()
    model.encoder, model.decoder = Encodes(kind).eval(), Decodes().eval()

    def step(m: Any, x: Tensor) -> Any:
        graph = Graph(x)
        return m.decoder(m.encoder(graph)[0], graph)

    recording = recorded(model, step, n_steps=1)
    assert recording.reason is None
    with torch.no_grad():
        model.encoder.layer.weight.mul_(2)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(recording.steps[0].run()[-1], step(model, x))


@pytest.mark.parametrize(
    "changed",
    [
        lambda given: Graph(given.x),
        lambda given: Graph(2 * given.x),
        lambda given: setattr(given, "x", given.x + 1) or given,
    ],
)
def test_objects_that_the_users_code_made_of_earlier_calls_are_not_run_again(changed):
    model = parts()
    model.encoder, model.decoder = Encodes(Graph).eval(), Decodes().eval()

    def step(m: Any, x: Tensor) -> Any:
        graph = Graph(x)
        return m.decoder(changed(m.encoder(graph)[0]), graph)

    recording = recorded(model, step, n_steps=1)
    assert recording.reason == "the step runs code of its own before 'decoder'"
