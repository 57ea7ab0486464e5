"""Generators: modules from gradients to images, built from an architecture alone."""

from gitlight.config import CoarseGeneratorConfig, ExactGeneratorConfig, HybridGeneratorConfig, MLPGeneratorConfig
from gitlight.registry import Registry

GENERATORS = Registry("generator", "generator")
GENERATORS.register("mlp", "gitlight.generators.mlp:MLPGenerator", MLPGeneratorConfig)
GENERATORS.register("coarse", "gitlight.generators.coarse:CoarseGenerator", CoarseGeneratorConfig)
GENERATORS.register("hybrid", "gitlight.generators.hybrid:HybridGenerator", HybridGeneratorConfig)
GENERATORS.register("exact", "gitlight.generators.exact.generator:ExactGenerator", ExactGeneratorConfig)
