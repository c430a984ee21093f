"""Lets `DiffusionPipeline.from_pretrained` find this checkpoint's pipeline, which is installed with the project."""

from pipeline_flux_dino_tile import FluxDinoTilePipeline


__all__ = ["FluxDinoTilePipeline"]
