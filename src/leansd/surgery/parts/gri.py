"""Global-regional interactive (GRI) self-attention, A-SDM's cheap attention for shallow layers.

The picture is taken apart into four regional pictures of half the side, one for each place in the
cells of 2 x 2 tokens, and averaged over these cells into a global one. The global queries attend to
the keys of each region apart, and the four results are put together to full size: a quarter of the
matrix products of self-attention (arXiv 2406.00210). It uses an attention's own projections, so
that a checkpoint stays what it was: stock diffusers runs full attention with it.

Where features are constant on the cells it equals full attention. Elsewhere it does not: a network
is distilled to it. A plan's gate puts it, or full attention, in the place of what an attention
computes for one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from math import isqrt
from typing import Any, TypeVar

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch.nn import functional as F

from leansd.errors import LeansdError
from leansd.plans.address import covers
from leansd.plans.anatomy import Unit
from leansd.plans.row import CELL, REGIONS, SELF_ATTENTION, Attend
from leansd.surgery.parts import AddressedUNet, Options, Replacement
from leansd.text import refuse_unknown

Size = tuple[int, int]
Result = TypeVar("Result")

LATENT_SIZE: ContextVar[Size | None] = ContextVar("LATENT_SIZE", default=None)
"""Latent (height, width) of the running UNet call; attention itself sees only a row of tokens."""


class Traced:
    """The size inside a trace of `torch.compile`, which cannot set context variables."""

    size: Size | None = None


_traced = Traced()


def call_at_size(size: Size, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """`call` with `size`, the latent (height, width), known to the GRI attentions in it."""
    if torch.compiler.is_compiling():
        _traced.size = size
        try:
            return call(*args, **kwargs)
        finally:
            _traced.size = None
    token = LATENT_SIZE.set(size)
    try:
        return call(*args, **kwargs)
    finally:
        LATENT_SIZE.reset(token)


def find_size(tokens: int) -> Size | None:
    """(height, width) of the feature map that `tokens` are: a level of the running UNet call.

    Every downsampler halves the sides, rounding up. Outside a call whose size is known a square
    number of tokens is a square; None where neither is so.
    """
    latent = _traced.size or LATENT_SIZE.get()
    if latent is None:
        side = isqrt(tokens)
        return (side, side) if side * side == tokens else None
    height, width = latent
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == tokens else None


def split_regions(tokens: torch.Tensor, size: Size) -> torch.Tensor:
    """Tokens [B, H * W, C] of a map of `size` as regions [B, 4, ceil(H / 2) * ceil(W / 2), C].

    Odd sides are made even by repeating their last row or column, so that each region covers the
    whole map and none needs a mask.
    """
    height, width = size
    channels = tokens.shape[-1]
    feature = tokens.unflatten(1, size)
    # A trace has no sizes: it joins what is missing to a map of any, a row and a column or nothing.
    if torch.jit.is_tracing() or height % CELL:
        feature = torch.cat((feature, feature[:, height - height % CELL : height]), dim=1)
    if torch.jit.is_tracing() or width % CELL:
        feature = torch.cat((feature, feature[:, :, width - width % CELL : width]), dim=2)
    cells = feature.unflatten(2, (-1, CELL)).unflatten(1, (-1, CELL))  # [B, H/2, 2, W/2, 2, C]
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(tokens.shape[0], REGIONS, -1, channels)


def join_regions(regions: torch.Tensor, size: Size) -> torch.Tensor:
    """Regions [B, 4, ceil(H / 2) * ceil(W / 2), C] as tokens [B, H * W, C]: undoes the split."""
    height, width = size
    rows, columns = (height + CELL - 1) // CELL, (width + CELL - 1) // CELL
    cells = regions.unflatten(2, (rows, columns)).unflatten(1, (CELL, CELL))
    feature = cells.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
    return feature[:, :height, :width].flatten(1, 2)


def average_cells(tokens: torch.Tensor, size: Size) -> torch.Tensor:
    """The mean [B, ceil(H / 2) * ceil(W / 2), C] of each cell of tokens [B, H * W, C]."""
    feature = tokens.unflatten(1, size).permute(0, 3, 1, 2)
    # A cell cut off by the edge is the mean of the tokens that it has.
    cells = F.avg_pool2d(feature, CELL, ceil_mode=True, count_include_pad=False)
    return cells.flatten(2).transpose(1, 2)


class GRIAttnProcessor:
    """GRI attention as an attention processor of diffusers, without parameters of its own.

    Cross-attention, masks, and maps whose size is not known run in full. What gives a whole UNet
    new processors (attention slicing, xFormers, fused projections) takes this one away.
    """

    def __init__(self) -> None:
        self.full = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend among `hidden_states` [B, N, C]; the arguments are those of diffusers."""
        size = None
        if encoder_hidden_states is None and attention_mask is None and hidden_states.ndim == 3:
            size = find_size(hidden_states.shape[1])
        if size is None or attn.group_norm is not None or attn.spatial_norm is not None:
            return self.full(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        output = self.attend(attn, hidden_states, size)
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor

    def attend(self, attn: Any, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """The projected attention [B, N, C] among `tokens` [B, N, C]: one map for each region."""
        regions = split_regions(tokens, size)
        batch = regions.shape[0]
        queries = attn.to_q(regions.mean(1))
        queries = queries.unsqueeze(1).expand(-1, REGIONS, -1, -1).flatten(0, 1)
        regions = regions.flatten(0, 1)
        mixed = mix_values(attn, queries, attn.to_k(regions), attn.to_v(regions))
        # Projected before they are joined: what `to_out` makes is put in its place in one copy.
        return join_regions(_project(attn, mixed).unflatten(0, (batch, REGIONS)), size)


class GlobalGRIAttnProcessor(GRIAttnProcessor):
    """The other reading of GRI: the global queries attend to the keys of all regions at once.

    All tokens of a cell then get the same value. It computes as many matrix products.
    """

    def attend(self, attn: Any, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        queries = attn.to_q(average_cells(tokens, size))
        mixed = mix_values(attn, queries, attn.to_k(tokens), attn.to_v(tokens))
        cells = _project(attn, mixed)
        return join_regions(cells.unsqueeze(1).expand(-1, REGIONS, -1, -1), size)


MODES: Mapping[str, type[GRIAttnProcessor]] = {
    "regional": GRIAttnProcessor,
    "global": GlobalGRIAttnProcessor,
}
"""The readings of GRI by name; the first is the default."""


def mix_values(
    attn: Attention, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Attention of queries [B, N, C] to keys and values [B, M, C], in the heads of `attn`.

    Which kernel computes it is PyTorch's choice.
    """
    heads = (attn.heads, -1)
    queries = queries.unflatten(2, heads).transpose(1, 2)
    keys = keys.unflatten(2, heads).transpose(1, 2)
    values = values.unflatten(2, heads).transpose(1, 2)
    if attn.norm_q is not None:
        queries = attn.norm_q(queries)
    if attn.norm_k is not None:
        keys = attn.norm_k(keys)
    mixed = F.scaled_dot_product_attention(queries, keys, values)
    return mixed.transpose(1, 2).flatten(2)


def _project(attn: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What `to_out`, a projection and a dropout, makes of `tokens`."""
    projection, dropout = attn.to_out
    return dropout(projection(tokens))


Processor = Callable[..., torch.Tensor]
"""An attention processor of diffusers."""

FULL = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
"""Processors that compute full attention and nothing else."""
GRI = GRIAttnProcessor()


def find_processor(attention: Attention, by: Attend) -> Processor | None:
    """The processor that has `attention` attend `by` GRI or in full.

    None where its own does so already, and where it is neither: perturbed-attention guidance, say,
    would be lost with it.
    """
    own: Any = attention.processor
    if by == "gri":
        return GRI if type(own) in FULL else None
    return own.full if isinstance(own, GRIAttnProcessor) else None


def attend(
    attention: Attention,
    processor: Processor,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **ignored: Any,
) -> torch.Tensor:
    """What `attention` makes of `hidden_states` [B, N, C] with `processor` in its own's place.

    Like `Attention.forward`, without setting anything: other threads may be in the same module.
    """
    return processor(
        attention,
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=attention_mask,
    )


def validate(unit: Unit, options: Options) -> None:
    """Refuse what has no self-attention, and options that are none."""
    if unit.kind not in ("transformer", SELF_ATTENTION):
        raise LeansdError(
            f"{unit.at} is no self-attention; gri is for the likes of *.attn and *.attn.*.sa"
        )
    refuse_unknown("gri", options, ("mode",))
    mode = options.get("mode", next(iter(MODES)))
    if mode not in MODES:
        raise LeansdError(f"gri has no mode {mode!r}; there are {', '.join(MODES)}")


def build(net: AddressedUNet, at: str, options: Options) -> None:
    """Give GRI to a self-attention, or to all of a transformer."""
    make = MODES[options.get("mode", next(iter(MODES)))]
    for part in net.anatomy.parts:
        if part.kind == SELF_ATTENTION and covers(at, part.at):
            net.find(part.at).set_processor(make())


REPLACEMENT = Replacement(validate, build)
