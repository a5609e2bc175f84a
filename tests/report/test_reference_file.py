"""References in files: all that they hold comes back; what is no reference is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_koopman import Options, credit_report, drift
from lightning_koopman.koopman.reference import FoldFits, Reference
from lightning_koopman.report.reference_file import read_reference
from lightning_koopman.report.saved import ReportFormatError

KEY = "lightning_koopman_reference"


def measured(components: Any = None, **options: Any) -> Any:
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))
    batches = torch.randn(700, 4).split(100)
    return credit_report(net, batches, components=components, step=12, options=Options(**options))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "reference.safetensors"
    measured(max_dim=6, delay=2).save_reference(path)
    return path


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(str(path), framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # ruff: ignore[in-dict-keys]
        return tensors, json.loads(opened.metadata()[KEY])


def rewritten(
    path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any], key: str = KEY
) -> Path:
    tensors, content = contents(path)
    change(tensors, content)
    save_file(tensors, path, {key: json.dumps(content)})
    return path


def flat(reference: Reference) -> dict[str, Any]:
    """Everything in a reference, tensors as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype), *value.double().tolist()]
        if isinstance(value, FoldFits):
            return plain(value())
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        if hasattr(value, "__dataclass_fields__"):
            return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
        return dict(value) if isinstance(value, dict) else value

    return plain(reference)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_dim": 6, "delay": 2, "folds": 3, "seed": 5},
        {"max_dim": 6, "observables": "rff"},
        {"observables": "rbf", "components": ["0", "4"]},
        {"observables": "polynomial", "output": "2", "reduce": {"0": "mean", "*": "pool"}},
    ],
    ids=str,
)
def test_all_that_a_reference_holds_comes_back(tmp_path, options):
    report = measured(**options)
    report.save_reference(tmp_path / "reference")
    read = read_reference(tmp_path / "reference")
    written = flat(report.reference)
    # What only credits need of the options is not kept.
    assert flat(read) == written
    assert read.step == 12


def test_a_file_of_0_2_0_which_holds_no_variance_of_the_input_is_read(file):
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))
    wide = [3 * torch.randn(300, 4)]
    assert drift(file, net, wide).widened == pytest.approx(3, rel=0.1)
    rewritten(file, lambda tensors, _: tensors.pop("variance"))
    assert drift(file, net, wide).widened == 1


def test_the_file_holds_tensors_and_text_alone(file):
    tensors, content = contents(file)
    assert {"operator.1", "operator.2", "operator.3", "basis.1", "mean.0", "center.3"} <= set(tensors)
    assert content["states"] == ["input", "0", "2", "4"]
    assert content["parts"] == {"0": ["0", "1"], "2": ["2", "3"], "4": ["4"]}
    assert content["format"] == 1
    assert b"pickle" not in file.read_bytes()


def test_a_file_that_cannot_be_written_is_not_left_half_written(tmp_path):
    path = tmp_path / "missing" / "reference"
    with pytest.raises(OSError, match="missing"):
        measured().save_reference(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle"])
def test_a_damaged_file_is_refused(file, damage):
    if damage == "pickle":
        torch.save({"a": torch.zeros(2)}, file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"cut": whole[:-7], "empty": b"", "text": b"{}" * 50}[damage])
    with pytest.raises(ReportFormatError, match=r"reference\.safetensors holds no reference: "):
        read_reference(file)


def test_a_path_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ReportFormatError, match=f"{path.name} cannot be read as a reference"):
            read_reference(path)


def test_a_file_of_weights_is_no_reference(file):
    rewritten(file, lambda tensors, content: None, key="other")
    with pytest.raises(ReportFormatError, match="a file of tensors that save_reference did not write"):
        read_reference(file)


CHANGES: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "field format: ": lambda tensors, content: content.update(format=2),
    "field widths: Field required": lambda tensors, content: content.pop("widths"),
    "field functions.0: ": lambda tensors, content: content.update(functions=["os.system"]),
    "field reduce": lambda tensors, content: content.update(reduce="lambda x: x"),
    "widths has 3 entries; expected 4": lambda tensors, content: content["widths"].pop(),
    "lifts has 1 entries; expected 4": lambda tensors, content: content.update(lifts=[None]),
    "step 1 reads the states [1]": lambda tensors, content: content["parents"].__setitem__(0, [1]),
    "step 3 reads the states [1, 1]": lambda tensors, content: content["parents"].__setitem__(2, [1, 1]),
    "tensor operator.2 is missing": lambda tensors, content: tensors.pop("operator.2"),
    "tensor mean.1 is torch.float64 (5, 7)": lambda tensors, content: tensors.update({
        "mean.1": torch.zeros(5, 7, dtype=torch.float64)
    }),
    "tensor operator.1 is torch.int64": lambda tensors, content: tensors.update({
        "operator.1": torch.zeros(5, 4, 6, dtype=torch.int64)
    }),
    "tensor center.0 holds NaN": lambda tensors, content: tensors["center.0"].fill_(torch.nan),
    "tensor center.2 has 4 entries; expected 5": lambda tensors, content: tensors.update({
        "center.2": torch.zeros(4)
    }),
    "delay is 0": lambda tensors, content: content.update(delay=0),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_does_not_fit_together_is_named(file, message):
    rewritten(file, CHANGES[message])
    with pytest.raises(ReportFormatError) as caught:
        read_reference(file)
    assert message.split(" is 0")[0] in str(caught.value)
    assert str(caught.value).startswith(f"{file} holds no reference: ")
