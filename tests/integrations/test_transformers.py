"""MoE models of transformers, as they are: tiny, with random weights, built from their configs."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cuda_graphs import recording
from tests.torch_backend.compiling import BACKEND, assert_compiled_close
from xmoe.config import config_from_recipe
from xmoe.fqn import FqnToConfig
from xmoe.oracle import sqnr
from xmoe.torch_backend import ScaledGroupedMMTensor, quantize_, scaled_grouped_mm, tensor, unquantize_

transformers = pytest.importorskip("transformers", minversion="5")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),  # torchao, which it imports where it is installed
]

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
}
"""Those of them that a config knows are set."""
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8}
GROUPED: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": LINEAR_ATTENTION,
    "deepseek_v2": {},
    "deepseek_v3": {},
    "olmoe": {},
    "glm4_moe": {},
    "phimoe": {},
    "granitemoe": {},
    "minimax_m2": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": MAMBA,  # not gated
    "gpt_oss": {},  # weights [E, K, N]; biases added in place to the output
    "aria_text": {},  # weights [E, K, N]
}
"""Those with ``experts_implementation="grouped_mm"``."""
OTHERS: dict[str, dict[str, Any]] = {
    "llama4_text": {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},  # bmm
    "jetmoe": {"kv_channels": 16},  # a linear per expert, in attention too
    "longcat_flash": {"num_layers": 1, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
}
"""Those that compute experts in a way of their own."""


def build(name: str, implementation: str | None = "grouped_mm", dtype: torch.dtype = torch.float32) -> nn.Module:
    known = transformers.AutoConfig.for_model(name).to_dict()
    fields = {key: value for key, value in COMMON.items() if key in known} | {"num_local_experts": 4}
    config = transformers.AutoConfig.for_model(name, **fields, **(GROUPED | OTHERS)[name])
    torch.manual_seed(0)
    chosen = {} if implementation is None else {"experts_implementation": implementation}
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, **chosen)
    except ValueError as error:
        if "does not support setting experts implementation" not in str(error):
            raise
        pytest.skip(f"{name} has no experts_implementation in transformers {transformers.__version__}")
    return model.to(dtype).train()


IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids = IDS.to(model.device)  # type: ignore (every model of transformers has one)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def converted(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, ScaledGroupedMMTensor)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights [G, K, N] of all GEMMs that ran quantized."""
    seen: list[tuple[int, ...]] = []
    original = tensor.grouped_mm_by_key

    def counted(A: Tensor, B: Tensor, offs: Tensor, key: str) -> Tensor:
        seen.append(tuple(B.shape))
        return original(A, B, offs, key)

    monkeypatch.setattr(tensor, "grouped_mm_by_key", counted)
    return seen


ROOT = Path(__file__).parents[2]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_gemms(name: str, device: str, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]) -> None:
    """Loss and all gradients have the bits of the same model around `scaled_grouped_mm`."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, reference, plain = (build(name, dtype=dtype).to(device) for _ in range(3))
    original = F.grouped_mm
    quantize_(model, "fp8_rowwise", verbose=False)
    if model.config._experts_implementation == "xmoe":
        model.set_experts_implementation("grouped_mm")
    experts = converted(model)
    assert experts
    assert all("experts" in name for name in experts)
    loss, gradients = loss_and_gradients(model)
    assert len(calls) == len(experts)
    monkeypatch.setattr(F, "grouped_mm", lambda A, B, offs: scaled_grouped_mm(A, B, offs, "fp8_rowwise"))
    expected_loss, expected = loss_and_gradients(reference)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        assert type(gradient) is Tensor, parameter
        assert torch.equal(gradient, expected[parameter]), parameter
    monkeypatch.setattr(F, "grouped_mm", original)
    exact_loss, exact = loss_and_gradients(plain)
    near = 2e-3 if device == "cuda" or name == "gpt_oss" else 2e-4  # GPT-OSS's untrained router changes its mind
    assert loss.item() == pytest.approx(exact_loss.item(), rel=near)
    assert not torch.equal(gradients[experts[0]], exact[experts[0]])


@pytest.mark.parametrize("name", OTHERS)
def test_other_experts(name: str, calls: list[tuple[int, ...]]) -> None:
    """bmm with equal groups, a linear for each expert: all run quantized."""
    model, reference = build(name, None), build(name, None)
    quantize_(model, "mxfp8_rceil", verbose=False)
    loss, gradients = loss_and_gradients(model)
    ran_quantized(model, calls)
    exact, expected = loss_and_gradients(reference)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-4)
    for parameter in converted(model):
        assert 20 <= db(expected[parameter], gradients[parameter]) < 60


@pytest.mark.parametrize(("implementation", "least"), [("eager", 60), ("batched_mm", 20)])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_other_implementations(name: str, implementation: str, least: float, calls: list[tuple[int, ...]]) -> None:
    """As ``grouped_mm``, but that ``batched_mm`` gathers a weight for each token, whose gradients it sums."""
    model, reference = build(name, implementation), build(name)
    for each in (model, reference):
        quantize_(each, "mxfp8_rceil", verbose=False)
    loss, gradients = loss_and_gradients(model)
    ran_quantized(model, calls)
    grouped, expected = loss_and_gradients(reference)
    assert loss.item() == pytest.approx(grouped.item(), rel=1e-6)
    for parameter in converted(model):
        assert db(expected[parameter], gradients[parameter]) >= least, parameter


FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe", "phimoe")


@DEVICES
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil_wgrad_with_hp"])
@pytest.mark.parametrize("name", [*FUSED, "granitemoe", "minimax_m2", "lfm2_moe"])
def test_fused_experts(name: str, recipe: str, device: str, calls: list[tuple[int, ...]]) -> None:
    """`quantize_` chooses the implementation "xmoe", whose GEMMs are those of "grouped_mm"; the sums between differ."""
    model, reference = (build(name).to(device) for _ in range(2))
    for each in (model, reference):
        quantize_(each, recipe, verbose=False)
    assert model.config._experts_implementation == "xmoe"
    loss, gradients = loss_and_gradients(model)
    assert not calls  # of GEMMs one by one
    reference.set_experts_implementation("grouped_mm")
    expected_loss, expected = loss_and_gradients(reference)
    assert calls
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert gradients.keys() == expected.keys()
    for parameter in converted(model):
        assert db(expected[parameter], gradients[parameter]) >= 30, parameter


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "aria_text"])
def test_experts_that_are_not_swiglu_keep_their_implementation(name: str) -> None:
    model = build(name)
    quantize_(model, "fp8_rowwise", verbose=False)
    assert model.config._experts_implementation == "grouped_mm"


def test_unquantize() -> None:
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    quantize_(model, "fp8_rowwise", verbose=False)
    unquantize_(model)
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(loss_and_gradients(model)[0], loss_and_gradients(plain)[0])


def test_fused_implementation_of_plain_weights() -> None:
    """It is "grouped_mm" there."""
    model, reference = build("qwen3_moe"), build("qwen3_moe")
    quantize_(model, FqnToConfig({"re:.*layers.0.*": config_from_recipe("bf16"), "_default": None}), verbose=False)
    assert model.config._experts_implementation == "xmoe"
    layers = [m.model.layers[1].mlp.experts for m in (model, reference)]
    inputs = routed(torch.float32)
    assert torch.equal(layers[0](*inputs), layers[1](*inputs))


def ran_quantized(model: nn.Module, calls: list[tuple[int, ...]]) -> None:
    """All of the converted weights, by their shapes, on either side of the product."""
    weights = {tuple(sorted(model.get_parameter(name).shape[1:])) for name in converted(model)}
    assert weights
    assert {tuple(sorted(shape[1:])) for shape in calls} == weights


def db(expected: Tensor, got: Tensor) -> float:
    assert type(got) is Tensor
    return sqnr(expected.cpu().double().numpy(), got.cpu().double().numpy())


def experts_of(dtype: torch.dtype, recipe: str | None = "fp8_rowwise", implementation: str = "grouped_mm") -> Any:
    model = build("qwen3_moe", dtype=dtype)
    if recipe:
        quantize_(model, recipe, verbose=False)
        model.set_experts_implementation(implementation)
    return model.model.layers[0].mlp.experts


def routed(dtype: torch.dtype, most: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, experts, their weights) of a layer."""
    return torch.randn(24, 32, dtype=dtype), torch.randint(0, most, (24, 2)), torch.rand(24, 2, dtype=dtype)


@pytest.mark.parametrize("implementation", ["grouped_mm", "xmoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_experts(dtype: torch.dtype, implementation: str) -> None:
    """In float32 transformers' "grouped_mm" calls an op of its own, ``transformers::grouped_mm_fallback``."""
    eager, compiled = (experts_of(dtype, implementation=implementation) for _ in range(2))
    inputs = routed(dtype)
    out, expected = torch.compile(compiled, backend=BACKEND, fullgraph=True)(*inputs), eager(*inputs)
    assert_compiled_close(out, expected)
    assert not torch.equal(expected, experts_of(dtype, None)(*inputs))
    for y in (out, expected):
        y.sin().sum().backward()
    assert_compiled_close(compiled.down_proj.grad, eager.down_proj.grad)


@pytest.mark.parametrize("implementation", ["grouped_mm", "xmoe"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_autocast(weights: torch.dtype, implementation: str) -> None:
    """It leaves grouped GEMMs alone: the output has the dtype that the unconverted experts give."""
    x, experts, scores = routed(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts_of(weights, implementation=implementation)(x, experts, scores)
        assert out.dtype == experts_of(weights, None)(x, experts, scores).dtype


def test_half_precision() -> None:
    """Experts in float16 go through the GEMMs one by one, which compute it in float32."""
    inputs = routed(torch.float16)
    out, plain = (experts_of(torch.float16, recipe, "xmoe")(*inputs) for recipe in ("mxfp8_rceil", None))
    assert out.dtype == torch.float16
    assert 20 <= db(plain.detach(), out.detach()) < 40


@pytest.mark.parametrize("implementation", ["grouped_mm", "xmoe"])
def test_expert_parallel_sentinels(implementation: str) -> None:
    """Tokens of other ranks come last: rows past the last offset, which give nothing and get no gradient."""
    module = experts_of(torch.bfloat16, implementation=implementation)
    x, experts, scores = routed(torch.bfloat16, most=7)
    module._is_expert_parallel = True
    x.requires_grad_()
    y = module(x, experts, scores * (experts < 4))
    y.sin().sum().backward()
    elsewhere = (experts >= 4).all(-1)
    assert elsewhere.any()
    assert not y[elsewhere].any()
    assert not x.grad[elsewhere].any()
    assert x.grad.isfinite().all()
    assert module.down_proj.grad.isfinite().all()


def test_checkpoints(tmp_path: Path) -> None:
    """``save_pretrained`` writes plain tensors; ``from_pretrained`` reads them, and they can be converted again."""
    model = build("qwen3_moe")
    quantize_(model, "fp8_rowwise", verbose=False)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    assert not converted(again)
    for (name, saved), loaded in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(saved.detach().as_subclass(Tensor), loaded), name
    assert again.config._experts_implementation == "grouped_mm"
    quantize_(again, "fp8_rowwise", verbose=False)
    assert torch.equal(loss_and_gradients(model)[0], loss_and_gradients(again)[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoints(tmp_path: Path) -> None:
    """DCP of a converted model holds what that of a plain one holds; each loads the other's."""
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    quantize_(model, "fp8_rowwise", verbose=False)
    states = {"converted": model.state_dict(), "plain": plain.state_dict()}
    for name, state in states.items():
        dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in states.items()}
    for name, other in (("converted", "plain"), ("plain", "converted")):
        dcp.load(states[name], checkpoint_id=tmp_path / other, no_dist=True)
    model.load_state_dict(states["converted"])
    plain.load_state_dict(states["plain"])
    assert converted(model)
    for loaded, saved in ((model, "plain"), (plain, "converted")):
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, before[saved][name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["grouped_mm", "xmoe"])
def test_cuda_graph(implementation: str) -> None:
    """A step of converted experts, captured: nothing waits for the host, and replays have the bits of eager steps."""
    module = experts_of(torch.bfloat16, implementation=implementation).cuda()
    batches = [[x.cuda() for x in routed(torch.bfloat16)] for _ in range(3)]
    x, experts, scores = (value.clone() for value in batches[0])

    def step() -> tuple[Tensor, Tensor, Tensor]:
        out = module(x, experts, scores)
        return out.detach(), *torch.autograd.grad(out.sin().sum(), (module.gate_up_proj, module.down_proj))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with recording(graph, stream):
        captured = step()
    for batch in batches:
        for static, value in zip((x, experts, scores), batch, strict=True):
            static.copy_(value)
        graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager)


def test_pickled_models_run_elsewhere(tmp_path: Path) -> None:
    """In a process that has not called `quantize_`."""
    model = build("qwen3_moe")
    quantize_(model, "fp8_rowwise", verbose=False)
    torch.save(model, tmp_path / "model.pt")
    script = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
ids = torch.tensor({IDS.tolist()})
print(model.config._experts_implementation, model(input_ids=ids, labels=ids).loss.item())
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    name, loss = out.stdout.split()
    assert name == "xmoe"
    assert float(loss) == pytest.approx(loss_and_gradients(model)[0].item(), rel=1e-6)


def test_generate() -> None:
    """Few tokens take a weight each (``batched_mm``)."""
    model = build("qwen3_moe").eval()
    plain = copy.deepcopy(model)
    quantize_(model, "mxfp8_rceil", verbose=False)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = (m.generate(IDS[:1], **options) for m in (model, plain))
    assert ours.sequences.shape == (1, 16)
    assert sqnr(theirs.logits[0].double().numpy(), ours.logits[0].double().numpy()) >= 20
    assert not torch.equal(ours.logits[0], theirs.logits[0])


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    def arguments(**kwargs: Any) -> Any:
        return transformers.TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            logging_steps=1,
            seed=0,
            **kwargs,
        )

    return arguments


@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "gradient_checkpointing": True}, {}])
def test_trainer(options: dict[str, Any], quiet: Callable[..., Any]) -> None:
    """Its autocast, accumulation of gradients, clipping and optimizer; the loss goes down as it does without us."""
    data = [{"input_ids": row, "labels": row} for row in torch.arange(8).repeat(16, 2) + 3]
    losses = []
    for recipe in (None, "fp8_rowwise"):
        model = build("qwen3_moe")
        if recipe:
            quantize_(model, config_from_recipe(recipe), verbose=False)
        args = quiet(max_steps=8, gradient_accumulation_steps=2, **options)
        trainer = transformers.Trainer(model=model, args=args, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
