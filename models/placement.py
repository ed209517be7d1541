"""Where a captioner's weights lie: on one device, split over several, offloaded, or sharded over processes (FSDP2)."""

from models.language import checkpoint_layers, decoder_layers, offload, split_layers
from utils.devices import split_devices
from utils.processes import world_size


def place(model, placement):
    """Put a captioner on its devices; returns it. All but decoder layers goes to the first device.

    Args:
        model: ClipCaptionModel.
        placement: Placement.
    Raises: ValueError where the placement does not suit the language model.
    """
    first = placement.devices[0]
    if placement.fsdp:
        _shard(model, first)
    elif placement.pn == "auto":
        offload(model.gpt, placement.devices, placement.max_memory, placement.offload_dir)
    elif not getattr(model.gpt, "is_quantized", False):  # a quantised model stays where it was loaded
        layer_devices = split_devices(placement.devices, placement.pn, model.gpt.config.num_hidden_layers)
        if len(set(layer_devices)) == 1:
            model.gpt.to(first)
        else:
            split_layers(model.gpt, layer_devices)
    if placement.gradient_checkpointing:  # after accelerate's hooks, which recomputing must run again
        checkpoint_layers(model.gpt)
    if not placement.fsdp:
        model.clip_project.to(first)
    return model


def _shard(model, device):
    """Shard the weights over all processes, which gather each decoder layer only while they compute it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    layers = decoder_layers(model.gpt)[1]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("token_logprobs", "caption"):  # methods that are called besides `forward`
        register_fsdp_forward_method(model, method)
    for layer in layers:  # if captioning were first to gather, its inference mode would forbid gradients for good
        layer.unshard()
        layer.reshard()


def is_sharded(model):
    """Tell whether `place` sharded the weights over the processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def get_weights(model, trained_only=False):
    """Return a captioner's weights by name; sharded ones gathered on the CPU of process 0 alone.

    Every process must call it. Tied weights stay one tensor.

    Args:
        trained_only: leave frozen weights out of a sharded model's.
    """
    if not is_sharded(model):
        # torch's function would gather nothing here, and would fail on the names that bitsandbytes' layers add to a
        # state dict, because it looks up every name in the model
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    weights, names = get_model_state_dict(model, options=options), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:  # torch gathers tied weights once for each of their names
            weights[name] = weights[names.setdefault(id(parameter), name)]
    return weights


def set_weights(model, weights):
    """Load weights by name, from process 0's full tensors where the model is sharded; weights not named stay.

    Every process must call it.
    """
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, dict(weights), options=_loading(model))  # a copy: torch adds to it


def get_optimizer_state(model, optimizer):
    """Return an optimiser's state under the weights' names; gathered as by `get_weights`.

    Every process must call it.
    """
    if not optimizer.state:  # torch's function would take a step to create it
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    sharded = is_sharded(model)  # an unsharded model's state stays on its devices, of which there may be several
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
    return get_optimizer_state_dict(model, optimizer, options=options)


def set_optimizer_state(model, optimizer, state):
    """Load what `get_optimizer_state` returned; before the weights, as torch takes a step of lr 0 to create the state.

    Every process must call it.
    """
    if not state["state"]:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=_loading(model))
    for name, parameter in model.named_parameters():
        if name not in state["state"]:  # it had no gradient when saved; drop the state that torch's step gave it
            optimizer.state.pop(parameter, None)


def _loading(model):
    """Return torch's options for loading a state dict that may be partial, such as the trained weights alone."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    sharded = is_sharded(model)  # then one process reads the file's tensors and sends the others their shares
    return StateDictOptions(full_state_dict=sharded, broadcast_from_rank0=sharded, strict=False)
