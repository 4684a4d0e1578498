"""A trace, which wraps functions of torch, leaves TorchDynamo's knowledge of them alone."""

import subprocess
import sys

SCRIPT = """
import torch
import mfx

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = x + torch.ones(8).to(x.dtype)
        for block in self.blocks:
            x = x + block(x)
        return x

mfx.momentumize(Net())(torch.randn(2, 8))
print(torch.compile(lambda x: x + torch.ones(8), backend="eager", fullgraph=True)(torch.zeros(8)).sum().item())
"""


def test_dynamo_knows_torch_after_a_trace():
    # in a process of its own: the table is made once
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "8.0\n"


IMPORTED_BY_A_TRACE = """
import collections
import sys
import torch
import mfx

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.recent = collections.deque([torch.ones(())])
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        self.recent.append(x.mean().detach() * self.recent[0].sum() * torch.finfo(x.dtype).eps)
        for block in self.blocks:
            x = x + block(x)
        return x

assert "torch._dynamo" not in sys.modules
net = mfx.momentumize(Net())
net(torch.randn(2, 8))
print(len(net.recent))
"""


def test_a_trace_may_be_the_first_to_need_dynamo():
    result = subprocess.run([sys.executable, "-c", IMPORTED_BY_A_TRACE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "2\n"
