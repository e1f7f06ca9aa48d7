"""Against code nobody here wrote: MoE blocks of Hugging Face transformers, saved by it, read by pymoe."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from pymoe import MoELayer
from pymoe.checkpoint import SafetensorsFolder, list_layers, load_layer
from pymoe.cli import main
from tests import tolerance
from tests.checkpoint import families
from tests.checkpoint.files import write
from tests.interop import models
from tests.interop.models import CASES, as_numpy, block_of, build, clear_tokens, route, run, run_in_float64

pytestmark = [
    pytest.mark.interop,
    # What these libraries say of their own code is not ours to raise.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
TOKENS = 64
SAVED = ("published", "fused", "shards", "other order")
DTYPES = ("float32", "bfloat16")


def save(model, folder, how):
    """Write the model as `SAVED` says; the layout is that of the published models but for "fused"."""
    # Quiet: transformers logs what it writes.
    models.transformers().logging.set_verbosity_error()
    options = {"fused": {"save_original_format": False}, "shards": {"max_shard_size": "9KB"}}.get(how, {})
    model.save_pretrained(folder, **options)
    if how == "other order":
        tensors = SafetensorsFolder(folder)
        names = np.random.default_rng(0).permutation(list(tensors))
        write(folder / "model.safetensors", {str(name): tensors[str(name)] for name in names})
    if how == "shards":
        assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.mark.parametrize("how", SAVED)
@cases
def test_float32(tmp_path, case, how):
    """Router, experts and shared experts together, to 1e-5, on tokens whose experts are beyond doubt."""
    model = build(case)
    block = block_of(model, case)
    folder = save(model, tmp_path, how)
    assert tuple(summary.layer for summary in list_layers(folder)) == case.layers
    layer = MoELayer.from_checkpoint(folder, case.layer)
    x = clear_tokens(block, case, TOKENS)
    y = layer(as_numpy(x))
    assert y.dtype == np.float32
    tolerance.assert_frobenius(y, as_numpy(run(block, x)), 1e-5)


@cases
def test_bfloat16(tmp_path, case):
    """With the block's own ids and weights, against its code in float64 on the same bfloat16 weights."""
    model = build(case, "bfloat16")
    block = block_of(model, case)
    layer = MoELayer.from_checkpoint(save(model, tmp_path, "published"), case.layer)
    assert layer.dtype == ml_dtypes.bfloat16
    x = clear_tokens(block, case, TOKENS).bfloat16()
    ids, weights = route(block, case, x)
    y = layer(as_numpy(x), topk_weights=as_numpy(weights), topk_ids=as_numpy(ids))
    assert y.dtype == ml_dtypes.bfloat16
    expected = as_numpy(run_in_float64(block, case, x, ids, weights))
    tolerance.assert_fused(y, expected, layer.K, layer.I)
    # Its own bfloat16 rounds gate, up, their product and every expert's output too.
    tolerance.assert_frobenius(y, as_numpy(run(block, x).float()), 1.5e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", list(families.FORMS))
def test_transformers_reads_the_published_names_as_we_do(tmp_path, family, dtype):
    """The other way round: files under the published models' names, written here, loaded by both."""
    t = models.torch()
    described = models.WIDTHS | {"hidden_size": 40, "num_hidden_layers": families.LAYER + 1, "dtype": dtype}
    described |= {"intermediate_size": 24, "moe_intermediate_size": 24, "first_k_dense_replace": 0}
    described |= {"shared_expert_intermediate_size": families.SHARED, "intermediate_size_mlp": 12}
    described |= {name: value for name, value in models.LATENT.items() if name != "first_k_dense_replace"}
    width = {"deepseek_v3": 24, "llama4": 24, "llama4_text": 24}.get(family, families.SHARED)
    made = families.make(family, dtype, size=(4, 40, 24), shared=width)
    (made.config.setdefault("text_config", {}) if family == "llama4" else made.config).update(
        {name: value for name, value in described.items() if name != "experts_implementation"}
    )
    if family == "llama4":
        made.config["vision_config"] = models.VISION
    folder = made.write(tmp_path / "ck")
    stem, _ = models.FAMILIES[family]
    tail = "ForConditionalGeneration" if family == "llama4" else "ForCausalLM"
    models.transformers().logging.set_verbosity_error()
    kind = getattr(models.transformers(), stem + tail)
    model = kind.from_pretrained(folder, dtype=getattr(t, dtype), experts_implementation="eager").eval()
    case = models.Case(family, layer=families.LAYER)
    block = block_of(model, case)
    x = clear_tokens(block, case, TOKENS).to(getattr(t, dtype))
    ids, weights = route(block, case, x)
    layer = MoELayer.from_checkpoint(folder, families.LAYER)
    y = layer(as_numpy(x), topk_weights=as_numpy(weights), topk_ids=as_numpy(ids))
    expected = as_numpy(run_in_float64(block, case, x, ids, weights))
    tolerance.assert_fused(y, expected, layer.K, layer.I)


def test_the_command_line_on_a_saved_model(tmp_path, capsys):
    """What README shows: `info` and `run` on a folder of transformers."""
    case = models.Case("qwen3_moe")
    model = build(case)
    folder = save(model, tmp_path / "qwen3", "shards")
    x = clear_tokens(block_of(model, case), case, TOKENS)
    np.save(tmp_path / "tokens.npy", as_numpy(x))
    assert main(["info", str(folder)]) == 0
    assert "2 MoE layers" in capsys.readouterr().out
    files = ["--input", str(tmp_path / "tokens.npy"), "--output", str(tmp_path / "y.npy")]
    assert main(["run", str(folder), "--layer", "1", *files]) == 0
    want = as_numpy(run(block_of(model, case), x))
    tolerance.assert_frobenius(np.load(tmp_path / "y.npy"), want, 1e-5)
    assert main(["run", str(folder), "--layer", "1", *files, "--scheme", "int8"]) == 0
    tolerance.assert_frobenius(np.load(tmp_path / "y.npy"), want, 3e-2)


FP8_FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("hidden, width", [(128, 128), (160, 192), (100, 72)])
@pytest.mark.parametrize("family", FP8_FAMILIES)
def test_fp8_blocks(tmp_path, family, hidden, width, shards):
    """Written here in blocks of 128 by 128, dequantized into the block of transformers."""
    sizes = {"hidden_size": hidden, "intermediate_size": width, "moe_intermediate_size": width}
    case = models.Case(family, config=sizes)
    model = build(case)
    block = block_of(model, case)
    folder = save(model, tmp_path, "published")
    to_fp8_blocks(folder, block, shards)
    x = clear_tokens(block, case, TOKENS)
    want = as_numpy(run(block, x))
    # The numbers that codes and scales stand for, multiplied in float32: nothing but the reading is left to differ.
    decoded = MoELayer.from_checkpoint(folder, case.layer, scheme="fp32")
    tolerance.assert_frobenius(decoded(as_numpy(x)), want, 1e-5)
    # The codes themselves; tokens and intermediate go through e4m3 on the way, 2.6e-2 each.
    coded = MoELayer.from_checkpoint(folder, case.layer, dtype="float32")
    assert coded.quant_config.weight_key.dtype == "fp8" and coded.dtype == np.float32
    tolerance.assert_frobenius(coded(as_numpy(x)), want, 6e-2)
    np.testing.assert_array_equal(coded.last_load, decoded.last_load)


def to_fp8_blocks(folder, block, shards):
    """Turn experts of a saved model into codes and scales, and the block's parameters into what these stand for."""
    t = models.torch()
    stored = SafetensorsFolder(folder)
    tensors = {name: stored[name].copy() for name in stored}
    numbers = {}
    for name in [n for n in tensors if "expert" in n and n.endswith("_proj.weight") or ".experts." in n]:
        w = tensors[name]
        rows, columns = (-(-extent // 128) for extent in w.shape)
        scale = np.empty((rows, columns), np.float32)
        for i in range(rows):
            for j in range(columns):
                part = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
                scale[i, j] = np.abs(w[part]).max() / np.float32(448)
                tensors[name][part] = w[part] / scale[i, j]
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        spread = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[: w.shape[0], : w.shape[1]]
        numbers[name] = t.from_numpy(tensors[name].astype(np.float32) * spread)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = list(tensors)[i::shards]
        write(folder / file, {name: tensors[name] for name in mine})
        where |= {name: file for name in mine}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(config))
    fill(block, {name.split("layers.1.")[1]: w for name, w in numbers.items() if "layers.1." in name})


def fill(block, numbers):
    """Put float32 matrices under their names on disk into the parameters of a block."""
    t = models.torch()
    experts = block.experts
    width = experts.down_proj.shape[2]
    done = 0
    with t.no_grad():
        for name, w in numbers.items():
            parts = name.split(".")
            if "experts" in parts and parts[2].isdigit():
                e, kind = int(parts[2]), parts[3]
                if kind in ("w2", "down_proj"):
                    experts.down_proj[e] = w
                else:
                    half = slice(0, width) if kind in ("w1", "gate_proj") else slice(width, None)
                    experts.gate_up_proj[e, half] = w
            else:
                block.get_parameter(".".join(parts[1:])).copy_(w)
            done += 1
    assert done >= 3 * experts.num_experts


@pytest.mark.parametrize("experts, hidden, width", [(4, 64, 32), (3, 96, 64)])
def test_mxfp4(tmp_path, experts, hidden, width):
    """Blocks as published, unpacked by transformers' own function into its own block."""
    t = models.torch()
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_local_experts": experts}
    case = models.Case("gpt_oss", config=sizes)
    model = build(case)
    block = block_of(model, case)
    folder = save(model, tmp_path, "published")
    stored = SafetensorsFolder(folder)
    tensors = {name: stored[name].copy() for name in stored}
    rng = np.random.default_rng(0)
    for part, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        name = f"model.layers.{case.layer}.mlp.experts.{part}"
        del tensors[name]
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
        scales = rng.integers(120, 126, (experts, rows, columns // 32)).astype(np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = convert_moe_packed_tensors(t.from_numpy(blocks), t.from_numpy(scales), dtype=t.float32)
        with t.no_grad():
            getattr(block.experts, part).copy_(numbers)
    write(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    decoded = load_layer(folder, case.layer, scheme="fp32")
    np.testing.assert_array_equal(decoded.w1, as_numpy(block.experts.gate_up_proj).swapaxes(1, 2))
    np.testing.assert_array_equal(decoded.w2, as_numpy(block.experts.down_proj).swapaxes(1, 2))
    x = clear_tokens(block, case, TOKENS)
    layer = MoELayer.from_checkpoint(folder, case.layer)
    assert layer.quant_config.weight_key.name == "kMxfp4Static"
    tolerance.assert_frobenius(layer(as_numpy(x)), as_numpy(run(block, x)), 1e-5)
