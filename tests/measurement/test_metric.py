"""The torchmetrics shell: what a Metric must do, and that streaming changes no number."""

import dataclasses
import itertools
import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import warm
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers import MetricTracker

from lightning_koopman import CreditReport, KoopmanCredit, Options
from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.koopman.states import sample_keys

NAMES = ("stem", "body", "head")
DIMS = (6, 8, 5, 4)


def chain(n: int = 203, seed: int = 0, noise: float = 0.1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(n, DIMS[0], generator=generator, dtype=torch.float64) + 1]
    for a, b in itertools.pairwise(DIMS):
        weight = torch.randn(a, b, generator=torch.Generator().manual_seed(a), dtype=torch.float64)
        states.append(torch.tanh(states[-1] @ weight / a**0.5))
        states[-1] += noise * torch.randn(n, b, generator=generator, dtype=torch.float64)
    return states


def rows_of(states: Sequence[Tensor], rows: Any) -> list[Tensor]:
    return [state[rows] for state in states]


def gathered(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with those of the options in one."""
    own = {field.name for field in dataclasses.fields(Options)} & set(arguments)
    rest = {name: value for name, value in arguments.items() if name not in own}
    return {**rest, "options": Options(**{name: arguments[name] for name in own})}


def metric(**options: Any) -> KoopmanCredit:
    return KoopmanCredit(NAMES, **gathered(options))


def fed(states: Sequence[Tensor], **options: Any) -> KoopmanCredit:
    given = metric(**options)
    given.update(states)
    return given


def assert_same(given: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-9) -> None:
    assert list(given) == list(other)
    for name, value in given.items():
        assert torch.allclose(value, other[name], rtol=0, atol=atol, equal_nan=True), name


def assert_same_report(given: CreditReport, other: CreditReport, atol: float = 1e-9) -> None:
    assert given.components == other.components
    assert given.n_samples == other.n_samples
    assert given.directions == other.directions
    close = partial(np.testing.assert_allclose, rtol=0, atol=atol)
    for name in (*QUANTITIES, "tikhonov", "variance_kept", "total", "total_stderr"):
        close(getattr(given, name), getattr(other, name), err_msg=name)
    for name in QUANTITIES:
        close(given.stderr[name], other.stderr[name], err_msg=name)
    np.testing.assert_allclose(given.condition, other.condition, rtol=1e-6)
    close(given.volumes, other.volumes, atol=10 * atol)
    np.testing.assert_array_equal(given.stable, other.stable)
    for name, operator in given.operators.items():
        assert torch.allclose(operator.matrix, other.operators[name].matrix, rtol=0, atol=10 * atol)


ALL = (*QUANTITIES, *(f"{name}_stderr" for name in QUANTITIES))


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
@pytest.mark.parametrize("batch", [1, 2, 64, 202, 500])
def test_any_batch_size_and_order_equal_everything_at_once(batch, normalize):
    states = chain()
    whole = fed(states, normalize=normalize, quantities=ALL)
    streamed = metric(normalize=normalize, quantities=ALL)
    for rows in torch.randperm(203).split(batch):
        streamed.update(rows_of(states, rows))
    assert_same(streamed.compute(), whole.compute())
    assert_same_report(streamed.report(), whole.report())


@pytest.mark.parametrize("sizes", [(203,), (1, 202), (100, 3, 100), (50, 0, 153)], ids=str)
def test_merged_shards_equal_everything_at_once(sizes):
    states = chain()
    whole = fed(states, quantities=ALL)
    shards = []
    for rows in torch.randperm(203).split(sizes):
        shards.append(metric(quantities=ALL))
        if len(rows):
            shards[-1].update(rows_of(states, rows))
    merged = shards[0]
    for shard in shards[1:]:
        merged.merge_state(shard)
    assert_same(merged.compute(), whole.compute())
    assert_same_report(merged.report(), whole.report())


def test_an_empty_metric_takes_over_what_it_merges():
    states = chain()
    whole = fed(states)
    merged = KoopmanCredit()
    merged.merge_state(whole)
    assert_same(merged.compute(), whole.compute(), atol=0)
    merged.update(rows_of(states, slice(0, 50)))
    twice = fed(states)
    twice.update(rows_of(states, slice(0, 50)))
    assert_same(merged.compute(), twice.compute())


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_merging_after_compute_changes_the_result(as_dictionary):
    states = chain()
    given, rest = fed(rows_of(states, slice(0, 100))), fed(rows_of(states, slice(100, None)))
    given.compute()
    given.merge_state(rest.metric_state if as_dictionary else rest)
    assert_same(given.compute(), fed(states).compute())
    assert given.report().n_samples == 203


def test_metrics_over_different_chains_are_not_merged():
    states = chain()
    named, shorter = KoopmanCredit(["a", "b", "c"]), KoopmanCredit()
    named.update(states)
    shorter.update(states[:3])
    for other, message in (
        (named, r"components \['a', 'b', 'c'\] cannot be added to"),
        (fed(states, folds=4), "folds 4 cannot be added to moments with folds 5"),
        (fed(states, seed=1), "seed 1 cannot be added to moments with seed 0"),
        (shorter, r"dims \[6, 8, 5\] cannot be added to moments with"),
        (fed(states, center=[state.mean(0) for state in states]), "center .* cannot be added"),
    ):
        with pytest.raises(ValueError, match=f"moments with {message}"):
            fed(states).merge_state(other)


def test_numbers_are_those_of_loops_over_the_hashed_folds():
    states = chain()
    given = fed(states, tikhonov=1e-3, quantities=ALL).compute()
    fold_of = (sample_keys(states[0]) % 5).numpy()
    arrays = [state.numpy() for state in states]
    fit = partial(oracles.ridge, tikhonov=1e-3)
    expected = oracles.credits(arrays, 4, fit)
    sizes = np.bincount(fold_of).tolist()
    without = [oracles.credits([x[fold_of != f] for x in arrays], 4, fit) for f in range(5)]
    for i, name in enumerate(NAMES):
        for quantity in ("credit", "gain", "sensitivity"):
            assert float(given[f"{quantity}/{name}"]) == pytest.approx(expected[quantity][i], abs=1e-9)
            left_out = [w[quantity][i] for w in without]
            bar = np.hypot(
                oracles.jackknife(expected[quantity][i], left_out, sizes),
                oracles.jackknife_bias(expected[quantity][i], left_out, sizes),
            )
            assert float(given[f"{quantity}_stderr/{name}"]) == pytest.approx(bar, abs=1e-9)
        r2 = oracles.held_out_r2(arrays[i], arrays[i + 1], fold_of, fit)
        assert float(given[f"r2/{name}"]) == pytest.approx(r2, abs=1e-10)


def test_given_keys_choose_the_folds():
    states = chain()
    keys = torch.arange(203) * 3
    given = metric(tikhonov=0.0)
    for rows in torch.randperm(203).split(20):
        given.update(rows_of(states, rows), keys[rows])
    x, y = states[0].numpy(), states[1].numpy()
    expected = oracles.held_out_r2(x, y, (keys % 5).numpy(), oracles.least_squares)
    assert float(given.compute()["r2/stem"]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_fixed_offset_changes_no_number_and_saves_the_far_ones(offset):
    states = chain()
    center = [state.mean(0) + offset for state in states]
    given = fed([state + offset for state in states], tikhonov=1e-6, center=center)
    fold_of = sample_keys(states[0] + offset)
    expected = metric(tikhonov=1e-6)
    expected.update(states, fold_of)
    assert_same(given.compute(), expected.compute(), atol=1e-9 if offset == 0 else 1e-7)
    operator = given.report().operators["body"]
    assert torch.allclose(operator.y_mean, states[2].mean(0) + offset, rtol=1e-12)


def test_results_are_flat_dictionaries_of_scalars_in_order():
    result = fed(chain()).compute()
    assert list(result) == [f"{q}/{c}" for q in QUANTITIES for c in NAMES]
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in result.values())
    chosen = fed(chain(), quantities=["gain", "r2_stderr"]).compute()
    assert list(chosen) == [f"{q}/{c}" for q in ("gain", "r2_stderr") for c in NAMES]


def test_names_come_from_a_mapping_or_are_counted():
    states = chain()
    named = KoopmanCredit(quantities=["gain"])
    named.update(dict(zip(("x", *NAMES), states, strict=True)))
    assert list(named.compute()) == [f"gain/{name}" for name in NAMES]
    counted = KoopmanCredit(quantities=["gain"])
    counted.update(states)
    assert list(counted.compute()) == ["gain/0", "gain/1", "gain/2"]


def test_further_axes_are_flattened_and_single_ones_added():
    states = chain()
    shaped = [states[0].view(203, 2, 3), states[1].view(203, 2, 2, 2), *states[2:]]
    assert_same(fed(shaped).compute(), fed(states).compute(), atol=0)
    given = KoopmanCredit()
    given.update([states[0], states[1][:, 0]])
    assert given.report().widths == (1,)


def test_memory_does_not_grow_with_samples():
    given = fed(chain())
    size = given.moments.numel()
    for seed in range(5):
        given.update(chain(seed=seed))
    assert given.moments.numel() == size
    assert [name for name, value in given.metric_state.items() if isinstance(value, list)] == []


# What torchmetrics promises.


def test_forward_gives_the_batch_and_accumulates_the_whole():
    states = chain()
    given = metric()
    for rows in torch.arange(203).split(70):
        batch = rows_of(states, rows)
        assert_same(given(batch), fed(batch).compute())
    assert_same(given.compute(), fed(states).compute())
    assert given.report().n_samples == 203


def test_reset_forgets_the_samples_only():
    states = chain()
    given = metric()
    given.update(chain(seed=1))
    given.reset()
    assert not given.moments.any()
    with pytest.raises(ValueError, match="0 of at least 2 samples arrived; pass more"):
        given.report()
    given.update(states)
    assert_same(given.compute(), fed(states).compute())


@pytest.mark.parametrize("copy", [lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()])
def test_copies_go_on_where_the_original_stopped(copy):
    states = chain()
    given = fed(rows_of(states, slice(0, 100)), center=[s.mean(0) for s in states])
    other, unused = copy(given), copy(metric())
    unused.update(states)
    assert_same(unused.compute(), fed(states).compute(), atol=0)
    for m in (given, other):
        m.update(rows_of(states, slice(100, None)))
    assert_same(other.compute(), given.compute(), atol=0)
    other.update(states)
    assert given.report().n_samples == 203
    assert other.report().n_samples == 406


def test_moving_keeps_double_precision_and_metrics_are_distinct():
    assert len({fed(chain()), fed(chain())}) == 2
    given = fed(chain()).to("cpu").float().half()
    assert given.moments.dtype == torch.float64
    assert_same(given.compute(), fed(chain()).compute(), atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_states_of_eight_bits_count_as_the_numbers_that_they_are(dtype):
    short = [state.to(dtype) for state in chain()]
    assert_same(fed(short).compute(), fed([state.double() for state in short]).compute(), atol=0)


def test_the_state_dict_is_empty_unless_asked_for():
    given = fed(chain())
    assert given.state_dict() == {}
    given.persistent(True)
    assert list(given.state_dict()) == ["header", "moments"]


def doubled(n: int = 60, seed: int = 0) -> dict[str, Tensor]:
    """Two linear components whose numbers are known: the first doubles, the second halves."""
    x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return {"x_0": x, "double": 2 * x, "halve": x}


DOUBLED = {"gain/double": np.log(2), "gain/halve": -np.log(2)}


def assert_doubled(given: dict[str, Tensor]) -> None:
    assert {name: float(value) for name, value in given.items()} == pytest.approx(DOUBLED, abs=1e-9)


@pytest.mark.parametrize("dims", [None, (4, 4, 4)])
def test_a_state_loaded_from_a_checkpoint_goes_on(dims, tmp_path):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.metric = KoopmanCredit(dims=dims, quantities=["gain"])
            self.metric.persistent(True)

    saved, loaded = Holder(), Holder()
    saved.metric.update(doubled())
    torch.save(saved.state_dict(), tmp_path / "saved.ckpt")
    loaded.load_state_dict(torch.load(tmp_path / "saved.ckpt", weights_only=True))
    assert loaded.metric.components == ("double", "halve")
    loaded.metric.update(list(doubled(seed=1).values()))
    assert loaded.metric.report().n_samples == 120
    assert_doubled(loaded.metric.compute())
    loaded.metric(doubled(seed=2))
    assert loaded.metric.report().n_samples == 180
    loaded.metric.reset()
    with pytest.raises(ValueError, match=r"state 'double' has shape \(60, 3\); expected \(60, 4\)"):
        loaded.metric.update({name: x[:, : 3 + (name != "double")] for name, x in doubled().items()})


@pytest.mark.parametrize(
    ("options", "differs"),
    [({"folds": 4}, "folds"), ({"delay": 2}, "delay"), ({"links": [(), (0,)]}, "links")],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric KoopmanCredit was called before")
def test_a_state_of_other_options_is_refused(options, differs):
    saved, loaded = KoopmanCredit(), KoopmanCredit(**gathered(options))
    saved.persistent(True)
    saved.update(doubled())
    loaded.load_state_dict(saved.state_dict())
    message = f"moments with {differs} .* cannot be added to moments with {differs}"
    with pytest.raises(ValueError, match=message):
        loaded.compute()


def test_metrics_grouped_by_hand_share_one_state():
    both = MetricCollection(
        {"a": KoopmanCredit(quantities=["credit"]), "b": KoopmanCredit(quantities=["gain"])},
        compute_groups=[["a", "b"]],
    )
    for epoch in range(2):
        for seed in range(2):
            both.update(doubled(seed=seed + 2 * epoch))
        result = {name.removeprefix("b_"): v for name, v in both.compute().items() if "gain" in name}
        assert_doubled(result)
        assert both["a"].update_count == both["b"].update_count == 2
        assert both["b"].report().n_samples == 120
        assert both["b"].report().credit.tolist() == pytest.approx([-np.log(2), 0], abs=1e-9)
        both.reset()


@pytest.mark.parametrize("inside", [(0,), (1,), (0, 2), (1, 2)], ids=str)
def test_batches_come_in_inference_mode_and_outside_of_it(inside):
    given = KoopmanCredit(quantities=["gain"])
    for epoch in range(2):
        for seed in range(4):
            with torch.inference_mode(seed in inside):
                add = given.update if seed % 2 == 0 else given
                add(doubled(seed=seed + 4 * epoch))
        with torch.inference_mode(epoch == 0):
            assert_doubled(given.compute())
            given.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, and of torchmetrics there
def test_a_module_that_holds_the_metric_can_be_scripted():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.metric = nn.Linear(4, 2), KoopmanCredit()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    holder, x = Holder(), torch.randn(3, 4)
    for fresh in (True, False):
        scripted = torch.jit.script(holder)
        assert torch.equal(scripted(x), holder(x)), fresh
        torch.jit.script(holder.metric)
        holder.metric.update(doubled())


def test_collections_with_prefixes_keep_their_metrics_apart():
    states = chain()
    train, val = (
        MetricCollection({"plain": metric(), "whitened": metric(normalize="whiten")}, prefix=prefix)
        for prefix in ("train/", "val/")
    )
    for rows in torch.arange(203).split(50):
        train.update(rows_of(states, rows))
    val.update(chain(seed=1))
    plain, whitened = fed(states).compute(), fed(states, normalize="whiten").compute()
    result = train.compute()
    assert all(key.startswith("train/") for key in result)
    assert all(key.startswith("val/") for key in val.compute())
    for name, value in plain.items():
        assert torch.allclose(result[f"train/plain_{name}"], value, rtol=0, atol=1e-9)
        assert torch.allclose(result[f"train/whitened_{name}"], whitened[name], rtol=0, atol=1e-9)
    train.reset()
    assert not train["plain"].moments.any()
    assert val["plain"].moments.any()


def test_a_tracker_keeps_every_epoch_and_knows_the_best():
    alone = MetricTracker(metric(quantities=["r2"]), maximize=True)
    collected = MetricTracker(MetricCollection([metric(quantities=["r2"])]), maximize=True)
    expected = []
    for noise in (0.5, 0.1, 0.3):
        for tracker in (alone, collected):
            tracker.increment()
            tracker.update(chain(noise=noise))
        expected.append(fed(chain(noise=noise)).compute()["r2/stem"])
    for tracker in (alone, collected):
        history = tracker.compute_all()
        assert torch.allclose(history["r2/stem"], torch.stack(expected), rtol=0, atol=1e-9)
    best, step = collected.best_metric(return_step=True)
    assert set(step.values()) == {1}
    assert best["r2/stem"] == pytest.approx(float(expected[1]), abs=1e-6)


def test_results_can_be_plotted_alone_and_as_a_series():
    given = fed(chain(), quantities=["credit"])
    figure, axis = given.plot()
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == [f"credit/{name}" for name in NAMES]
    assert figure is axis.figure
    series = [fed(chain(seed=seed), quantities=["credit"]).compute() for seed in range(3)]
    _, axis = given.plot(series)
    drawn = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    expected = [float(result["credit/body"]) for result in series]
    assert np.allclose(drawn["credit/body"], expected)


CUTS = [(130, None), (203, None), (203, DIMS)]


def worker(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = []
        for cut, dims in CUTS:
            shard = rows_of(chain(), [slice(0, cut), slice(cut, None)][rank])
            given = KoopmanCredit(NAMES, dims=dims, quantities=ALL)
            for batch in zip(*(state.split(30) for state in shard), strict=True):
                if len(batch[0]):
                    given.update(list(batch))
            report, result = given.report(), given.compute()
            # Un-synchronised again afterwards.
            assert int(given.moments[:, :1].sum()) == len(shard[0])
            results.append((result, report))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    # A process without any batch learns the widths from the other.
    torch.multiprocessing.start_processes(worker, (str(tmp_path),), 2, start_method=warm.METHOD)
    whole = fed(chain(), quantities=ALL)
    for rank in range(2):
        for result, report in torch.load(tmp_path / f"{rank}.pt", weights_only=False):
            assert_same(result, whole.compute())
            assert_same_report(report, whole.report())


# Bad input.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_state_and_change_nothing(value):
    given = fed(chain())
    before = given.moments.clone()
    for i, name in ((2, "body"), (0, "x_0")):
        states = chain(seed=1)
        states[i][7, 3] = value
        with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity; leave that batch out"):
            given.update(states)
    assert torch.equal(given.moments, before)


def test_states_that_do_not_fit_are_refused():
    states = chain()
    nothing = "no sample arrived; states must hold at least one row"
    for given, message in (
        (states[:3], r"3 states arrived; expected 4: \('x_0', 'stem', 'body', 'head'\)"),
        ([states[0], states[1][1:], *states[2:]], r"'stem' has shape \(202, 8\); expected \(203, 8\)"),
        ([*states[:3], states[2]], r"'head' has shape \(203, 5\); expected \(203, 4\)"),
        (dict(zip("xabc", states, strict=True)), r"named \('a', 'b', 'c'\); expected x_0 and then"),
        (rows_of(states, slice(0, 0)), nothing),
        ([], nothing),
    ):
        with pytest.raises(ValueError, match=message):
            fed(states).update(given)
    for fresh, given, message in (
        (KoopmanCredit(["a"]), states, r"4 states need 3 components, not \('a',\)"),
        (metric(center=[torch.zeros(6)]), states, r"one offset per state, of widths \(6, 8, 5, 4\)"),
        (KoopmanCredit(), states[:1], "1 of at least 2 states arrived; pass the state"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh.update(given)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric KoopmanCredit was called before")
def test_without_a_sample_there_is_no_result():
    nothing = "no sample arrived; call update with the states of a batch first"
    for ask, message in (
        (metric().compute, nothing),
        (metric().report, nothing),
        (metric(dims=DIMS).compute, "0 of at least 2 samples arrived"),
        (fed(rows_of(chain(), slice(0, 1))).compute, "1 of at least 2 samples arrived; pass more"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_too_few_samples_are_warned_of_with_the_number_to_have():
    given = fed(rows_of(chain(), slice(0, 19)))
    with pytest.warns(UserWarning, match="19 samples are few for states this wide; take 20 or more"):
        report = given.report()
    assert "take 20 or more" in report.notes[0]
    assert fed(rows_of(chain(), slice(0, 20))).report().notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantities": ["credits"]}, r"unknown quantities \['credits'\]; choose from"),
        ({"quantities": "credit"}, "quantities is 'credit'; give a list, with names out of"),
        ({"dims": (3,)}, "1 of at least 2 states arrived"),
        ({"dims": (4, -4)}, r"dims is \[4, -4\]; each is the width of a state, 1 or above"),
        ({"dims": [4, 0]}, r"dims is \[4, 0\]; each is the width"),
        ({"dims": (3, 4), "delay": 2, "components": ["a"]}, "delay is 2; with 1 components"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        KoopmanCredit(**gathered(options))


def test_forward_on_a_batch_that_is_too_small_changes_nothing():
    states = chain()
    for given, count in ((KoopmanCredit(NAMES), 0), (fed(states), 1)):
        with pytest.raises(ValueError, match="1 of at least 2 samples arrived"):
            given(rows_of(states, slice(0, 1)))
        assert given.update_count == count
        if not count:
            given.update(states)
        assert_same(given.compute(), fed(states).compute(), atol=0)


def test_single_precision_sums_may_overflow_and_names_may_come_twice():
    states = {name: state.float() * 1e37 for name, state in zip(("x_0", *NAMES), chain(), strict=True)}
    large, small = KoopmanCredit(), KoopmanCredit()
    for _ in range(2):
        large.update(states)
        small.update({name: state / 1e37 for name, state in states.items()})
    assert large.components == NAMES
    np.testing.assert_allclose(large.report().credit, small.report().credit, rtol=1e-4, atol=1e-5)
