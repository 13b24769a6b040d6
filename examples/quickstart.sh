#!/usr/bin/env bash
# The main job, small: convert a teacher and a student, distil with TrOPD under torchrun, evaluate, export.
#
#   bash examples/quickstart.sh                 # two gloo processes, tensor_model_parallel_size=2
#   TP=1 PP=2 bash examples/quickstart.sh       # another layout; TEACHER_TP, TEACHER_PP for one of the teacher's own
#   TEACHER_RANKS=dedicated TEACHER_TP=1 bash examples/quickstart.sh   # the teacher on dedicated processes
#   DEVICE=cuda TP=1 bash examples/quickstart.sh  # on a GPU, in bfloat16; as many GPUs as the layout has processes
#   SEED=7 bash examples/quickstart.sh          # another seed
#   RUN=runs/other bash examples/quickstart.sh  # another folder
#   bash examples/quickstart.sh training.steps=20 objective.gate=soft   # any recipe key
#
# Runs on the CPU unless DEVICE=cuda. Sets up its own .venv unless a virtual environment with the package is active. Starts over in $RUN each time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_env.sh
source examples/setup_device.sh

RUN=${RUN:-runs/quickstart}
SEED=${SEED:-1234}
TP=${TP:-2}
PP=${PP:-1}
TEACHER_TP=${TEACHER_TP:-$TP}
TEACHER_PP=${TEACHER_PP:-$PP}
TEACHER_RANKS=${TEACHER_RANKS:-shared}
PROCESSES=$((TP * PP))
[[ $TEACHER_RANKS == shared ]] || PROCESSES=$((TP * PP + TEACHER_TP * TEACHER_PP))
LAYOUT=(
  student.tensor_model_parallel_size="$TP" student.pipeline_model_parallel_size="$PP"
  teacher.tensor_model_parallel_size="$TEACHER_TP" teacher.pipeline_model_parallel_size="$TEACHER_PP"
  "${DTYPE[@]}"
)
require_gpus "$PROCESSES"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one thread a process: two processes share two cores
STARTED=$(date +%s)
if [[ -e $RUN && ! -e $RUN/.quickstart && ! -e $RUN/train/recipe.yaml && -n "$(ls -A "$RUN")" ]]; then
  echo "quickstart: error: RUN=$RUN holds files that no quickstart wrote, and would be emptied; give another folder." >&2
  exit 2
fi
rm -rf "$RUN"
mkdir -p "$RUN"
touch "$RUN/.quickstart"

for model in teacher student; do
  echo "== Converting the $model from Hugging Face to Megatron's distributed checkpoint"
  python -m megatron_tropd convert hf-to-mcore --hf-path "examples/tiny/$model" --output "$RUN/$model" --verify
done

echo "== Evaluating the teacher on unseen problems"
torchrun --nproc-per-node $((TP * PP)) -m megatron_tropd evaluate tiny \
  --model teacher --output "$RUN/teacher.json" \
  "${LAYOUT[@]}" \
  student.checkpoint="$RUN/student" teacher.checkpoint="$RUN/teacher"

echo "== Distilling: the student writes, the teacher scores, the trust region decides"
torchrun --nproc-per-node "$PROCESSES" -m megatron_tropd train tiny \
  "${LAYOUT[@]}" teacher.ranks="$TEACHER_RANKS" \
  student.checkpoint="$RUN/student" teacher.checkpoint="$RUN/teacher" \
  training.seed="$SEED" logging.dir="$RUN/train" "$@"

echo "== Exporting the student to Hugging Face format"
CHECKPOINT=$(ls -d "$RUN"/train/checkpoints/step_* | tail -n 1)
python -m megatron_tropd convert mcore-to-hf --checkpoint "$CHECKPOINT/model" --output "$RUN/student_hf"

megatron-tropd report "$RUN/train"
python examples/tiny/summarize.py --run "$RUN" --seconds $(($(date +%s) - STARTED))
