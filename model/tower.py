"""The vision tower's attention within frames and windows, in few calls and without GPU syncs.

Shape letters: N patches of all clips, B clips, H heads, d head size.
"""

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


def segments(starts: Tensor, device: torch.device) -> list[Tensor]:
    """The token indices of segments that begin at starts[:-1] and end at starts[1:]: for each
    length that occurs, (segments of that length, length) int64."""
    lengths = starts.diff()
    places = [starts[:-1][lengths == n, None] + torch.arange(n) for n in lengths.unique()]
    return [x.to(device) for x in places]


def tower_layout(grids_B3: Tensor, config: PreTrainedConfig, device: torch.device) -> dict:
    """Precomputes what the vision tower derives from its clips' grids, as keyword arguments.

    By itself, it reads window lengths back from the GPU in every layer and calls attention once per
    window: 2,120 calls for a clip of the recipe. A max length of 0 avoids one more such read.
    """
    merge = config.spatial_merge_size
    frames = get_vision_cu_seqlens(grids_B3)  # full attention stays within a frame
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
    cu_seq_lens_q: list[Tensor],
    **_,
) -> tuple[Tensor, None]:
    """Attention of each token over its own segment; segments of equal length form one batch.

    query, key, value (1, H, N, d); `cu_seq_lens_q` are the `segments`. Returns (1, N, H, d).
    """
    out_NHd = torch.empty_like(value[0].transpose(0, 1))
    for places in cu_seq_lens_q:
        batch = (x[0][:, places].transpose(0, 1) for x in (query, key, value))
        out_NHd[places] = F.scaled_dot_product_attention(*batch, scale=scaling).transpose(1, 2)
    return out_NHd[None], None


# The name needs "flash" in it to get all windows of a layer in one call instead of one by one.
AttentionInterface.register("segments_flash", attend_within)
