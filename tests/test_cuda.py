"""The CUDA path against the batched float32 reference on the CPU: `python -m pytest tests/test_cuda.py`."""
import copy
import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments import compare
from test_tinybubbles import random_model, read_in_chunks, split, tokens
from tinybubbles import Cache, Config

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


@pytest.mark.parametrize("form", ["ours", "paper"])
@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_bfloat16_with_the_flash_kernel_is_close_to_float32(routing, form, record_property):
    """Head size 8, the score channel in it; the loss within 0.2, and of the selection's decisions few differ."""
    differ, total = 0, 0
    for seed, budget in enumerate((1.25, 2, 3)):
        model, idx, targets, exact, half = random_model(seed, form=form), tokens(seed), tokens(seed + 1), [], []
        cuda, call = copy.deepcopy(model).cuda(), dict(routing=routing, budget=budget)
        loss = model(idx, targets, streams=exact, **call)[1]
        with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            again = cuda(idx.cuda(), targets.cuda(), streams=half, **call)[1]
            again.backward()
        assert again.dtype == torch.float32 and abs(again.item() - loss.item()) < 0.2
        assert all(p.grad.isfinite().all() for p in cuda.parameters())
        count = [torch.nn.functional.one_hot(tok.cpu() + 1, 13).sum(1)[:, 1:] for (tok, _) in (exact[-1], half[-1])]
        differ, total = differ + (count[0] != count[1]).sum().item(), total + count[0].numel()
    record_property("tokens whose streams differ in bfloat16", f"{differ} of {total}")
    print(f"{routing}, {form}: {differ} of {total} tokens hold another number of streams in bfloat16")
    assert differ < total / 4


@pytest.mark.parametrize("merge", ["probability", "residual"])
def test_a_compiled_training_step_equals_the_cpus(merge):
    cpu, idx, targets = random_model(0, merge=merge), tokens(0), tokens(1)
    cuda = copy.deepcopy(cpu).cuda()
    losses = cpu(idx, targets)[1], torch.compile(cuda, fullgraph=True)(idx.cuda(), targets.cuda())[1]
    assert abs(losses[0].item() - losses[1].item()) < 2e-4
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(cpu.named_parameters(), cuda.parameters()):
        assert (p.grad - q.grad.cpu()).abs().max() < 2e-4 * max(1, p.grad.abs().max().item()), name


def test_decoding_with_cuda_graphs_equals_the_cpus_full_forward():
    """The step compiled in mode reduce-overhead; greedy, past block_size, so over several caches."""
    cpu, idx = random_model(2), tokens(2, B=3, T=5)
    cuda = copy.deepcopy(cpu).cuda()
    assert torch.equal(cuda.generate(idx.cuda(), 40, temperature=0, budget=1.5, compile=True).cpu(),
                       cpu.generate(idx, 40, temperature=0, budget=1.5))


def test_a_step_of_a_fixed_cache_never_waits_for_the_device():
    model, idx, cache = random_model(0).cuda(), tokens(0).cuda(), Cache()
    with torch.no_grad():
        model(idx[:, :4], cache=cache)
        cache.fix(12, 2.0)
        one = idx[:, 4:5].clone()
        model(one, cache=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(one, cache=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_never_waits_for_the_device():
    model, idx = random_model(0).cuda(), tokens(0).cuda()
    model(idx, idx)[1].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(idx, idx)[1].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("name", compare.ARMS)
def test_every_rival_reads_and_decodes_as_on_the_cpu(name):
    arm = compare.ARMS[name]
    torch.manual_seed(0)
    layers, routing = () if "none" in arm.flags else (1, 2), "topk" if "topk" in arm.flags else "causal"
    cpu = arm.build(Config(vocab_size=11, block_size=24, n_layer=4, n_head=2, n_embd=16, fork_layers=layers,
                           budget=float(arm.dials[0]), routing=routing)).eval()
    cuda, idx = copy.deepcopy(cpu).cuda(), torch.randint(11, (3, 20))
    want = cpu(idx)[0]
    assert (want - cuda(idx.cuda())[0].cpu()).abs().max() < 2e-4
    if arm.cached:
        cache = cuda.new_cache() if hasattr(cuda, "new_cache") else Cache()
        steps = [cuda(token, cache=cache)[0] for token in idx.cuda().split(1, dim=1)]
        assert (want - torch.cat(steps, dim=1).cpu()).abs().max() < 2e-4
