"""The CUDA path against the batched float32 reference on the CPU: `python -m pytest tests/test_cuda.py`."""
import copy
import random

import pytest
import torch

from test_tinybubbles import random_model, read_in_chunks, split, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("merge", ["probability", "residual"])
@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_logits_loss_and_gradients_equal_the_cpus(merge, routing):
    for seed, budget in enumerate((1, 1.25, 2, 3, 4)):
        cpu = random_model(seed, merge=merge)
        cuda, idx, targets = copy.deepcopy(cpu).cuda(), tokens(seed), tokens(seed + 1)
        call = dict(routing=routing, budget=budget)
        assert (cpu(idx, **call)[0] - cuda(idx.cuda(), **call)[0].cpu()).abs().max() < 2e-4
        losses = cpu(idx, targets, **call)[1], cuda(idx.cuda(), targets.cuda(), **call)[1]
        assert abs(losses[0].item() - losses[1].item()) < 2e-4
        for loss in losses:
            loss.backward()
        for (name, p), q in zip(cpu.named_parameters(), cuda.parameters()):
            assert (p.grad - q.grad.cpu()).abs().max() < 2e-4 * max(1, p.grad.abs().max().item()), name


@pytest.mark.parametrize("merge", ["probability", "residual"])
def test_cached_decoding_equals_the_cpus_full_forward(merge):
    for seed, budget in enumerate((1, 1.25, 2, 3, 4)):
        cpu, idx = random_model(seed, merge=merge), tokens(seed, B=3, T=20)
        chunked = read_in_chunks(copy.deepcopy(cpu).cuda(), idx.cuda(), split(random.Random(seed), 20), budget=budget)
        assert (cpu(idx, budget=budget)[0] - chunked.cpu()).abs().max() < 2e-4


def test_a_bfloat16_step_is_close_to_the_float32_one():
    model, idx, targets = random_model(0), tokens(0), tokens(1)
    exact = model(idx, targets)[1].item()
    with torch.autocast("cuda", torch.bfloat16):
        loss = copy.deepcopy(model).cuda()(idx.cuda(), targets.cuda())[1]
    assert loss.dtype == torch.float32 and abs(loss.item() - exact) < 0.2


def test_a_training_step_never_waits_for_the_device():
    model, idx = random_model(0).cuda(), tokens(0).cuda()
    model(idx, idx)[1].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(idx, idx)[1].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
