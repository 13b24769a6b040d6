# Sourced by the examples after setup_env.sh: DEVICE=cpu (the default, also on a machine with GPUs) or DEVICE=cuda.
# Leaves DTYPE, overrides of recipe keys. Variables that the user has set stay as they are.

cuda_environment() { # what training on GPUs wants of its surroundings
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron's, for tensor parallelism
  export NCCL_GRAPH_REGISTER=${NCCL_GRAPH_REGISTER:-0} # with expandable segments CUDA graphs demand it
  # Rollouts, teacher and update take turns in one allocator: without it memory is lost to fragments.
  [[ -n ${PYTORCH_ALLOC_CONF:-} ]] || # its name in newer versions of torch, which read the older one, too
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
}

require_gpus() { # N: refuse to start more processes than there are GPUs
  [[ ${DEVICE:-cpu} == cuda ]] || return 0
  local gpus
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  if [[ $1 -gt $gpus ]]; then
    echo "error: DEVICE=cuda needs one GPU per process: this layout needs $1, and $gpus can be used. Set smaller sizes" \
      "(TP, PP; the comment at the top of the script lists all), or DEVICE=cpu." >&2
    return 2
  fi
}

DEVICE=${DEVICE:-cpu}
DTYPE=()
case $DEVICE in
cpu)
  export CUDA_VISIBLE_DEVICES=""
  ;;
cuda)
  cuda_environment
  DTYPE=(student.dtype=bfloat16 teacher.dtype=bfloat16) # float32 is for the CPU: there it is as fast, and exact
  ;;
*)
  echo "error: DEVICE=$DEVICE: expected cpu or cuda" >&2
  exit 2
  ;;
esac
