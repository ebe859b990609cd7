"""A model ready to compute: loaded, placed, with the precision that was asked for.

In: a model path and what the user wants of the device. Out: an `InferenceSession`. What cannot be honoured fails
here, before sequences are read.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from protformer import __version__
from protformer.checkpoint import load_model
from protformer.device import choose_device, choose_precision
from protformer.errors import InputError
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.model_description import ModelDescription, find_model_folder, model_name, weights_sha256


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceSession:
    """A model in evaluation mode on its device."""

    model: ProteinLanguageModel
    description: ModelDescription
    device: torch.device
    dtype: torch.dtype
    """Of most matrix products (see `Block` on the others); float32 unless bf16 was asked for or it is a GPU."""
    provenance: dict[str, object]
    """What made the results: name of the model, hash of its weights, version of the program."""

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def require_lm_head(self, what: str) -> None:
        """Raise InputError if the model predicts no residues, which `what` needs."""
        if not self.description.has_lm_head:
            origin = f" ({name})" if (name := self.description.converted_from) else ""
            raise InputError(
                f"{what}: this model has an untrained masked-LM head, as the weights it came from{origin} had none;"
                " train it on residues, or choose other weights"
            )


def open_session(path: Path, *, device: str, precision: str) -> InferenceSession:
    """Load the model in `path`. `auto` precision is float32 on a CPU, so that results agree between machines."""
    torch_device = choose_device(device)
    automatic = "auto" if torch_device.type == "cuda" else "fp32"
    dtype = choose_precision(automatic if precision == "auto" else precision, torch_device)
    model, description = load_model(path, torch_device)
    folder = find_model_folder(path)
    return InferenceSession(
        model=model,
        description=description,
        device=torch_device,
        dtype=dtype,
        provenance={
            "model": model_name(folder),
            "weights_sha256": weights_sha256(folder),
            "protformer_version": __version__,
        },
    )
