"""Settings that make any run small and quiet."""

SMALL = [
    "data.name=photos",
    "data.n_public_images=96",
    "data.n_validation=16",
    "data.batch_size=16",
    "leaked.width=4",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "logging.quiet=true",
    "logging.wandb=off",
]
