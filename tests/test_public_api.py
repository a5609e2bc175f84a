"""The names a user may rely on."""

import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_koopman


def test_few_public_names_none_equal_to_a_module():
    names = lightning_koopman.__all__
    modules = {module.name for module in pkgutil.iter_modules(lightning_koopman.__path__)}
    assert len(names) == len(set(names)) <= 16
    assert not set(names) & modules
    assert {"network", "koopman", "report", "measurement"} <= modules


def test_dir_shows_the_public_names_and_the_version_alone():
    assert dir(lightning_koopman) == sorted([*lightning_koopman.__all__, "__version__"])


@pytest.mark.parametrize("name", lightning_koopman.__all__)
def test_what_a_user_calls_is_documented_argument_by_argument(name):
    value = getattr(lightning_koopman, name)
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    called = (
        [value]
        if inspect.isfunction(value)
        else [f for n, f in vars(value).items() if inspect.isfunction(f) and not n.startswith("_")]
    )
    for function in called:
        documented = inspect.getdoc(function) or ""
        for parameter in list(inspect.signature(function).parameters)[inspect.isclass(value) :]:
            if name == "KoopmanCreditMonitor" and parameter in {"trainer", "pl_module"}:
                break  # a hook of Lightning's, which Lightning documents
            assert f"{parameter}: " in documented, f"{function.__qualname__} says nothing of {parameter}"


@pytest.mark.parametrize("name", lightning_koopman.__all__)
def test_every_public_name_exists_and_is_explained(name):
    value = getattr(lightning_koopman, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
        assert value.__module__.startswith("lightning_koopman.")


def test_signatures_are_those_agreed_upon():
    parameters = inspect.signature(lightning_koopman.credit_report).parameters
    agreed = {
        "components": None, "forward_fn": None, "step": None, "options": lightning_koopman.Options(),
    }  # fmt: skip
    assert len(parameters) <= 10
    assert len(inspect.signature(lightning_koopman.KoopmanCreditMonitor).parameters) <= 10
    assert list(parameters)[:2] == ["model", "batches"]
    for name, default in agreed.items():
        assert parameters[name].default == default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(inspect.signature(lightning_koopman.fit_operator).parameters)[:4] == [
        "x",
        "y",
        "tikhonov",
        "rank",
    ]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_koopman' has no attribute 'blame'"):
        _ = lightning_koopman.blame


def test_the_version_is_that_of_the_distribution():
    assert lightning_koopman.__version__.split(".")[0].isdigit()


def test_importing_the_package_imports_no_lightning():
    code = (
        "import sys, lightning_koopman;"
        "print(sorted({'lightning', 'pytorch_lightning'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import lightning_koopman", ["torch", "numpy"]),
        (
            "from lightning_koopman import credit_report",
            ["torchmetrics", "lightning", "matplotlib", "pandas", "scipy", "pydantic", "sklearn"],
        ),
        (
            "from lightning_koopman.cli.main import main; main(['--help'])",
            ["torch", "numpy", "scipy", "pandas"],
        ),
        (
            "from lightning_koopman.cli.main import main; main(['--version'])",
            ["torch", "numpy", "scipy", "pandas"],
        ),
    ],
    ids=["package", "report", "help", "version"],
)
def test_what_takes_long_to_import_is_imported_where_it_is_used(code: str, unwanted: list[str]):
    code += f"; import sys; print(sorted(set({unwanted}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_report_imports_no_compiler():
    # It would cost the first report of a process seconds.
    code = (
        "import sys, torch; from lightning_koopman import credit_report\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))\n"
        "credit_report(net, [torch.randn(60, 4)])\n"
        "print([name for name in sys.modules if name.startswith('torch._dynamo.symbolic')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_names_that_are_first_used_behind_a_seed_draw_no_random_numbers():
    code = (
        "import random, lightning_koopman as lk; random.seed(0); drawn = random.getstate()\n"
        "for name in lk.__all__: getattr(lk, name); assert random.getstate() == drawn, name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def numbers_of_drift(net: nn.Module, batches: Any) -> Any:
    report = lightning_koopman.credit_report(net, batches)
    moved = [(x + 0.5, y) for x, y in batches]
    return [report.credit, report.stderr["credit"], lightning_koopman.drift(report, net, moved).drift]


def numbers_of_effects(net: nn.Module, batches: Any) -> Any:
    kinds = ("skip", "linear", "weight_noise", "output_noise", "reinit")
    found = [
        lightning_koopman.component_effects(net, batches, None, kinds, how=how)
        for how in ("measured", "predicted")
    ]
    return [effects.values[kind] for effects in found for kind in kinds]


def numbers_of_observables(net: nn.Module, batches: Any) -> Any:
    options = (lightning_koopman.Options(observables=kind, delay=2) for kind in ("rff", "rbf"))
    return [lightning_koopman.credit_report(net, batches, options=each).credit for each in options]


def numbers_of_decisions(net: nn.Module, batches: Any) -> Any:
    linear = lightning_koopman.linearize(net, batches, max_drop=0.5)
    order = lightning_koopman.drop_order(net, batches)
    bits = lightning_koopman.bit_widths(net, batches, average=4)
    return [*linear.model.state_dict().values(), order.effect, bits.bits]


@pytest.mark.parametrize(
    "numbers", [numbers_of_drift, numbers_of_effects, numbers_of_observables, numbers_of_decisions]
)
def test_a_default_device_where_nothing_is_changes_no_number_and_the_network_sees_it(
    numbers: Callable[[nn.Module, Any], Any],
) -> None:
    seen = set()

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(torch.get_default_device().type)
            return super().forward(x)

    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(60, 6, generator=generator), torch.arange(60) % 3) for _ in range(12)]
    torch.manual_seed(0)
    net = Net(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    expected = numbers(net, batches)
    assert seen == {"cpu"}
    with torch.device("meta"):
        found = numbers(net, batches)
    assert seen == {"cpu", "meta"}
    for mine, true in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(true))
