"""LoRA (arXiv 2106.09685): two thin trained matrices beside each linear layer of a frozen language model, by peft."""

from transformers.pytorch_utils import Conv1D

ADAPTER = "default"  # peft's name of the only adapter
SCALE = 2  # alpha / rank


def add_lora(gpt, rank):
    """Freeze a language model and put LoRA beside every linear layer but the output's.

    Args:
        gpt: causal language model; changed in place.
        rank: width between the two matrices.
    Raises: ValueError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError('--lora_rank needs the package peft: pip install -e ".[lora]"') from None
    transposed = any(isinstance(module, Conv1D) for module in gpt.modules())  # GPT-2's kind of linear layer
    # Mamba's mixers read the weights of these layers directly, bypassing the LoRA
    mixers = [name for name, module in gpt.named_modules() if hasattr(module, "A_log")]
    passed_by = [f"{mixer}.{layer}" for mixer in mixers for layer in ("dt_proj", "out_proj")]
    config = LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules="all-linear", exclude_modules=passed_by or None,
        fan_in_fan_out=transposed, task_type="CAUSAL_LM",
    )  # fmt: skip
    inject_adapter_in_model(config, gpt, adapter_name=ADAPTER)
    for parameter in gpt.parameters():
        if parameter.requires_grad:  # peft gives it the weights' dtype, which may be too coarse to learn in
            parameter.data = parameter.data.float()


def merge_lora(model, weights):
    """Return a model's weights with LoRA added in, under the names the model has without it.

    Args:
        model: with LoRA in it; not changed.
        weights: its state dict.
    """
    merged = dict(weights)
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        thin, wide = (merged.pop(f"{name}.lora_{side}.{ADAPTER}.weight") for side in "AB")
        delta = (wide @ thin) * module.scaling[ADAPTER]
        for key in [key for key in merged if key.startswith(f"{name}.base_layer.")]:
            value = merged.pop(key)
            if key.endswith(".weight"):
                value = value + (delta.T if module.fan_in_fan_out else delta)
            merged[key.replace(".base_layer.", ".")] = value
    return merged
