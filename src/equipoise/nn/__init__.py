"""The DEQ module, layers that are safe inside it, and penalties."""

from equipoise.nn.deq import DEQ
from equipoise.nn.dropout import VariationalDropout
from equipoise.nn.frozen import frozen
from equipoise.nn.norms import spectral_norm, weight_norm
from equipoise.nn.penalties import jacobian_penalty, skip_penalty, spectral_radius

__all__ = [
    "DEQ",
    "VariationalDropout",
    "frozen",
    "jacobian_penalty",
    "skip_penalty",
    "spectral_norm",
    "spectral_radius",
    "weight_norm",
]
