"""Loads a checkpoint or an exported folder as a whole model in one process, for sampling and scoring.

In both cases this package's own copy of the exported model's code runs; no code in the folder is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_dlm.checkpointing.layout import MANIFEST
from megatron_dlm.data.shards.manifest import read_manifest
from megatron_dlm.data.tokenizers.tokenizer import TOKENIZER_FILE, load_tokenizer
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.platform.gpu import own_cuda
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.peers import Peers, meet_peers
from megatron_dlm.run.checkpoint_names import find_checkpoint
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.run_record import EXPORT_CONFIG, RunRecord, read_run_record

if TYPE_CHECKING:
    import torch

    from megatron_dlm.data.tokenizers.encoders import LoadedTokenizer
    from megatron_dlm.sampling.family_sampler import FamilySampler
    from megatron_dlm.sampling.network import Network

ModelDtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A loaded model with its samplers, tokenizer and configuration."""

    model: Any
    """Instance of this package's `MegatronDlmModel`, in evaluation mode."""
    family: FamilySampler
    """Samplers of the model's family."""
    tokenizer: LoadedTokenizer
    vocabulary: Vocabulary
    config: RunConfig
    """Configuration of the run that trained it."""
    peers: Peers = Peers()
    """Processes that have loaded the same model and share its requests."""

    @property
    def network(self) -> Network:
        """The model wrapped as the `Network` that samplers call."""
        from megatron_dlm.conversion.hugging_face_model.generation_megatron_dlm import ModelNetwork

        network: Network = ModelNetwork(self.model)
        return network

    def length(self, wanted: int | None) -> int:
        """Length of a text in tokens.

        Args:
            wanted: length that was asked for; None: the sequence length of the training.

        Returns:
            The length.

        Raises:
            InputError: longer than the sequences of the training.
        """
        longest = self.config.data.seq_length
        if wanted is not None and wanted > longest:
            raise InputError(f"length: {wanted} is above {longest}, the tokens of a training sequence")
        return longest if wanted is None else wanted

    def weights_sha256(self) -> str:
        """Hexadecimal SHA-256 of all tensors by name: the same for a checkpoint and its fp32 export."""
        import torch

        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def open_model(
    path: Path,
    *,
    tokenizer: Path | None,
    dtype: ModelDtype,
    device: str | None,
    peers: Peers | None = None,
) -> LoadedModel:
    """Load a model; under a launcher on each of its processes, which then share requests.

    Args:
        path: a run (its newest checkpoint), RUN@STEP, a checkpoint directory (step-NNNNNNNN), or an
            exported folder.
        tokenizer: directory of the model's tokenizer; None: the exported folder's, or the run data's.
        dtype: precision of the loaded weights.
        device: PyTorch device name; None: a GPU of its own for each process if there are GPUs, else CPU.
        peers: processes that share the model's requests; None: those of the launcher, which meet here.

    Returns:
        The loaded model.

    Raises:
        InputError: the checkpoint, folder or tokenizer cannot be used, or transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise InputError("sampling and scoring need transformers; install megatron-dlm[hf]")
    path = find_checkpoint(path)
    if not (path / MANIFEST).is_file() and not (path / EXPORT_CONFIG).is_file():
        raise InputError(f"model: {path}: neither a run, a checkpoint (step-NNNNNNNN) nor an exported folder")
    # Before what can fail on one process alone, which the others would wait for.
    peers = meet_peers() if peers is None else peers
    chosen = _device(device)
    if (path / MANIFEST).is_file():
        record = read_run_record(path)
        loaded = _load_tokenizer(
            tokenizer or tokenizer_of_data(record.config), record.vocabulary, {record.tokenizer_fingerprint}
        )
        weights = _checkpoint_weights(record)
        return _build(record.config, record.vocabulary, loaded, weights, dtype, chosen, peers)
    from megatron_dlm.conversion.exported_run import read_exported_run
    from megatron_dlm.conversion.from_hugging_face import ExportedFolder

    folder = ExportedFolder(path)
    run = read_exported_run(folder)
    folder.refuse_altered_weights()
    if tokenizer is None and folder.tokenizer_fingerprint is None:
        raise InputError(f"{path}: has no {TOKENIZER_FILE}; give --tokenizer")
    loaded = _load_tokenizer(tokenizer or path, run.vocabulary, run.tokenizer_files)
    if run.tokenizer_fingerprint:
        # The export's file may have a mask token more; shards know the tokenizer by the file before.
        loaded = replace(loaded, fingerprint=run.tokenizer_fingerprint)
    weights = folder.weights(run.config.model, run.vocabulary)
    return _build(run.config, run.vocabulary, loaded, weights, dtype, chosen, peers)


def _load_tokenizer(path: Path, vocabulary: Vocabulary, fingerprints: Set[str]) -> LoadedTokenizer:
    """The model's tokenizer; `fingerprints` are those of its files, none where they are unknown."""
    loaded = load_tokenizer(path, known=dict.fromkeys(fingerprints, vocabulary))
    if fingerprints and loaded.fingerprint not in fingerprints:
        raise InputError(f"tokenizer: {path} is not the one the model was trained with")
    if loaded.vocabulary != vocabulary:
        raise InputError(f"tokenizer: {path}: {loaded.vocabulary} differs from the model's {vocabulary}")
    return loaded


def _device(name: str | None) -> torch.device:
    """Refuse a device on which no tensor can be made."""
    import torch

    own = str(own_cuda(detect_environment().local_rank)) if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(own if name in (None, "cuda") else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device: {name or own}: {str(error).splitlines()[0]}") from error
    return device


def is_model(path: Path) -> bool:
    """Whether a path names a checkpoint or an exported folder of this package."""
    if (find_checkpoint(path) / MANIFEST).is_file():
        return True
    try:
        config = json.loads((path / EXPORT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "megatron_dlm"


def _checkpoint_weights(record: RunRecord) -> Mapping[str, torch.Tensor]:
    from megatron_dlm.checkpointing.full_weights import FullWeights

    weights = FullWeights(record.directory, record.config.model, record.vocabulary.size)
    return weights.read(weights.shapes)


def tokenizer_of_data(config: RunConfig) -> Path:
    """Directory of the tokenizer that the run's data was indexed with.

    Args:
        config: configuration of the run.

    Returns:
        Directory of the tokenizer.

    Raises:
        InputError: the data or the tokenizer's directory no longer exists.
    """
    prefix = config.data.validation or config.data.train[0]
    try:
        path = Path(read_manifest(Path(prefix)).tokenizer_directory)
    except InputError as error:
        raise InputError(f"tokenizer: none given, and {error}") from error
    if not path.exists():
        raise InputError(f"tokenizer: {path}, that of {prefix}, is not there; give --tokenizer")
    return path


def _build(
    config: RunConfig,
    vocabulary: Vocabulary,
    tokenizer: LoadedTokenizer,
    weights: Mapping[str, torch.Tensor],
    dtype: ModelDtype,
    device: torch.device,
    peers: Peers,
) -> LoadedModel:
    import torch

    from megatron_dlm.families.registry import sampler_of

    model = exported_model(config.model, vocabulary, config.objective, config.data.seq_length)
    model.load_state_dict(dict(weights))
    model = model.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32).eval()
    return LoadedModel(
        model=model,
        family=sampler_of(config.objective.name).from_config(model.config),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        config=config,
        peers=peers,
    )


def exported_model(
    model: ModelConfig, vocabulary: Vocabulary, objective: ObjectiveConfig, seq_length: int
) -> Any:
    """This package's copy of the exported model, with weights still to be loaded.

    Args:
        model: configuration of the network.
        vocabulary: token ids of the model.
        objective: configuration of the family.
        seq_length: tokens per training sample.

    Returns:
        Instance of `MegatronDlmModel`.
    """
    from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
    from megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm import MegatronDlmModel
    from megatron_dlm.conversion.to_hugging_face import hugging_face_fields

    fields = hugging_face_fields(model, vocabulary, objective)
    return MegatronDlmModel(MegatronDlmConfig(**fields, max_position_embeddings=seq_length))
