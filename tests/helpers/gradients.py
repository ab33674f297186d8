"""Gradients that several microbatches leave behind."""

from tests.helpers import weights


def accumulated_gradients(state, config):
    """What megatron-core has summed over the microbatches of a second batch, by parameter.

    Args:
        state: this process's place.
        config: of a run; every tensor of its model is random.

    Returns:
        float32 on the CPU.
    """
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    random_state = weights.random_state(config.model, session.data.vocabulary.size)
    weights.set_weights(session.denoiser, state, random_state)
    session.optimizer.reload_model_params()
    for step in range(2):
        session.run_batch(step, step * config.training.global_batch_size)
    found = {name: p.main_grad.float().cpu().clone() for name, p in session.denoiser.named_parameters()}
    for chunk in session.denoiser.chunks:
        chunk.forget_recordings()
    return found
