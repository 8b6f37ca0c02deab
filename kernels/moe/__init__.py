"""Rows of tokens in the order of their experts, and the experts' matrices."""

from .op import Routing, grouped_linear, permute, route, unpermute
