"""PyTorch tensors through a pymoe layer and back, without a copy: python examples/pytorch_arrays.py

Needs: pip install pymoe torch.  With CuPy and a GPU, tensors of the GPU: the layer then runs there.
"""

import importlib.util

import torch

import pymoe

E, K, I, TOPK = 8, 64, 128, 2  # experts, hidden size, expert width, experts a token
torch.manual_seed(0)
if torch.cuda.is_available() and importlib.util.find_spec("cupy"):
    torch.set_default_device("cuda")
w1 = torch.randn(E, 2 * I, K, dtype=torch.bfloat16) / K**0.5  # I gate rows, then I up rows
w2 = torch.randn(E, K, I, dtype=torch.bfloat16) / I**0.5
gate = torch.randn(E, K, dtype=torch.bfloat16)
x = torch.randn(5, K, dtype=torch.bfloat16)

layer = pymoe.MoELayer(w1, w2, topk=TOPK, gate=gate)
y = layer(x)  # a torch.Tensor of x's dtype; pymoe borrowed x and the weights, and lent y

# The same in PyTorch's own operations.
weights, ids = torch.topk(torch.softmax(x.float() @ gate.float().T, -1), TOPK)
weights = weights / weights.sum(-1, keepdim=True)
expected = torch.zeros(x.shape)
for token, (row, experts) in enumerate(zip(x, ids, strict=True)):
    for weight, e in zip(weights[token], experts, strict=True):
        gate_up = w1[e].float() @ row.float()
        h = torch.nn.functional.silu(gate_up[:I]) * gate_up[I:]
        expected[token] += weight * (w2[e].float() @ h.bfloat16().float())

error = (y.float() - expected).norm() / expected.norm()
print(f"{type(y).__name__} {y.dtype} {tuple(y.shape)} on {y.device}; relative difference from PyTorch {error:.1e}")
assert error < 5e-3, error

# The same layer with fp8 weights: codes are uint8 tensors, or float8_e4m3fn ones of the same bits.
w1_codes, w2_codes, config = pymoe.quantize_experts(w1, w2, "fp8_w8a8")
as_fp8 = [codes.view(torch.float8_e4m3fn) for codes in (w1_codes, w2_codes)]
y8 = pymoe.MoELayer(*as_fp8, topk=TOPK, gate=gate, quant_config=config)(x)
error = (y8.float() - expected).norm() / expected.norm()
print(f"{as_fp8[0].dtype} weights: {y8.dtype} on {y8.device}; relative difference {error:.1e}")
assert y8.dtype == x.dtype and error < 0.1, error
