"""Which parts of a trained PyTorch network earn their keep: Koopman credit for every component."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lightning_koopman.checkpoints import CheckpointError
from lightning_koopman.evaluate import credit_report
from lightning_koopman.linearization import linearize
from lightning_koopman.measured_effects import intervene
from lightning_koopman.metric import KoopmanCredit
from lightning_koopman.operator import KoopmanOperator, fit_operator
from lightning_koopman.predictions import predict_effects
from lightning_koopman.report import CreditReport
from lightning_koopman.series import EvaluationError, evaluate_checkpoints

if TYPE_CHECKING:
    from lightning_koopman.callback import KoopmanCreditMonitor

__version__ = version("lightning-koopman")

__all__ = [
    "CheckpointError",
    "CreditReport",
    "EvaluationError",
    "KoopmanCredit",
    "KoopmanCreditMonitor",
    "KoopmanOperator",
    "credit_report",
    "evaluate_checkpoints",
    "fit_operator",
    "intervene",
    "linearize",
    "predict_effects",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and credit_report needs none of it.
    if name == "KoopmanCreditMonitor":
        return import_module("lightning_koopman.callback").KoopmanCreditMonitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
