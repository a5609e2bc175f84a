"""Which parts of a trained PyTorch network earn their keep: Koopman credit for every component."""

import random
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from warnings import warn

if TYPE_CHECKING:
    from lightning_koopman.callback.monitor import KoopmanCreditMonitor
    from lightning_koopman.checkpoints.series import EvaluationError, evaluate_checkpoints
    from lightning_koopman.decisions.bits import bit_widths
    from lightning_koopman.decisions.drop import drop_order
    from lightning_koopman.decisions.linear import linearize
    from lightning_koopman.effects.component_effects import component_effects
    from lightning_koopman.koopman.operator import KoopmanOperator, fit_operator
    from lightning_koopman.koopman.options import Options
    from lightning_koopman.measurement.drift import drift
    from lightning_koopman.measurement.evaluate import credit_report
    from lightning_koopman.measurement.metric import KoopmanCredit
    from lightning_koopman.network.weights import CheckpointError
    from lightning_koopman.report.report import CreditReport

__all__ = [
    "CheckpointError",
    "CreditReport",
    "EvaluationError",
    "KoopmanCredit",
    "KoopmanCreditMonitor",
    "KoopmanOperator",
    "Options",
    "bit_widths",
    "component_effects",
    "credit_report",
    "drift",
    "drop_order",
    "evaluate_checkpoints",
    "fit_operator",
    "linearize",
]

# Lightning and torchmetrics take seconds to import, and most names need neither.
_HOMES = {
    "CheckpointError": "network.weights",
    "CreditReport": "report.report",
    "EvaluationError": "checkpoints.series",
    "KoopmanCredit": "measurement.metric",
    "KoopmanCreditMonitor": "callback.monitor",
    "KoopmanOperator": "koopman.operator",
    "Options": "koopman.options",
    "bit_widths": "decisions.bits",
    "component_effects": "effects.component_effects",
    "credit_report": "measurement.evaluate",
    "drift": "measurement.drift",
    "drop_order": "decisions.drop",
    "evaluate_checkpoints": "checkpoints.series",
    "fit_operator": "koopman.operator",
    "linearize": "decisions.linear",
}


_GONE = {"intervene": "measured", "predict_effects": "predicted"}
"""Functions of 0.1, and how the one that took their place is to be told to do what they did."""


def _refuse(message: str, *args: Any, **kwargs: Any) -> None:
    raise TypeError(message)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lightning-koopman")
    if name in _GONE:
        message = (
            f"{name} is now component_effects(model, batches, report, kinds, how={_GONE[name]!r}), "
            "which returns the effects; see docs/migration.md"
        )
        # A script that imports the name and never calls it goes on.
        warn(message, FutureWarning, stacklevel=2)
        return partial(_refuse, message)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    drawn = random.getstate()
    home = import_module(f"{__name__}.{_HOMES[name]}")
    # Rich draws while it is imported, which may be between a user's seed and what it is for.
    random.setstate(drawn)
    if name == "KoopmanCreditMonitor":
        # Whoever asks for the callback by its name may have imported Lightning's other namespace since.
        import_module(f"{__name__}.callback.harmless").join_namespaces()
    return getattr(home, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
