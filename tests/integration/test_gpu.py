"""What only a GPU can show; skipped where there is none."""

import csv
import json
import math

import pytest
import torch
from small_run import SMALL
from torch.nn import functional as F
from torchvision.models import resnet18

from gitlight.architecture import Architecture
from gitlight.config import FullyConnectedConfig, GradientsConfig, LeNetConfig, ResNetConfig, SketchConfig, ViTConfig
from gitlight.generators.exact.separated import SeparatedFeatures
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.sketch import Sketch
from gitlight.leaked import LEAKED_MODELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPE, N_CLASSES = (3, 32, 32), 10
LEAKED = {
    "lenet": LeNetConfig(),
    "mlp": FullyConnectedConfig(),
    "resnet20": ResNetConfig(),
    "vit": ViTConfig(),
}
GPU = [setting for setting in SMALL if not setting.startswith(("trainer.accelerator", "leaked.width"))]
GPU += ["trainer.accelerator=gpu", "trainer.devices=1", "data.n_public_images=2048", "data.batch_size=128"]


def built(name):
    torch.manual_seed(0)
    if name == "resnet18":
        return resnet18(num_classes=N_CLASSES).eval()
    return LEAKED_MODELS[name].load()(LEAKED[name], SHAPE, N_CLASSES).eval()


def leaks(n_leaks=3, n_images=2):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n_leaks, n_images, *SHAPE, generator=generator)
    return images, torch.randint(N_CLASSES, (n_leaks, n_images), generator=generator)


def logged(path, column):
    with path.open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def float64_loop_on_the_cpu(network, images, labels):
    network.double()
    parameters = list(network.parameters())
    made = [
        torch.autograd.grad(F.cross_entropy(network(own), its), parameters)
        for own, its in zip(images.double(), labels, strict=True)
    ]
    network.float()
    return [torch.stack(parts) for parts in zip(*made, strict=True)]


@pytest.mark.parametrize("method", ["captured", "vmap"])
@pytest.mark.parametrize("name", [*LEAKED, "resnet18"])
def test_gradients_are_those_of_the_float64_loop_on_the_cpu(name, method):
    network, (images, labels) = built(name), leaks()
    wanted = float64_loop_on_the_cpu(network, images, labels)
    network.cuda()
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        settings = GradientsConfig(method=method, dtype=dtype)
        engine = GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), settings)
        found = engine(images.cuda(), labels.cuda())
        for (parameter, gradient), reference in zip(found.items(), wanted, strict=True):
            error = (gradient.cpu() - reference).norm() / reference.norm().clamp_min(1e-30)
            assert error < tolerance, (parameter, dtype, float(error))


def test_sketches_are_the_same_on_every_device():
    network, (images, labels) = built("resnet20"), leaks()
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    settings = GradientsConfig(dtype="float64")
    sketches = [Sketch(architecture, SketchConfig(name="count", size=256)) for _ in range(2)]
    on_cpu = GradientEngine(network, architecture, settings, sketches[0])(images, labels)
    network.cuda()
    on_gpu = GradientEngine(network, architecture, settings, sketches[1])(images.cuda(), labels.cuda())
    for name, sketched in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), sketched, rtol=1e-9, atol=1e-12)


def test_images_of_a_batch_are_told_apart_as_on_the_cpu():
    network = built("lenet")
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    engine = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))
    images, labels = leaks(2000, 1)
    features = SeparatedFeatures(architecture, None, 2)
    for fit in features.fits():
        fit.update(engine(images, labels), images, torch.arange(2000))
        fit.finish()
    gradients = engine(images[:64].view(32, 2, *SHAPE), labels[:64].view(32, 2))
    (wanted, *_), levels = features(gradients)
    features.cuda()
    (found, *_), its_levels = features({name: gradient.cuda() for name, gradient in gradients.items()})
    told_apart = levels[:, 1] < levels[:, 1].median()  # elsewhere rounding may lead to another minimum
    torch.testing.assert_close(found.cpu()[told_apart], wanted[told_apart], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(its_levels.cpu()[told_apart, :2], levels[told_apart, :2], rtol=0, atol=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("generator", ["hybrid", "coarse", "mlp"])
def test_generators_train_and_are_evaluated(train, evaluate, tmp_path, generator, precision):
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(f"generator: {{name: {generator}}}\ntrainer: {{max_epochs: 2}}\n")
    assert train("run.yaml", *GPU, f"trainer.precision={precision}", f"output_dir={run}") == 0
    assert evaluate(str(run), "evaluation.n_images=32", "logging.quiet=true") == 0
    (result,) = json.loads((run / "evaluation" / "metrics.json").read_text())["results"]
    assert result["n_images"] == 32
    first, last = logged(run / "metrics.csv", "val/loss")
    assert last < first
    assert result["metrics"]["psnr"]["mean"] > -10 * math.log10(first)


def test_exact_inversion_is_exact(train, evaluate, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text("generator: {name: exact}\ngradients: {dtype: float64}\n")
    assert train("run.yaml", *GPU, f"output_dir={run}") == 0
    assert evaluate(str(run), "evaluation.n_images=8", "logging.quiet=true") == 0
    (result,) = json.loads((run / "evaluation" / "metrics.json").read_text())["results"]
    assert result["metrics"]["psnr"]["mean"] > 100


@pytest.mark.parametrize("attack", ["ig", "dlg"])
def test_searches_come_nearer(evaluate, tmp_path, attack):
    (tmp_path / "run.yaml").write_text(f"attack: {{name: {attack}, iterations: 100}}\n")
    settings = [s for s in GPU if not s.startswith(("trainer.devices", "data.batch_size"))]
    code = evaluate(str(tmp_path / "run.yaml"), *settings, "evaluation.n_images=4", f"output_dir={tmp_path / 'run'}")
    assert code == 0
    (path,) = (tmp_path / "run" / "evaluation" / "trajectories").glob("*.csv")
    leaks_of, distances = (logged(path, column) for column in ("leak", "distance"))
    for number in set(leaks_of):
        its = [distance for leak, distance in zip(leaks_of, distances, strict=True) if leak == number]
        assert its[-1] < 0.8 * its[0]
