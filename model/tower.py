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

    runs: list[tuple[int, int]]  # neighbours of one length: how many, how many tokens each
    order_N: Tensor | None = None  # int64: where their tokens are; None: as they stand
    back_N: Tensor | None = None  # its inverse


def runs_of(lengths: Tensor) -> list[tuple[int, int]]:
    length, count = lengths.unique_consecutive(return_counts=True)
    return list(zip(count.tolist(), length.tolist(), strict=True))


def tower_layout(grids_B3: Tensor, config: PreTrainedConfig, device: torch.device) -> dict:
    """What the vision tower works out from the grids of its clips, as keywords that hand it over.

    Left to itself it reads the window lengths from the GPU in every layer, and calls attention once
    per window: 2,120 calls for a clip of the recipe. Here windows are sorted by length. Lengths
    given as 0 are not asked for either.
    """
    merge, unit = config.spatial_merge_size, config.spatial_merge_size**2
    lengths = get_vision_cu_seqlens(grids_B3).diff()  # of the frames: full attention is within one
    layout = dict(cu_seqlens=Segments(runs_of(lengths)), max_seqlen=0)
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
        index, starts = get_vision_window_index(
            grids_B3, merge, config.window_size, config.patch_size
        )
        sizes, by_length = starts.diff().sort(stable=True)
        windows = index.split((starts.diff() // unit).tolist())
        index = torch.cat([windows[k] for k in by_length.tolist()])
        frame_of = torch.repeat_interleave(lengths // unit)[index]
        order_N = (frame_of.argsort(stable=True)[:, None] * unit + torch.arange(unit)).flatten()
        layout |= dict(
            window_index=index.to(device),
            cu_seqlens=Segments(runs_of(lengths), order_N.to(device), order_N.argsort().to(device)),
            cu_window_seqlens=Segments(runs_of(sizes)),
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
    """Attention of each token over its own segment, neighbours of one length as one batch.

    query, key, value (1, H, N, d); `cu_seq_lens_q` is the Segments from `tower_layout`. Returns
    (1, N, H, d).
    """
    segments, parts = cu_seq_lens_q, []
    qkv = [x[0].transpose(0, 1) for x in (query, key, value)]
    if segments.order_N is not None:
        qkv = [x[segments.order_N] for x in qkv]
    sizes = [count * length for count, length in segments.runs]
    for run, *three in zip(segments.runs, *(x.split(sizes) for x in qkv), strict=True):
        batch = (x.unflatten(0, run).transpose(1, 2) for x in three)
        out = F.scaled_dot_product_attention(*batch, scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(parts)
    return (out if segments.back_N is None else out[segments.back_N])[None], None


# Only a function with "flash" in its name gets a layer's windows in one call, not one by one.
AttentionInterface.register("segments_flash", attend_within)
