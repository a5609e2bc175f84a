"""Which parts of a trained PyTorch network earn their keep: Koopman credit for every component."""

from importlib.metadata import version

from lightning_koopman.credit import QUANTITIES
from lightning_koopman.evaluate import credit_report
from lightning_koopman.metric import KoopmanCredit
from lightning_koopman.operator import KoopmanOperator, fit_operator
from lightning_koopman.report import CreditReport, ReportFormatError

__version__ = version("lightning-koopman")

__all__ = [
    "QUANTITIES",
    "CreditReport",
    "KoopmanCredit",
    "KoopmanOperator",
    "ReportFormatError",
    "credit_report",
    "fit_operator",
]
