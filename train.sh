#!/usr/bin/env bash
# The paper's recipe: Qwen2.5-VL-7B-Instruct on CLEVRER counterfactual questions, 2 x 80 GB
# (official scripts/tw-grpo.sh). Not yet run on GPUs; add --dry_run true to see the memory plan.
#
#   DATA=clevrer_counterfactual_train.json VIDEOS=CLEVRER/videos bash train.sh --output_dir runs/7b
#
# After a kill, the same command with --resume_from_checkpoint auto continues the run.
# The paper's GRPO baseline (official scripts/grpo.sh) adds:
#   --loss_type grpo --alpha 1.0 --reward_funcs origin_accuracy format --freeze_vision_modules false
# The longest published answer has 513 words, so the limit is 1,024 new tokens (official: 4,096).
set -euo pipefail
: "${MODEL:=Qwen/Qwen2.5-VL-7B-Instruct}"
: "${DATA:?set DATA to the training questions, a JSON list or JSONL}"
: "${VIDEOS:?set VIDEOS to the directory that their video paths are relative to}"
: "${GPUS:=2}"
[ -e "$DATA" ] || { echo "error: DATA=$DATA: no such file" >&2; exit 1; }
[ -d "$VIDEOS" ] || { echo "error: VIDEOS=$VIDEOS: no such directory" >&2; exit 1; }

# Seconds from SIGTERM to SIGKILL: a step and a save of 7B (116 GB) take longer than torchrun's 30.
# torch 2.11 ignores it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
torchrun --standalone --nproc_per_node "$GPUS" twgrpo.py \
    --model_name_or_path "$MODEL" \
    --jsonl_path "$DATA" \
    --video_root "$VIDEOS" \
    --question_type mixed \
    --train_samples 2000 \
    --loss_type tw_grpo \
    --alpha 1.7 \
    --beta 0 \
    --reward_funcs accuracy format \
    --num_generations 8 \
    --max_completion_length 1024 \
    --temperature 1.0 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --gradient_checkpointing true \
    --max_steps 1000 \
    --learning_rate 1e-6 \
    --max_grad_norm 20 \
    --freeze_vision_modules true \
    --save_steps 100 \
    --seed 42 \
    "$@"
