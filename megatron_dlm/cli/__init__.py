"""The commands of `megatron-dlm`, one file each: parse, build, call."""
