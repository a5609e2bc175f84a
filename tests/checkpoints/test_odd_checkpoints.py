"""Whatever a checkpoint holds, reading it raises nothing but our own error."""

import io
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small import batches, network, save
from torch import Tensor, nn

from lightning_koopman import CheckpointError, EvaluationError, evaluate_checkpoints, linearize
from lightning_koopman.decisions.swaps import load_shrunk, save_shrunk
from lightning_koopman.network.weights import Weights, apply_checkpoint, load_checkpoint
from lightning_koopman.report.comparison import runs_table
from lightning_koopman.report.files import read_reports, write_reports

pytestmark = pytest.mark.filterwarnings("ignore")
OFTEN = settings(max_examples=40, deadline=None, derandomize=True, database=None)


WEIGHTS = network().state_dict()
ODD: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.tensor(2.0),
    "empty": lambda: torch.empty(0, 4),
    "whole": lambda: torch.ones(5, 4, dtype=torch.int64),
    "flags": lambda: torch.ones(5, 4, dtype=torch.bool),
    "complex": lambda: torch.ones(5, 4, dtype=torch.complex64),
    "sparse": lambda: torch.ones(5, 4).to_sparse(),
    "rows": lambda: torch.ones(5, 4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(5, 4), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "meta": lambda: torch.ones(5, 4, device="meta"),
}
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(sorted(ODD)).map(lambda name: ODD[name]())
)
NAMES = st.sampled_from([*WEIGHTS, "module.0.weight", "_orig_mod.0.weight", ""]) | st.text(max_size=3)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
STATES = (
    st.dictionaries(NAMES, LEAVES, max_size=4).map(lambda more: {**WEIGHTS, **more})
    | st.dictionaries(NAMES, LEAVES, max_size=4)
    | ANYTHING
)
AVERAGING = st.fixed_dictionaries(
    {}, optional={"average_model_state": STATES, "n_averaged": LEAVES, "latest_update_step": LEAVES}
)
CONTENTS = st.fixed_dictionaries(
    {},
    optional={
        "state_dict": STATES,
        "global_step": LEAVES,
        "hyper_parameters": ANYTHING,
        "datamodule_hyper_parameters": ANYTHING,
        "callbacks": st.dictionaries(st.text(max_size=3), AVERAGING | ANYTHING, max_size=2) | ANYTHING,
        "current_model_state": STATES,
    },
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("odd") / "odd.ckpt"


def unchanged(model: nn.Module) -> bool:
    return all(torch.equal(value, WEIGHTS[name]) for name, value in model.state_dict().items())


@OFTEN
@given(content=CONTENTS | ANYTHING, weights=st.sampled_from(get_args(Weights)))
def test_any_content_fits_or_is_refused(content, weights, path):
    torch.save(content, path)
    model = network()
    try:
        checkpoint = load_checkpoint(path, weights=weights)
        assert checkpoint.step is None or checkpoint.step >= 0
        apply_checkpoint(model, checkpoint)
    except CheckpointError:
        assert unchanged(model)


@OFTEN
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), length=st.integers(1, 8))
def test_any_bytes_may_be_damaged(place, value, length, path):
    torch.save({"state_dict": WEIGHTS, "global_step": 3}, path)
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    content[start : start + length] = bytes([value]) * length
    path.write_bytes(content)
    model = network()
    try:
        apply_checkpoint(model, load_checkpoint(path))
    except CheckpointError:
        assert unchanged(model)


@OFTEN
@given(
    swap=st.fixed_dictionaries(
        {},
        optional={
            "kind": st.sampled_from(["skipped", "linear"]) | LEAVES,
            "in_features": st.integers() | LEAVES,
            "shape": st.lists(st.integers(), max_size=3) | ANYTHING,
            "rank": st.none() | st.integers() | LEAVES,
            "replaces": st.lists(NAMES, max_size=2) | ANYTHING,
        },
    )
    | ANYTHING
)
def test_any_swap_fits_or_is_refused(swap, path):
    torch.save({"state_dict": WEIGHTS, "swaps": [swap]}, path)
    model = network()
    with pytest.raises(CheckpointError, match=r"odd\.ckpt"):
        load_shrunk(model, path)
    assert unchanged(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"odd\.ckpt is no checkpoint, or a damaged one; name a file that the Trainer"),
        (b"(dp0\nI1\nI2\ns.", "is no checkpoint, or a damaged one"),
        (b"PK\x03\x04" + bytes(60), r"is damaged \(.*\); name another checkpoint"),
    ],
)
def test_a_foreign_file_is_not_recommended_for_trust(content, message, path):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "trust" not in str(caught.value)


def test_a_checkpoint_that_was_cut_off_is_damaged(path):
    torch.save({"state_dict": {"weight": torch.zeros(20000)}}, path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(CheckpointError, match=r"odd\.ckpt is damaged \(.*\); name another checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_without_weights_says_what_it_holds(path):
    torch.save({"optimizer": 1, "epoch": 2}, path)
    with pytest.raises(CheckpointError, match="no state_dict of tensors but 'optimizer', 'epoch'; name"):
        load_checkpoint(path)


def test_a_linear_component_may_not_claim_more_than_the_file_holds(tmp_path, report):
    net = network()
    new = linearize(net, batches(), report, components=["0"], max_drop=10.0, allow_larger=True).model
    save_shrunk(new, tmp_path / "a.ckpt")
    back = load_shrunk(net, tmp_path / "a.ckpt")
    assert torch.equal(back(batches()[0]), new(batches()[0]))
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    # More than any machine could make room for.
    content["swaps"][0]["in_features"] = 10**15
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"its place .*it is larger than the file"):
        load_shrunk(net, tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sparse", r"shape \(5, 4\) \(torch.sparse_coo\)"),
        ("quantized", r"shape \(5, 4\) \(quantized\)"),
        ("complex", r"shape \(5, 4\) \(complex\)"),
        ("meta", r"shape \(5, 4\) \(no values\)"),
        ("nested", "nested tensors"),
    ],
)
def test_tensors_that_cannot_be_copied_are_named_and_the_other_files_measured(kind, words, tmp_path):
    save(tmp_path / "a.ckpt", 1)
    save(tmp_path / "b.ckpt", 2, state_dict={**WEIGHTS, "0.weight": ODD[kind]()})
    model, message = network(), rf"b\.ckpt does not fit Sequential: '0.weight' has {words}"
    with pytest.raises(EvaluationError, match=message) as told:
        evaluate_checkpoints(model, tmp_path, batches())
    assert [report.step for report in told.value.reports] == [1]
    assert unchanged(model)


@pytest.mark.parametrize("step", [-1, True, 2**70, 1.5, "7"])
def test_a_step_that_is_none_counts_as_unknown(step, tmp_path):
    save(tmp_path / "a.ckpt", step)
    (report,) = evaluate_checkpoints(network(), tmp_path, batches())
    assert report.step is None
    # Of several, places tell them apart.
    save(tmp_path / "b.ckpt", step)
    reports = evaluate_checkpoints(network(), tmp_path, batches())
    write_reports(reports, tmp_path / "r.json")
    assert [report.step for report in read_reports(tmp_path / "r.json")] == [0, 1]


def test_a_single_state_dict_is_at_no_step(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        torch.save(network().state_dict(), tmp_path / run / "weights.pt")
    (report,) = evaluate_checkpoints(network(), tmp_path / "a" / "weights.pt", batches())
    assert "at step" not in str(report)
    reports = evaluate_checkpoints(network(), str(tmp_path / "*" / "weights.pt"), batches())
    assert [(report.run, report.step) for report in reports] == [("a", None), ("b", None)]
    write_reports(reports, tmp_path / "r.html", "html")
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(runs_table(reports))
    assert "None" not in console.export_text() + (tmp_path / "r.html").read_text()
