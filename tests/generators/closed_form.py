"""Closed-form fits without a trainer."""


def run_fits(generator, pairs):
    """What `GITModule` does before training, on one device."""
    for fit in generator.fits():
        for pair in pairs:
            fit.update(pair)
        assert fit.sums()
        fit.finish()
    generator.fitted.fill_(True)
    return generator
