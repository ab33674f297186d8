"""Samplers and likelihood of a model's family; in an export this file imports the family's own classes."""

from megatron_dlm.families.registry import likelihood_of, sampler_of


def sampler_for(config):
    """The samplers of the model."""
    return sampler_of(config.family).from_config(config)


def likelihood_for(config):
    """The likelihood of the model."""
    return likelihood_of(config.family)(config)
