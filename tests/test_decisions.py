import pytest

from gitlight.config import Config, GaussianNoiseConfig, HybridGeneratorConfig, PruningConfig
from gitlight.decisions import with_decisions, with_decisions_of

NOISE = GaussianNoiseConfig(relative_std=0.01)


@pytest.mark.parametrize(
    ("channel", "epochs", "n_images", "given", "alone"),
    [
        ([], 1, 1, None, True),
        ([NOISE], 1, 1, None, False),
        ([NOISE], 1, 1, True, True),
        ([], 3, 1, None, False),
        ([], 1, 4, None, True),
    ],
)
def test_the_closed_form_is_left_alone_where_its_equations_hold(channel, epochs, n_images, given, alone):
    config = Config(channel=channel, generator=HybridGeneratorConfig(closed_form_alone=given))
    config.gradients.updates.epochs, config.data.client_batch_size = epochs, n_images
    trained = with_decisions(config)
    assert trained.generator.closed_form_alone is alone
    assert with_decisions_of(Config(generator=HybridGeneratorConfig()), trained).generator.closed_form_alone is alone


@pytest.mark.parametrize(
    ("channel", "given", "decided"),
    [
        ([], None, False),
        ([NOISE], None, True),
        ([PruningConfig()], None, True),
        ([NOISE, PruningConfig()], None, True),
        ([NOISE], False, False),
        ([], True, True),
        ([GaussianNoiseConfig(relative_std=0.1, lowest_std=1e-3)], None, True),
    ],
)
def test_hybrid_averages_all_layers_where_a_channel_changes_the_leaks(channel, given, decided):
    config = Config(channel=channel, generator=HybridGeneratorConfig(averages_of_inverted_layers=given))
    trained = with_decisions(config)
    assert trained.generator.averages_of_inverted_layers is decided
    attacked = Config(generator=HybridGeneratorConfig())
    assert with_decisions_of(attacked, trained).generator.averages_of_inverted_layers is decided
