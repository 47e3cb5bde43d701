"""Models of transformers and timm, built from configurations with random weights, on these kernels and torch's."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from limits import scaled
from switch import accelerated
from torch import Tensor, nn
from vision import declared as declared

import matmul_grad
from matmul_grad.testing import assert_model_within_budget, normal

transformers = pytest.importorskip("transformers")

VOCABULARY, CLASSES, WIDTH, HEADS, LAYERS = 100, 5, 32, 4, 2
DROPOUT = 0.1


def gpt2() -> nn.Module:
    """Its linear layers are transformers' Conv1D, which calls torch.addmm."""
    config = transformers.GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, vocab_size=VOCABULARY, n_positions=64,
        bos_token_id=1, eos_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, hidden_size=WIDTH,
        intermediate_size=2 * WIDTH, vocab_size=VOCABULARY, attention_dropout=DROPOUT,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        vocab_size=VOCABULARY, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        image_size=32, patch_size=8, num_labels=CLASSES,
        hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def timm_vit() -> nn.Module:
    return pytest.importorskip("timm").create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS,
        num_classes=CLASSES, proj_drop_rate=DROPOUT, attn_drop_rate=DROPOUT, pos_drop_rate=DROPOUT,
    )  # fmt: skip


def timm_convnext() -> nn.Module:
    """Convolutions, which stay torch's, and between them an MLP of linear layers."""
    return pytest.importorskip("timm").create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(24, WIDTH, WIDTH, 48), num_classes=CLASSES,
        conv_mlp=False, ls_init_value=1.0,
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    make.__name__: make for make in (gpt2, llama, bert, vit, timm_vit, timm_convnext)
}
LANGUAGE = ("gpt2", "llama", "bert")


def made(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]().to(dtype)
    return model


def tokens(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: nn.Module, name: str, images: Tensor, train: bool) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter. A seed draws the same dropout in every dtype.

    Some models compute a norm or a softmax in float32 whatever their dtype: that is an error of all three alike.
    """
    labels = torch.arange(len(images)) % CLASSES
    model.train(train)
    torch.manual_seed(2)
    if name in LANGUAGE:
        result = model(input_ids=tokens(), labels=tokens())
        logits, loss = result.logits, result.loss
    else:
        logits = model(images)
        logits = getattr(logits, "logits", logits)
        loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach()}
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        found[parameter] = value.grad
    return found


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_logits_loss_and_gradients(name: str, dtype: torch.dtype, train: bool) -> None:
    images = normal(3 * 3 * 32, 32, dtype).view(3, 3, 32, 32)
    theirs = loss_and_gradients(made(name, dtype), name, images, train)
    truth = loss_and_gradients(made(name, dtype).double(), name, images.double(), train)
    before = accelerated(dtype)
    with matmul_grad.enabled():
        switched = loss_and_gradients(made(name, dtype), name, images, train)
    after = accelerated(dtype)
    assert after["mm"] - before["mm"] >= 2 * LAYERS, "each layer's gradients"
    assert after.total() - before.total() >= 4 * LAYERS
    assert_model_within_budget(switched, theirs, truth, f"{name}, switched")

    model = matmul_grad.convert(made(name, dtype))
    assert matmul_grad.converted(model)
    converted = loss_and_gradients(model, name, images, train)
    assert_model_within_budget(converted, theirs, truth, f"{name}, converted")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": False, "num_beams": 2}], ids=["greedy", "beams"]
)
def test_generates_the_same_tokens_as_torch(name: str, sampling: dict[str, object]) -> None:
    def generated(model: nn.Module) -> list[list[int]]:
        prompt = tokens(2, 5)
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **sampling}
        # A module's attributes are typed as Tensor | Module.
        generate = model.eval().generate
        mask = torch.ones_like(prompt)
        return generate(prompt, attention_mask=mask, **settings).tolist()  # type: ignore[operator]  # see above

    theirs = generated(made(name, torch.float32))
    assert {len(row) for row in theirs} == {5 + 12}
    before = accelerated(torch.float32)
    with matmul_grad.enabled():
        assert generated(made(name, torch.float32)) == theirs
    assert accelerated(torch.float32).total() > before.total()
    assert generated(matmul_grad.convert(made(name, torch.float32))) == theirs


@pytest.mark.parametrize("way", ["switched", "converted"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_token_in_bf16_is_a_best_one(name: str, way: str) -> None:
    """Logits of 8 bits have ties, which two right kernels may break in two ways. In float64, on what was written so
    far, no token is better than the one taken by more than the error that the two logits may have.
    """
    dtype, prompt = torch.bfloat16, tokens(2, 5)
    model = made(name, dtype).eval()
    with matmul_grad.enabled() if way == "switched" else nullcontext():
        if way == "converted":
            matmul_grad.convert(model)
        settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)  # type: ignore[operator]  # nn.Module has no generate
    assert written.shape == (2, 5 + 12)
    with torch.no_grad():
        truth = made(name, dtype).double().eval()(input_ids=written[:, :-1]).logits[:, 4:]
        theirs = made(name, dtype).eval()(input_ids=written[:, :-1]).logits[:, 4:].double()
    error, largest = float((theirs - truth).abs().max()), float(truth.abs().max())
    budget = 2 * (error + torch.finfo(dtype).eps / 2 * largest)
    best = truth.amax(-1)
    taken = truth.gather(-1, written[:, 5:, None])[..., 0]
    assert float((best - taken).max()) <= 2 * budget
    assert float((best - truth.median(-1).values).min()) > 8 * budget, "most tokens would be seen to be wrong"


def test_override_reaches_what_convert_does_not() -> None:
    """GPT-2's own layers are no nn.Linear: converted, only its head runs on these kernels; switched, all of it."""
    model = matmul_grad.convert(made("gpt2", torch.float32)).eval()
    assert matmul_grad.converted(model) == ["lm_head"]
    layers = [module for module in model.modules() if type(module).__name__ == "Conv1D"]
    assert len(layers) == 4 * LAYERS
    before = accelerated(torch.float32)
    with matmul_grad.enabled(), matmul_grad.strict():
        model(input_ids=tokens())
    assert accelerated(torch.float32)["addmm"] - before["addmm"] == len(layers)


# --- Hugging Face's package `kernels`, whose name is also that of a folder here -----------------------------

STAND_IN = """
from unittest.mock import MagicMock
owner, layers = "somebody else", []
def use_kernel_forward_from_hub(name):
    layers.append(name)
    return lambda kind: kind
def use_kernelized_func(*functions):
    return lambda kind: kind
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""
BESIDE = """
import importlib.util, json, runpy, sys
models = runpy.run_path(sys.argv[1])
from transformers.utils import is_kernels_available
import torch, matmul_grad, matmul_grad.kernels.cpu
theirs, ours = models["made"]("llama", torch.float32).eval(), models["made"]("llama", torch.float32).eval()
matmul_grad.convert(ours)
close = torch.allclose(theirs(models["tokens"]()).logits, ours(models["tokens"]()).logits, atol=1e-5)
there = is_kernels_available()
if there:
    import kernels
print(json.dumps([there, [kernels.owner, sorted(set(kernels.layers))] if there else None, close]))
"""


def beside(path: Path) -> list[object]:
    """What a process says that starts in the root of the checkout, where `kernels` is also the name of a folder."""
    command = [sys.executable, "-c", BESIDE, __file__]
    folders = [path, Path(__file__).parents[1] / "helpers"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True, text=True, timeout=scaled(120),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said: list[object] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_transformers_without_the_package_named_kernels(tmp_path: Path) -> None:
    if any(distribution.name == "kernels" for distribution in importlib.metadata.distributions()):
        pytest.skip("it is installed")
    assert beside(tmp_path) == [False, None, True]


def test_transformers_with_the_package_named_kernels(tmp_path: Path) -> None:
    """A stand-in of the version that transformers takes: it finds that, not the folder, and asks it for layers."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    package, about = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
    (package / "layer").mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "layer" / "__init__.py").write_text("")
    (package / "layer" / "mode.py").write_text("from unittest.mock import MagicMock\nMode = MagicMock()\n")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    there, named, close = beside(tmp_path)
    assert (there, close) == (True, True)
    assert isinstance(named, list) and named[0] == "somebody else" and "RMSNorm" in named[1]
