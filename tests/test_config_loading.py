from pathlib import Path

import pytest

from gitlight.config import MLPGeneratorConfig
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


CONFIG_FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps")


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_of_the_repository_is_valid(path):
    assert load_config(path).output_dir == f"runs/{path.stem}"


def test_no_two_configs_of_the_repository_share_a_run_folder():
    assert len({path.stem for path in CONFIG_FILES}) == len(CONFIG_FILES)


def test_overrides_win_over_the_file_and_the_file_over_its_base(config_file):
    config_file("seed: 1\ntrainer: {max_epochs: 1, log_every_n_steps: 7}", "base.yaml")
    path = config_file("base: base.yaml\nseed: 2\ntrainer: {max_epochs: 2}")
    config = load_config(path, ["trainer.max_epochs=3"])
    assert (config.seed, config.trainer.max_epochs, config.trainer.log_every_n_steps) == (2, 3, 7)


def test_naming_another_component_drops_only_what_it_does_not_have(config_file):
    path = config_file("generator: {name: hybrid, blocks: 9, parameters: 5000}")
    generator = load_config(path, ["generator.name=mlp"]).generator
    assert isinstance(generator, MLPGeneratorConfig)
    assert generator.parameters == 5000


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
