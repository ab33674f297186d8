"""What samplers are made of, behind one network protocol; torch and numpy alone, since exports carry it.

Use: `sample(network, family, SamplingConfig(num_steps=64), start_from(prompts, length, family), seed=0)`.
"""
