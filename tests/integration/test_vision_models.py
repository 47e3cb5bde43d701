"""ResNets of torchvision and timm and the U-Net of the examples, with random weights, converted against unconverted."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import counted
from torch import Tensor, nn
from vision import declared as declared

import matmul_grad
from matmul_grad.testing import normal

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
CLASSES = 5


def torchvision_resnet() -> nn.Module:
    model: nn.Module = pytest.importorskip("torchvision").models.resnet18(weights=None, num_classes=CLASSES)
    return model


def timm_resnet() -> nn.Module:
    """Its last stage keeps the size by dilation, its stem is three convolutions, and 3 × 3 ones have groups."""
    model: nn.Module = pytest.importorskip("timm").create_model(
        "resnext50_32x4d", layers=(1, 1, 1, 1), stem_type="deep", stem_width=16, output_stride=16, num_classes=CLASSES
    )
    return model


def unet() -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        model: nn.Module = importlib.import_module("train_unet").UNet(widths=(8, 16, 32))
    return model


SHORT = ("torchvision_resnet", "unet")
MODELS: dict[str, Callable[[], nn.Module]] = {make.__name__: make for make in (torchvision_resnet, timm_resnet, unet)}


def smoothed(model: nn.Module) -> nn.Module:
    """SiLU for ReLU, averages for maxima: where a rounding decides which side of a kink a number is on, the gradients
    of a whole image differ by chance, torch's from those in float64 too.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return model


def results(name: str, images: Tensor, converted: bool) -> dict[str, Tensor]:
    """Evaluation, then one step of training by SGD: its loss, gradients, and all parameters and buffers after it."""
    torch.manual_seed(0)
    model = smoothed(MODELS[name]()).to(images.dtype)
    if converted:
        matmul_grad.convert(model, kinds=KINDS)
        layers = [name for name, module in model.named_modules() if isinstance(module, KINDS)]
        assert sorted(matmul_grad.converted(model)) == sorted(layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with torch.no_grad(), counted() as seen:
        found = {"evaluated": model.eval()(images)}
    convolutions = sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
    assert seen.ours.count("convolution") == convolutions * converted
    result = model.train()(images)
    if result.dim() == 2:
        loss = nn.functional.cross_entropy(result, torch.arange(len(images)) % CLASSES)
    else:
        loss = nn.functional.mse_loss(result, images)
    loss.backward()
    optimizer.step()
    found["loss"] = loss.detach()
    gradients = {f"{name}.grad": x.grad for name, x in model.named_parameters() if x.grad is not None}
    state = {name: x for name, x in model.state_dict().items() if x.is_floating_point()}
    return {**found, **gradients, **state}


def assert_close_to_torch(name: str, images: Tensor) -> None:
    """Of all numbers together: one tensor's error, normalised by few samples, differs by chance."""
    with matmul_grad.strict():
        ours = results(name, images, converted=True)
    theirs, truth = results(name, images, converted=False), results(name, images.double(), converted=False)
    assert ours.keys() == theirs.keys() == truth.keys()

    def error(values: dict[str, Tensor]) -> float:
        parts = [((values[key] - x) / x.abs().max().clamp_min(1e-30)).flatten() for key, x in truth.items()]
        return float(torch.cat(parts).square().mean().sqrt())

    assert all(ours[key].dtype == theirs[key].dtype for key in truth)
    assert error(theirs) < 0.1, "nothing was computed that could be judged"
    assert error(ours) <= 2 * error(theirs) + torch.finfo(images.dtype).eps


@pytest.mark.parametrize(
    "name", [*SHORT, *[pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in SHORT]]
)
def test_evaluation_and_a_training_step(name: str) -> None:
    assert_close_to_torch(name, normal(2 * 3 * 48, 48, torch.float32).view(2, 3, 48, 48))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_channels_last_in_float64(name: str) -> None:
    """The same numbers as torch's, up to roundings that are far below any difference of the algorithm."""
    images = normal(2 * 3 * 64, 64, torch.float64).view(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with matmul_grad.strict():
        ours = results(name, images, converted=True)
    for key, theirs in results(name, images, converted=False).items():
        assert float((ours[key] - theirs).abs().max()) <= 1e-7 * max(1.0, float(theirs.abs().max())), key


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_images(name: str, dtype: torch.dtype) -> None:
    assert_close_to_torch(name, normal(2 * 3 * 224, 224, dtype).view(2, 3, 224, 224))
