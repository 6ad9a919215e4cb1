"""What makes training take less: narrow frozen weights, feed-forwards in pieces, no idle attention.

Activation checkpointing is the U-Net's own (``network_config.params.use_checkpoint``).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgm.modules.attention import CrossAttention, FeedForward


def store_weights(engine: nn.Module, frozen: torch.dtype) -> None:
    """Bring an engine's weights to the types that they are to have in training, in place.

    What learns is in float32: small steps would be lost in the rounding of narrower types. So are
    autoencoders, whose activations overflow in some of them.

    Args:
        engine: what learns in it requires gradients.
        frozen: of the other parameters, read by layers under autocast.
    """
    wide = {id(p) for part in _autoencoders(engine) for p in part.parameters()}
    for parameter in engine.parameters():
        narrow = not parameter.requires_grad and id(parameter) not in wide
        parameter.data = parameter.data.to(frozen if narrow else torch.float32)
    for buffer in engine.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


def _autoencoders(engine: Any) -> list[nn.Module]:
    """The first stage and the condition autoencoder; of an engine that is one, itself."""
    if not hasattr(engine, "conditioner"):
        return [engine]
    encoders = (getattr(each, "encoder", None) for each in engine.conditioner.embedders)
    return [engine.first_stage_model, *(each for each in encoders if each is not None)]


class ChunkedFeedForward(FeedForward):
    """A feed-forward whose inside, eight times as wide as its input, is there for a piece at once.

    Also backward: a piece is computed again for its gradient.
    """

    pieces = 1

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        whole = super().forward
        if not torch.is_grad_enabled():
            return whole(x)
        parts = x.flatten(0, -2).chunk(self.pieces)
        done = [checkpoint(whole, part, use_reentrant=False) for part in parts]
        return torch.cat(done).view_as(x)


def chunk_feed_forwards(engine: nn.Module, pieces: int) -> None:
    """Have feed-forwards computed in pieces, in place: the same gradients in less memory."""
    for module in engine.modules():
        if type(module) is FeedForward and pieces > 1:
            module.__class__ = ChunkedFeedForward
            module.pieces = pieces  # type: ignore[assignment]


class OneTokenAttention(CrossAttention):
    """Attention without the work that is idle where the context is one token.

    The softmax of one score is 1 whatever the query is, so that every position gets the same
    value. What has no effect has the gradient zero, as in the plain form.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(n, s, c), context (n, k, c_context) -> (n, s, c)."""
        if context is None or context.shape[1] != 1:
            return super().forward(x, context)
        project, drop = self.to_out
        value = project(self.to_v(context))
        idle = self.to_q(x[:, :0]).sum() + self.to_k(context[:, :0]).sum()
        return drop((value + idle).expand(-1, x.shape[1], -1))


def skip_idle_attention(engine: nn.Module) -> None:
    """Have attention over one token computed by its result, in place: the same gradients sooner."""
    for module in engine.modules():
        if type(module) is CrossAttention:
            module.__class__ = OneTokenAttention
