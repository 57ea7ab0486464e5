from pathlib import Path

import pytest

from gitlight.config import CoarseGeneratorConfig, HybridGeneratorConfig, MLPGeneratorConfig, PruningConfig
from gitlight.config_loading import load_config, save_config
from gitlight.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="experiment.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_repository_is_valid(path):
    assert load_config(path).output_dir == f"runs/{path.stem}"


def test_overrides_win_over_the_file_and_the_file_over_its_base(config_file):
    config_file("seed: 1\ntrainer: {max_epochs: 1, log_every_n_steps: 7}", "base.yaml")
    path = config_file("base: base.yaml\nseed: 2\ntrainer: {max_epochs: 2}")
    config = load_config(path, ["trainer.max_epochs=3"])
    assert (config.seed, config.trainer.max_epochs, config.trainer.log_every_n_steps) == (2, 3, 7)


def test_the_name_of_a_component_chooses_its_settings(config_file):
    assert isinstance(load_config(config_file("generator: {name: mlp}")).generator, MLPGeneratorConfig)
    assert isinstance(load_config(config_file("generator: {name: coarse}")).generator, CoarseGeneratorConfig)
    assert isinstance(load_config(config_file("seed: 0")).generator, HybridGeneratorConfig)


def test_naming_another_component_drops_only_what_it_does_not_have(config_file):
    path = config_file("generator: {name: hybrid, blocks: 9, parameters: 5000}")
    generator = load_config(path, ["generator.name=mlp"]).generator
    assert isinstance(generator, MLPGeneratorConfig)
    assert generator.parameters == 5000


def test_channel_stages_have_their_own_settings(config_file):
    path = config_file("channel: [{name: pruning, fraction: 0.5}]")
    assert load_config(path).channel == [PruningConfig(fraction=0.5)]


def test_the_word_off_is_a_word(config_file):
    assert load_config(config_file("logging: {wandb: off}")).logging.wandb == "off"
    assert load_config(config_file("seed: 0"), ["logging.wandb=off"]).logging.wandb == "off"


def test_a_saved_config_loads_as_it_was(config_file, tmp_path):
    config = load_config(
        config_file("channel: [{name: pruning}]\nleaked: {name: mlp}"),
        ["data.public_classes=[cat,dog]", "seed=3", "logging.wandb=off"],
    )
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_a_run_folder_is_its_own_output_folder_wherever_it_was_moved(config_file, tmp_path):
    config = load_config(config_file("output_dir: runs/x"))
    (tmp_path / "x.1").mkdir()
    save_config(config, tmp_path / "x.1" / "config.yaml")
    assert load_config(tmp_path / "x.1").output_dir == str(tmp_path / "x.1")
    assert load_config(tmp_path / "x.1", ["output_dir=y"]).output_dir == "y"
    assert load_config(tmp_path / "x.1" / "config.yaml").output_dir == "runs/x"


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


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "just words"])
def test_a_file_that_is_not_settings_is_named(config_file, text):
    with pytest.raises(ConfigError, match=r"experiment\.yaml"):
        load_config(config_file(text))


def test_a_missing_file_suggests_its_neighbour(config_file, tmp_path):
    config_file("seed: 0", "lenet_hybrid.yaml")
    with pytest.raises(ConfigError, match=r"Did you mean .*lenet_hybrid\.yaml"):
        load_config(tmp_path / "lenet_hybird.yaml")


def test_bases_that_name_each_other_are_an_error(config_file):
    config_file("base: b.yaml", "a.yaml")
    path = config_file("base: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match="its own base"):
        load_config(path)


def test_arguments_of_a_custom_model_are_free_and_survive_saving(config_file, tmp_path):
    path = config_file(
        "leaked: {name: custom, target: 'nets:Net', arguments: {depth: 3, sizes: [1, 2], nested: {a: 1}}}"
    )
    config = load_config(path, ["leaked.arguments.nested.b=off", "leaked.arguments.depth=null"])
    assert config.leaked.arguments == {"depth": None, "sizes": [1, 2], "nested": {"a": 1, "b": False}}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").leaked == config.leaked
    assert not hasattr(load_config(path, ["leaked.name=lenet"]).leaked, "arguments")
    with pytest.raises(ConfigError, match=r"leaked.arguments: 3 .* is not a mapping"):
        load_config(path, ["leaked.arguments=3"])


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
