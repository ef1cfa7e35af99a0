"""What every training stage shares: device, budgets that do not count pauses, half-precision copies, averages, checkpoints."""

import copy
import os
import time

import torch


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
        # Denormal numbers, which small gradients reach, are slow on CPUs and worth nothing here.
        torch.set_flush_denormal(True)
    return torch.device(name)


class Clock:
    """Seconds of work: processor time over the threads on a CPU, so that neither pauses nor a busy machine eat a budget."""

    def __init__(self, device: torch.device, spent: float = 0.0):
        self._read = (lambda: time.process_time() / torch.get_num_threads()) if device.type == "cpu" else time.monotonic
        self.spent, self._last = spent, self._read()

    def tick(self) -> float:
        now = self._read()
        self.spent, self._last = self.spent + now - self._last, now
        return self.spent


class Ema:
    """A running average of parameters, updated every few steps: a pass over all weights costs as much as several layers."""

    def __init__(self, parameters, decay: float, every: int = 10):
        self.parameters = list(parameters)
        self.decay, self.every, self.count = decay, every, 0
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int):
        if step % self.every:
            return
        self.count += 1
        decay = min(self.decay**self.every, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchanges the average and the parameters; a second call undoes it."""
        for value, parameter in zip(self.values, self.parameters):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


class Half:
    """A bfloat16 copy of modules, which runs forwards and backwards, and the way back of its gradients to float32 weights.

    CPUs with AMX and GPUs alike are quickest so; autocast would convert every weight anew in each layer of each step.
    """

    def __init__(self, *modules):
        self.copies = [copy.deepcopy(m).to(torch.bfloat16) for m in modules]
        self._masters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self._parameters = [p for m in self.copies for p in m.parameters() if p.requires_grad]

    @torch.no_grad()
    def take_gradients(self):
        for master, parameter in zip(self._masters, self._parameters):
            master.grad = parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def refresh(self):
        torch._foreach_copy_(self._parameters, self._masters)


def save_state(path, state: dict):
    """Writes a checkpoint whole or not at all."""
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)
