"""The code that runs on a GPU, on one that is not there, at the size of Qwen2.5-VL-7B.

Its tensors have a shape, a dtype and the device "cuda", but no numbers. A tensor on the wrong
device, factors of two dtypes, a wait for the GPU where there should be none or a copy that is kept
alive fails here. What is alive is compared with the memory plan.
"""

import contextlib
import ctypes
import gc
import heapq
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toy
import twgrpo
from benchmarks.step import SIZES
from data import TEMPLATES, Question
from kernels.logits import row_kernel
from model import packing, rollout
from model.packing import Group
from model.policy import Policy
from records import Record
from run import plan
from run.config import Config
from run.setup import make_optimizer
from video import mrope_positions

aten = torch.ops.aten
PRODUCTS = "mm bmm addmm baddbmm index_copy_ convolution".split()  # of factors of one dtype
ONE_DTYPE = {getattr(aten, name).default for name in PRODUCTS} | {aten.mm.dtype}
HOME = {PROJECT, *(PROJECT / room for room in ("kernels", "model", "run"))}  # waits count there


class FakeGPU(TorchDispatchMode):
    """Fakes what happens on the GPU; the host computes as ever. Counts the bytes alive, and keeps
    the name of each function of this project that waits for the GPU."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = 0
        self.storages, self.waits, self.launched, self.capturing = set(), [], [], False
        self.uploads = set()  # names of functions that copy to the GPU and wait for it
        self.answer = lambda: 0  # to every number that is read from the GPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu, target = any(x.is_cuda for x in tensors), (kwargs or {}).get("device")
        if not on_gpu and (target is None or torch.device(target).type != "cuda"):
            return func(*args, **kwargs or {})
        to_host = on_gpu and target is not None and torch.device(target).type == "cpu"
        if to_host or func is aten._local_scalar_dense.default:
            self.waits.append(self.caller())
            host = getattr(args[0], "host", torch.zeros(args[0].shape, dtype=args[0].dtype))
            return host if to_host else self.answer()
        if not on_gpu and tensors and not (kwargs or {}).get("non_blocking"):
            self.uploads.add(self.caller())
        # A graph that is replayed would read the host's memory again, wherever that is by then.
        assert not self.capturing or not tensors or on_gpu, f"{func} copies from the host"
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        assert len(dtypes) < 2 or func not in ONE_DTYPE, f"{func} of {dtypes}"
        if func is aten.addmm.dtype_out:  # torch 2.11 cannot fake it
            return kwargs["out"]
        with self.fake:
            out = func(*args, **kwargs or {})
        if not on_gpu and tensors:
            out.host = args[0]  # what came from the host unchanged goes back unchanged
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor) and x.untyped_storage()._cdata not in self.storages:
                self.count(x.untyped_storage())
        return out

    def caller(self) -> str:
        frame = sys._getframe(2)
        while frame and Path(frame.f_code.co_filename).parent not in HOME:
            frame = frame.f_back
        return frame.f_code.co_name if frame else "a test"

    def count(self, storage):
        name, size = storage._cdata, storage.nbytes()
        self.storages.add(name)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.freed, name, size)

    def freed(self, name, size):
        self.storages.discard(name)
        self.live -= size

    def peak_of(self, work):
        """Bytes alive at the peak of work(), and its value."""
        self.peak = self.live
        value = work()
        return self.peak, value


def no_device() -> None:
    """torch puts a guard that does nothing in the place of one that finds no device; a build
    without CUDA has none to replace."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[1]:
        zero = ctypes.CFUNCTYPE(ctypes.c_byte, ctypes.c_void_p)(lambda guard: 0)
        methods = (ctypes.c_void_p * 32)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 32)
        guard = ctypes.c_void_p(ctypes.addressof(methods))
        guards[1] = ctypes.addressof(guard)
        torch._C._ensureCUDADeviceGuardSet()
        assert guards[1] != ctypes.addressof(guard)


def backward(loss, outputs):
    """loss.backward(). torch's own engine asks the device for its streams, and there is none."""
    queue, gradients, held = [], {}, {}

    def pass_on(node, index, gradient):
        if node not in gradients:
            gradients[node] = [None] * len(node._input_metadata)
            heapq.heappush(queue, (-node._sequence_nr(), id(node), node))
        expected, before = node._input_metadata[index], gradients[node][index]
        assert gradient.device == expected.device
        gradient = gradient.to(expected.dtype).sum_to_size(tuple(expected.shape))
        gradients[node][index] = gradient if before is None else before + gradient

    pass_on(loss.grad_fn, loss.output_nr, torch.ones_like(loss))
    for x in (loss, *(output.loss for output in outputs)):
        x.detach_()  # from here on the queue owns the graph, so that walking it frees it
    with torch.no_grad():
        while queue:
            node = heapq.heappop(queue)[-1]
            if hasattr(node, "variable"):
                (gradient,), leaf = gradients.pop(node), node.variable
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            out = getattr(node, "apply", node)(*gradients.pop(node))
            out = out if isinstance(out, tuple) else (out,)
            for (following, index), gradient in zip(node.next_functions, out, strict=False):
                if following is not None and gradient is not None:
                    pass_on(following, index, gradient)
                    if hasattr(following, "saved_tensors"):  # torch 2.11 frees it with `node`
                        held[following] = node
            held.pop(node, None)
            del out, gradient, node


def fused_attention(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
    """What scaled_dot_product_attention does on an H100: bf16, one kernel, no L x L scores. Flash
    attention takes fewer key heads than query heads as they are."""
    if attn_mask is None and torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert attn_mask is None or attn_mask == (query.shape[2], key.shape[2])
    attend = aten._scaled_dot_product_flash_attention  # causal for it: last query, last key
    return attend(query, key, value, 0.0, is_causal or attn_mask is not None, scale=scale)[0]


def flash_stand_in(q, k, v, softmax_scale, causal):
    sees = (q.shape[1], k.shape[1]) if causal else None
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return fused_attention(*heads, attn_mask=sees, scale=softmax_scale).transpose(1, 2)


@pytest.fixture
def gpu(monkeypatch):
    def step_that_is_captured(decoder):
        before, gpu.capturing = len(gpu.waits), True
        decoder.step()
        assert len(gpu.waits) == before, "a graph cannot wait while it is captured"
        gpu.capturing = False
        return decoder.step

    def launch(kernel, grid):
        def check(*args, **_):
            assert all(x.is_cuda for x in args if isinstance(x, torch.Tensor)) and all(grid)
            gpu.launched.append(kernel.fn.__name__)

        return check

    gpu = FakeGPU()
    no_device()
    for name, value in {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # for autocast
        "torch.cuda.is_bf16_supported": lambda: True,
        "torch._C._current_graph_task_id": lambda: 1,  # so that checkpoints recompute only once
    }.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: self.cpu().tolist())
    # What is compiled or launched on a GPU.
    monkeypatch.setattr(rollout.Decoder, "_captured_step", step_that_is_captured)
    monkeypatch.setattr(type(row_kernel), "__getitem__", launch, raising=False)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(packing, "causal_lower_right", lambda *size: size)
    flash = types.SimpleNamespace(flash_attn_func=flash_stand_in)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # makes torch.tensor(..., device="cuda") a copy
    with gpu:
        yield gpu
    torch._C._set_only_lift_cpu_tensors(lift)


def model_and_question(**size) -> tuple[Policy, Question]:
    """A model of 7B's size or, with other numbers, another; a clip of 10 frames of 392 x 392."""
    tokenizer = toy.build_tokenizer(list(TEMPLATES.values()))
    with torch.device("cuda"):
        model = toy.build_model(tokenizer, **(SIZES["7b"] | size)).eval()
    policy = Policy(model, tokenizer, toy.CHAT_TEMPLATE)
    policy.vision.requires_grad_(False)
    grid, video, geometry = (5, 28, 28), model.config.video_token_id, policy.geometry
    ids_P = torch.tensor([7] * 60 + [video] * (5 * 14 * 14) + [7] * 60)
    positions = mrope_positions(ids_P, video, grid, 1.0, geometry)
    patches, record = torch.zeros(5 * 28 * 28, 1176), Record("1", "", "<answer>A</answer>", Path())
    return policy, Question(record, "", ids_P, positions, patches, grid, 1.0)


def group_of(question, policy, cfg) -> Group:
    G, T = cfg.num_generations, cfg.max_completion_length
    group = Group(question, [torch.full((T,), 7)] * G, [True] * G, [""] * G)
    (group.features,) = policy.encode_videos([question])
    group.advantages_G = torch.linspace(-1, 1, G)
    return group


# ---------------------------------------------------------------------------------- what runs on it

SMALL = dict(num_hidden_layers=2, vision=SIZES["7b"]["vision"] | dict(depth=2))


@pytest.mark.slow
@pytest.mark.parametrize("raises", [False, True])
def test_a_rollout_waits_only_to_see_whether_all_have_ended_and_frees_its_copy(gpu, raises):
    policy, question = model_and_question(**SMALL)
    before, parameters = gpu.live, sum(p.numel() for p in policy.model.parameters())
    with contextlib.suppress(ZeroDivisionError), torch.no_grad(), policy.gathered() as actor:
        assert {p.dtype for p in actor.model.parameters()} == {torch.bfloat16}
        assert gpu.live == before + 2 * parameters
        features = actor.encode_videos([question] * 2)
        assert features[0].dtype == torch.bfloat16 and not gpu.waits
        groups = actor.rollout([question] * 2, features, 4, 20, 1.0, [(1,), (2,)])
        assert gpu.waits == ["run", "run", "rollout", "rollout"]  # steps 0 and 16; tokens, logps
        assert [group.lengths_G.tolist() for group in groups] == [[20] * 4] * 2
        assert raises is False or 1 / 0
    del features
    gc.collect()
    assert actor and gpu.live == before


@pytest.mark.parametrize("attention", packing.ATTENTION)
def test_a_step_waits_for_what_it_has_to_know(gpu, attention):
    """For the norm of the gradient, and for nothing in the model or the loss."""
    policy, question = model_and_question(**SMALL)
    cfg = Config(attn_implementation=attention, max_completion_length=5)
    policy.attn_implementation = attention
    policy.checkpoint_activations()
    group = group_of(question, policy, cfg)
    loss, (output,) = twgrpo.score_groups(cfg, policy, [group])
    assert not gpu.waits and not gpu.uploads & {"packed_attention", "torch_attend", "flash_attend"}
    assert {"row_kernel", "group_kernel"} <= set(gpu.launched)
    assert output.logps_N.shape == (40,) and output.logps_N.dtype == torch.float32
    backward(loss, [output])
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.is_cuda for p in trained)
    norm, finite = twgrpo.optimizer_step(cfg, policy, make_optimizer(cfg, policy), 0.0, 1e-6)
    assert finite
    assert gpu.waits == ["optimizer_step"]


@pytest.mark.slow
@pytest.mark.parametrize("layers, checkpoints, T", [(28, True, 1024), (6, False, 170)])
def test_the_memory_plan_counts_what_is_alive(gpu, monkeypatch, layers, checkpoints, T):
    """What each phase holds beside parameters and moments, within 10 %."""
    policy, question = model_and_question(**SMALL | dict(num_hidden_layers=layers))
    cfg = Config(max_completion_length=T, gradient_checkpointing=checkpoints)
    if checkpoints:
        policy.checkpoint_activations()
    optimizer = make_optimizer(cfg, policy)
    monkeypatch.setattr(gpu, "answer", lambda: gpu.waits.count("run") > 1)
    monkeypatch.setattr(rollout, "CHECK_EVERY", 2)

    def sample():
        twgrpo.sample_groups(cfg, policy, [question], [(1,)])

    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    twgrpo.optimizer_step(cfg, policy, optimizer, 0.0, 1e-6)  # makes the moments
    held = {"always": gpu.live, "rollout": gpu.peak_of(sample)[0]}
    groups = [group_of(question, policy, cfg)]
    held["score"], scored = gpu.peak_of(lambda: twgrpo.score_groups(cfg, policy, groups))
    held["update"], _ = gpu.peak_of(lambda: backward(*scored))
    phases = plan.memory(cfg, policy, len(question.ids_P))
    for phase, most in held.items():
        planned = sum(phases[phase].values())
        measured = most - (held["always"] if phase != "always" else 0)
        assert planned == pytest.approx(measured, rel=0.1), phase
