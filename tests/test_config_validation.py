import pytest

from gitlight.config import CoarseGeneratorConfig, HybridGeneratorConfig, MLPGeneratorConfig, PruningConfig
from gitlight.config_loading import load_config
from gitlight.errors import ConfigError


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return path

    return write


def test_the_name_of_a_component_chooses_its_settings(config_file):
    assert isinstance(load_config(config_file("generator: {name: mlp}")).generator, MLPGeneratorConfig)
    assert isinstance(load_config(config_file("generator: {name: coarse}")).generator, CoarseGeneratorConfig)
    assert isinstance(load_config(config_file("seed: 0")).generator, HybridGeneratorConfig)


def test_channel_stages_have_their_own_settings(config_file):
    path = config_file("channel: [{name: pruning, fraction: 0.5}]")
    assert load_config(path).channel == [PruningConfig(fraction=0.5)]


def test_the_word_off_is_a_word(config_file):
    assert load_config(config_file("logging: {wandb: off}")).logging.wandb == "off"
    assert load_config(config_file("seed: 0"), ["logging.wandb=off"]).logging.wandb == "off"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.imagesize=3", ["data.imagesize", "no such setting", "command line", "Did you mean data.image_size?"]),
        ("max_epochs=3", ["max_epochs", "Did you mean trainer.max_epochs?"]),
        ("datta.root=x", ["datta", "Did you mean data?"]),
        ("data.image_size=abc", ["data.image_size", "'abc'", "a whole number"]),
        ("data.image_size=1.5", ["data.image_size", "1.5", "a whole number"]),
        ("seed=null", ["seed", "None", "a whole number"]),
        ("data=3", ["data", "3", "data.name"]),
        ("data.root=[1]", ["data.root", "text or null"]),
        ("data.download=maybe", ["data.download", "true or false"]),
        ("trainer.max_epochs=0", ["trainer.max_epochs", "0", "at least 1"]),
        ("leaked.init_range=0", ["leaked.init_range", "more than 0"]),
        ("leaked.activation=sigmod", ["leaked.activation", "Did you mean sigmoid?", "tanh"]),
        ("generator.name=hybird", ["generator.name", "'hybird'", "Did you mean hybrid?", "mlp, coarse, hybrid"]),
        ("generator.name=[hybrid]", ["generator.name", "['hybrid']", "mlp, coarse, hybrid"]),
        ("generator.hidden_size=3", ["generator.hidden_size", "hybrid", "channels"]),
        ("channel=3", ["channel", "expected a list", "gaussian_noise"]),
        ("channel=[{name: gauss}]", ["'gauss'", "gaussian_noise, pruning"]),
        ("channel=[noise]", ["channel[0]", "'noise'", "{name: gaussian_noise"]),
        ("channel=[{name: pruning, fractoin: 1}]", ["channel[0].fractoin", "Did you mean channel[0].fraction?"]),
        ("channel=[{name: pruning, fraction: 2}]", ["channel[0].fraction", "at most 1"]),
        ("channel=[{name: pruning, fraction: x}]", ["channel[0].fraction", "'x'", "a number"]),
        ("channel=[{name: pruning, fraction: '${none}'}]", ["Interpolation key 'none' not found"]),
        ("seed=${none}", ["Interpolation key 'none' not found"]),
        ("seed", ["'seed'", "key.path=value"]),
        ("--quiet=1", ["'--quiet=1'", "key.path=value"]),
    ],
)
def test_a_bad_override_is_named_with_what_is_allowed(config_file, override, words):
    with pytest.raises(ConfigError) as error:
        load_config(config_file("generator: {name: hybrid}"), [override])
    for word in words:
        assert word in str(error.value)


def test_a_bad_value_in_a_file_names_the_file(config_file):
    path = config_file("trainer: {max_epochs: many}")
    with pytest.raises(ConfigError, match=r"experiment\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "gradients.updates.epoch=2",
            r"gradients.updates.epoch: no such setting.*Did you mean gradients.updates.epochs",
        ),
        ("gradients.updates.batch_size=0", r"gradients.updates.batch_size: 0 .* at least 1"),
        ("gradients.updates.learning_rate=0", r"gradients.updates.learning_rate: 0.0 .* more than 0"),
        ("gradients.updates=2", r"gradients.updates: 2 .*expected settings below it"),
        ("leaked.batch_norm=train", r"leaked.batch_norm: 'train' .* Allowed: running, batch"),
        ("leaked.activation=own", r"leaked.activation: 'own' .* Allowed: sigmoid"),
    ],
)
def test_mistakes_about_what_leaks_are_named(config_file, override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(config_file("seed: 0"), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=runs/a: b", r"output_dir: {'runs/a': 'b'} \(on the command line\) is not text or null"),
        ("trainer.max_epochs={a: 1}", r"trainer\.max_epochs: {'a': 1} \(on the command line\) is not a whole number"),
        ("data.public_classes={a: 1}", r"data\.public_classes: {'a': 1} .* is not a list or null"),
    ],
)
def test_settings_below_one_that_has_none_are_named_with_it(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file("trainer: {max_epochs: 3}"), [override])
