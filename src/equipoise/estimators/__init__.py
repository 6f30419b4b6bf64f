"""Linear estimators with the interface of scikit-learn; gradients tune their penalties."""

try:
    import scipy  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError("the estimators need scikit-learn and SciPy: pip install 'equipoise[estimators]'") from error

from equipoise.estimators.classifiers import BilevelLogisticRegression, BilevelNonlinearLeastSquares
from equipoise.estimators.ridge import BilevelRidge
from equipoise.estimators.saved import load, save
from equipoise.estimators.tables import read_rows, read_table

__all__ = [
    "BilevelLogisticRegression",
    "BilevelNonlinearLeastSquares",
    "BilevelRidge",
    "load",
    "read_rows",
    "read_table",
    "save",
]
