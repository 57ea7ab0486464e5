"""Closed-form fits without a trainer."""

from gitlight.generators.base import FitOn


def add(fit, pair):
    fit.update(pair.gradients, pair.images, pair.indices[:, 0] // pair.images.shape[1])


def run_fits(generator, pairs, single_images=()):
    """What `GITModule` does before training, on one device; ``single_images`` are pairs of one image each."""
    for fit in generator.fits():
        single = isinstance(fit, FitOn) and fit.pairs.single_images
        assert single_images or not single
        for pair in single_images if single else pairs:
            add(fit, pair)
        assert fit.sums()
        fit.finish()
    generator.fitted.fill_(True)
    return generator
