"""What depends on the device that the tests run on: ``pytest --device cuda``; the CPU by default."""

import torch


def device():
    return torch.get_default_device()


def generator(seed):
    """Random numbers of the device."""
    return torch.Generator(device()).manual_seed(seed)


def grad_scaler(scale=2.0**16, **options):
    return torch.amp.GradScaler(device().type, init_scale=scale, **options)


def array(tensor):
    """A tensor of any device as numpy has it."""
    return tensor.detach().cpu().numpy()
