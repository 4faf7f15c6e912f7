"""Loads a Qwen-VL checkpoint from a directory or the hub, with a clear error if it is unusable.

Code shipped with a checkpoint is never run.
"""

import os

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from files import UserError, brief

FAMILIES = {  # by model_type: how a clip becomes tokens, where the config does not say
    "qwen2_5_vl": {},
    "qwen2_vl": {},
    "qwen3_vl": dict(timestamps=True, mean=(0.5,) * 3, std=(0.5,) * 3),
}


def read_config(name: str | os.PathLike) -> PreTrainedConfig:
    """The config of a checkpoint directory or hub name. Code shipped with it is never run. Raises
    UserError if it is not a Qwen-VL model."""
    try:
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if kind in FAMILIES:
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # config.json is checked by several libraries
        raise UserError(f"{name}: not a checkpoint for transformers ({brief(error)})") from error
    if kind is None:
        raise UserError(f"{name}: not a checkpoint; it has no config.json with a model_type")
    raise UserError(f"{name}: is a {kind!r} model; {' or '.join(FAMILIES)} is needed")


def load_model(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype]:
    """The model in `dtype`, its tokenizer, and the checkpoint's dtype. On the device "meta" the
    model has no weights and none are read. Raises UserError."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not os.path.isdir(name):
        raise UserError(f"{name}: no such model directory; give one, or a hub name")
    config = read_config(name)
    if set(getattr(config.text_config, "layer_types", ())) - {"full_attention"}:
        raise UserError(f"{name}: has sliding-window layers, which packed rows do not support")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if str(device) == "meta":
            with torch.device("meta"):
                model, found = AutoModelForImageTextToText.from_config(config), {}
        else:
            model, found = AutoModelForImageTextToText.from_pretrained(
                name,
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers, tokenizers and safetensors raise their own types
        raise UserError(
            f"{name}: its weights or tokenizer cannot be loaded ({brief(error)})"
        ) from error
    if lost := sorted(found.get("missing_keys", ())):
        raise UserError(f"{name}: its weights lack {len(lost)} tensors, such as {lost[0]}")
    if tokenizer.convert_tokens_to_ids("<|video_pad|>") != config.video_token_id:
        raise UserError(f"{name}: its tokenizer does not have <|video_pad|> where config.json does")
    return model.to(device), tokenizer, config.dtype or torch.float32


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation stops. Raises UserError if one is not in the vocabulary."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for end in [tokenizer.eos_token_id, *ends]:
        if type(end) is not int or not 0 <= end < model.config.text_config.vocab_size:
            raise UserError(
                f"{model.name_or_path or 'the model'}: its end token {end!r} is not in its "
                "vocabulary (generation_config.json, or the tokenizer's eos_token)"
            )
    return sorted({tokenizer.eos_token_id, *ends})
