"""Samplers of all families behind one network protocol; torch and numpy alone, since exports carry them.

Use: `sample(network, process, SamplingConfig(num_steps=64), start_from(prompts, length, process), seed=0)`.
"""
