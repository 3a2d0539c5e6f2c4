"""`from_hf` and `to_hf`: checkpoints that transformers writes, beside transformers' own layers."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xmoe import oracle
from xmoe.jax_frontend import MoE, from_hf, to_hf

transformers = pytest.importorskip("transformers")

D, H, E, k, T = 32, 48, 8, 2, 40
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": H, "num_experts": E, "num_experts_per_tok": k, "head_dim": 16, "norm_topk_prob": False,
        "intermediate_size": H,
    },
    "mixtral": {"intermediate_size": H, "num_local_experts": E, "num_experts_per_tok": k},
}  # fmt: skip
NORMALIZED = {"qwen3_moe": False, "mixtral": True}
PREFIX = {"qwen3_moe": "model.layers.1.mlp.", "mixtral": "model.layers.1.block_sparse_moe."}
apply = nnx.jit(lambda moe, x: moe(x)[0])


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A model of two layers and where `save_pretrained` wrote it, in several files."""
    kind = request.param
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=32, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        **KINDS[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_()  # so that scores lie apart
            layer.mlp.experts.gate_up_proj.normal_(std=D**-0.5)
            layer.mlp.experts.down_proj.normal_(std=H**-0.5)
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder, max_shard_size="40KB")
    return kind, model, folder


def make(kind: str, **options: Any) -> MoE:
    """Abstract until it gets weights: shapes alone."""
    options = {"normalize_scores": NORMALIZED[kind], **options}
    return nnx.eval_shape(lambda: MoE(D, H, E, k, rngs=nnx.Rngs(0), **options))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {n: a for file in folder.glob("*.safetensors") for n, a in safetensors.numpy.load_file(file).items()}


def test_gives_the_output_of_the_block(saved: tuple[str, Any, Path]) -> None:
    kind, model, folder = saved
    assert len(list(folder.glob("*.safetensors"))) > 2
    moe, x = make(kind), torch.randn(2, T // 2, D)
    nnx.update(moe, from_hf(folder, 1))
    with torch.no_grad():
        want = model.model.layers[1].mlp(x)
    y = apply(moe, jnp.asarray(x.numpy()))
    assert oracle.sqnr(want.numpy(), y) >= 120
    nnx.update(moe, from_hf(folder, 0))
    assert oracle.sqnr(want.numpy(), apply(moe, jnp.asarray(x.numpy()))) < 10


def test_in_bfloat16(saved: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, model, _ = saved
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    moe, x = make(kind, param_dtype=jnp.bfloat16, config="bf16"), torch.randn(2, T // 2, D).to(torch.bfloat16)
    weights = from_hf(tmp_path / "model.safetensors", 1)
    assert {array.dtype.name for array in jax.tree.leaves(weights)} == {"bfloat16"}
    nnx.update(moe, weights)
    with torch.no_grad():
        block = model.model.layers[1].mlp
        want, (_, _, theirs) = block(x), block.gate(x)
    probabilities = x.reshape(T, D).float() @ block.gate.weight.float().T
    same = (theirs.sort(-1).values == probabilities.topk(k).indices.sort(-1).values).all(-1)  # bf16 makes ties
    assert same.float().mean() > 0.9
    y = apply(moe, jax.dlpack.from_dlpack(x)).reshape(T, D)
    db = oracle.sqnr(want.reshape(T, D)[same].float().numpy(), np.asarray(y, np.float32)[same.numpy()])
    assert db >= 42  # 43.9 and 45.1 seen


def test_layouts_hold_the_same(saved: tuple[str, Any, Path]) -> None:
    """From files, from tensors in memory, and from what transformers holds."""
    kind, model, folder = saved
    want = from_hf(folder, 1, layout=kind)
    arrays = tensors_of(folder)
    for other in (arrays, jax.tree.map(jnp.asarray, arrays), dict(model.state_dict())):
        jax.tree.map(np.testing.assert_array_equal, from_hf(other, 1), want)
    renamed = {name.replace("model.", "model.language_model.", 1): array for name, array in arrays.items()}
    jax.tree.map(np.testing.assert_array_equal, from_hf(renamed, 1, prefix="model.language_model."), want)
    np.testing.assert_array_equal(want["experts"]["w1"], model.model.layers[1].mlp.experts.gate_up_proj.detach()[:, :H])
    np.testing.assert_array_equal(want["experts"]["w3"], model.model.layers[1].mlp.experts.gate_up_proj.detach()[:, H:])


def test_back_into_transformers(saved: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, model, folder = saved
    moes = [make(kind) for _ in range(2)]
    tensors = tensors_of(folder)
    before = set(tensors)
    for layer, moe in enumerate(moes):
        nnx.update(moe, jax.tree.map(lambda w: 2 * w, from_hf(folder, layer)))
        tensors |= to_hf(moe, layer, layout=kind)
    assert set(tensors) == before
    model.config.save_pretrained(tmp_path)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again = type(model).from_pretrained(tmp_path)
    theirs = model.state_dict()
    for name, tensor in again.state_dict().items():
        factor = 2 if ".mlp." in name else 1
        torch.testing.assert_close(tensor, factor * theirs[name], rtol=0, atol=0)

    fused = to_hf(nnx.state(moes[1]), 1, layout="fused")
    assert fused.keys() == {name for name in theirs if name.startswith("model.layers.1.mlp.")}
    for name, array in fused.items():
        np.testing.assert_array_equal(array, again.state_dict()[name])


def test_like_gives_dtypes_and_shardings(saved: tuple[str, Any, Path]) -> None:
    """Every device reads its part: 4 x 2 devices, experts over one axis, H over the other."""
    kind, _, folder = saved
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("expert", "tensor"))
    specs = {"w1": P("expert", "tensor"), "w3": P("expert", "tensor"), "w2": P("expert", None, "tensor")}
    like = make(kind, param_dtype=jnp.bfloat16)
    state = nnx.to_pure_dict(nnx.state(like, nnx.Param))

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, specs.get(path[-1].key, P())))

    wanted, whole = jax.tree.map_with_path(place, state), from_hf(folder, 1)
    sharded = from_hf(folder, 1, like=wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), sharded, whole)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, sharded, wanted))
    assert {shard.data.shape for shard in sharded["experts"]["w2"].addressable_shards} == {(E // 4, D, H // 2)}
    assert from_hf(folder, 1, like=like)["router"]["weight"].dtype == jnp.bfloat16
    assert from_hf(folder, 1, like=like, dtype=jnp.float32)["router"]["weight"].dtype == jnp.float32
    moe = make(kind)
    nnx.update(moe, sharded)
    back = to_hf(moe, 1, layout=kind)
    assert back[PREFIX[kind] + "gate.weight"].dtype == ml_dtypes.bfloat16
    jax.tree.map(np.testing.assert_array_equal, from_hf(back, 1), sharded)


# -------------------------------------------------------------------------------------------------------------- errors


def small(**changed: Any) -> dict[str, Any]:
    """The tensors of layer 0 of a Mixtral with two experts."""
    block = "model.layers.0.block_sparse_moe."
    tensors = {f"{block}gate.weight": np.zeros((2, D), np.float32)}
    for expert in range(2):
        for name, shape in (("w1", (H, D)), ("w2", (D, H)), ("w3", (H, D))):
            tensors[f"{block}experts.{expert}.{name}.weight"] = np.zeros(shape, np.float32)
    return tensors | {block + name: value for name, value in changed.items()}


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer=1 .* its experts are model\.layers\.0\.block_sparse_moe\.experts\.0"):
        from_hf(small(), 1)
    with pytest.raises(ValueError, match=r"layout='qwen3_moe'; its experts are model\.layers\.0\.block_sparse_moe"):
        from_hf(small(), 0, layout="qwen3_moe")
    with pytest.raises(ValueError, match=r"layout='llama' is not known"):
        from_hf(small(), 0, layout="llama")  # type: ignore
    with pytest.raises(ValueError, match=r"no experts, but model\.norm\.weight"):
        from_hf({"model.norm.weight": np.ones(4)}, 0)
    without = small()
    del without["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 of the 7 tensors .*experts\.1\.w2\.weight; .* E=2 rows"):
        from_hf(without, 0)
    with pytest.raises(ValueError, match=r"has .*experts\.2\.w1\.weight, but .*gate\.weight has E=2 rows"):
        from_hf(small(**{"experts.2.w1.weight": np.zeros((H, D))}), 0)
    with pytest.raises(ValueError, match=r"experts\.1\.w3\.weight of shape \(48, 16\); \(48, 32\) goes with"):
        from_hf(small(**{"experts.1.w3.weight": np.zeros((H, 16))}), 0)
    with pytest.raises(ValueError, match=r"experts\.1\.w3\.weight in float8_e4m3fn, which is no weight without its"):
        from_hf(small(**{"experts.1.w3.weight": np.zeros((H, D), ml_dtypes.float8_e4m3fn)}), 0)
    with pytest.raises(ValueError, match=r"like has .* \(8, .*\) and the checkpoint \(2, .*\); .*num_experts=2"):
        from_hf(small(), 0, like=make("mixtral"))
    with pytest.raises(ValueError, match=r"like has no router\.weight, experts\.w2, experts\.w3;"):
        from_hf(small(), 0, like={"experts": {"w1": jnp.zeros((2, H, D))}})
    with pytest.raises(ValueError, match=r"like has shared\.w1\.weight, .* 'mixtral' has no names for"):
        from_hf(small(), 0, like=make("mixtral", shared_hidden_dim=16))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no safetensors file, nor a folder with model\.safetensors"):
        from_hf(tmp_path, 0)
    index, file = tmp_path / "model.safetensors.index.json", tmp_path / "model-1.safetensors"
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"has no weight_map"):
        from_hf(tmp_path, 0)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(small(), file.name)}))
    with pytest.raises(ValueError, match=r"model-1\.safetensors cannot be read"):
        from_hf(tmp_path, 0)
    tensors = small()
    gone, _ = tensors.popitem()
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"model-1\.safetensors lacks {gone}, which model\.safetensors\.index"):
        from_hf(tmp_path, 0)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"model-1\.safetensors cannot be read"):
        from_hf(file, 0)


def test_wrong_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"module_or_state has shared\.w1\.weight, .* leave them out"):
        to_hf(make("mixtral", shared_hidden_dim=16), 0, layout="mixtral")
    with pytest.raises(ValueError, match=r"module_or_state has no experts\.w1, experts\.w2, experts\.w3;"):
        to_hf({"router": {"weight": jnp.zeros((2, D))}}, 0, layout="mixtral")
    with pytest.raises(ValueError, match=r"module_or_state has router\.bias, .* leave them out"):
        to_hf(make("mixtral", bias_update_rate=0), 0, layout="mixtral")
    with pytest.raises(ValueError, match=r"layer='1' is not an integer"):
        to_hf(make("mixtral"), "1", layout="mixtral")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layout='llama' is not known"):
        to_hf({}, 0, layout="llama")  # type: ignore
    with pytest.raises(ValueError, match=r"^module_or_state is a int; give an MoE, or its state or parameters"):
        to_hf(3, 0, layout="mixtral")
    with pytest.raises(ValueError, match=r"^like is a int; give an MoE"):
        from_hf(small(), 0, like=3)


@pytest.mark.parametrize("dtype", ["foo", np.int8, 3])
def test_wrong_dtypes_are_named(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"^dtype=.* is not supported; use one of bfloat16, float16, float32, float64"):
        from_hf(small(), 0, dtype=dtype)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (
            "qwen3_moe",
            {"score_function": "sigmoid"},
            "score_function='sigmoid', and models .* have 'softmax'",
        ),
        ("fused", {"scaling_factor": 2.5}, r"scaling_factor=2\.5"),
        ("fused", {"num_expert_groups": 2, "num_limited_groups": 1}, "num_expert_groups=2"),
        (
            "mixtral",
            {"activation": "geglu"},
            "activation='geglu', and .* 'swiglu'; to write its weights all the same",
        ),
        ("mixtral", {"normalize_scores": False}, "normalize_scores=False"),
    ],
)
def test_layers_that_no_such_model_has_are_refused(layout: Any, options: Any, message: str) -> None:
    moe = MoE(D, H, E, k, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        to_hf(moe, 0, layout=layout)
    assert to_hf(nnx.state(moe, nnx.Param), 0, layout=layout)
