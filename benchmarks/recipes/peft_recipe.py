"""LoRA by PEFT in transformers.Trainer. Copy the function, and the Trainer recipe, which takes what it returns.

The heads train whole and are saved with the adapter; of the shared part LoRA's matrices are balanced, and what is
frozen is passed over: no memory, nothing in checkpoints. ``trainer.train(resume_from_checkpoint=...)`` goes on bit for
bit. For one backward pass take an adapter's lora_B as `norm_params`: a fresh lora_A has no gradient in the first step.
"""

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model


def with_lora(model: Any, layers: Sequence[str], heads: Sequence[str], **options: Any) -> PeftModel:
    """Freeze the model but for its heads and put LoRA into the named layers; `options` are LoraConfig's."""
    return get_peft_model(model, LoraConfig(target_modules=list(layers), modules_to_save=list(heads), **options))
