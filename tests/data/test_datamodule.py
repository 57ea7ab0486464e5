import dataclasses

import pytest
import torch
from PIL import Image

from gitlight.cli import train_command
from gitlight.config import DataConfig, FullyConnectedConfig, GaussianNoiseConfig, GradientsConfig
from gitlight.data.datamodule import ImageDataModule
from gitlight.data.images import ImageSplits, InMemoryImages
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.errors import CheckpointError, ConfigError
from gitlight.generators.base import FitPairs
from gitlight.leaked.model import LeakedModel

CPU = torch.device("cpu")


def split(n, seed, name):
    images = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return InMemoryImages(images, torch.arange(n) % 3, [f"{name}/{i}" for i in range(n)])


@pytest.fixture
def images():
    return ImageSplits(split(60, 0, "train"), None, split(20, 1, "test"), ("cat", "dog", "eel"))


def module(images, channel=(), leaked_seed=0, seed=0, **changed):
    settings = DataConfig(**{"image_size": 8, "n_validation": 10, "batch_size": 4, **changed})
    leaked = LeakedModel(FullyConnectedConfig(hidden_sizes=[5], seed=leaked_seed), (3, 8, 8), 3)
    return GradientPairDataModule(images, settings, leaked, GradientsConfig(), list(channel), seed)


def pairs(data, split="train", epoch=0):
    loader = {"train": data.train_dataloader, "test": data.test_dataloader}[split]()
    loader.sampler.set_epoch(epoch)
    return [data.prepare(batch, split, epoch) for batch in loader]


def test_pairs_have_the_shapes_and_ranges_of_the_contract(images):
    data = module(images, client_batch_size=2)
    pair = pairs(data)[0]
    assert pair.images.shape == (4, 2, 3, 8, 8)
    assert pair.labels.shape == pair.indices.shape == (4, 2)
    assert pair.images.min() >= 0
    assert pair.images.max() <= 1
    assert list(pair.gradients) == list(data.leaked_model.architecture.parameter_shapes)
    assert all(gradient.shape[0] == len(pair) == 4 for gradient in pair.gradients.values())


def test_a_share_of_an_epoch_is_a_batch_at_least_on_every_device(images):
    """Of 9 leaks one device has 5, in batches of 2, and the other 4."""
    data = module(images, n_validation=9, batch_size=4)
    with pytest.raises(ConfigError, match=r"trainer.limit_val_batches: 0.4 of 2 batches .* at least 0.5"):
        data.check_shares(2, limit_val_batches=0.4)
    with pytest.raises(ConfigError, match=r"trainer.limit_train_batches: 0.05 of 12 batches .* at least 0.084"):
        data.check_shares(2, limit_train_batches=0.05)
    data.check_shares(2, 0.084, 0.5)
    data.check_shares(2, 1, 0)


def test_a_pair_holds_the_image_and_label_at_its_index(images):
    data = module(images)
    for pair in pairs(data):
        positions = pair.indices[:, 0].tolist()
        assert torch.equal((pair.images[:, 0] * 255).round().to(torch.uint8), data.split("train").read(positions))
        assert torch.equal(pair.labels[:, 0], data.split("train").labels[positions])


def everything(batches):
    return torch.cat([torch.cat([p.images.flatten(), p.gradients["linear1.weight"].flatten()]) for p in batches])


def test_the_seed_fixes_the_pairs_whatever_the_number_of_workers(images):
    changed = {"horizontal_flip": True, "channel": [GaussianNoiseConfig(relative_std=0.1)]}
    wanted = everything(pairs(module(images, **changed)))
    assert torch.equal(everything(pairs(module(images, num_workers=0, **changed))), wanted)
    assert torch.equal(everything(pairs(module(images, num_workers=2, **changed))), wanted)
    assert not torch.equal(everything(pairs(module(images, seed=1, **changed))), wanted)


def test_mirroring_and_noise_are_fresh_in_every_epoch_of_training_and_fixed_in_the_attack(images):
    data = module(images, horizontal_flip=True, channel=[GaussianNoiseConfig(relative_std=0.1)])
    by_index = []
    for epoch in (0, 1):
        batches = pairs(data, epoch=epoch)
        found = {int(i): image for p in batches for i, image in zip(p.indices[:, 0], p.images[:, 0], strict=True)}
        by_index.append(found)
    both = [index for index in by_index[0] if index in by_index[1]]
    mirrored = [not torch.equal(by_index[0][index], by_index[1][index]) for index in both]
    assert any(mirrored)
    assert not all(mirrored)
    assert torch.equal(everything(pairs(data, "test", 0)), everything(pairs(data, "test", 5)))


def test_fit_pairs_are_all_public_images_as_they_are(images):
    data = module(images, horizontal_flip=True)
    indices = torch.cat([pair.indices.flatten() for pair in data.fit_pairs(CPU)])
    assert torch.equal(indices.sort().values, torch.arange(50))
    first = next(data.fit_pairs(CPU))
    assert torch.equal((first.images[:, 0] * 255).round().to(torch.uint8), data.split("train").read([0, 1, 2, 3]))


def test_fit_pairs_of_single_images_are_the_same_images_and_their_own_gradients(images):
    data = module(images, client_batch_size=3)
    batches = list(data.fit_pairs(CPU, FitPairs(single_images=True)))
    assert max(len(pair) for pair in batches) == 4  # as many leaks at once as otherwise
    assert all(pair.images.shape[1] == 1 for pair in batches)
    whole = torch.cat([pair.indices.flatten() for pair in data.fit_pairs(CPU)])
    assert torch.equal(torch.cat([pair.indices.flatten() for pair in batches]), whole)
    assert whole.sort().values.diff().min() > 0
    assert not torch.equal(whole, whole.sort().values)  # in a folder, neighbours are of one class
    of_one, first = batches[0], next(data.fit_pairs(CPU))
    for name, gradient in first.gradients.items():
        mean = of_one.gradients[name][:3].mean(dim=0)
        torch.testing.assert_close(gradient[0], mean, rtol=1e-4, atol=1e-6)


def test_leaks_that_fits_are_made_of_have_the_same_numbers_at_every_pass(images):
    data = module(images, client_batch_size=3, horizontal_flip=True)
    numbers = torch.cat([data.fit_numbers(pair) for pair in data.fit_pairs(CPU)])
    assert torch.equal(numbers.sort().values, torch.arange(16))
    twice = torch.cat([data.fit_numbers(pair) for pair in data.fit_pairs(CPU, FitPairs(mirrored=True))])
    assert torch.equal(twice, numbers.repeat(2))
    single = list(data.fit_pairs(CPU, FitPairs(single_images=True)))
    assert torch.equal(
        torch.cat([data.fit_numbers(pair) for pair in single]), torch.cat([pair.indices[:, 0] for pair in single])
    )


@pytest.mark.parametrize("horizontal_flip", [True, False])
def test_fit_pairs_may_be_mirrored_where_training_mirrors(images, horizontal_flip):
    data = module(images, horizontal_flip=horizontal_flip)
    pairs = list(data.fit_pairs(CPU, FitPairs(mirrored=True)))
    seen, indices = torch.cat([pair.images[:, 0] for pair in pairs]), torch.cat([pair.indices[:, 0] for pair in pairs])
    assert len(seen) == (100 if horizontal_flip else 50)
    if horizontal_flip:
        assert torch.equal(seen[50:], seen[:50].flip(3))
        assert torch.equal(indices[50:], indices[:50])
        first, mirrored = pairs[0].gradients, pairs[len(pairs) // 2].gradients
        assert not any(torch.equal(gradient, mirrored[name]) for name, gradient in first.items())


def test_fit_pairs_have_the_noise_that_they_are_wanted_with(images):
    clean, noisy = module(images), module(images, channel=[GaussianNoiseConfig(relative_std=0.1, lowest_std=0)])

    def added(noise):
        """Of each leak, over the size of its entries."""
        found = []
        for one, other in zip(clean.fit_pairs(CPU), noisy.fit_pairs(CPU, FitPairs(noise=noise)), strict=True):
            a, b = (torch.cat([g.flatten(1) for g in pair.gradients.values()], dim=1) for pair in (one, other))
            found.append((b - a).norm(dim=1) / a.norm(dim=1))
        return torch.cat(found)

    assert added((0.0, 0.0)).max() == 0
    low, high = added((1e-5, 1e-4)), added((1e-3, 1e-2))
    assert 0 < low.max() < high.min()
    assert high.max() > 2 * high.min(), "levels are drawn from the range"
    assert added(None).max() > high.max()


@pytest.mark.parametrize(("n_images", "per_leak", "n_leaks"), [(7, 1, 7), (7, 2, 3), (100, 1, 20)])
def test_private_pairs_are_as_many_as_asked_for(images, n_images, per_leak, n_leaks):
    data = module(images, client_batch_size=per_leak)
    assert sum(len(pair) for pair in data.private_pairs(CPU, n_images)) == n_leaks


def test_batches_that_cannot_be_filled_are_named(images):
    with pytest.raises(ConfigError, match=r"data.batch_size: 64 .* only 50"):
        module(images, batch_size=64).train_dataloader()


def test_a_checkpoint_of_another_leaked_model_is_refused(images):
    state = module(images).state_dict()
    module(images).load_state_dict(state)
    with pytest.raises(CheckpointError, match="another leaked model"):
        module(images, leaked_seed=1).load_state_dict(state)


def test_images_alone_for_training_a_leaked_model(images):
    settings = dataclasses.replace(module(images).settings, batch_size=10)
    data = ImageDataModule(images, settings, seed=0)
    batch, labels, indices = data.prepare(next(iter(data.train_dataloader())), "train", 0)
    assert batch.shape == (10, 3, 8, 8)
    assert batch.dtype == torch.float32
    assert labels.shape == indices.shape == (10,)


@pytest.mark.usefixtures("without_lpips")
def test_an_image_that_a_worker_cannot_read_is_named_in_one_message(tmp_path, capsys):
    for name in ("train", "test"):
        folder = tmp_path / name / "cat"
        folder.mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    broken = tmp_path / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (tmp_path / "run.yaml").write_text("seed: 0")
    settings = ["data.name=folder", f"data.root={tmp_path}", "data.memory_limit_gb=0", "data.image_size=8"]
    settings += ["data.batch_size=2", "data.n_validation=1", "data.num_workers=1", f"output_dir={tmp_path / 'out'}"]
    settings += ["logging.wandb=off", "generator.name=mlp", "generator.hidden_size=8", "trainer.accelerator=cpu"]
    assert train_command([str(tmp_path / "run.yaml"), *settings], tmp_path / "unused.yaml") == 2
    error = capsys.readouterr().err
    assert str(broken) in error
    assert "Traceback" not in error
