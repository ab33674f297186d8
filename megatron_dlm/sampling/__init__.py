"""Building blocks of the samplers, over one network protocol; need torch and numpy only, for exports.

Use: `sample(network, family, SamplingConfig(num_steps=64), start_from(prompts, length, family), seed=0)`.
"""
