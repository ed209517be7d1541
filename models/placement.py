"""Where a captioner's weights lie: on one device, split over several, offloaded, or sharded over processes (FSDP2)."""

from models.language import checkpoint_layers, decoder_layers, offload, split_layers
from utils.devices import split_devices
from utils.distributed import is_main, world_size


def place(model, placement):
    """Put a captioner where it runs; returns it. What is no decoder layer goes to the first device.

    Args:
        model: ClipCaptionModel.
        placement: Placement.
    Raises: ValueError where it does not fit the language model.
    """
    first = placement.devices[0]
    if placement.fsdp:
        _shard(model, first)
    elif placement.pn == "auto":
        offload(model.gpt, placement.devices, placement.max_memory, placement.offload_dir)
    elif not getattr(model.gpt, "is_quantized", False):  # else it lies where it was loaded
        layer_devices = split_devices(placement.devices, placement.pn, model.gpt.config.num_hidden_layers)
        if len(set(layer_devices)) == 1:
            model.gpt.to(first)
        else:
            split_layers(model.gpt, layer_devices)
    if placement.gradient_checkpointing:  # after the hooks that move weights, which it must repeat
        checkpoint_layers(model.gpt)
    if not placement.fsdp:
        model.clip_project.to(first)
    return model


def _shard(model, device):
    """Share the weights out over all processes; each gathers a decoder layer while it computes it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    layers = decoder_layers(model.gpt)[1]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("token_logprobs", "caption"):  # what is called of a captioner besides `forward`
        register_fsdp_forward_method(model, method)
    for layer in layers:  # where captioning gathered first, its inference mode would forbid gradients for good
        layer.unshard()
        layer.reshard()


def is_sharded(model):
    """Tell whether `place` shared the weights out over the processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensors):
    """Return a dictionary's tensors, those that are sharded (FSDP2) gathered on the CPU of process 0.

    Every process must call it; tensors that are shared, as tied weights are, stay shared.
    """
    gathered = {}
    for tensor in tensors.values():
        if hasattr(tensor, "full_tensor") and id(tensor) not in gathered:
            full = tensor.full_tensor()  # needs all processes
            gathered[id(tensor)] = full.cpu() if is_main() else None
    return {name: gathered.get(id(tensor), tensor) for name, tensor in tensors.items()}


def laid_out_as(parameter, tensor):
    """Return a whole tensor, which every process has, sharded as a parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # a second that only sharded runs pay

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
