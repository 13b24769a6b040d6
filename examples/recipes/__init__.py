"""The shipped recipes, installed beside the package so that `megatron-tropd train tropd_paper` finds them."""
