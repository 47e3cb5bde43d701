"""Convolutional modules and ``convert(kinds=...)``: values, names, hooks, what is left out; a ResNet and a U-Net."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from small_models import counted, seeded, step, strictly
from torch import Tensor, nn

import matmul_grad
from matmul_grad.testing import assert_same_bits, normal

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SETTINGS: list[dict[str, Any]] = [
    {}, {"stride": 2, "padding": 1}, {"padding": 1, "dilation": 2, "groups": 2}, {"bias": False, "stride": (2,)},
]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def drawn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return normal(1, torch.Size(size).numel(), dtype, seed=seed + 1).view(size)


def image(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> Tensor:
    return drawn(2, 4, *range(6, 6 + int(kind.__name__[-2])), dtype=dtype)


@every_kind
def test_modules_are_torchs(kind: Any) -> None:
    """One and the same parameters, state and text; the values are within rounding."""
    own = getattr(matmul_grad.nn, kind.__name__)
    for named in SETTINGS:
        theirs, ours = (seeded(each, 4, 6, 3, dtype=torch.float64, **named) for each in (kind, own))
        assert repr(ours) == repr(theirs) and isinstance(ours, kind)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        x = image(kind)
        with counted() as seen:
            torch.testing.assert_close(strictly(ours, x), step(theirs, x))
        assert "convolution" in seen.ours and "convolution_weight_gradient" in seen.ours
        assert matmul_grad.converted(matmul_grad.convert(ours, kinds=KINDS)) == []  # it is ours already


@every_kind
def test_convert_when_asked(kind: Any) -> None:
    for named in SETTINGS:
        layer = seeded(kind, 4, 6, 3, dtype=torch.float64, **named)
        x, before = image(kind), vars(layer).copy()
        expected = step(layer, x)
        assert matmul_grad.converted(matmul_grad.convert(layer)) == []
        assert matmul_grad.converted(matmul_grad.convert(layer, kinds=(kind,))) == [""]
        calls = matmul_grad.nn.calls()
        torch.testing.assert_close(strictly(layer, x), expected)
        assert matmul_grad.nn.calls() != calls
        assert matmul_grad.converted(matmul_grad.restore(layer)) == []
        assert vars(layer).keys() == before.keys()
        for found, was in zip(step(layer, x), expected, strict=True):
            assert_same_bits(found, was)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.__name__)
def test_padding_modes(kind: Any, mode: str) -> None:
    named: dict[str, Any] = {
        "padding": "same" if mode == "circular" else 2,
        "padding_mode": mode,
        "dtype": torch.float64,
    }
    layer = seeded(kind, 4, 6, 3, **named)
    own = seeded(getattr(matmul_grad.nn, kind.__name__), 4, 6, 3, **named)
    x = image(kind)
    expected = step(layer, x)
    torch.testing.assert_close(strictly(own, x), expected)
    torch.testing.assert_close(strictly(matmul_grad.convert(layer, kinds=KINDS), x), expected)


@pytest.mark.parametrize("kind", KINDS[3:], ids=lambda kind: kind.__name__)
def test_output_size(kind: Any) -> None:
    """Which torch's forward takes as a second argument; errors of it too."""
    layer = seeded(kind, 4, 6, 3, stride=2, dtype=torch.float64)
    own = seeded(getattr(matmul_grad.nn, kind.__name__), 4, 6, 3, stride=2, dtype=torch.float64)
    x = image(kind)
    size = [2 * n + 2 for n in x.shape[2:]]
    expected = layer(x, output_size=size)
    assert list(expected.shape[2:]) == size
    matmul_grad.convert(layer, kinds=(kind,))
    for module in (own, layer):
        torch.testing.assert_close(module(x, output_size=size), expected)
        torch.testing.assert_close(module(x, size), expected)
        with pytest.raises(ValueError, match="requested an output size"):
            module(x, output_size=[99] * len(size))


class Scaled(nn.Conv2d):
    """Its convolution is of its own, under the forward of torch's class."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.lazy = nn.LazyConv2d(4, 1)
        self.scaled = Scaled(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scaled(self.lazy(self.stem(x))).mean((2, 3)))


def test_what_is_converted_and_left_out() -> None:
    model = Mixed()
    assert matmul_grad.converted(matmul_grad.convert(model)) == ["head"]
    assert matmul_grad.nn.left_out(model) == {}
    both = (nn.Linear, nn.Conv2d)
    matmul_grad.convert(model, lambda module, name: name != "stem", kinds=both)
    assert matmul_grad.converted(model) == ["lazy", "head"]
    assert list(matmul_grad.nn.left_out(model, both)) == ["scaled"]
    assert "forward of its own" in matmul_grad.nn.left_out(model, both)["scaled"]
    x = drawn(2, 3, 8, 8)
    value = model(x)
    twin = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (twin, torch.load(saved, weights_only=False)):
        assert matmul_grad.converted(other) == ["lazy", "head"]
        assert_same_bits(other(x), value)
    torch.testing.assert_close(matmul_grad.restore(model)(x), value)
    with pytest.raises(ValueError, match=r"no kernels for .*ReLU"):
        matmul_grad.convert(model, kinds=(nn.ReLU,))  # type: ignore[arg-type]  # any module is a type of it


# --- models ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions, and one of 1 × 1 beside them where the sizes change."""

    def __init__(self, ci: int, co: int, stride: int) -> None:
        super().__init__()
        first, second = nn.Conv2d(ci, co, 3, stride, 1, bias=False), nn.Conv2d(co, co, 3, padding=1, bias=False)
        self.body = nn.Sequential(first, nn.BatchNorm2d(co), nn.ReLU(), second, nn.BatchNorm2d(co))
        same = stride == 1 and ci == co
        self.side = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.side(x))


class ResNet(nn.Sequential):
    def __init__(self) -> None:
        stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        blocks = Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2)
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


class UNet(nn.Module):
    """Down twice, up twice by transposed convolutions, with the images of one size side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(self.twice(ci, co) for ci, co in ((3, 8), (8, 16), (16, 32)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, c // 2, 2, 2) for c in (32, 16))
        self.join = nn.ModuleList(self.twice(c, c // 2) for c in (32, 16))
        self.last = nn.Conv2d(8, 2, 1)

    @staticmethod
    def twice(ci: int, co: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(ci, co, 3, padding=1), nn.ReLU(), nn.Conv2d(co, co, 3, padding="same"), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = layer(x if not kept else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for up, join, beside in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([up(x), beside], 1))
        return self.last(x)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("make", [ResNet, UNet])
def test_models(make: type[nn.Module], last: bool) -> None:
    """Evaluation and a training step, converted against unconverted; errors are those of all numbers together.

    A single tensor's are a matter of chance here: normalised by few samples, each differs by factors either way.
    """
    x = drawn(2, 3, 24, 20)
    convolutions = sum(isinstance(module, KINDS) for module in make().modules())

    def found(dtype: torch.dtype, convert: bool) -> dict[str, Tensor]:
        model = seeded(make).to(dtype)
        images = x.to(dtype)
        if last:
            model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        if convert:
            matmul_grad.convert(model, kinds=(nn.Linear, *KINDS))
            linear = sum(isinstance(module, nn.Linear) for module in model.modules())
            assert len(matmul_grad.converted(model)) == convolutions + linear
        run = strictly if convert else step
        with counted() as seen:
            trained = run(model, images)
        assert seen.ours.count("convolution") >= convolutions * convert
        names = ["trained", *(name for name, _ in model.named_parameters())]
        with torch.no_grad():
            evaluated = model.eval()(images)
        return {"evaluated": evaluated, **dict(zip(names, trained, strict=True))}

    truth = found(torch.float64, False)
    torch.testing.assert_close(found(torch.float64, True), truth, rtol=1e-10, atol=1e-10)

    def error(values: dict[str, Tensor]) -> float:
        parts = [((values[name] - x) / x.abs().max()).flatten() for name, x in truth.items()]
        return float(torch.cat(parts).square().mean().sqrt())

    ours, theirs = (error(found(torch.float32, convert)) for convert in (True, False))
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_compiled_model() -> None:
    """A converted model, and one of our modules, in one graph."""
    for transposed in (False, True):
        kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
        own = getattr(matmul_grad.nn, kind.__name__)
        model = nn.Sequential(seeded(kind, 3, 4, 3, padding=1), nn.ReLU(), seeded(own, 4, 2, 3))
        x = drawn(2, 3, 7, 8)
        expected = model(x)
        matmul_grad.convert(model, kinds=(kind,))
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_autocast_and_per_sample_gradients() -> None:
    """In bfloat16 as torch's, and by vmap over the samples."""
    theirs, x = seeded(UNet), drawn(2, 3, 8, 8)
    ours = matmul_grad.convert(copy.deepcopy(theirs), kinds=KINDS)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)

    def gradient(model: nn.Module) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (sample[None],)).sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-4, atol=1e-4)


def test_every_kind_has_its_module() -> None:
    names = [f"Conv{infix}{rank}d" for infix, rank in itertools.product(("", "Transpose"), (1, 2, 3))]
    assert [kind.__name__ for kind in KINDS] == names
    assert {*names} <= {*matmul_grad.nn.__all__}
