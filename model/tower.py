"""The vision tower: attention within frames and windows, in few calls that never wait for a GPU.

Letters in shapes: N patches of all clips, B clips, H heads, d their size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


@dataclass
class Segments:
    """A sequence of N tokens cut into segments that attend only within themselves."""

    places: list[Tensor]  # int64, of each length: (segments of it, length), where their tokens are
    back_N: Tensor  # the inverse of all places, one after another


def segments(starts: Tensor, device: torch.device) -> Segments:
    """Of segments that begin at starts[:-1] and end at starts[1:]."""
    lengths = starts.diff()
    places = [starts[:-1][lengths == n, None] + torch.arange(n) for n in lengths.unique()]
    order_N = torch.cat([x.flatten() for x in places])
    return Segments([x.to(device) for x in places], order_N.argsort().to(device))


def tower_layout(grids_B3: Tensor, config: PreTrainedConfig, device: torch.device) -> dict:
    """What the vision tower works out from the grids of its clips, as keywords that hand it over.

    Left to itself it reads the window lengths from the GPU in every layer, and calls attention once
    per window: 2,120 calls for a clip of the recipe. Lengths given as 0 are not asked for either.
    """
    merge = config.spatial_merge_size
    frames = get_vision_cu_seqlens(grids_B3)  # full attention is within one
    layout = dict(cu_seqlens=segments(frames, device), max_seqlen=0)
    layout["position_ids"] = get_vision_position_ids(grids_B3, merge).to(device)
    if hasattr(config, "num_position_embeddings"):  # Qwen3-VL: learned positions, interpolated
        places, shares = get_vision_interpolation_indices_and_weights(
            grids_B3,
            int(config.num_position_embeddings**0.5),
            align_corners=True,
            spatial_merge_size=merge,
        )
        layout |= dict(interp_indices=places.to(device), interp_weights=shares.to(device))
    if hasattr(config, "window_size"):  # Qwen2.5-VL
        index, windows = get_vision_window_index(
            grids_B3, merge, config.window_size, config.patch_size
        )
        layout |= dict(
            window_index=index.to(device),
            cu_window_seqlens=segments(windows, device),
            max_window_seqlen=0,
        )
    return layout


def attend_within(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Segments,
    **_,
) -> tuple[Tensor, None]:
    """Attention of each token over its own segment, all segments of one length as one batch.

    query, key, value (1, H, N, d); `cu_seq_lens_q` is the Segments from `tower_layout`. Returns
    (1, N, H, d).
    """
    parts = []
    for places in cu_seq_lens_q.places:
        batch = (x[0][:, places].transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*batch, scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[cu_seq_lens_q.back_N][None], None


# Only a function with "flash" in its name gets a layer's windows in one call, not one by one.
AttentionInterface.register("segments_flash", attend_within)
