"""Small exported models with random weights."""

from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
from megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm import MegatronDlmModel
from megatron_dlm.conversion.to_hugging_face import hugging_face_fields
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import Vocabulary
from megatron_dlm.models.config import ModelConfig
from tests.helpers.weights import random_state

LENGTH = 12


MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, conditioning_size=8
)


VOCABULARY = Vocabulary(size=11, mask_token_id=4, eos_token_id=0, bos_token_id=1)


FAMILIES = {
    "ar": ARConfig(),
    "mdlm": MDLMConfig(),
    "mdlm-cosine": MDLMConfig(noise_schedule="cosine", time_conditioning=True),
    "mdlm-shifted": MDLMConfig(shift=True),
    "duo": DuoConfig(),
    "duo-without-mask": DuoConfig(mask_in_noise=False, noise_schedule="linear"),
    "esolm": EsoLMConfig(),
    "esolm-two-parts": EsoLMConfig(alpha_0=0.5, batch_split=0.5),
    "esolm-sequential": EsoLMConfig(alpha_0=0.0, batch_split=0.0),
    "block-diffusion": BlockDiffusionConfig(block_size=4),
}


def build(objective, seed=5):
    fields = hugging_face_fields(MODEL, VOCABULARY, objective)
    model = MegatronDlmModel(MegatronDlmConfig(**fields, max_position_embeddings=LENGTH)).eval()
    model.load_state_dict(random_state(MODEL, VOCABULARY.size, seed=seed, scale=0.3))
    return model
