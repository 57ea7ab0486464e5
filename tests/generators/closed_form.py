"""Closed-form fits without a trainer."""


def add(fit, pair):
    fit.update(pair.gradients, pair.images, pair.indices[:, 0] // pair.images.shape[1])


def run_fits(generator, pairs):
    """What `GITModule` does before training, on one device."""
    for fit in generator.fits():
        for pair in pairs:
            add(fit, pair)
        assert fit.sums()
        fit.finish()
    generator.fitted.fill_(True)
    return generator
