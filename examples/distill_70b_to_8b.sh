#!/usr/bin/env bash
''':' # To bash a line that does nothing; to Python, see the end, the start of a text that is everything in between.
# Llama-3.1-70B-Instruct teaches Llama-3.1-8B: convert, let the teacher write responses, TrOPD, evaluate, export.
#
#   export TEACHER=models/Llama-3.1-70B-Instruct  # Hugging Face folders: config.json, tokenizer, *.safetensors
#   export STUDENT=models/Llama-3.1-8B
#   export PROMPTS=prompts.jsonl                  # to train on: {"messages": [...]} or {"text": ...} a line
#   export PROBLEMS=problems.jsonl                # to evaluate on: the same with "answer"
#   bash examples/distill_70b_to_8b.sh            # one node, all its GPUs; or either of
#   torchrun --nproc-per-node 8 examples/distill_70b_to_8b.sh
#   torchrun --nproc-per-node 8 --no-python examples/distill_70b_to_8b.sh
#   srun --ntasks-per-node 1 bash examples/distill_70b_to_8b.sh             # under Slurm, on all nodes of the job
#   bash examples/distill_70b_to_8b.sh training.steps=400 objective.gate=soft   # any recipe key
#   REHEARSAL=1 bash examples/distill_70b_to_8b.sh  # both models shrunk and random, two CPU processes, one minute
#
# Paths are relative to the repository. Started again after a failure or a time limit it skips what is complete, and
# training goes on from its newest checkpoint. More variables, with their defaults:
#
#   RUN=runs/llama_70b_to_8b   all output; on several nodes a folder that all of them see
#   RECIPE=llama_70b_to_8b     where learning rate, lengths and memory are explained: examples/recipes
#   TP=<processes per node>      tensor parallelism of both models, at most 8
#   PP=<nodes>                 their pipeline parallelism; with more processes than TP x PP the rest is data parallelism
#   STUDENT_TP, STUDENT_PP     the student's own, such as 2 and 1: smaller, it needs fewer ranks per replica
#   TEACHER_RANKS=shared       dedicated: the last TP x PP processes are the teacher's alone (PP=1, if nothing else is
#                              said), the others the student's; with 2 nodes of 8, a node each
#   VERIFY=auto                two layers and the output of each model are compared with transformers before it is
#                              converted; all: and all tensors' bits afterwards; off: nothing
#   NPROC=<GPUs>, NNODES=<Slurm's, or 1>, NODE_RANK, MASTER_ADDR, MASTER_PORT=29500   when bash starts it, as torchrun's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_env.sh
[[ ${REHEARSAL:-0} == 1 ]] && DEVICE=cpu || DEVICE=cuda
source examples/setup_device.sh

REHEARSAL=${REHEARSAL:-0}
if [[ $REHEARSAL == 1 ]]; then
  RUN=${RUN:-runs/rehearsal}
  NPROC=${NPROC:-2}
  TEACHER=$RUN/inputs/teacher STUDENT=$RUN/inputs/student
  PROMPTS=$RUN/inputs/prompts.jsonl PROBLEMS=$RUN/inputs/problems.jsonl
  # Random bytes become several when they are read as text: with all of a response given nothing would be left to write.
  set -- training.steps=2 training.prompts_per_step=4 rollout.samples_per_prompt=2 rollout.max_new_tokens=16 \
    evaluation.samples=2 guidance.start=0.2 "$@"
  export TORCHDYNAMO_DISABLE=1 # compilation is not worth its seconds here
fi
RUN=${RUN:-runs/llama_70b_to_8b}
RECIPE=${RECIPE:-llama_70b_to_8b}
IS_FIRST=$([[ ${RANK:-${NODE_RANK:-${SLURM_NODEID:-0}}} == 0 ]] && echo 1 || echo 0) # one process speaks for all
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say() { [[ $IS_FIRST == 0 ]] || echo "$@"; }

fail() { # the first process explains; the others leave later, or its launcher would end it before it has
  [[ $IS_FIRST == 1 ]] || sleep 5
  say "distill_70b_to_8b: error: $*" >&2
  exit 2
}

check_inputs() { # everything that can be missing, before anything runs
  local missing=""
  [[ -e ${TEACHER:-}/config.json ]] || missing+=" TEACHER=${TEACHER:-} is no Hugging Face folder: download \
meta-llama/Llama-3.1-70B-Instruct (about 141 GB; hf download meta-llama/Llama-3.1-70B-Instruct --exclude 'original/*' \
--local-dir DIR, once its licence is accepted) and set TEACHER=DIR."
  [[ -e ${STUDENT:-}/config.json ]] || missing+=" STUDENT=${STUDENT:-} is no Hugging Face folder: download \
meta-llama/Llama-3.1-8B (about 16 GB) in the same way and set STUDENT=DIR."
  [[ -f ${PROMPTS:-} ]] || missing+=" PROMPTS=${PROMPTS:-} is no file: write the prompts to train on as JSONL, one \
{\"id\": ..., \"messages\": [{\"role\": \"user\", \"content\": ...}]} a line."
  [[ -f ${PROBLEMS:-} ]] || missing+=" PROBLEMS=${PROBLEMS:-} is no file: write the problems to evaluate on in the \
same way, each with \"answer\"."
  [[ -z $missing ]] || fail "nothing was started.$missing"
}

start_processes() { # bash started this file: let torchrun start it once per GPU
  local nnodes=${NNODES:-${SLURM_NNODES:-1}} launcher
  if [[ $nnodes == 1 ]]; then
    launcher=(--standalone --local-addr 127.0.0.1) # on a free port
  else
    [[ -n ${MASTER_ADDR:-}${SLURM_JOB_NODELIST:-} ]] || fail "NNODES=$nnodes needs MASTER_ADDR, the first node's name."
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    launcher=(--nnodes "$nnodes" --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}")
    launcher+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  fi
  NPROC=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)}
  [[ $NPROC -gt 0 ]] || fail "no GPU was found; set NPROC, or try the script out with REHEARSAL=1."
  exec torchrun "${launcher[@]}" --nproc-per-node "$NPROC" --no-python bash examples/distill_70b_to_8b.sh "$@"
}

STAGE=0
stage() { # NAME TITLE COMMAND...: run the command unless the stage was whole when this process started
  local name=$1 title=$2 status=0
  shift 2
  STAGE=$((STAGE + 1))
  if [[ $TODO != *" $name "* ]]; then
    say "== $title: complete, skipped"
    return
  fi
  say "== $title"
  # A separate port, on which rank 0 opens a store: torchrun's still holds what the previous stage wrote.
  MASTER_PORT=$((FIRST_PORT + STAGE)) TORCHELASTIC_USE_AGENT_STORE=False "$@" || status=$?
  [[ $status == 0 ]] || exit $status
  say "== $title: done in $SECONDS s since the start"
}

main() {
  if [[ $REHEARSAL == 1 && $IS_FIRST == 1 ]]; then
    python examples/rehearsal/make_models.py --output "$RUN/inputs"
  elif [[ $REHEARSAL == 1 ]]; then
    until [[ -d $RUN/inputs ]]; do sleep 0.2; done # torchrun ends this process if the first one fails
  fi
  check_inputs
  [[ -n ${TORCHELASTIC_RUN_ID:-} ]] || start_processes "$@"

  # From here on every process of every node does the same.
  local tp=${TP:-$LOCAL_WORLD_SIZE} pp=$GROUP_WORLD_SIZE teacher_ranks=${TEACHER_RANKS:-shared}
  [[ $teacher_ranks == shared ]] || pp=1
  pp=${PP:-$pp}
  local student_tp=${STUDENT_TP:-$tp} student_pp=${STUDENT_PP:-$pp}
  local layout=(--tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp")
  local student_layout=(--tensor-model-parallel-size "$student_tp" --pipeline-model-parallel-size "$student_pp")
  local verify=(--verify "${VERIFY:-auto}")
  [[ ${VERIFY:-auto} != off ]] || verify=()
  local settings=("$RECIPE" teacher.checkpoint="$RUN/teacher" student.checkpoint="$RUN/student")
  settings+=(tokenizer.path="$TEACHER") # the base model's has no chat template; the checkpoints carry this one
  settings+=(data.prompts="$PROMPTS" logging.dir="$RUN/train")
  settings+=(teacher.tensor_model_parallel_size="$tp" teacher.pipeline_model_parallel_size="$pp")
  settings+=(student.tensor_model_parallel_size="$student_tp" student.pipeline_model_parallel_size="$student_pp")
  settings+=(teacher.sequence_parallel="$([[ $tp -gt 1 ]] && echo true || echo false)")
  settings+=(student.sequence_parallel="$([[ $student_tp -gt 1 ]] && echo true || echo false)")
  settings+=(teacher.ranks="$teacher_ranks")
  settings+=("$@")
  local train=(python -m megatron_tropd train "${settings[@]}" guidance.responses="$RUN/responses.jsonl")

  # A mistake in the recipe, or a change that the run so far does not allow, is found now. RANK=0: only that rank prints.
  local resolved errors
  errors=$(mktemp)
  resolved=$(RANK=0 WORLD_SIZE=1 "${train[@]}" --dry-run 2>"$errors") || fail "$(cat "$errors")"
  rm -f "$errors"
  local steps exit_step
  steps=$(sed -n 's/^  steps: //p' <<<"$resolved")
  exit_step=$(sed -n 's/^  exit_step: //p' <<<"$resolved")
  [[ $exit_step == null || $exit_step -gt $steps ]] || steps=$exit_step
  local checkpoint evaluation=$RUN/evaluation_step_$steps.json export=$RUN/student_hf_step_$steps
  checkpoint=$RUN/train/checkpoints/step_$(printf %06d "$steps")

  # What is to be done is decided now, by every process alike: no stage finishes before all have come to it, so none
  # can mistake for complete, and skip, what the others are about to write.
  TODO=" " FIRST_PORT=$MASTER_PORT
  [[ -e $RUN/teacher/complete.json ]] || TODO+="teacher "
  [[ -e $RUN/student/complete.json ]] || TODO+="student "
  [[ -e $RUN/responses.jsonl && $(wc -l <"$RUN/responses.jsonl") -ge $(grep -c '[^[:space:]]' "$PROMPTS") ]] ||
    TODO+="responses "
  [[ $resolved == *"# finished: $steps steps"* ]] && grep -q "\"steps\": $steps," "$RUN/train/summary.json" ||
    TODO+="train "
  [[ -e $evaluation ]] || TODO+="evaluate "
  [[ -e $export/config.json ]] || TODO+="export "

  stage teacher "Converting the teacher to Megatron's distributed checkpoint" \
    python -m megatron_tropd convert hf-to-mcore --hf-path "$TEACHER" --output "$RUN/teacher" "${layout[@]}" "${verify[@]}"
  stage student "Converting the student" \
    python -m megatron_tropd convert hf-to-mcore --hf-path "$STUDENT" --output "$RUN/student" "${student_layout[@]}" \
    "${verify[@]}"
  stage responses "Writing the teacher's responses, whose beginnings will guide the student" \
    python -m megatron_tropd generate "${settings[@]}" --model teacher --temperature 0 --output "$RUN/responses.jsonl"
  stage train "Distilling: the student writes, the teacher scores, the trust region decides" "${train[@]}"
  stage evaluate "Evaluating the student" \
    python -m megatron_tropd evaluate "${settings[@]}" --checkpoint "$checkpoint/model" --problems "$PROBLEMS" \
    --output "$evaluation"
  stage export "Exporting the student to Hugging Face format" \
    python -m megatron_tropd convert mcore-to-hf --checkpoint "$checkpoint" --output "$export" "${student_layout[@]}"

  [[ $IS_FIRST == 0 ]] || megatron-tropd report "$RUN/train"
  say "== All stages are whole after $SECONDS s: $export, $evaluation, $RUN/train/report.html"
}

trap 'exit 143' TERM # when the command that runs has ended: training saves a checkpoint first
main "$@"
exit
''' # Python comes here, when torchrun has handed it this file, and hands it on to bash.
import os, sys
os.execvp("bash", ["bash", *sys.argv]) # '
