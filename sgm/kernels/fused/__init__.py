"""The functions of :mod:`sgm.kernels` in Triton. Importing this imports Triton."""

from sgm.kernels.fused.attention import temporal_attention
from sgm.kernels.fused.group_norms import group_norm
from sgm.kernels.fused.layer_norms import residual_layer_norm
from sgm.kernels.fused.pointwise import blend, geglu

__all__ = ["blend", "geglu", "group_norm", "residual_layer_norm", "temporal_attention"]
